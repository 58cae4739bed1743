"""`launch/bench.py`: what an optimizer step costs beside other programs, and what each method holds and writes.

Each program or method trains a few steps on random token ids, in a process of its own. `steps` runs programs in
alternation: they share model, token ids, batch, precision, optimizer numbers and clip, so what differs is the program.
Weights are random unless a folder has real ones.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from trainer.config import cli
from trainer.config.choices import DEMO_MODEL
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
from trainer.tracking.records import StepRecord
from trainer.training.checkpoint import CheckpointManager
from trainer.training.loop import train
from trainer.training.run_plan import cpu_name, package_versions, validate_early
from trainer.training.schedule import TrainState

LENGTH_SPREAD = 0.6  # of the logarithm of a ragged row's length, about that of E2E and ACLED records
MEAN_LENGTH_SHARE = 0.3  # of ragged rows, of the longest
STEPS_HEADINGS = ("mode", "program", "ms/step", "tokens/s", "speed", "peak GiB")
MEMORY_HEADINGS = ("method", "trainable", "optimizer MiB", "peak above the start MiB", "checkpoint MiB", "tokens/s")
EXPLANATION = (
    "program: in brackets how its steps really ran; ms/step: median of the rounds; speed: over the first line of the "
    "same mode, median (least-most) of the rounds, so that a line without X at 0.80 says that X makes steps 1.25 times "
    "as fast; peak GiB: in use at most."
)


def measure_steps(args: argparse.Namespace) -> int:
    """Measure every program `args.rounds` times in turn and print the table; 1 where one failed."""
    if "packing" in args.without and args.against:
        raise UserError("--without packing: compares rows of many lengths, which other programs lack; omit --against")
    programs = [("ours", ""), *(("ours", path) for path in args.without), *((peer, "") for peer in args.against)]
    rows = [
        {"mode": mode, "flags": f"--mode {mode}", "program": program, "without": path}
        for mode in args.modes
        for program, path in programs
    ]
    # Rows of many lengths, packed unless `without` is packing.
    measure_rows(rows, args, num_rounds=args.rounds, is_ragged="packing" in args.without)
    cells, baselines = [], dict[str, list[float]]()
    for row in rows:
        seconds = [result["step_seconds"] for result in row["results"]]
        baseline = baselines.setdefault(row["mode"], seconds)
        cells.append([row["mode"], row["name"], row["problem"], "", "", ""])
        if not row["problem"]:
            step_seconds, last = statistics.median(seconds), row["results"][-1]
            ratios = [base / own for base, own in zip(baseline, seconds, strict=False)]
            cells[-1][1:] = [f"{row['name']} ({last['ran_by']})" if last["ran_by"] else row["name"]]
            cells[-1] += [f"{1000 * step_seconds:.1f}", f"{last['tokens'] / step_seconds:,.0f}"]
            cells[-1] += [f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else ""]
            cells[-1] += [f"{max(result['peak_memory_bytes'] for result in row['results']) / 2**30:.2f}"]
    print(f"\n{markdown_table(STEPS_HEADINGS, cells)}\n\n{EXPLANATION}")
    return _print_workload(rows, args)


def measure_memory(args: argparse.Namespace, flags_of_methods: Mapping[str, str]) -> int:
    """Measure every method and print the table; 1 where one failed."""
    rows = [{"flags": flags_of_methods[name], "program": name, "without": ""} for name in args.methods]
    measure_rows(rows, args, saves=True)
    cells = []
    for row in rows:
        cells.append([row["program"], row["problem"], "", "", "", ""])
        for result in row["results"]:
            sizes = [result[name] / 2**20 for name in ("optimizer_bytes", "grown_bytes", "checkpoint_bytes")]
            speed = f"{result['tokens'] / result['step_seconds']:,.0f}"
            cells[-1][1:] = [f"{result['trainable']:,}", *(f"{size:,.1f}" for size in sizes), speed]
    print(f"\n{markdown_table(MEMORY_HEADINGS, cells)}\n")
    return _print_workload(rows, args)


def measure_rows(rows: Sequence[dict[str, Any]], args: argparse.Namespace, *, num_rounds: int = 1, **job: Any) -> None:
    """Put `name`, `results` and `problem` into every row; one that failed is not tried again."""
    on_gpu = torch.cuda.is_available()
    args.precision, args.warmup_steps = args.precision or ("bf16" if on_gpu else "fp32"), 10 if on_gpu else 3
    for number in range(1, num_rounds + 1):
        for row in rows:
            row.setdefault("name", row["program"] + (f" without {row['without']}" if row["without"] else ""))
            results = row.setdefault("results", [])
            if row.setdefault("problem", ""):
                continue
            answers, _, reason = run_job(measure_row, {**vars(args), **row, **job}, 1)
            flag_problem = reason.partition("UserError: ")[2]
            if flag_problem.startswith(("--model ", "--block-size ")):  # every row would say the same
                raise UserError(flag_problem)
            results += answers
            row["problem"] = "" if answers else f"failed: {reason}"
            outcome = row["problem"] or f"{1000 * answers[0]['step_seconds']:.1f} ms/step"
            print(f"round {number}/{num_rounds}  {row.get('mode', '')} {row['name']}: {outcome}", flush=True)


def _print_workload(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> int:
    if results := [result for row in rows for result in row["results"]]:
        packages = ", ".join(f"{name} {number}" for name, number in results[0]["versions"].items() if number)
        workload = f"{args.model}, {args.global_batch} rows of {args.block_size} tokens, {args.precision}"
        rounds = f"{args.steps} steps after {args.warmup_steps}, {getattr(args, 'rounds', 1)} times"
        print("{}, {hardware}, {threads} threads; {}; {}".format(workload, packages, rounds, **results[0]))
    return int(any(row["problem"] for row in rows))


# --- in a process of its own ---


def measure_row(job: dict[str, Any], dist_context: DistContext) -> Iterator[dict[str, Any]]:
    """The mean time of a step of the job's program, in seconds, and what it holds and writes, in bytes."""
    device, settings = dist_context.device, cli.parse_args(_to_argv(job)).settings
    validate_early(settings, dist_context)
    # Every method imports what adapters need, so that no peak counts it.
    build_model(cli.parse_args(["--mode", "lora", "--model", DEMO_MODEL]).settings, on_meta=True)
    bytes_before = 0 if device.type == "cuda" else peak_memory_bytes(device)
    data = make_data(job, load_config(settings.model).get_text_config().vocab_size)
    times: list[float] = []  # at the end of each step; the device is idle at the first and the last that count

    def after_step() -> None:
        if device.type == "cuda" and len(times) + 1 in (job["warmup_steps"], job["warmup_steps"] + job["steps"]):
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    result: dict[str, Any] = {"ran_by": ""}
    if peer := {"plain": _run_plain, "hf": _run_hf_trainer}.get(job["program"]):
        torch.manual_seed(settings.train.seed)
        config = load_config(settings.model)  # the model as transformers and peft make it
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        if settings.mode == "lora":
            model = lora.add_adapters(model, settings.lora, lora.resolve_target_modules(model, settings.lora))
        peer(settings, data, model, device, after_step)
    else:
        if job["without"] == "chunked-loss":  # what no flag turns off
            loss.has_linear_head = lambda causal: False
        elif job["without"] == "cpu-attention":
            attention.install_on_cpu = lambda module, causal: None
        plan, engine = start_trial(settings, data, dist_context)
        state = TrainState(eval_pending=False)  # nothing is evaluated before the first step
        with tempfile.TemporaryDirectory() as folder:
            checkpoints: Any = SimpleNamespace(save=lambda *_: None)
            if job.get("saves"):
                identity = plan.checkpoint_identity()
                checkpoints = CheckpointManager(Path(folder), dist_context, save_total_limit=1, identity=identity)
            for record in train(engine, data, plan.schedule, state, checkpoints, lambda: False):
                if isinstance(record, StepRecord):
                    after_step()
            result["checkpoint_bytes"] = folder_size(Path(folder))
        result["ran_by"] = "; ".join([engine.plan.path, *(change["reason"] for change in engine.plan_changes)])
        result |= {"trainable": plan.model_info["trainable"], "optimizer_bytes": engine.state.optimizer_bytes()}
    cpu = f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores"
    yield result | {
        "step_seconds": (times[-1] - times[job["warmup_steps"] - 1]) / job["steps"],
        "grown_bytes": peak_memory_bytes(device) - bytes_before,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": dist_context.num_threads,
        "versions": package_versions(),
        "tokens": job["global_batch"] * float(data.train.lengths().mean()),
    }


