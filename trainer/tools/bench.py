"""`launch/bench.py`: what an optimizer step costs beside other programs, and what each method holds and writes.

`steps` runs programs in alternation, each in a process of its own. They share model, token ids, batch, precision,
optimizer numbers and clip, so what differs is the program. `memory` trains a few steps with each method, through the
program's own engine and loop; its rows count upwards with some noise, so a loss says whether a method learns, not how
good it is. Weights are random unless a folder has real ones.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, GPT2Config

from trainer.config import cli
from trainer.config.choices import DEMO_MODEL, LORA_LR_FACTOR
from trainer.config.errors import UserError
from trainer.config.files import folder_size
from trainer.config.settings import Settings
from trainer.config.text import markdown_table
from trainer.data.dataset import PreparedDataset, TokenDataset
from trainer.distributed.machine import peak_memory_bytes
from trainer.distributed.process_group import DistContext
from trainer.model import attention, lora, loss
from trainer.model.build import build_model, load_config
from trainer.tools.trial_engine import run_job, start_trial
from trainer.tracking.records import EvalRecord, StepRecord
from trainer.training.checkpoint import CheckpointManager
from trainer.training.loop import train
from trainer.training.run_plan import cpu_name, package_versions, validate_early
from trainer.training.schedule import TrainState

LENGTH_SPREAD = 0.6  # of the logarithm of a ragged row's length, about that of E2E and ACLED records
MEAN_LENGTH_SHARE = 0.3  # of ragged rows, of the longest
STEPS_HEADINGS = ("mode", "program", "ms/step", "tokens/s", "speed", "peak GiB")
EXPLANATION = (
    "program: in brackets how its steps really ran; ms/step: median of the rounds; speed: over the first line of the "
    "same mode, median (least-most) of the rounds, so that a line without X at 0.80 says that X makes steps 1.25 times "
    "as fast; peak GiB: in use at most."
)
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 512, "n_positions": 128},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
FULL_LR = 3e-4  # of full training; adapters learn at ten times that, as the program has it
NUM_VAL_ROWS = 4
MAX_TOKEN_ID = 256  # the ids that rows count through
MEMORY_HEADINGS = (
    *("method", "trainable", "optimizer MiB", "peak MiB", "checkpoint MiB", "tokens/s", "validation loss"),
)


def measure_steps(args: argparse.Namespace) -> int:
    """Measure every program `args.rounds` times in turn and print the table; 1 where one failed."""
    if "packing" in args.without and args.against:
        raise UserError("--without packing: compares rows of many lengths, which other programs lack; omit --against")
    on_gpu = torch.cuda.is_available()
    shared = {name: getattr(args, name) for name in ("model", "block_size", "global_batch", "steps")}
    shared |= {"precision": args.precision or ("bf16" if on_gpu else "fp32"), "warmup_steps": 10 if on_gpu else 3}
    shared |= {"is_ragged": "packing" in args.without}  # rows of many lengths, packed unless `without` is packing
    programs = [("ours", ""), *(("ours", path) for path in args.without), *((peer, "") for peer in args.against)]
    rows = [
        {"mode": mode, "program": program, "without": path, "results": [], "problem": ""}
        for mode in args.modes
        for program, path in programs
    ]
    for number in range(1, args.rounds + 1):
        for row in rows:
            if row["problem"]:  # it is not tried again
                continue
            answers, _, reason = run_job(measure_program, {**shared, **row}, 1)
            _refuse_flag(reason)
            row["results"] += answers
            row["problem"] = "" if answers else f"failed: {reason}"
            outcome = row["problem"] or f"{1000 * answers[0]['step_seconds']:.1f} ms/step"
            print(f"round {number}/{args.rounds}  {row['mode']} {_name(row)}: {outcome}", flush=True)
    print(f"\n{format_steps(rows)}\n\n{EXPLANATION}")
    if results := [result for row in rows for result in row["results"]]:
        packages = ", ".join(f"{name} {number}" for name, number in results[0]["versions"].items() if number)
        print("{model}, {global_batch} rows of {block_size} tokens, {precision}, ".format(**shared), end="")
        print("{hardware}, {threads} threads".format(**results[0]), end="")
        print(f"; {packages}; {args.rounds} rounds of {args.steps} steps after {shared['warmup_steps']}")
    return int(any(row["problem"] for row in rows))


def _refuse_flag(reason: str) -> None:
    """UserError where a process failed by a flag that all rows share: each would say the same."""
    problem = reason.partition("UserError: ")[2]
    if problem.startswith(("--model ", "--block-size ")):
        raise UserError(problem)


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['program']} without {row['without']}" if row["without"] else row["program"]


def format_steps(rows: Sequence[Mapping[str, Any]]) -> str:
    cells, baselines = [], dict[str, list[float]]()
    for row in rows:
        results = row["results"]
        seconds = [result["step_seconds"] for result in results]
        baseline = baselines.setdefault(row["mode"], seconds)
        if row["problem"] or not seconds:
            cells.append([row["mode"], _name(row), row["problem"], "", "", ""])
            continue
        step_seconds, last = statistics.median(seconds), results[-1]
        ratios = [base / own for base, own in zip(baseline, seconds, strict=False)]
        speed = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else ""
        cells.append([row["mode"], _name(row) + (f" ({last['ran_by']})" if last["ran_by"] else "")])
        cells[-1] += [f"{1000 * step_seconds:.1f}", f"{last['tokens'] / step_seconds:,.0f}", speed]
        cells[-1] += [f"{max(result['peak_memory_bytes'] for result in results) / 2**30:.2f}"]
    return markdown_table(STEPS_HEADINGS, cells)


def measure_memory(args: argparse.Namespace, flags_of_methods: Mapping[str, str]) -> int:
    """Measure every method and print the table; 1 where one failed."""
    rows: list[list[str]] = []
    results: list[dict[str, Any]] = []
    for method in args.methods:
        answers, _, reason = run_job(measure_method, {**vars(args), "flags": flags_of_methods[method]}, 1)
        _refuse_flag(reason)
        results += answers
        cells = format_cells(answers[0]) if answers else ["-"] * (len(MEMORY_HEADINGS) - 2) + [f"failed: {reason}"]
        rows.append([method, *cells])
        print(*rows[-1], file=sys.stderr, flush=True)
    print(markdown_table(MEMORY_HEADINGS, rows))
    if results:
        model = args.model or f"{args.shape}'s shape with random weights"
        workload = f"{args.steps} steps of {args.micro_batch} rows of {args.block_size} tokens"
        print("\n{}, {}, {precision}, on {hardware} with torch {torch}".format(model, workload, **results[-1]))
    return int(len(results) < len(rows))


def format_cells(result: Mapping[str, Any]) -> list[str]:
    sizes = [f"{result[name] / 2**20:,.1f}" for name in ("optimizer_bytes", "peak_bytes", "checkpoint_bytes")]
    return [f"{result['trainable']:,}", *sizes, f"{result['tokens_per_second']:,.0f}", f"{result['loss']:.4f}"]


# --- in a process of its own ---


def measure_program(job: dict[str, Any], dist_context: DistContext) -> Iterator[dict[str, Any]]:
    """The mean time of a step of the job's program, in seconds."""
    device, settings = dist_context.device, cli.parse_args(_to_argv(job)).settings
    validate_early(settings, dist_context)
    vocab_size = load_config(settings.model).get_text_config().vocab_size
    rng, num_rows = np.random.default_rng(0), (job["warmup_steps"] + job["steps"]) * job["global_batch"]
    lengths = np.full(num_rows, job["block_size"])
    if job["is_ragged"]:
        mean = np.log(MEAN_LENGTH_SHARE * job["block_size"]) - LENGTH_SPREAD**2 / 2
        lengths = np.clip(rng.lognormal(mean, LENGTH_SPREAD, num_rows), 4, job["block_size"]).astype(np.int64)
    rows = [rng.integers(0, vocab_size, length) for length in lengths]  # random: nothing has to be fetched
    data = wrap_rows(rows, rows[: job["global_batch"]], vocab_size=vocab_size, is_ragged=job["is_ragged"])
    times: list[float] = []  # at the end of each step; the device is idle at the first and the last that count

    def after_step() -> None:
        if device.type == "cuda" and len(times) + 1 in (job["warmup_steps"], job["warmup_steps"] + job["steps"]):
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    ran_by = ""
    if job["program"] == "ours":
        if job["without"] == "chunked-loss":  # what no flag turns off
            loss.has_linear_head = lambda causal: False
        elif job["without"] == "cpu-attention":
            attention.install_on_cpu = lambda module, causal: None
        plan, engine = start_trial(settings, data, dist_context)
        nothing_saved: Any = SimpleNamespace(save=lambda *_: None)
        state = TrainState(eval_pending=False)  # nothing is evaluated before the first step
        for record in train(engine, data, plan.schedule, state, nothing_saved, lambda: False):
            if isinstance(record, StepRecord):
                after_step()
        ran_by = "; ".join([engine.plan.path, *(change["reason"] for change in engine.plan_changes)])
    else:  # the model as transformers and peft make it
        torch.manual_seed(settings.train.seed)
        config = load_config(settings.model)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        if settings.mode == "lora":
            model = lora.add_adapters(model, settings.lora, lora.resolve_target_modules(model, settings.lora))
        run_peer = _run_plain if job["program"] == "plain" else _run_hf_trainer
        run_peer(settings, data, model, device, after_step)
    yield {
        "ran_by": ran_by,
        "step_seconds": (times[-1] - times[job["warmup_steps"] - 1]) / job["steps"],
        "hardware": describe_hardware(device),
        "threads": dist_context.num_threads,
        "versions": package_versions(),
        "tokens": job["global_batch"] * float(lengths.mean()),
    }


