"""What an optimizer step costs: programs in alternation, each in processes of its own; JSON and a Markdown table."""

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trainer.config.errors import UserError
from trainer.config.text import markdown_table
from trainer.tools.worker_processes import run_job
from trainer.training.provenance import cpu_name

TIMEOUT_SECONDS = 3600.0  # for one program in one round
HEADINGS = ("mode", "batch", "program", "ms/step", "spread", "tokens/s", "speed", "FLOP share", "peak GiB", "GPU GiB")
EXPLANATION = (
    "program: in brackets how its steps really ran; ms/step: median over all windows; spread: of the rounds' medians, "
    "of one round its windows; speed: tokens/s over the first line of the same mode and batch, median (least-most) of "
    "the rounds, so that a line without X at 0.80 says that X makes steps 1.25 times as fast; FLOP share: of {:.3g} "
    "TFLOP/s, one large {} matrix product in the same process; peak GiB: in use at most; GPU GiB: taken of the GPU, as "
    "nvidia-smi says."
)

#: A line of the table: the fields of its configuration, `name`, `problem`, `results` (one a round) and their summary.
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """One line of the table."""

    program: str  #: ours, plain or hf
    mode: str
    global_batch: int  #: examples per step over all ranks
    ds_config: str | None = None  #: the ZeRO file; None: the program has none
    world_size: int = 1
    model: str = "gpt2"
    block_size: int = 1024
    precision: str = "fp32"
    device: str = "cpu"
    dropout: float | None = None  #: None: the model's own
    execution: str = "auto"  #: of ours
    without: str | None = None  #: of ours: the faster path that is turned off
    is_ragged: bool = False  #: rows of many lengths, packed unless `without` is packing
    num_windows: int = 5
    steps_per_window: int = 4
    warmup_steps: int = 3  #: before the first window

    @property
    def name(self) -> str:
        """As the table prints it."""
        ranks = f"{self.world_size} ranks" if self.world_size > 1 else None
        execution = self.execution if self.execution != "auto" else None
        packing = "packed" if self.is_ragged and self.without != "packing" else None
        without = f"without {self.without}" if self.without else None
        return " ".join(
            filter(None, (self.program, self.ds_config, ranks, self.precision, execution, packing, without))
        )

    @property
    def num_steps(self) -> int:
        """Optimizer steps of a round."""
        return self.warmup_steps + self.num_windows * self.steps_per_window


def build_configs(args: argparse.Namespace, device: str) -> list[BenchmarkConfig]:
    """For each mode and batch: ours in every combination, ours without each faster path, then the other programs.

    Those two run on one rank and in the first precision.
    """
    for global_batch, world_size in itertools.product(args.batches, args.ranks):
        if global_batch % world_size:
            raise UserError(f"--batches {global_batch}: does not divide over {world_size} ranks")
    if "packing" in args.without and args.against:
        raise UserError("--without packing: compares rows of many lengths, which other programs lack; omit --against")
    precisions = args.precision or ["bf16" if device == "cuda" else "fp32"]
    configs = []
    for mode, global_batch in itertools.product(args.modes, args.batches):
        fields: dict[str, Any] = {
            "mode": mode,
            "global_batch": global_batch,
            "model": args.model,
            "block_size": args.block_size,
            "device": device,
            "dropout": args.dropout,
            "is_ragged": "packing" in args.without,
            "num_windows": args.windows,
            "steps_per_window": args.window,
            "warmup_steps": args.warmup or (10 if device == "cuda" else 3),
        }
        for precision, ranks, file, way in itertools.product(precisions, args.ranks, args.ds_config, args.execution):
            ours = {"program": "ours", "precision": precision, "world_size": ranks, "ds_config": file, "execution": way}
            configs.append(BenchmarkConfig(**fields, **ours))
        ours = {"program": "ours", "precision": precisions[0], "ds_config": args.ds_config[0]}
        configs += [BenchmarkConfig(**fields, **ours, without=path) for path in args.without]
        configs += [BenchmarkConfig(**fields, program=peer, precision=precisions[0]) for peer in args.against]
    return configs


