"""`launch/gpu_acceptance.py`: its parts, each a command with a limit, and a table of how they went; no torch."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.config.argument_parser import ArgumentParser
from trainer.config.errors import UserError

ROOT = Path(__file__).parents[3]
LIMIT_SECONDS = 480.0  # of all parts together
CARD_ROWS, CARD_WIDTH, CARD_VOCABULARY = 256, 1024, 50_257
CARD_STEPS = 60
CARD_FLAGS = (
    f"--preset card --model gpt2 --init random --objective blocks --max-steps {CARD_STEPS} --eval-every never "
    "--wandb disabled --num-samples 0"
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
    parser = ArgumentParser(prog="gpu_acceptance.py", description="Tests, doctor, benchmark and short runs on a GPU.")
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("gpu-acceptance"), metavar="DIR", help="default: gpu-acceptance")
    add("--parts", metavar="NAMES", help="some of the parts, with commas (default: all)")
    add("--limit", type=float, default=LIMIT_SECONDS, metavar="SECONDS", help=f"of all (default: {LIMIT_SECONDS:g})")
    args = parser.parse_args(argv)
    folder = args.output_dir.absolute()
    parts = build_parts(folder)
    names = args.parts.split(",") if args.parts else list(parts)
    for name in names:
        if name not in parts:
            raise UserError(f"--parts {name}: expected some of {', '.join(parts)}")
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "rows.jsonl")
    return run_parts({name: parts[name] for name in names}, folder, args.limit)


def build_parts(folder: Path) -> dict[str, list[str]]:
    """{name: command}, in the order in which they run; each writes below `folder`."""
    train = f"{{python}} launch/train.py --mode {{mode}} {CARD_FLAGS} --data {folder}/rows.jsonl"
    doctor = f"{{python}} launch/doctor.py --mode full {CARD_FLAGS} --data {folder}/rows.jsonl"
    commands = {
        "tests": "{python} -m pytest -q -m gpu -n 4",
        "doctor": f"{doctor} --output-dir {folder}/doctor-run --limit 120 --json",
        "bench": "{python} launch/bench.py --batches 2,16 --against plain,hf,hf-compile,hf-deepspeed --window 20 "
        f"--windows 3 --rounds 1 --output-dir {folder}/bench",
        "memory": "{python} launch/bench.py memory --shape gpt2 --block-size 1024 --steps 20",
        "card-full": f"{train.replace('{mode}', 'full')} --output-dir {folder}/card-full",
        "card-lora": f"{train.replace('{mode}', 'lora')} --output-dir {folder}/card-lora",
        "compare": f"{{python}} launch/compare.py {folder}/card-full {folder}/card-lora --no-card "
        f"--output-dir {folder}/compare",
    }  # fmt: skip
    return {
        name: [sys.executable if word == "{python}" else word for word in command.split()]
        for name, command in commands.items()
    }


def write_rows(path: Path) -> None:
    """Rows of token ids that count upwards from a random start: learnable, and no tokenizer is needed."""
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(CARD_ROWS):
            start = rng.randrange(CARD_VOCABULARY)
            row = [(start + position) % CARD_VOCABULARY for position in range(CARD_WIDTH)]
            file.write(json.dumps({"input_ids": row}) + "\n")


def run_parts(parts: Mapping[str, Sequence[str]], folder: Path, limit_seconds: float) -> int:
    """Run the commands one after the other; a part that fails stops no other. Returns 0 where all passed."""
    deadline = time.monotonic() + limit_seconds
    results: list[PartResult] = []
    for name, command in parts.items():
        results.append(_run_part(name, command, folder / f"{name}.log", deadline))
        print(_describe(results[-1]), flush=True)
        content = [asdict(result) for result in results]
        (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (folder / "results.md").write_text(format_table(results), encoding="utf-8")
    return int(any(result.exit_code != 0 for result in results))


def _run_part(name: str, command: Sequence[str], log_path: Path, deadline: float) -> PartResult:
    start_time = time.monotonic()
    if deadline <= start_time:
        return PartResult(name=name, exit_code=None, elapsed_seconds=0.0, last_line="not begun: the time was used up")
    with open(log_path, "w", encoding="utf-8") as log_file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log_file, stderr=subprocess.STDOUT,
            start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        try:
            exit_code: int | None = process.wait(deadline - start_time)
        except subprocess.TimeoutExpired:
            exit_code = None
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
    """Markdown."""
    lines = ["| part | exit code | seconds | last line |", "|---|--:|--:|---|"]
    for result in results:
        exit_code = "-" if result.exit_code is None else str(result.exit_code)
        last_line = result.last_line.replace("|", "\\|")
        lines.append(f"| {result.name} | {exit_code} | {result.elapsed_seconds:.0f} | {last_line} |")
    return "\n".join(lines) + "\n"