def _to_argv(job: Mapping[str, Any]) -> list[str]:
    flags = f"--mode {job['mode']} --preset card --model {job['model']} --block-size {job['block_size']}"
    flags += f" --global-batch {job['global_batch']} --eval-batch {job['global_batch']} --ds-config zero0"
    flags += f" --max-steps {job['warmup_steps'] + job['steps']} --precision {job['precision']}"
    flags += f" --eval-every never --save-every never --execution {'eager' if job['without'] == 'graphs' else 'auto'}"
    is_only_shape = job["model"] == "gpt2" or not list(Path(job["model"]).glob("*.safetensors"))
    flags += " --init random" if is_only_shape and job["model"] != DEMO_MODEL else ""
    flags += " --objective completion" if job["is_ragged"] else ""
    flags += " --packing" if job["is_ragged"] and job["without"] != "packing" else ""
    return flags.split()


def wrap_rows(
    train: Sequence[NDArray[np.int64]], val: Sequence[NDArray[np.int64]], *, vocab_size: int, is_ragged: bool = False
) -> PreparedDataset:
    """Rows of token ids as a run takes them; all tokens of a row but the first count in the loss."""
    train_rows, val_rows = (
        TokenDataset(ids=np.concatenate(rows).astype(np.uint32), offsets=np.cumsum([0, *map(len, rows)]))
        for rows in (train, val)
    )
    objective = "completion" if is_ragged else "blocks"
    metadata: dict[str, Any] = {"vocabulary": vocab_size, "objective": objective, "fingerprint": "made"}
    metadata |= {"notices": [], "train": {}, "val": {}}
    return PreparedDataset(train=train_rows, val=val_rows, metadata=metadata, val_texts=(), folder=Path())


