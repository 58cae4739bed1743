"""What an optimizer step costs: programs in alternation, each in processes of its own; JSON and a Markdown table.

The programs share model, token ids, batch, precision, optimizer numbers and clip, so what differs is the program.
`python -m trainer.tools.bench.steps JOB` is one rank of one program.
"""

import argparse
import itertools
import json
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
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from trainer.config import cli
from trainer.config.choices import DEMO_MODEL
from trainer.config.errors import UserError
from trainer.config.files import refuse_foreign_files, write_atomically
from trainer.config.settings import Settings
from trainer.config.text import markdown_table
from trainer.data.dataset import PreparedDataset, TokenDataset
from trainer.distributed.process_group import DistContext
from trainer.model import attention, lora, loss
from trainer.model.build import load_config
from trainer.model.flops import count_step_flops
from trainer.tools.processes import run_job
from trainer.tools.trial_engine import run_rank, start_trial
from trainer.tracking.records import StepRecord
from trainer.training.loop import train
from trainer.training.provenance import cpu_name, package_versions
from trainer.training.schedule import TrainState

WORKER_COMMAND = ("-m", "trainer.tools.bench.steps")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LENGTH_SPREAD = 0.6  # of the logarithm of a ragged row's length, about that of E2E and ACLED records
MEAN_LENGTH_SHARE = 0.3  # of ragged rows, of the longest
HEADINGS = ("mode", "batch", "program", "ms/step", "spread", "tokens/s", "speed", "FLOP share", "peak GiB")
EXPLANATION = (
    "program: in brackets how its steps really ran; ms/step: median over all windows; spread: of the rounds' medians, "
    "of one round its windows; speed: tokens/s over the first line of the same mode and batch, median (least-most) of "
    "the rounds, so that a line without X at 0.80 says that X makes steps 1.25 times as fast; FLOP share: of {:.3g} "
    "TFLOP/s, one large {} matrix product in the same process; peak GiB: in use at most."
)

#: A line of the table: what is run (`program`: ours, plain or hf; `without`: of ours, the faster path that is turned
#: off; ...), its `name`, and what was measured: `problem`, `results` (one a round) and their summary.
Row = dict[str, Any]


def build_rows(args: argparse.Namespace, device: str) -> list[Row]:
    """For each mode and batch: ours in every combination, ours without each faster path, then the other programs.

    Those two run on one rank and in the first precision. UserError for what does not go together.
    """
    for global_batch, world_size in itertools.product(args.batches, args.ranks):
        if global_batch % world_size:
            raise UserError(f"--batches {global_batch}: does not divide over {world_size} ranks")
    if "packing" in args.without and args.against:
        raise UserError("--without packing: compares rows of many lengths, which other programs lack; omit --against")
    precisions = args.precision or ["bf16" if device == "cuda" else "fp32"]
    programs: list[Row] = [
        {"precision": precision, "world_size": ranks, "ds_config": file, "execution": execution}
        for precision, ranks, file, execution in itertools.product(
            precisions, args.ranks, args.ds_config, args.execution
        )
    ]
    programs += [{"ds_config": args.ds_config[0], "without": path} for path in args.without]
    programs += [{"program": peer} for peer in args.against]
    rows = []
    for mode, global_batch, program in itertools.product(args.modes, args.batches, programs):
        row: Row = {
            "program": "ours",
            "mode": mode,
            "global_batch": global_batch,  # examples of a step, over all ranks
            "ds_config": None,
            "world_size": 1,
            "model": args.model,
            "block_size": args.block_size,
            "precision": precisions[0],
            "device": device,
            "dropout": args.dropout,  # None: the model's own
            "execution": "auto",
            "without": None,
            "is_ragged": "packing" in args.without,  # rows of many lengths, packed unless `without` is packing
            "num_windows": args.windows,
            "steps_per_window": args.window,
            "warmup_steps": args.warmup or (10 if device == "cuda" else 3),
            **program,
        }
        row["num_steps"] = row["warmup_steps"] + row["num_windows"] * row["steps_per_window"]  # of a round
        parts = [
            row["program"],
            row["ds_config"],
            f"{row['world_size']} ranks" if row["world_size"] > 1 else None,
            row["precision"],
            row["execution"] if row["execution"] != "auto" else None,
            "packed" if row["is_ragged"] and row["without"] != "packing" else None,
            f"without {row['without']}" if row["without"] else None,
        ]
        rows.append({**row, "name": " ".join(filter(None, parts)), "problem": "not measured", "results": []})
    return rows


