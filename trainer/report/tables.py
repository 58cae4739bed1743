"""The tables of the comparison: one row an epoch and group, one row a run, one row a setting. Values stay numbers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.config import reference
from trainer.report.comparability import MetadataField, compare_metadata, reference_blockers
from trainer.report.full_vs_lora import difference_to_reference
from trainer.report.run_data import RunData, Series
from trainer.report.seed_groups import MODE_NAMES, MeanStd, SeedGroup, mean_std
from trainer.report.verdict import format_percent

REFERENCE_LABEL = "card"
NO_VALUE = "-"  # what a cell shows that has no value
MAX_TEXT_CHARS = 300  # characters of a text in a cell
MAX_HASH_CHARS = 12  # of a fingerprint in a cell; comparison.json has it whole


@dataclass(frozen=True)
class Cell:
    """One value and how it reads."""

    value: Any
    text: str


@dataclass(frozen=True)
class Table:
    """Columns by key and heading (units in the heading), rows of cells, and notes to be read with them."""

    title: str
    columns: dict[str, str]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def to_records(self) -> list[dict[str, Any]]:
        """The rows as {key: value}, for comparison.json."""
        return [{key: cell.value for key, cell in zip(self.columns, row, strict=True)} for row in self.rows]

    def transpose(self) -> "Table":
        """Columns as rows: easier to read, and to scroll, where there are few rows and many columns."""
        headings = list(self.columns.values())
        names = [row[0].text for row in self.rows]
        columns = {"": headings[0], **{str(i): name for i, name in enumerate(names)}}
        rows = tuple(
            (Cell(heading, heading), *(row[i] for row in self.rows)) for i, heading in enumerate(headings) if i
        )
        return Table(self.title, columns, rows, self.notes)


def build_epoch_table(groups: Sequence[SeedGroup], with_reference: bool) -> Table:
    """Step, examples, losses and perplexity at each epoch, and the difference to the card where there may be one."""
    columns = {
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
        del columns["to_card"]
    epochs = sorted(
        {epoch for group in groups for run in group.runs for epoch in _evaluated_epochs(run)}
        | ({row.epoch for row in reference.CURVE} if with_reference else set())
    )
    rows = []
    for epoch in epochs:
        reference_row = next((row for row in reference.CURVE if row.epoch == epoch), None) if with_reference else None
        if reference_row:
            rows.append(_reference_row(reference_row))
        rows += [row for group in groups if (row := _seed_group_row(group, epoch, with_reference)) is not None]
    notes = [
        "Losses in nats per token. The train loss of a run is the token mean of the epoch; "
        "the card's is the last value its program logged."
    ]
    if with_reference:
        incomparable_labels = [group.label for group in groups if any(reference_blockers(run) for run in group.runs)]
        if incomparable_labels:
            notes.append(f"No difference to the card for {', '.join(incomparable_labels)}: not comparable with it.")
    if any(len(group.runs) > 1 for group in groups):
        notes.append("Several seeds: mean ± one standard deviation, n is the number of runs.")
    return Table("By epoch", columns, tuple(rows), tuple(notes))


def _evaluated_epochs(run: RunData) -> set[float]:
    """The whole epochs at which the run was evaluated, and the end where it is within one."""
    epochs = {
        float(round(epoch)) for epoch in run.evals["epoch"] if run.index_at_epoch(run.evals, round(epoch)) is not None
    }
    if run.final_eval and run.index_at_epoch(run.evals, round(run.final_eval["epoch"])) != len(run.evals["epoch"]) - 1:
        epochs.add(round(run.final_eval["epoch"], 4))
    return epochs


def _reference_row(reference_row: reference.ReferenceRow) -> tuple[Cell, ...]:
    low, high = ((examples * reference_row.epoch) for examples in reference.EXAMPLES_PER_EPOCH)
    return (
        Cell(reference_row.epoch, str(reference_row.epoch)),
        Cell(REFERENCE_LABEL, REFERENCE_LABEL),
        number_cell(reference_row.step),
        Cell([low, high], f"{low:,}–{high:,}"),
        loss_cell(reference_row.train_loss),
        loss_cell(reference_row.val_loss),
        Cell(reference_row.perplexity, f"{reference_row.perplexity:.3f}"),
        Cell(None, ""),
    )


def _seed_group_row(group: SeedGroup, epoch: float, with_reference: bool) -> tuple[Cell, ...] | None:
    evaluated_runs = [
        (run, index)
        for run in group.runs
        if (index := run.index_at_epoch(run.evals, epoch)) is not None and run.evals["epoch"][index] is not None
    ]
    if not evaluated_runs:
        return None
    name = group.label + (f", n = {len(evaluated_runs)}" if len(group.runs) > 1 else "")
    run, index = evaluated_runs[0]
    val_loss_stats = mean_std([float(run.evals["loss"][index]) for run, index in evaluated_runs])
    train_loss_stats = mean_std(
        [
            value
            for run, _ in evaluated_runs
            if (value := _value_at_epoch(run, run.epochs, "train_loss", epoch)) is not None
        ]
    )
    cells = [
        Cell(epoch, f"{epoch:g}"),
        Cell(group.label, name),
        number_cell(_finite_or_none(run.evals["step"][index])),
        number_cell(_finite_or_none(run.evals["samples"][index])),
        _mean_std_cell(train_loss_stats if epoch > 0 else None),
        _mean_std_cell(val_loss_stats),
        _mean_std_cell(mean_std([float(run.evals["perplexity"][index]) for run, index in evaluated_runs]), 3),
    ]
    if with_reference:
        gap = difference_to_reference(group, epoch)
        cells.append(Cell(None, NO_VALUE) if gap is None else Cell(gap, f"{gap:+.4f}"))
    return tuple(cells)


def _value_at_epoch(run: RunData, series: Series, column: str, epoch: float) -> float | None:
    index = run.index_at_epoch(series, epoch)
    return None if index is None else _finite_or_none(series[column][index])


def build_run_table(groups: Sequence[SeedGroup], with_reference: bool) -> Table:
    """What each run cost and how good it got; in the order given, not by rank."""
    columns = {
        "run": "run",
        "run_id": "id",
        "mode": "mode",
        "state": "state",
        "trainable": "trainable parameters",
        "share": "share of its parameters",
        "peak_memory_bytes": "peak memory",
        "optimizer_bytes": "optimizer state",
        "tokens_per_second": "tokens/s (median)",
        "wall_seconds": "wall time",
        "device_hours": "device-hours",
        "checkpoint_bytes": "checkpoint size",
        "export_bytes": "export size",
        "base_val_loss": "validation loss before training",
        "best_val_loss": "best validation loss",
        "best_epoch": "best at epoch",
        "best_step": "best at step",
        "final_val_loss": "final validation loss",
        "ds_config": "ZeRO file",
        "ranks": "ranks",
        "precision": "precision",
        "seed": "seed",
    }
    rows = [_run_row(run) for group in groups for run in group.runs]
    if with_reference:
        rows.insert(0, _reference_run_row(list(columns)))
    return Table("By run: cost and quality", columns, tuple(rows))


def _run_row(run: RunData) -> tuple[Cell, ...]:
    tokens_per_second = run.steps["tokens_per_second"]
    tokens_per_second = tokens_per_second[np.isfinite(tokens_per_second)]
    best_eval, final_eval = run.best_eval or {}, run.final_eval or {}
    share = run.get("model.share")
    device_hours = run.summary.get("device_hours")
    return (
        Cell(run.name, run.name),
        Cell(run.run_id, run.run_id),
        Cell(run.mode, MODE_NAMES[run.mode]),
        Cell(run.state, run.state + (" (early stop)" if run.summary.get("early_stop") else "")),
        number_cell(run.get("model.trainable")),
        Cell(share, NO_VALUE if share is None else format_percent(share)),
        bytes_cell(run.summary.get("peak_memory_bytes")),
        bytes_cell(run.summary.get("optimizer_bytes")),
        number_cell(float(np.median(tokens_per_second)) if len(tokens_per_second) else None),
        duration_cell(run.summary.get("wall_seconds")),
        Cell(device_hours, NO_VALUE if device_hours is None else f"{device_hours:.3g}"),
        bytes_cell(run.summary.get("checkpoint_bytes")),
        bytes_cell(run.summary.get("export_bytes")),
        loss_cell(run.initial_loss),
        loss_cell(best_eval.get("loss")),
        Cell(best_eval.get("epoch"), f"{best_eval['epoch']:.4g}" if best_eval else NO_VALUE),
        number_cell(best_eval.get("step")),
        loss_cell(final_eval.get("loss")),
        plain_cell(run.get("resolved.ds_config")),
        plain_cell(run.get("resolved.ranks")),
        plain_cell(run.get("resolved.precision")),
        plain_cell(run.get("settings.train.seed")),
    )


def _reference_run_row(keys: list[str]) -> tuple[Cell, ...]:
    last_row = reference.CURVE[-1]
    cells = {
        "run": Cell(REFERENCE_LABEL, REFERENCE_LABEL),
        "mode": Cell("full", "full"),
        "state": Cell("published", "published"),
        "trainable": number_cell(float(str(reference.SETTINGS["trainable_parameters"]))),
        "share": Cell(1.0, "100%"),
        "best_val_loss": loss_cell(last_row.val_loss),
        "best_epoch": Cell(last_row.epoch, str(last_row.epoch)),
        "best_step": number_cell(last_row.step),
        "final_val_loss": loss_cell(last_row.val_loss),
        "seed": plain_cell(reference.SETTINGS["seed"]),
        "run_id": Cell(None, reference.NAME),
    }
    return tuple(cells.get(key, Cell(None, "unknown")) for key in keys)


def build_generation_table(groups: Sequence[SeedGroup]) -> Table:
    """The prompts that were completed at each evaluation: the first and the last completion beside the reference."""
    columns = {"run": "run", "prompt": "prompt", "reference": "reference", "first": "at first", "last": "at last"}
    rows = []
    for run in (run for group in groups for run in group.runs if run.generations):
        first_evaluation, last_evaluation = run.generations[0], run.generations[-1]
        for first_text, last_text in zip(
            first_evaluation.get("texts", ()), last_evaluation.get("texts", ()), strict=False
        ):
            cells = [_text_cell(last_text["prompt"]), _text_cell(last_text["reference"])]
            cells += [
                _text_cell(f"(epoch {evaluation['epoch']:.4g}) {text['completion']}")
                for evaluation, text in ((first_evaluation, first_text), (last_evaluation, last_text))
            ]
            rows.append((Cell(run.name, run.name), *cells))
    notes = ("Completed greedily, the likeliest token each time.",)
    return Table("Samples", columns, tuple(rows), notes if rows else ())


def build_score_table(groups: Sequence[SeedGroup]) -> Table:
    """What --score-samples found at the last evaluation of each run that asked for it."""
    scored_runs = [
        (run, run.generations[-1])
        for group in groups
        for run in group.runs
        if run.generations and run.generations[-1].get("scores")
    ]
    names = list(dict.fromkeys(name for _, event in scored_runs for name in event["scores"]))
    columns = {
        "run": "run",
        "epoch": "epoch",
        "texts": "texts",
        **{name: SCORE_HEADINGS.get(name, name) for name in names},
    }
    rows = tuple(
        (
            Cell(run.name, run.name), Cell(event["epoch"], f"{event['epoch']:.4g}"), number_cell(event.get("scored")),
            *(loss_cell(event["scores"].get(name)) for name in names),
        )
        for run, event in scored_runs
    )  # fmt: skip
    return Table("Completions against their references", columns, rows)


#: headings of the scores
SCORE_HEADINGS = {
    "exact_match": "exact match", "bleu": "BLEU (0-100)", "chrf": "chrF (0-100)", "rouge_l": "ROUGE-L",
    "date": "date right", "place": "place right", "fatalities": "fatalities right",
    "invented_deaths": "deaths invented", "reference/invented_deaths": "deaths beyond the record in references",
    "reference/date": "date in references", "reference/place": "place in references",
    "reference/fatalities": "fatalities in references",
}  # fmt: skip


def _text_cell(text: str) -> Cell:
    """A text on one line, cut where it is very long."""
    line = " ".join(str(text).split())
    return Cell(text, line if len(line) <= MAX_TEXT_CHARS else line[: MAX_TEXT_CHARS - 1] + "…")


def build_diagnostics_table(groups: Sequence[SeedGroup]) -> Table:
    """What each run noticed of itself while it ran."""
    columns = {"run": "run", "step": "at step", "finding": "what it noticed, the likely cause, and what to try"}
    rows = tuple(
        (Cell(run.name, run.name), number_cell(step), Cell(line, line))
        for group in groups for run in group.runs for step, line in run.diagnostics
    )  # fmt: skip
    return Table("Diagnosis", columns, rows)


def build_settings_tables(groups: Sequence[SeedGroup], with_reference: bool) -> tuple[Table, Table]:
    """Every setting and fact: those that differ, and those that are the same; the columns are groups and the card."""
    fields = compare_metadata([group.runs for group in groups], with_reference)
    names = ([REFERENCE_LABEL] if with_reference else []) + [group.label for group in groups]
    columns = {"fact": "setting or fact", **{str(i): name for i, name in enumerate(names)}}
    differing_rows = tuple(_field_row(field) for field in fields if not field.is_same)
    shared_rows = tuple(_field_row(field) for field in fields if field.is_same)
    return Table("Different", columns, differing_rows), Table("Same, where known", columns, shared_rows)


def _field_row(field: MetadataField) -> tuple[Cell, ...]:
    cells = [
        Cell(value, _format_field_value(field.name, value) if is_known else "unknown")
        for value, is_known in zip(field.values, field.is_known, strict=True)
    ]
    return (Cell(field.name, field.name), *cells)


def _format_field_value(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        return " | ".join(_format_field_value(name, item) for item in value)
    if isinstance(value, list):
        return ", ".join(_format_field_value(name, item) for item in value) or "none"
    if value is None:
        return "left out" if name.startswith("settings.") else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    if isinstance(value, str) and len(value) > MAX_HASH_CHARS and re.fullmatch(r"[0-9a-f]{32,}", value):
        return f"{value[:MAX_HASH_CHARS]}…"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def loss_cell(value: float | None) -> Cell:
    """A loss in nats per token, to four digits as the card has them."""
    return Cell(value, NO_VALUE if value is None else f"{value:.4f}")


def number_cell(value: float | None) -> Cell:
    """A whole number with separators."""
    return Cell(value, NO_VALUE if value is None else f"{value:,.0f}")


def plain_cell(value: Any) -> Cell:
    """A value that reads as itself."""
    return Cell(value, NO_VALUE if value is None else str(value))


def bytes_cell(value: float | None) -> Cell:
    """Bytes, in MB or GB of ten."""
    if value is None:
        return Cell(None, NO_VALUE)
    return Cell(value, f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB")


def duration_cell(seconds: float | None) -> Cell:
    """Seconds, in the units a person would use."""
    if seconds is None:
        return Cell(None, NO_VALUE)
    minutes = seconds / 60
    if minutes < 2:
        return Cell(seconds, f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s")
    return Cell(seconds, f"{minutes:.1f} min" if minutes < 60 else f"{int(minutes // 60)} h {minutes % 60:02.0f} min")


def _mean_std_cell(stats: MeanStd | None, digits: int = 4) -> Cell:
    if stats is None or not np.isfinite(stats.mean):
        return Cell(None, NO_VALUE)
    if stats.sd is None:
        return Cell(stats.mean, f"{stats.mean:.{digits}f}")
    return Cell({"mean": stats.mean, "sd": stats.sd, "n": stats.n}, f"{stats.mean:.{digits}f} ± {stats.sd:.{digits}f}")


def _finite_or_none(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