def _run_plain(
    settings: Settings, data: PreparedDataset, model: Any, device: torch.device, after_step: Callable[[], None]
) -> None:
    """What one writes by hand: the model's own loss on full logits, clip_grad_norm_, torch's fused AdamW."""
    module, batch_size = model.to(device).train(), settings.train.global_batch
    params = [p for p in module.parameters() if p.requires_grad]
    adamw = {"lr": settings.train.lr, "eps": settings.train.epsilon, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(params, **adamw, fused=True)
    for start in range(0, len(data.train), batch_size):
        rows = [data.train.row(i) for i in range(start, start + batch_size)]
        ids = torch.from_numpy(np.stack(rows)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.engine.precision == "bf16"):
            batch_loss = module(input_ids=ids, labels=ids, use_cache=False).loss
        batch_loss.backward()
        torch.nn.utils.clip_grad_norm_(params, settings.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        after_step()


def _run_hf_trainer(
    settings: Settings, data: PreparedDataset, model: Any, device: torch.device, after_step: Callable[[], None]
) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class AfterStep(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            after_step()

    with tempfile.TemporaryDirectory() as scratch:
        training_args = TrainingArguments(
            output_dir=scratch,
            max_steps=len(data.train) // settings.train.global_batch,
            per_device_train_batch_size=settings.train.global_batch,
            learning_rate=settings.train.lr,
            lr_scheduler_type="linear",
            max_grad_norm=settings.train.max_grad_norm,
            weight_decay=0.0,
            bf16=settings.engine.precision == "bf16",
            use_cpu=device.type == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows = [{"input_ids": ids, "labels": ids} for ids in map(data.train.row, range(len(data.train)))]
        Trainer(model=model, args=training_args, callbacks=[AfterStep()], train_dataset=rows).train()


def measure_method(job: dict[str, Any], dist_context: DistContext) -> Iterator[dict[str, Any]]:
    """What a method trains, holds, writes and reaches. Bytes; the peak on a CPU is above the start."""
    with tempfile.TemporaryDirectory() as folder:
        scratch, device = Path(folder), dist_context.device
        lr = FULL_LR * (LORA_LR_FACTOR if "--mode lora" in job["flags"] else 1)
        flags = f"{job['flags']} --preset card --ds-config zero0 --lr {lr} --max-steps {job['steps']}"
        flags += f" --global-batch {job['micro_batch']} --eval-batch {job['micro_batch']} --eval-every never"
        flags += f" --save-every never --block-size {job['block_size']}"
        flags += f" --precision {job['precision']}" if job["precision"] else ""
        model = job["model"]
        if not model:  # a folder with nothing but the configuration
            flags += " --init random"
            model = str(scratch / job["shape"])
            GPT2Config(**SHAPES[job["shape"]], architectures=["GPT2LMHeadModel"]).save_pretrained(model)
        settings = cli.parse_args([*flags.split(), "--model", model, "--output-dir", f"{scratch}/run"]).settings
        validate_early(settings, dist_context)
        # Every method imports what adapters need, so that no peak counts it.
        build_model(cli.parse_args(["--mode", "lora", "--model", "demo-base"]).settings, on_meta=True)
        baseline_bytes = 0 if device.type == "cuda" else peak_memory_bytes(device)
        rng, vocab_size = np.random.default_rng(0), load_config(settings.model).vocab_size
        num_rows, rows = job["micro_batch"] * job["steps"], []
        for _ in range(num_rows + NUM_VAL_ROWS):  # from a random start, two at a time now and then
            strides = 1 + (rng.random(job["block_size"]) < 0.2)
            rows.append((rng.integers(vocab_size) + strides.cumsum()) % min(vocab_size, MAX_TOKEN_ID))
        data = wrap_rows(rows[:num_rows], rows[num_rows:], vocab_size=vocab_size)
        plan, engine = start_trial(settings, data, dist_context)
        checkpoints = CheckpointManager(
            scratch / "checkpoints", dist_context, save_total_limit=1, identity=plan.checkpoint_identity("bench")
        )
        records = list(train(engine, data, plan.schedule, TrainState(), checkpoints, lambda: False))
        speeds = [record.tokens_per_second for record in records if isinstance(record, StepRecord)]
        losses = [record.loss for record in records if isinstance(record, EvalRecord)]
        yield {
            "trainable": plan.model_info["trainable"],
            "optimizer_bytes": engine.state.optimizer_bytes(),
            "peak_bytes": peak_memory_bytes(device) - baseline_bytes,
            "checkpoint_bytes": folder_size(scratch / "checkpoints"),
            "tokens_per_second": statistics.median(speeds[1:] or speeds),
            "loss": losses[-1],
            "loss_before": losses[0],
            "precision": plan.precision,
            "hardware": f"{describe_hardware(device)}, {dist_context.num_threads} threads",
            "torch": torch.__version__,
        }


def describe_hardware(device: torch.device) -> str:
    """The name of the GPU, or of the processor with the cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores"
