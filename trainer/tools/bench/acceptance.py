"""`launch/gpu_acceptance.py`: its parts, each a command, and a file of how they went and what they measured; no torch.

Estimate for an H100 with 16 cores, where a process imports for 15 to 25 s and a compiler takes 40 s: tests, prove and
card beside one another 170 s, compare 10, the three benchmarks 130, 70 and 80, since each variant's processes import
while the one before is measured.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.config.argument_parser import ArgumentParser
from trainer.config.errors import UserError
from trainer.tools.bench.card import write_rows
from trainer.tools.bench.shapes import SHAPES, save_shape

ROOT = Path(__file__).parents[3]
LIMIT_SECONDS = 480.0  # of all parts together


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the parts run on: GPT-2 124M with random weights, or as little as a CPU does in seconds."""

    model: str = "gpt2"
    block_size: int = 1024
    num_rows: int = 256
    vocab_size: int = 50_257
    num_steps: int = 220  # enough for a run to time its ways
    large_batch: int = 16
    against: str = "plain,hf,hf-compile,hf-deepspeed"
    bench: str = "--execution auto,compile --window 20 --windows 3"


def tiny_sizes(folder: Path) -> Sizes:
    """`--rehearse`: every command with a model and rows of next to nothing."""
    return Sizes(
        model=save_shape(folder, "tiny"),
        block_size=32,
        num_rows=24,
        vocab_size=SHAPES["tiny"][3],
        num_steps=4,
        large_batch=4,
        against="hf-deepspeed",
        bench="--window 2 --windows 1 --warmup 1",
    )


@dataclass(frozen=True, kw_only=True)
class PartResult:
    """How a part went."""

    name: str
    exit_code: int | None  #: None: it was cut off, or did not begin
    elapsed_seconds: float
    last_line: str


def run(argv: Sequence[str]) -> int:
    """Run the parts and write results.json and results.md; 0 where all passed."""
    parser = ArgumentParser(
        prog="gpu_acceptance.py", description="Tests, proof, benchmark and short card runs on a GPU."
    )
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("gpu-acceptance"), metavar="DIR", help="default: gpu-acceptance")
    add("--parts", metavar="NAMES", help="some of the parts, with commas (default: all)")
    add("--limit", type=float, default=LIMIT_SECONDS, metavar="SECONDS", help=f"of all (default: {LIMIT_SECONDS:g})")
    add("--rehearse", action="store_true", help="all parts on a CPU with tiny sizes: whether the script itself works")
    args = parser.parse_args(argv)
    folder = args.output_dir.absolute()
    names = args.parts.split(",") if args.parts else list(PARTS)
    for name in names:
        if name not in PARTS:
            raise UserError(f"--parts {name}: expected some of {', '.join(PARTS)}")
    if not (args.rehearse or Path("/dev/nvidiactl").exists()):
        raise UserError(
            "no NVIDIA GPU is here, which is what this settles; --rehearse tries the script itself on a CPU"
        )
    folder.mkdir(parents=True, exist_ok=True)
    sizes = tiny_sizes(folder) if args.rehearse else Sizes()
    write_rows(folder / "rows.jsonl", sizes.num_rows, sizes.block_size, sizes.vocab_size)
    parts = build_parts(folder, sizes)
    return run_parts({name: parts[name] for name in names}, folder, args.limit)


#: Parts of one stage run beside one another: what they take is no measurement.
STAGES = (("tests", "prove", "card"), ("compare",), ("bench-full",), ("bench-large",), ("bench-lora",))
PARTS = tuple(name for stage in STAGES for name in stage)


