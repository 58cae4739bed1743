"""The tables of the comparison: values for JSON, and the same as text in pandas frames for pages and the console."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from trainer.config import reference
from trainer.report.comparability import reference_blockers
from trainer.report.formats import format_bytes, format_duration, format_percent
from trainer.report.full_vs_lora import difference_to_reference
from trainer.report.run_data import RunData
from trainer.report.seed_groups import MODE_NAMES, SeedGroup

REFERENCE_LABEL = "card"
NO_VALUE = "-"  # what a cell shows that has no value
NOT_STATED = ""  # what the card's row shows where the card says nothing
MAX_SIDE_BY_SIDE = 8  # runs side by side; more are one below the other
Format = Callable[[Any], str]


@dataclass(frozen=True)
class MeanStd:
    """Mean and sample standard deviation of n values, two or more."""

    mean: float
    sd: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows by column, how each column is headed and its numbers are formatted, and notes to read with it."""

    title: str
    rows: Sequence[Mapping[str, Any]]
    headings: Mapping[str, str]
    formats: Mapping[str, Format] = field(default_factory=dict)
    format_text: Callable[[str], str] = str
    notes: Sequence[str] = ()
    is_transposed: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def to_records(self) -> list[dict[str, Any]]:
        """The rows as {key: value}, for comparison.json."""
        return [{key: _to_json(row.get(key)) for key in self.headings} for row in self.rows]

    def to_text(self) -> pd.DataFrame:
        """The same in words under the headings; columns become rows where the table is transposed."""
        cells = [[self._format(key, row.get(key)) for key in self.headings] for row in self.rows]
        headings = list(self.headings.values())
        if self.is_transposed:
            headings, *cells = map(list, zip(headings, *cells, strict=True))
        return pd.DataFrame(cells, columns=pd.Index(headings), dtype=object)

    def _format(self, key: str, value: Any) -> str:
        if value is None:
            return NO_VALUE
        return self.format_text(value) if isinstance(value, str) else self.formats.get(key, str)(value)


def build_epoch_table(groups: Sequence[SeedGroup], with_reference: bool) -> Table:
    """Step, examples, losses and perplexity at each epoch, and the difference to the card where there may be one."""
    headings = {
        "epoch": "epoch",
        "run": "run",
        "step": "step",
        "examples": "examples",
        "train_loss": "train loss",
        "val_loss": "validation loss",
        "perplexity": "perplexity",
        "to_card": "loss − card's",
    }
    if not with_reference:
        del headings["to_card"]
    epochs = {epoch for group in groups for run in group.runs for epoch in _evaluated_epochs(run)}
    reference_rows = {row.epoch: row for row in reference.CURVE} if with_reference else {}
    rows: list[Mapping[str, Any]] = []
    for epoch in sorted(epochs | set(reference_rows)):
        if epoch in reference_rows:
            rows.append(_reference_row(reference_rows[int(epoch)]))
        rows += [row for group in groups if (row := _group_row(group, epoch)) is not None]
    notes = [
        "Losses in nats per token. The train loss of a run is the token mean of the epoch; "
        "the card's is the last value its program logged."
    ]
    incomparable = [group.label for group in groups if any(reference_blockers(run) for run in group.runs)]
    if with_reference and incomparable:
        notes.append(f"No difference to the card for {', '.join(incomparable)}: not comparable with it.")
    if any(len(group.runs) > 1 for group in groups):
        notes.append("Several seeds: mean ± one sample standard deviation, n is the number of runs.")
    formats: dict[str, Format] = {
        "epoch": lambda value: f"{value:g}",
        **dict.fromkeys(("step", "examples"), format_count),
        **dict.fromkeys(("train_loss", "val_loss"), format_loss),
        "perplexity": lambda value: format_loss(value, digits=3),
        "to_card": lambda value: format_loss(value, sign="+"),
    }
    return Table(title="By epoch", headings=headings, rows=rows, formats=formats, notes=notes)


def _evaluated_epochs(run: RunData) -> set[float]:
    """The whole epochs at which the run was evaluated, and the end where it is within one."""
    epochs = {
        float(round(epoch)) for epoch in run.evals["epoch"] if run.index_at_epoch(run.evals, round(epoch)) is not None
    }
    if run.final_eval and run.index_at_epoch(run.evals, round(run.final_eval["epoch"])) != len(run.evals["epoch"]) - 1:
        epochs.add(round(run.final_eval["epoch"], 4))
    return epochs


def _reference_row(row: reference.ReferenceRow) -> dict[str, Any]:
    examples = [num_examples * row.epoch for num_examples in reference.EXAMPLES_PER_EPOCH]
    return {**vars(row), "run": REFERENCE_LABEL, "examples": examples, "to_card": NOT_STATED}


def _group_row(group: SeedGroup, epoch: float) -> dict[str, Any] | None:
    evaluated = [(run, index) for run in group.runs if (index := run.index_at_epoch(run.evals, epoch)) is not None]
    if not evaluated:
        return None
    run, index = evaluated[0]
    train_rows = [(run, run.index_at_epoch(run.epochs, epoch)) for run, _ in evaluated if epoch > 0]
    return {
        "epoch": epoch,
        "run": group.label + (f", n = {len(evaluated)}" if len(group.runs) > 1 else ""),
        "step": _finite_or_none(run.evals["step"][index]),
        "examples": _finite_or_none(run.evals["samples"][index]),
        "train_loss": _mean_value([run.epochs["train_loss"][row] for run, row in train_rows if row is not None]),
        "val_loss": _mean_value([run.evals["loss"][row] for run, row in evaluated]),
        "perplexity": _mean_value([run.evals["perplexity"][row] for run, row in evaluated]),
        "to_card": difference_to_reference(group, epoch),
    }