def measure_steps(args: argparse.Namespace) -> int:
    """Measure everything `args.rounds` times in turn, write and print the table; 1 where a program failed."""
    rows = build_rows(args, args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    json_file, table_file = args.output_dir / "bench.json", args.output_dir / "bench.md"
    flag = f"--output-dir {args.output_dir}"
    refuse_foreign_files([json_file, table_file], json_file, flag, lambda content: "rows" in content)
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(json_file, json.dumps({"rows": rows}) + "\n")
    except OSError as error:
        raise UserError(f"{flag}: cannot write there ({error.strerror})") from error
    for number in range(1, args.rounds + 1):
        for row in rows:
            if row["problem"].startswith("failed"):  # it is not tried again
                continue
            job = {name: value for name, value in row.items() if name != "results"}
            answers, _, reason = run_job(WORKER_COMMAND, job, row["world_size"])
            row["problem"] = "" if answers else f"failed: {reason}"
            row["results"] += answers
            if answers:
                row |= summarize(row["results"])
            outcome = row["problem"] or f"{1000 * row['rounds'][-1]:.1f} ms/step"
            label = f"{row['mode']}, batch {row['global_batch']}, {row['name']}"
            print(f"round {number}/{args.rounds}  {label}: {outcome}", flush=True)
            # After each measurement, so that none is lost.
            add_speeds(rows)
            text = format_markdown(rows, args.rounds)
            write_atomically(json_file, json.dumps({"rows": rows}, indent=1) + "\n")
            write_atomically(table_file, text)
    print(f"\n{text}\n{json_file} has every window")
    return int(any(row["problem"] for row in rows))


def summarize(results: Sequence[Mapping[str, Any]]) -> Row:
    last, windows = results[-1], [result["windows"] for result in results]
    step_seconds = statistics.median(itertools.chain(*windows))
    ceiling_flops = statistics.median(result["ceiling_flops"] for result in results)
    return {
        **{key: last[key] for key in ("ran_by", "hardware", "threads", "tokens", "versions")},
        "step": step_seconds,
        "rounds": [statistics.median(times) for times in windows],
        "tokens_per_second": last["tokens"] / step_seconds,
        "flop_share": last["flops"] / step_seconds / ceiling_flops,
        "ceiling_flops": ceiling_flops,
        "peak_memory": max(result["peak_memory_bytes"] for result in results),
    }


def add_speeds(rows: Sequence[Row]) -> None:
    """`speed`: the rate over that of the first row of the same mode and batch, round by round."""
    baselines: dict[tuple[str, int], Row] = {}
    for row in rows:
        baseline = baselines.setdefault((row["mode"], row["global_batch"]), row)
        pairs = zip(baseline.get("rounds", ()), row.get("rounds", ()), strict=False)  # the first may be one ahead
        if ratios := [base / seconds for base, seconds in pairs]:
            row["speed"] = [statistics.median(ratios), min(ratios), max(ratios)]


def format_markdown(rows: Sequence[Row], rounds: int) -> str:
    cells = []
    for row in rows:
        cells.append([row["mode"], str(row["global_batch"]), row["name"]])
        if "step" not in row:
            cells[-1] += [row["problem"], *[""] * (len(HEADINGS) - 4)]
            continue
        spread = row["rounds"] if len(row["rounds"]) > 1 else row["results"][0]["windows"]
        cells[-1][-1] += f" ({row['ran_by']})" if row["ran_by"] else ""
        cells[-1] += [
            f"{1000 * row['step']:.1f}",
            f"{1000 * min(spread):.1f}-{1000 * max(spread):.1f}",
            f"{row['tokens_per_second']:,.0f}",
            "{:.2f} ({:.2f}-{:.2f})".format(*row["speed"]) if "speed" in row else "",
            f"{100 * row['flop_share']:.0f}%",
            f"{row['peak_memory'] / 2**30:.2f}",
        ]
    table = markdown_table(HEADINGS, cells) + "\n"
    row = next((row for row in rows if "step" in row), {})
    if not row:
        return table
    packages = ", ".join(f"{name} {number}" for name, number in row["versions"].items() if number)
    where = (
        f"{row['model']}, rows of {row['block_size']} tokens, {row['hardware']}, {row['threads']} threads; {packages}; "
        f"{rounds} round(s) in alternation, {row['num_windows']} windows of {row['steps_per_window']} steps after "
        f"{row['warmup_steps']}."
    )
    return f"{where}\n\n{table}\n{EXPLANATION.format(row['ceiling_flops'] / 1e12, row['precision'])}\n"


def describe_hardware(device: torch.device) -> str:
    """The name of the GPU, or of the processor with the cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores"


# --- one rank of one program ---


def measure_program(job: Row, dist_context: DistContext) -> Iterator[dict[str, Any]]:
    """The times of the row's program, in seconds, and what else it used, in bytes."""
    device, settings = dist_context.device, cli.parse_args(_to_argv(job)).settings
    vocab_size = load_config(settings.model).get_text_config().vocab_size
    rng, num_rows = np.random.default_rng(0), job["num_steps"] * job["global_batch"]
    lengths = np.full(num_rows, job["block_size"])
    if job["is_ragged"]:
        mean = np.log(MEAN_LENGTH_SHARE * job["block_size"]) - LENGTH_SPREAD**2 / 2
        lengths = np.clip(rng.lognormal(mean, LENGTH_SPREAD, num_rows), 4, job["block_size"]).astype(np.int64)
    rows = [rng.integers(0, vocab_size, length) for length in lengths]  # random: nothing has to be fetched
    data = wrap_rows(rows, rows[: job["global_batch"]], vocab_size=vocab_size, is_ragged=job["is_ragged"])
    times: list[float] = []  # at the end of each step; the device is idle at the end of a window

    def after_step() -> None:
        num_timed_steps = len(times) + 1 - job["warmup_steps"]
        if device.type == "cuda" and num_timed_steps >= 0 and num_timed_steps % job["steps_per_window"] == 0:
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    ran_by = ""
    if job["program"] == "ours":
        if job["without"] == "chunked-loss":  # what no flag turns off
            loss.find_output_head = lambda causal: None
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
        run_peer(job, settings, data, model, after_step)
    yield {
        "ran_by": ran_by,
        "windows": (
            np.diff(times[job["warmup_steps"] - 1 :: job["steps_per_window"]]) / job["steps_per_window"]
        ).tolist(),
        "hardware": describe_hardware(device),
        "threads": dist_context.num_threads,
        "versions": package_versions(),
        "tokens": job["global_batch"] * float(lengths.mean()),
        "flops": count_step_flops(settings, lengths=data.train.lengths(), global_batch=job["global_batch"]),
        "ceiling_flops": _measure_ceiling(job["precision"], device),
    }


def _to_argv(job: Row) -> list[str]:
    flags = f"--mode {job['mode']} --preset card --model {job['model']} --block-size {job['block_size']}"
    flags += f" --global-batch {job['global_batch']} --eval-batch {job['global_batch']} --max-steps {job['num_steps']}"
    flags += f" --precision {job['precision']} --eval-every never --save-every never"
    flags += f" --execution {'eager' if job['without'] == 'graphs' else job['execution']}"
    is_only_shape = job["model"] == "gpt2" or not list(Path(job["model"]).glob("*.safetensors"))
    flags += " --init random" if is_only_shape and job["model"] != DEMO_MODEL else ""
    flags += f" --dropout {job['dropout']}" if job["dropout"] is not None else ""
    flags += f" --ds-config {job['ds_config']}" if job["ds_config"] else ""
    flags += " --objective completion" if job["is_ragged"] else ""
    flags += " --packing" if job["is_ragged"] and job["without"] != "packing" else ""
    return flags.split()


def wrap_rows(
    train: Sequence[NDArray[np.int64]], val: Sequence[NDArray[np.int64]], *, vocab_size: int, is_ragged: bool = False
) -> PreparedDataset:
    """Rows of token ids as a run takes them; all tokens of a row but the first count in the loss."""
    train_rows, val_rows = (
        TokenDataset(
            ids=np.concatenate(rows).astype(np.uint32),
            offsets=np.cumsum([0, *map(len, rows)]),
        )
        for rows in (train, val)
    )
    objective = "completion" if is_ragged else "blocks"
    metadata: dict[str, Any] = {"vocabulary": vocab_size, "objective": objective, "fingerprint": "made"}
    metadata |= {"notices": [], "train": {}, "val": {}}
    return PreparedDataset(train=train_rows, val=val_rows, metadata=metadata, val_texts=(), folder=Path())


def _run_plain(job: Row, settings: Settings, data: PreparedDataset, model: Any, after_step: Callable[[], None]) -> None:
    """What one writes by hand: the model's own loss on full logits, clip_grad_norm_, torch's fused AdamW."""
    device = torch.device(job["device"])
    module = model.to(device).train()
    params = [p for p in module.parameters() if p.requires_grad]
    adamw = {"lr": settings.train.lr, "eps": settings.train.epsilon, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(params, **adamw, fused=True)
    for step in range(job["num_steps"]):
        rows = range(step * job["global_batch"], (step + 1) * job["global_batch"])
        ids = torch.from_numpy(np.stack([data.train.row(i) for i in rows])).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=job["precision"] == "bf16"):
            batch_loss = module(input_ids=ids, labels=ids, use_cache=False).loss
        batch_loss.backward()
        torch.nn.utils.clip_grad_norm_(params, settings.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        after_step()


def _run_hf_trainer(
    job: Row, settings: Settings, data: PreparedDataset, model: Any, after_step: Callable[[], None]
) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class AfterStep(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            after_step()

    with tempfile.TemporaryDirectory() as scratch:
        training_args = TrainingArguments(
            output_dir=scratch,
            max_steps=job["num_steps"],
            per_device_train_batch_size=job["global_batch"],
            learning_rate=settings.train.lr,
            lr_scheduler_type="linear",
            max_grad_norm=settings.train.max_grad_norm,
            weight_decay=0.0,
            bf16=job["precision"] == "bf16",
            use_cpu=job["device"] == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows = [{"input_ids": ids, "labels": ids} for ids in map(data.train.row, range(len(data.train)))]
        Trainer(model=model, args=training_args, callbacks=[AfterStep()], train_dataset=rows).train()


def _measure_ceiling(precision: str, device: torch.device) -> float:
    """FLOP/s of one large matrix product in the program's precision: what arithmetic can reach here."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, dtype=DTYPES[precision], device=device) for _ in range(2))
    times = []
    for _ in range(12):
        start_time = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start_time)
    return 2 * size**3 / statistics.median(times[2:])


if __name__ == "__main__":
    run_rank(measure_program)