def _to_argv(job: Mapping[str, Any]) -> list[str]:
    flags = f"{job['flags']} --preset card --model {job['model']} --block-size {job['block_size']}"
    flags += f" --global-batch {job['global_batch']} --eval-batch {job['global_batch']} --ds-config zero0"
    flags += f" --max-steps {job['warmup_steps'] + job['steps']} --precision {job['precision']}"
    flags += f" --eval-every never --save-every never --execution {'eager' if job['without'] == 'graphs' else 'auto'}"
    is_only_shape = job["model"] == "gpt2" or not list(Path(job["model"]).glob("*.safetensors"))
    flags += " --init random" if is_only_shape and job["model"] != DEMO_MODEL else ""
    flags += " --objective completion" if job.get("is_ragged") else ""
    flags += " --packing" if job.get("is_ragged") and job["without"] != "packing" else ""
    return flags.split()


def make_data(job: Mapping[str, Any], vocab_size: int) -> PreparedDataset:
    """Random rows as a run takes them, for which nothing is fetched; all tokens but the first count in the loss."""
    rng, num_rows = np.random.default_rng(0), (job["warmup_steps"] + job["steps"]) * job["global_batch"]
    lengths = np.full(num_rows, job["block_size"])
    if job.get("is_ragged"):
        mean = np.log(MEAN_LENGTH_SHARE * job["block_size"]) - LENGTH_SPREAD**2 / 2
        lengths = np.clip(rng.lognormal(mean, LENGTH_SPREAD, num_rows), 4, job["block_size"]).astype(np.int64)
    offsets = np.cumsum([0, *lengths])
    rows = TokenDataset(ids=rng.integers(0, vocab_size, offsets[-1]).astype(np.uint32), offsets=offsets)
    val_offsets = offsets[: job["global_batch"] + 1]
    val_rows = TokenDataset(ids=rows.ids[: val_offsets[-1]], offsets=val_offsets)
    objective = "completion" if job.get("is_ragged") else "blocks"
    metadata: dict[str, Any] = {"vocabulary": vocab_size, "objective": objective, "fingerprint": "made"}
    metadata |= {"notices": [], "train": {}, "val": {}}
    return PreparedDataset(train=rows, val=val_rows, metadata=metadata, val_texts=(), folder=Path())


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