def _mean_value(values: Sequence[float]) -> float | MeanStd | None:
    """The value of one run, mean and spread of several."""
    if not values or not np.isfinite(values).all():
        return None
    mean = statistics.fmean(values)
    return mean if len(values) == 1 else MeanStd(mean, statistics.stdev(map(float, values)), len(values))


def build_run_table(groups: Sequence[SeedGroup], with_reference: bool) -> Table:
    """What each run cost and how good it got; in the order given, not by rank."""
    headings = {
        "run": "run",
        "run_id": "id",
        "mode": "mode",
        "state": "state",
        "lr": "learning rate",
        "best_val_loss": "best validation loss",
        "best_epoch": "best at epoch",
        "best_step": "best at step",
        "final_val_loss": "final validation loss",
        "bits_per_byte": "final bits per byte",
        "base_val_loss": "validation loss before training",
        "forgetting": "forgetting (nats per token)",
        "trainable": "trainable parameters",
        "share": "share of its parameters",
        "peak_memory_bytes": "peak memory",
        "optimizer_bytes": "optimizer state",
        "tokens_per_second": "tokens/s (median)",
        "wall_seconds": "wall time",
        "device_hours": "device-hours",
        "checkpoint_bytes": "checkpoint size",
        "export_bytes": "export size",
        "ds_config": "ZeRO file",
        "ranks": "ranks",
        "precision": "precision",
        "seed": "seed",
    }
    run_rows = [_run_row(run) for group in groups for run in group.runs]
    headings = {key: name for key, name in headings.items() if any(row[key] is not None for row in run_rows)}
    rows = [_reference_run_row(headings), *run_rows] if with_reference else run_rows
    formats: dict[str, Format] = {
        **dict.fromkeys(("base_val_loss", "best_val_loss", "final_val_loss"), format_loss),
        **dict.fromkeys(("trainable", "tokens_per_second", "best_step"), format_count),
        **dict.fromkeys(("peak_memory_bytes", "optimizer_bytes", "checkpoint_bytes", "export_bytes"), format_bytes),
        "bits_per_byte": format_loss,
        "forgetting": lambda value: format_loss(value, sign="+"),
        "share": format_percent,
        **dict.fromkeys(("best_epoch", "lr", "device_hours"), format_short),
        "wall_seconds": format_duration,
    }
    return Table(
        title="By run: quality and cost",
        headings=headings,
        rows=rows,
        formats=formats,
        is_transposed=len(rows) <= MAX_SIDE_BY_SIDE,
    )


def _run_row(run: RunData) -> dict[str, Any]:
    rates = run.steps["tokens_per_second"]
    rates = rates[np.isfinite(rates)]
    best, final = run.best_eval or {}, run.final_eval or {}
    costs = ("optimizer_bytes", "device_hours", "checkpoint_bytes", "export_bytes", "peak_memory_bytes", "wall_seconds")
    return {
        "run": run.name,
        "run_id": run.run_id,
        "mode": MODE_NAMES[run.mode],
        "state": run.state + (" (early stop)" if run.summary.get("early_stop") else ""),
        "trainable": run.get("model.trainable"),
        "share": run.get("model.share"),
        "tokens_per_second": float(np.median(rates)) if len(rates) else None,
        **{key: run.summary.get(key) for key in costs},
        **({"peak_memory_bytes": "resumed: unknown", "wall_seconds": "resumed: unknown"} if run.get("resumed") else {}),
        "base_val_loss": run.initial_loss,
        "best_val_loss": best.get("loss"),
        "best_epoch": best.get("epoch"),
        "best_step": best.get("step"),
        "final_val_loss": final.get("loss"),
        "bits_per_byte": next(map(_finite_or_none, run.evals["bits_per_byte"][-1:]), None),
        "forgetting": run.forgetting,
        "lr": run.get("resolved.lr"),
        "ds_config": run.get("resolved.ds_config"),
        "ranks": run.get("resolved.ranks"),
        "precision": run.get("resolved.precision"),
        "seed": run.get("settings.train.seed"),
    }


def _reference_run_row(headings: Mapping[str, str]) -> dict[str, Any]:
    last_row = reference.CURVE[-1]
    values: dict[str, Any] = {
        "run": REFERENCE_LABEL,
        "run_id": reference.NAME,
        "mode": "full",
        "state": "published",
        "lr": reference.SETTINGS["lr"],
        "trainable": reference.SETTINGS["trainable_parameters"],
        "share": 1.0,
        "best_val_loss": last_row.val_loss,
        "best_epoch": last_row.epoch,
        "best_step": last_row.step,
        "final_val_loss": last_row.val_loss,
        "seed": reference.SETTINGS["seed"],
    }
    return {key: values.get(key, NOT_STATED) for key in headings}


# --- how values read ---


def format_loss(value: float | MeanStd, digits: int = 4, sign: str = "") -> str:
    """A loss in nats per token, to four digits as the card has them; with its spread over several seeds."""
    if isinstance(value, MeanStd):
        return f"{value.mean:{sign}.{digits}f} ± {value.sd:.{digits}f}"
    return f"{value:{sign}.{digits}f}"


def format_count(value: float | list[int]) -> str:
    """A whole number with separators, or the range of two."""
    return "–".join(f"{bound:,}" for bound in value) if isinstance(value, list) else f"{value:,.0f}"


def format_short(value: float) -> str:
    """Three or four significant digits."""
    return f"{value:.4g}"


def _to_json(value: Any) -> Any:
    if isinstance(value, MeanStd):
        return vars(value)
    return None if isinstance(value, str) and value == NOT_STATED else value


def _finite_or_none(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
