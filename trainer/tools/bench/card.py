"""The card's whole training in both modes, by the program itself, and the rows of it for a table; no torch."""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.config.errors import TrainingError
from trainer.tools.bench.configs import check_names
from trainer.tools.bench.tables import table_lines
from trainer.tools.worker_processes import last_line
from trainer.tracking.records import EvalRecord, EventRecord, StepRecord, read_records

TRAIN_SCRIPT = Path(__file__).parents[3] / "launch" / "train.py"
CARD_ROWS = 13_241  # training examples of the reference run, of 1,024 tokens each
VAL_SHARE = 0.02  # of the rows, beside those
HEADINGS = ("mode", "device", "steps", "time", "GPU hours", "tokens/s", "peak GiB", "execution", "validation loss")


def measure_card(args: argparse.Namespace) -> int:
    """Train each mode, then write card.json and card.md."""
    check_names("--modes", args.modes, ("full", "lora"))
    folder = args.output_dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    data = args.data
    if data is None:
        vocab_size = 50_257
        if Path(args.model).is_dir():
            from transformers import AutoConfig

            vocab_size = AutoConfig.from_pretrained(args.model, trust_remote_code=False).vocab_size
        data = str(write_rows(folder / "rows.jsonl", args.rows, args.block_size, vocab_size))
    rows = [_train(mode, data, args, folder / mode) for mode in args.modes]
    text = format_table(rows)
    (folder / "card.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "card.md").write_text(text)
    print(f"\n{text}\n{folder / 'card.json'} has every number")
    return 0


def write_rows(path: Path, num_rows: int, width: int, vocab_size: int) -> Path:
    """Rows of token ids that count upwards from a random start: learnable, and no tokenizer is needed."""
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(round(num_rows * (1 + VAL_SHARE)) + 1):
            start = rng.randrange(vocab_size)
            file.write(json.dumps({"input_ids": [(start + n) % vocab_size for n in range(width)]}) + "\n")
    return path


def train_argv(mode: str, data: str, args: argparse.Namespace, folder: Path) -> list[str]:
    """The flags of launch/train.py: the card's preset, and what cannot be had here."""
    flags = f"--mode {mode} --preset card --model {args.model} --init {args.init} --objective blocks --wandb disabled"
    flags += f" --block-size {args.block_size} --num-samples 0 --save-every never"
    flags += f" --max-steps {args.max_steps} --eval-every never" if args.max_steps else ""
    return [*flags.split(), "--data", data, "--output-dir", str(folder)]


def _train(mode: str, data: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={args.ranks}"] if args.ranks > 1 else []
    command = [sys.executable, *launcher, str(TRAIN_SCRIPT), *train_argv(mode, data, args, folder)]
    print(f"training {mode}, {folder}", flush=True)
    log_file = folder.with_suffix(".log")
    with open(log_file, "w", encoding="utf-8") as log:
        exit_code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False).returncode
    if exit_code:
        raise TrainingError(f"{mode} ended with exit code {exit_code}: {last_line(log_file.read_text())}")
    return _read_row(folder)


def _read_row(folder: Path) -> dict[str, Any]:
    """What a finished run took and reached."""
    metadata = json.loads((folder / "run.json").read_text())
    records = list(read_records(folder / "metrics.jsonl"))
    steps = [record for record in records if isinstance(record, StepRecord)]
    finished = next(record for record in records if isinstance(record, EventRecord) and record.event == "finished")
    hardware, seconds = metadata["hardware"], steps[-1].time - steps[0].time
    return {
        "mode": metadata["mode"],
        "device": f"{metadata['resolved']['ranks']} x {hardware['gpu'] or hardware['cpu']}",
        "steps": len(steps),
        "seconds": finished.facts["wall_seconds"],
        "device_hours": finished.facts["device_hours"],
        "tokens_per_second": (steps[-1].tokens - steps[0].tokens) / seconds if seconds else None,
        "peak_memory_bytes": finished.facts["peak_memory_bytes"],
        "execution": metadata["execution"],
        "losses": [[record.epoch, record.loss] for record in records if isinstance(record, EvalRecord)],
        "versions": metadata["versions"],
    }


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    cells = (
        [
            row["mode"],
            row["device"],
            f"{row['steps']:,}",
            f"{row['seconds'] / 60:.1f} min",
            f"{row['device_hours']:.2f}",
            f"{row['tokens_per_second'] or 0:,.0f}",
            f"{row['peak_memory_bytes'] / 2**30:.2f}",
            row["execution"][-1]["path"],
            ", ".join(f"{loss:.4f}" for _, loss in row["losses"]),
        ]
        for row in rows
    )
    versions = rows[0]["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "deepspeed", "peft"))
    return "\n".join([*table_lines(HEADINGS, cells, num_left=2), "", f"The card's preset; {named}."]) + "\n"
