"""`launch/bench.py`: run the variants in alternation, each in its own processes; write JSON and a Markdown table."""

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

from trainer.config.errors import RunFailed
from trainer.tools.bench.configs import Variant

PACKAGES = ("torch", "transformers", "peft", "deepspeed")
LIMIT = 3600.0  # seconds for one variant


def run(chosen: Sequence[Variant], *, rounds: int, out: Path) -> int:
    """Measure all variants `rounds` times in turn, write and print the table; 1 where a variant failed."""
    out.mkdir(parents=True, exist_ok=True)
    rows, top = measured(chosen, rounds=rounds)
    facts = _facts(chosen[0], rounds, top)
    text = markdown(rows, facts)
    (out / "bench.json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    (out / "bench.md").write_text(text)
    print(f"\n{text}\n{out / 'bench.json'} has every window")
    return int(any(row["problem"] for row in rows))


def measured(chosen: Sequence[Variant], *, rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(a row for each variant, the ceiling): each measured `rounds` times, in turn, in processes of its own."""
    results: dict[Variant, list[dict[str, Any]]] = {variant: [] for variant in chosen}
    failed: dict[Variant, str] = {}
    top = _ask("ceiling", chosen[0])
    for turn in range(rounds):
        for variant in chosen:
            if variant in failed:
                continue
            began = time.monotonic()
            try:
                results[variant].append(_ask("variant", variant))
            except RunFailed as problem:
                failed[variant] = str(problem)
            said = failed.get(variant, f"{1000 * statistics.median(results[variant][-1]['windows']):.1f} ms/step"
                              if results[variant] else "")  # fmt: skip
            label = f"{variant.mode}, batch {variant.batch}, {variant.name}"
            print(f"round {turn + 1}/{rounds}  {label}: {said}  ({time.monotonic() - began:.0f} s)", flush=True)
    rows = [_row(variant, results[variant], top["flops"], failed.get(variant)) for variant in chosen]
    compare(rows)
    return rows, top


def _ask(kind: str, variant: Variant) -> dict[str, Any]:
    """The result of a job, done by processes that begin anew; RunFailed with the last line that they said."""
    with tempfile.TemporaryDirectory() as scratch:
        job, result = Path(scratch) / "job.json", Path(scratch) / "result.json"
        job.write_text(json.dumps({"kind": kind, "variant": variant.as_dict(), "result": str(result)}))
        ranks = variant.ranks if kind == "variant" else 1
        log = Path(scratch) / "log"
        with open(log, "wb") as output:
            command = [sys.executable, "-m", "trainer.tools.bench.worker", str(job)]
            started = [
                subprocess.Popen(command, env=env, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
                for env in _environments(ranks)
            ]
            try:
                codes = [process.wait(LIMIT) for process in started]
            except subprocess.TimeoutExpired:
                codes = [1]
            finally:
                for process in started:
                    process.kill()
        if any(codes) or not result.exists():
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise RunFailed(f"failed: {lines[-1][:200] if lines else 'without a word'}")
        return dict(json.loads(result.read_text()))


def _environments(ranks: int) -> list[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        **os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }  # fmt: skip
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _row(variant: Variant, results: Sequence[Mapping[str, Any]], top: float, problem: str | None) -> dict[str, Any]:
    """One line of the table. Times in seconds; spread: smallest and largest median of a round."""
    row: dict[str, Any] = {**variant.as_dict(), "name": variant.name, "problem": problem}
    if not results or problem:
        return row
    medians = [statistics.median(result["windows"]) for result in results]
    seconds = statistics.median([window for result in results for window in result["windows"]])
    evals = [result["eval"] for result in results if result["eval"] is not None]
    return row | {
        "windows": [result["windows"] for result in results],
        "step": seconds,
        "spread": [min(medians), max(medians)],
        "rounds": medians,
        "tokens_per_second": variant.tokens / seconds,
        "flop_share": results[0]["flops_per_token"] * variant.tokens / seconds / top,
        "peak_memory": max(result["peak_memory"] for result in results),
        "input_share": statistics.median(result["input"] for result in results) / seconds,
        "first_step": statistics.median(result["first_step"] for result in results),
        "eval_over_training": seconds / variant.tokens / statistics.median(evals) if evals else None,
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Give each row its rate over ours of the same mode and batch, round by round: median, smallest, largest."""
    for row in rows:
        first = next(one for one in rows if one["mode"] == row["mode"] and one["batch"] == row["batch"])
        if "rounds" in row and "rounds" in first:
            ratios = [ours / theirs for ours, theirs in zip(first["rounds"], row["rounds"], strict=False)]
            row["speed"] = [statistics.median(ratios), min(ratios), max(ratios)]


def _facts(variant: Variant, rounds: int, top: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hardware": top["gpu"] or f"{_cpu()}, {len(os.sched_getaffinity(0))} cores",
        "threads": top["threads"],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "model": variant.model,
        "block_size": variant.block_size,
        "ceiling_flops": top["flops"],
        "ceiling_precision": variant.precision,
        "rounds": rounds,
        "steps": f"{variant.windows} windows of {variant.window} steps after {variant.warmup}",
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


HEADINGS = (
    "mode", "batch", "program", "ms/step", "spread", "tokens/s", "speed", "FLOP share", "peak GiB", "input", "eval",
)  # fmt: skip


def markdown(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """The table and where it was measured, in Markdown."""
    packages = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines = [
        f"{facts['model']}, blocks of {facts['block_size']} tokens, {facts['hardware']}, "
        f"{facts['threads']} threads; {packages}; {facts['rounds']} rounds in alternation, {facts['steps']}.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---|--:|---|" + "--:|" * (len(HEADINGS) - 3),
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
        "",
        "ms/step: median over all windows; spread: of the rounds' medians; speed: tokens/s over the first line of the "
        "same mode and batch, median (least-most) of the rounds; FLOP share: of "
        f"{facts['ceiling_flops'] / 1e12:.3g} TFLOP/s, a {facts['ceiling_precision']} matrix product measured in the "
        "same call; input: share of a step to draw its rows; eval: tokens/s of evaluation over training.",
    ]
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    head = [row["mode"], str(row["batch"]), row["name"]]
    if "step" not in row:
        return [*head, row["problem"] or "not measured", *[""] * (len(HEADINGS) - 4)]
    low, high = (1000 * seconds for seconds in row["spread"])
    speed = "{:.2f} ({:.2f}-{:.2f})".format(*row["speed"]) if "speed" in row else ""
    return [
        *head,
        f"{1000 * row['step']:.1f}",
        f"{low:.1f}-{high:.1f}",
        f"{row['tokens_per_second']:,.0f}",
        speed,
        f"{100 * row['flop_share']:.0f}%",
        f"{row['peak_memory'] / 2**30:.2f}",
        f"{100 * row['input_share']:.1f}%",
        f"{row['eval_over_training']:.1f}x" if row["eval_over_training"] else "",
    ]
