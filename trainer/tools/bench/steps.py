"""What a step costs: run the variants in alternation, each in its own processes; write JSON and a Markdown table."""

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainer.config.errors import TrainingError
from trainer.tools.bench.configs import BenchmarkConfig
from trainer.training.provenance import cpu_name

PACKAGES = ("torch", "transformers", "peft", "deepspeed")
TIMEOUT_SECONDS = 3600.0  # seconds for one variant


def run_benchmarks(configs: Sequence[BenchmarkConfig], *, rounds: int, output_dir: Path) -> int:
    """Measure all variants `rounds` times in turn, write and print the table; 1 where a variant failed."""
    output_dir.mkdir(parents=True, exist_ok=True)
    rows = run_rounds(configs, rounds=rounds)
    environment = _describe_environment(configs[0], rounds, rows)
    text = format_markdown(rows, environment)
    (output_dir / "bench.json").write_text(
        json.dumps({"facts": environment, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )
    (output_dir / "bench.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{output_dir / 'bench.json'} has every window")
    return int(any(row["problem"] for row in rows))


def run_rounds(configs: Sequence[BenchmarkConfig], *, rounds: int) -> list[dict[str, Any]]:
    """A row for each variant, each measured `rounds` times, in turn, in processes of its own."""
    results: dict[BenchmarkConfig, list[dict[str, Any]]] = {config: [] for config in configs}
    errors: dict[BenchmarkConfig, str] = {}
    for round_index in range(rounds):
        for config in configs:
            if config in errors:
                continue
            start_time = time.monotonic()
            try:
                results[config].append(_run_job(config))
            except TrainingError as error:
                errors[config] = str(error)
            outcome = errors.get(config, f"{1000 * statistics.median(results[config][-1]['windows']):.1f} ms/step"
                              if results[config] else "")  # fmt: skip
            label = f"{config.mode}, batch {config.global_batch}, {config.name}"
            print(
                f"round {round_index + 1}/{rounds}  {label}: {outcome}  ({time.monotonic() - start_time:.0f} s)",
                flush=True,
            )
    rows = [_table_row(config, results[config], errors.get(config)) for config in configs]
    add_relative_speeds(rows)
    return rows


def _run_job(config: BenchmarkConfig) -> dict[str, Any]:
    """The result of a variant, by processes that begin anew; TrainingError with the last line that they said."""
    with tempfile.TemporaryDirectory() as scratch:
        job_file, result_file = Path(scratch) / "job.json", Path(scratch) / "result.json"
        job_file.write_text(json.dumps({"variant": config.as_dict(), "result": str(result_file)}))
        log_file = Path(scratch) / "log"
        with open(log_file, "wb") as output:
            command = [sys.executable, "-m", "trainer.tools.bench.worker", str(job_file)]
            processes = [
                subprocess.Popen(command, env=env, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
                for env in _rank_environments(config.world_size)
            ]
            try:
                exit_codes = [process.wait(TIMEOUT_SECONDS) for process in processes]
            except subprocess.TimeoutExpired:
                exit_codes = [1]
            finally:
                for process in processes:
                    process.kill()
        if any(exit_codes) or not result_file.exists():
            lines = [
                line for line in log_file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
            ]
            raise TrainingError(f"failed: {lines[-1][:200] if lines else 'without a word'}")
        return dict(json.loads(result_file.read_text()))


def _rank_environments(world_size: int) -> list[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared_environment = {
        **os.environ, "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }  # fmt: skip
    return [{**shared_environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def _table_row(
    config: BenchmarkConfig, results: Sequence[Mapping[str, Any]], error: str | None
) -> dict[str, Any]:  # fmt: skip
    """One line of the table. Times in seconds; spread: smallest and largest median of a round."""
    row: dict[str, Any] = {**config.as_dict(), "name": config.name, "problem": error}
    if not results or error:
        return row
    medians = [statistics.median(result["windows"]) for result in results]
    step_seconds = statistics.median([window for result in results for window in result["windows"]])
    ceiling_flops = statistics.median(result["ceiling"] for result in results)
    evals = [result["eval"] for result in results if result["eval"] is not None]
    return row | {
        "windows": [result["windows"] for result in results],
        "step": step_seconds,
        "spread": [min(medians), max(medians)],
        "rounds": medians,
        "tokens_per_second": config.tokens / step_seconds,
        "flop_share": results[0]["flops_per_token"] * config.tokens / step_seconds / ceiling_flops,
        "ceiling_flops": ceiling_flops,
        "gpu": results[0]["gpu"],
        "threads": results[0]["threads"],
        "product_share": statistics.median(
            products / step
            for result in results
            for products, step in zip(result["products"], result["windows"], strict=True)
        ),
        "peak_memory": max(result["peak_memory"] for result in results),
        "input_share": statistics.median(result["input"] for result in results) / step_seconds,
        "first_step": statistics.median(result["first_step"] for result in results),
        "eval_over_training": step_seconds / config.tokens / statistics.median(evals) if evals else None,
    }


def add_relative_speeds(rows: list[dict[str, Any]]) -> None:
    """Give each row its rate over ours of the same mode and batch, round by round: median, smallest, largest."""
    for row in rows:
        baseline_row = next(
            candidate
            for candidate in rows
            if candidate["mode"] == row["mode"] and candidate["global_batch"] == row["global_batch"]
        )
        if "rounds" in row and "rounds" in baseline_row:
            ratios = [
                baseline_seconds / seconds
                for baseline_seconds, seconds in zip(baseline_row["rounds"], row["rounds"], strict=False)
            ]
            row["speed"] = [statistics.median(ratios), min(ratios), max(ratios)]


def _describe_environment(
    config: BenchmarkConfig, rounds: int, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:  # fmt: skip
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


HEADINGS = (
    "mode", "batch", "program", "ms/step", "spread", "tokens/s", "speed", "products", "FLOP share", "peak GiB", "input",
    "eval",
)  # fmt: skip


def format_markdown(rows: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]) -> str:
    """The table and where it was measured, in Markdown."""
    packages = ", ".join(f"{name} {package_version}" for name, package_version in environment["versions"].items())
    lines = [
        f"{environment['model']}, blocks of {environment['block_size']} tokens, {environment['hardware']}, "
        f"{environment['threads']} threads; {packages}; {environment['rounds']} rounds in alternation, "
        f"{environment['steps']}.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---|--:|---|" + "--:|" * (len(HEADINGS) - 3),
        *("| " + " | ".join(_format_cells(row)) + " |" for row in rows),
        "",
        "ms/step: median over all windows; spread: of the rounds' medians; speed: tokens/s over the first line of the "
        "same mode and batch, median (least-most) of the rounds; products: share of a step that the bare matrix "
        "products with its weights take on this machine, timed between its windows; FLOP share: of "
        f"{environment['ceiling_flops'] / 1e12:.3g} TFLOP/s, a {environment['ceiling_precision']} matrix product "
        "measured by the same processes; input: share of a step to draw its rows; eval: tokens/s of evaluation over "
        "training.",
    ]
    return "\n".join(lines) + "\n"


def _format_cells(row: Mapping[str, Any]) -> list[str]:
    leading_cells = [row["mode"], str(row["global_batch"]), row["name"]]
    if "step" not in row:
        return [*leading_cells, row["problem"] or "not measured", *[""] * (len(HEADINGS) - 4)]
    low, high = (1000 * seconds for seconds in row["spread"])
    speed = "{:.2f} ({:.2f}-{:.2f})".format(*row["speed"]) if "speed" in row else ""
    return [
        *leading_cells,
        f"{1000 * row['step']:.1f}",
        f"{low:.1f}-{high:.1f}",
        f"{row['tokens_per_second']:,.0f}",
        speed,
        f"{100 * row['product_share']:.0f}%",
        f"{100 * row['flop_share']:.0f}%",
        f"{row['peak_memory'] / 2**30:.2f}",
        f"{100 * row['input_share']:.1f}%",
        f"{row['eval_over_training']:.1f}x" if row["eval_over_training"] else "",
    ]