def measure_steps(args: argparse.Namespace) -> int:
    """Measure everything `args.rounds` times in turn, write and print the table; 1 where a program failed."""
    configs = build_configs(args, args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.output_dir.mkdir(parents=True, exist_ok=True)

    def write(rows: Sequence[Row]) -> str:
        text = format_markdown(rows, args.rounds)
        (args.output_dir / "bench.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
        (args.output_dir / "bench.md").write_text(text, encoding="utf-8")
        return text

    rows = run_rounds(configs, rounds=args.rounds, after_each=write)
    print(f"\n{write(rows)}\n{args.output_dir / 'bench.json'} has every window")
    return int(any(row["problem"] for row in rows))


def run_rounds(
    configs: Sequence[BenchmarkConfig], *, rounds: int, after_each: Callable[[list[Row]], object]
) -> list[Row]:
    """A row for each configuration. `after_each` gets the rows after each measurement, so that none is lost; what
    failed is not tried again."""
    rows: list[Row] = [
        {**asdict(config), "name": config.name, "problem": "not measured", "results": []} for config in configs
    ]
    for round_number in range(1, rounds + 1):
        for config, row in zip(configs, rows, strict=True):
            if row["problem"].startswith("failed"):
                continue
            answers, _, reason = run_job(
                ("-m", "trainer.tools.bench.worker"),
                {"config": asdict(config), "device": config.device},
                config.world_size,
                timeout_seconds=TIMEOUT_SECONDS,
            )
            row["problem"] = "" if answers else f"failed: {reason}"
            row["results"] += answers
            if answers:
                row |= _summarize(row["results"])
            outcome = row["problem"] or f"{1000 * row['rounds'][-1]:.1f} ms/step"
            label = f"{config.mode}, batch {config.global_batch}, {config.name}"
            print(f"round {round_number}/{rounds}  {label}: {outcome}", flush=True)
            # The rate over the first of the same mode and batch, round by round; within a round the first is one ahead.
            baselines: dict[tuple[str, int], Row] = {}
            for other in rows:
                baseline = baselines.setdefault((other["mode"], other["global_batch"]), other)
                pairs = zip(baseline.get("rounds", ()), other.get("rounds", ()), strict=False)
                if ratios := [base / seconds for base, seconds in pairs]:
                    other["speed"] = [statistics.median(ratios), min(ratios), max(ratios)]
            after_each(rows)
    return rows


def _summarize(results: Sequence[Mapping[str, Any]]) -> Row:
    """Medians over all windows of all rounds."""
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
        "device_memory": max(result["device_memory"] for result in results),
    }


def format_markdown(rows: Sequence[Row], rounds: int) -> str:
    """The table and where it was measured, in Markdown."""
    cells = []
    for row in rows:
        first_cells = [row["mode"], str(row["global_batch"])]
        if "step" not in row:
            cells.append([*first_cells, row["name"], row["problem"], *[""] * (len(HEADINGS) - 4)])
            continue
        spread = row["rounds"] if len(row["rounds"]) > 1 else row["results"][0]["windows"]
        cells.append(
            [
                *first_cells,
                f"{row['name']} ({row['ran_by']})" if row["ran_by"] else row["name"],
                f"{1000 * row['step']:.1f}",
                f"{1000 * min(spread):.1f}-{1000 * max(spread):.1f}",
                f"{row['tokens_per_second']:,.0f}",
                "{:.2f} ({:.2f}-{:.2f})".format(*row["speed"]) if "speed" in row else "",
                f"{100 * row['flop_share']:.0f}%",
                f"{row['peak_memory'] / 2**30:.2f}",
                f"{row['device_memory'] / 2**30:.2f}" if row["device_memory"] else "",
            ]
        )
    table = markdown_table(HEADINGS, cells) + "\n"
    measured = [row for row in rows if "step" in row]
    if not measured:
        return table
    row = measured[0]
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