def build_parts(folder: Path, sizes: Sizes) -> dict[str, list[str]]:
    """{name: command}, in the order in which they run; each writes below `folder`."""
    run = (
        f"--mode full --preset card --model {sizes.model} --init random --objective blocks --wandb disabled "
        f"--block-size {sizes.block_size} --max-steps {sizes.num_steps}"
    )
    bench = f"{{python}} launch/bench.py --model {sizes.model} --block-size {sizes.block_size} --rounds 1 {sizes.bench}"
    commands = {
        "tests": "{python} -m pytest -q -m gpu -n 4 --dist=load tests/distributed/test_cuda_graphs.py",
        "prove": f"{{python}} launch/doctor.py --prove {run} --data {folder}/rows.jsonl --limit 200 "
        f"--output-dir {folder}/prove",
        "card": f"{{python}} launch/bench.py card --model {sizes.model} --block-size {sizes.block_size} "
        f"--data {folder}/rows.jsonl --max-steps {sizes.num_steps} --output-dir {folder}/card",
        "compare": f"{{python}} launch/compare.py {folder}/card/full {folder}/card/lora --no-card "
        f"--output-dir {folder}/compare",
        "bench-full": f"{bench} --modes full --batches 2 --against {sizes.against} --output-dir {folder}/bench-full",
        "bench-large": f"{bench} --modes full --batches {sizes.large_batch} --output-dir {folder}/bench-large",
        "bench-lora": f"{bench} --modes lora --batches 2 --against plain,hf --output-dir {folder}/bench-lora",
    }
    return {name: [sys.executable if word == "{python}" else word for word in commands[name].split()] for name in PARTS}


def run_parts(parts: Mapping[str, Sequence[str]], folder: Path, limit_seconds: float) -> int:
    """Run the commands stage by stage, others at the end; one that fails stops no other. Returns 0 where all passed."""
    deadline = time.monotonic() + limit_seconds
    results: list[PartResult] = []
    for stage in (*STAGES, *([name] for name in parts if name not in PARTS)):
        is_over = threading.Event()
        with ThreadPoolExecutor() as pool:
            running = [
                pool.submit(_run_part, name, parts[name], folder / f"{name}.log", deadline, is_over)
                for name in stage
                if name in parts
            ]
            try:
                for part in as_completed(running):
                    results.append(part.result())
                    print(_describe(results[-1]), flush=True)
                    content = [asdict(result) for result in results]
                    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
                    (folder / "results.md").write_text(format_table(results) + _measured(folder), encoding="utf-8")
            finally:
                is_over.set()  # an interruption ends those that run, which are in sessions of their own
    return int(any(result.exit_code != 0 for result in results))


def _measured(folder: Path) -> str:
    """The tables that the parts left so far, and what the proof said."""
    texts = [
        (file.parent.name, file.read_text(encoding="utf-8"))
        for file in sorted(folder.glob("*/*.md"))
        if file.name in ("bench.md", "card.md")
    ]
    proof_log = folder / "prove.log"
    proof = (
        proof_log.read_text(encoding="utf-8", errors="replace").partition("\nproof, ")[2] if proof_log.exists() else ""
    )
    texts += [("prove", f"```text\n{proof.strip()}\n```\n")] if proof else []
    note = "\nTests, prove and card ran beside one another: their times are no measurements, those of bench are.\n"
    return note + "".join(f"\n## {name}\n\n{text}" for name, text in texts)


def _run_part(
    name: str, command: Sequence[str], log_path: Path, deadline: float, is_over: threading.Event
) -> PartResult:
    start_time = time.monotonic()
    if deadline <= start_time:
        return PartResult(name=name, exit_code=None, elapsed_seconds=0.0, last_line="not begun: the time was used up")
    with open(log_path, "w", encoding="utf-8") as log_file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        while (exit_code := process.poll()) is None and time.monotonic() < deadline and not is_over.wait(0.1):
            pass
        if exit_code is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [
        line.strip() for line in log_path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
    ]
    last_line = "cut off" if exit_code is None else (lines or ["no output"])[-1][:200]
    elapsed_seconds = time.monotonic() - start_time
    return PartResult(name=name, exit_code=exit_code, elapsed_seconds=elapsed_seconds, last_line=last_line)


def _describe(result: PartResult) -> str:
    state = {0: "passed", None: "cut off"}.get(result.exit_code, f"failed ({result.exit_code})")
    return f"{result.name:<10} {state}, {result.elapsed_seconds:.0f} s: {result.last_line}"


def format_table(results: Sequence[PartResult]) -> str:
    """Markdown, in the order of the parts."""
    results = sorted(results, key=lambda result: PARTS.index(result.name) if result.name in PARTS else len(PARTS))
    lines = ["| part | exit code | seconds | last line |", "|---|--:|--:|---|"]
    for result in results:
        exit_code = "-" if result.exit_code is None else str(result.exit_code)
        last_line = result.last_line.replace("|", "\\|")
        lines.append(f"| {result.name} | {exit_code} | {result.elapsed_seconds:.0f} | {last_line} |")
    return "\n".join(lines) + "\n"
