"""What a step costs: run the variants in alternation, each in its own processes; write JSON and a Markdown table."""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trainer.config.errors import TrainingError
from trainer.tools.bench.configs import BenchmarkConfig, build_configs
from trainer.tools.bench.tables import table_lines
from trainer.tools.worker_processes import last_line, run_ranks
from trainer.training.provenance import cpu_name

PACKAGES = ("torch", "transformers", "peft", "deepspeed")
TIMEOUT_SECONDS = 3600.0  # seconds for one variant
HEADINGS = (
    "mode",
    "batch",
    "program",
    "ms/step",
    "spread",
    "tokens/s",
    "speed",
    "products",
    "FLOP share",
    "peak GiB",
    "device GiB",
    "input",
    "eval",
)


def measure_steps(args: argparse.Namespace) -> int:
    """Measure all variants `args.rounds` times in turn, write and print the table; 1 where a variant failed."""
    configs = build_configs(args, args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.output_dir.mkdir(parents=True, exist_ok=True)

    def write(rows: Sequence[Mapping[str, Any]]) -> str:
        environment = _describe_environment(configs[0], args.rounds, rows)
        text = format_markdown(rows, environment)
        json_file.write_text(json.dumps({"facts": environment, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        (args.output_dir / "bench.md").write_text(text, encoding="utf-8")
        return text

    json_file = args.output_dir / "bench.json"
    rows = run_rounds(configs, rounds=args.rounds, after_each=write)
    print(f"\n{write(rows)}\n{json_file} has every window")
    return int(any(row["problem"] for row in rows))


def run_rounds(
    configs: Sequence[BenchmarkConfig], *, rounds: int, after_each: Callable[[list[dict[str, Any]]], object] = len
) -> list[dict[str, Any]]:
    """A row for each variant, each measured `rounds` times, in turn, in processes of its own.

    `after_each`: called with the rows after each of them, so that what is cut off leaves what it had. On a GPU a
    variant's processes import while the one before is measured: then they wait for their turn.
    """
    results: dict[BenchmarkConfig, list[dict[str, Any]]] = {config: [] for config in configs}
    errors: dict[BenchmarkConfig, str] = {}
    rows: list[dict[str, Any]] = []
    start_time = time.monotonic()
    # Not with several ranks, which would wait for rank 0 longer than a group may take to meet.
    imports_ahead = all(config.device == "cuda" and config.world_size == 1 for config in configs)
    with (
        tempfile.NamedTemporaryFile() as turn,
        ThreadPoolExecutor(2 if imports_ahead else 1) as pool,
    ):
        for round_number in range(1, rounds + 1):
            remaining = [config for config in configs if config not in errors]
            jobs = [pool.submit(_run_job, config, turn.name) for config in remaining]
            for config, job in zip(remaining, jobs, strict=True):
                try:
                    results[config].append(_result_of(job, jobs))
                    outcome = f"{1000 * statistics.median(results[config][-1]['windows']):.1f} ms/step"
                except TrainingError as error:
                    outcome = errors[config] = str(error)
                label = f"{config.mode}, batch {config.global_batch}, {config.name}"
                start_time, seconds = time.monotonic(), time.monotonic() - start_time
                print(f"round {round_number}/{rounds}  {label}: {outcome}  ({seconds:.0f} s)", flush=True)
                rows = [_table_row(config, results[config], errors.get(config)) for config in configs]
                add_relative_speeds(rows)
                after_each(rows)
    return rows


def _result_of(job: "Future[dict[str, Any]]", jobs: Sequence["Future[dict[str, Any]]"]) -> dict[str, Any]:
    """What a job leaves; where the wait is interrupted the others are not begun."""
    try:
        return job.result()
    except KeyboardInterrupt:
        for other in jobs:
            other.cancel()
        raise


def _run_job(config: BenchmarkConfig, turn: str) -> dict[str, Any]:
    """The result of a variant, by processes that begin anew; TrainingError with the last line that they said.

    `turn`: a file that is locked by those that measure.
    """
    with tempfile.TemporaryDirectory() as scratch:
        job_file, result_file, log = (Path(scratch) / name for name in ("job.json", "result.json", "log"))
        job_file.write_text(json.dumps({"variant": asdict(config), "result": str(result_file), "turn": turn}))
        argv = ["-m", "trainer.tools.bench.worker", str(job_file)]
        exit_codes = run_ranks(argv, config.world_size, log, timeout_seconds=TIMEOUT_SECONDS)
        if exit_codes is None or any(exit_codes) or not result_file.exists():
            raise TrainingError(f"failed: {last_line(log.read_text(encoding='utf-8', errors='replace'))}")
        return dict(json.loads(result_file.read_text()))


def _table_row(config: BenchmarkConfig, results: Sequence[Mapping[str, Any]], error: str | None) -> dict[str, Any]:
    """The variant and what all rounds say of it: medians, and the spread of the rounds' medians."""
    problem = error or ("" if results else "not measured")
    row: dict[str, Any] = {**asdict(config), "name": config.name, "problem": problem}
    if problem:
        return row
    medians = [statistics.median(result["windows"]) for result in results]
    spread = medians if len(results) > 1 else results[0]["windows"]
    step_seconds = statistics.median([window for result in results for window in result["windows"]])
    ceiling_flops = statistics.median(result["ceiling"] for result in results)
    evals = [result["eval"] for result in results if result["eval"] is not None]
    product_shares = [
        products / step
        for result in results
        for products, step in zip(result["products"], result["windows"], strict=True)
    ]
    return row | {
        "ran_by": results[0]["ran_by"],
        "windows": [result["windows"] for result in results],
        "step": step_seconds,
        "spread": [min(spread), max(spread)],
        "rounds": medians,
        "tokens_per_second": config.tokens / step_seconds,
        "flop_share": results[0]["flops_per_token"] * config.tokens / step_seconds / ceiling_flops,
        "ceiling_flops": ceiling_flops,
        "gpu": results[0]["gpu"],
        "threads": results[0]["threads"],
        "product_share": statistics.median(product_shares),
        "peak_memory": max(result["peak_memory"] for result in results),
        "device_memory": max(result["device_memory"] for result in results),
        "input_share": statistics.median(result["input"] for result in results) / step_seconds,
        "first_step": statistics.median(result["first_step"] for result in results),
        "eval_over_training": step_seconds / config.tokens / statistics.median(evals) if evals else None,
    }


def add_relative_speeds(rows: list[dict[str, Any]]) -> None:
    """Give each row its rate over ours of the same mode and batch, round by round: median, smallest, largest."""
    baselines: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        baseline = baselines.setdefault((row["mode"], row["global_batch"]), row)
        if "rounds" in row and "rounds" in baseline:
            pairs = zip(baseline["rounds"], row["rounds"], strict=False)  # within a round the first is one ahead
            ratios = [base / seconds for base, seconds in pairs]
            row["speed"] = [statistics.median(ratios), min(ratios), max(ratios)]


def _describe_environment(config: BenchmarkConfig, rounds: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    measured = next((row for row in rows if "step" in row), {"gpu": None, "threads": None, "ceiling_flops": 0.0})
    return {
        "hardware": measured["gpu"] or f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "threads": measured["threads"],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "model": config.model,
        "block_size": config.block_size,
        "ceiling_flops": measured["ceiling_flops"],
        "ceiling_precision": config.precision,
        "rounds": rounds,
        "steps": f"{config.num_windows} windows of {config.steps_per_window} steps after {config.warmup_steps}",
    }


def format_markdown(rows: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]) -> str:
    """The table and where it was measured, in Markdown."""
    packages = ", ".join(f"{name} {package_version}" for name, package_version in environment["versions"].items())
    lines = [
        f"{environment['model']}, blocks of {environment['block_size']} tokens, {environment['hardware']}, "
        f"{environment['threads']} threads; {packages}; {environment['rounds']} round(s) in alternation, "
        f"{environment['steps']}.",
        "",
        *table_lines(HEADINGS, map(_format_cells, rows), num_left=3),
        "",
        "program: in brackets how its steps really ran; ms/step: median over all windows; spread: of the rounds' "
        "medians, of one round its windows; speed: tokens/s over the first line of the "
        "same mode and batch, median (least-most) of the rounds; products: share of a step that the bare matrix "
        "products with its weights take on this machine, timed between its windows; FLOP share: of "
        f"{environment['ceiling_flops'] / 1e12:.3g} TFLOP/s, a {environment['ceiling_precision']} matrix product "
        "measured by the same processes; peak GiB: in use at most; device GiB: taken of the GPU, "
        "as nvidia-smi says; input: share of a step to draw its rows; eval: tokens/s of evaluation over "
        "training.",
    ]
    return "\n".join(lines) + "\n"


def _format_cells(row: Mapping[str, Any]) -> list[str]:
    program = f"{row['name']} ({row['ran_by']})" if row.get("ran_by") else row["name"]
    leading_cells = [row["mode"], str(row["global_batch"]), program]
    if "step" not in row:
        return [*leading_cells, row["problem"], *[""] * (len(HEADINGS) - 4)]
    low, high = (1000 * seconds for seconds in row["spread"])
    return [
        *leading_cells,
        f"{1000 * row['step']:.1f}",
        f"{low:.1f}-{high:.1f}",
        f"{row['tokens_per_second']:,.0f}",
        "{:.2f} ({:.2f}-{:.2f})".format(*row["speed"]) if "speed" in row else "",
        f"{100 * row['product_share']:.0f}%",
        f"{100 * row['flop_share']:.0f}%",
        f"{row['peak_memory'] / 2**30:.2f}",
        f"{row['device_memory'] / 2**30:.2f}" if row["device_memory"] else "",
        f"{100 * row['input_share']:.1f}%",
        f"{row['eval_over_training']:.1f}x" if row["eval_over_training"] else "",
    ]
