"""The tables of the comparison: one row an epoch and group, one row a run, one row a setting. Values stay numbers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.config import reference
from trainer.report.comparability import Fact, facts, why_not_card
from trainer.report.full_vs_lora import card_difference
from trainer.report.paired_interval import MODE_NAMES, Group, Spread, spread
from trainer.report.run_data import Run, Series
from trainer.report.verdict import percent

CARD = "card"
NOT_TOLD = "-"  # what a cell shows that has no value
MOST_TEXT = 300  # characters of a text in a cell
HASH_LETTERS = 12  # of a fingerprint in a cell; comparison.json has it whole


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

    def records(self) -> list[dict[str, Any]]:
        """The rows as {key: value}, for comparison.json."""
        return [{key: cell.value for key, cell in zip(self.columns, row, strict=True)} for row in self.rows]

    def turned(self) -> "Table":
        """Columns as rows: easier to read, and to scroll, where there are few rows and many columns."""
        headings = list(self.columns.values())
        names = [row[0].text for row in self.rows]
        columns = {"": headings[0], **{str(i): name for i, name in enumerate(names)}}
        rows = tuple(
            (Cell(heading, heading), *(row[i] for row in self.rows)) for i, heading in enumerate(headings) if i
        )
        return Table(self.title, columns, rows, self.notes)


def by_epoch(groups: Sequence[Group], with_card: bool) -> Table:
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
    if not with_card:
        del columns["to_card"]
    epochs = sorted(
        {epoch for group in groups for run in group.runs for epoch in _epochs(run)}
        | ({row.epoch for row in reference.CURVE} if with_card else set())
    )
    rows = []
    for epoch in epochs:
        card = next((row for row in reference.CURVE if row.epoch == epoch), None) if with_card else None
        if card:
            rows.append(_card_row(card))
        rows += [row for group in groups if (row := _group_row(group, epoch, with_card)) is not None]
    notes = [
        "Losses in nats per token. The train loss of a run is the token mean of the epoch; "
        "the card's is the last value its program logged."
    ]
    if with_card:
        apart = [group.label for group in groups if any(why_not_card(run) for run in group.runs)]
        if apart:
            notes.append(f"No difference to the card for {', '.join(apart)}: not comparable with it.")
    if any(len(group.runs) > 1 for group in groups):
        notes.append("Several seeds: mean ± one standard deviation, n is the number of runs.")
    return Table("By epoch", columns, tuple(rows), tuple(notes))


def _epochs(run: Run) -> set[float]:
    """The whole epochs at which the run was evaluated, and the end where it is within one."""
    found = {float(round(epoch)) for epoch in run.evals["epoch"] if run.at_epoch(run.evals, round(epoch)) is not None}
    if run.final and run.at_epoch(run.evals, round(run.final["epoch"])) != len(run.evals["epoch"]) - 1:
        found.add(round(run.final["epoch"], 4))
    return found


def _card_row(card: reference.CardRow) -> tuple[Cell, ...]:
    low, high = ((examples * card.epoch) for examples in reference.EXAMPLES_PER_EPOCH)
    return (
        Cell(card.epoch, str(card.epoch)),
        Cell(CARD, CARD),
        number(card.step),
        Cell([low, high], f"{low:,}–{high:,}"),
        loss(card.train_loss),
        loss(card.val_loss),
        Cell(card.perplexity, f"{card.perplexity:.3f}"),
        Cell(None, ""),
    )


def _group_row(group: Group, epoch: float, with_card: bool) -> tuple[Cell, ...] | None:
    evals = [
        (run, at)
        for run in group.runs
        if (at := run.at_epoch(run.evals, epoch)) is not None and run.evals["epoch"][at] is not None
    ]
    if not evals:
        return None
    name = group.label + (f", n = {len(evals)}" if len(group.runs) > 1 else "")
    run, at = evals[0]
    losses = spread([float(run.evals["loss"][at]) for run, at in evals])
    trains = spread([value for run, _ in evals if (value := _at(run, run.epochs, "train_loss", epoch)) is not None])
    cells = [
        Cell(epoch, f"{epoch:g}"),
        Cell(group.label, name),
        number(_finite(run.evals["step"][at])),
        number(_finite(run.evals["samples"][at])),
        _spread_cell(trains if epoch > 0 else None),
        _spread_cell(losses),
        _spread_cell(spread([float(run.evals["perplexity"][at]) for run, at in evals]), 3),
    ]
    if with_card:
        gap = card_difference(group, epoch)
        cells.append(Cell(None, NOT_TOLD) if gap is None else Cell(gap, f"{gap:+.4f}"))
    return tuple(cells)


def _at(run: Run, rows: Series, column: str, epoch: float) -> float | None:
    at = run.at_epoch(rows, epoch)
    return None if at is None else _finite(rows[column][at])


def by_run(groups: Sequence[Group], with_card: bool) -> Table:
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
    if with_card:
        rows.insert(0, _card_run_row(list(columns)))
    return Table("By run: cost and quality", columns, tuple(rows))


def _run_row(run: Run) -> tuple[Cell, ...]:
    speed = run.steps["tokens_per_second"]
    speed = speed[np.isfinite(speed)]
    best, final = run.best or {}, run.final or {}
    share = run.fact("model.share")
    hours = run.end.get("device_hours")
    return (
        Cell(run.name, run.name),
        Cell(run.run_id, run.run_id),
        Cell(run.mode, MODE_NAMES[run.mode]),
        Cell(run.state, run.state + (" (early stop)" if run.end.get("early_stop") else "")),
        number(run.fact("model.trainable")),
        Cell(share, NOT_TOLD if share is None else percent(share)),
        size(run.end.get("peak_memory_bytes")),
        size(run.end.get("optimizer_bytes")),
        number(float(np.median(speed)) if len(speed) else None),
        duration(run.end.get("wall_seconds")),
        Cell(hours, NOT_TOLD if hours is None else f"{hours:.3g}"),
        size(run.end.get("checkpoint_bytes")),
        size(run.end.get("export_bytes")),
        loss(run.base_loss),
        loss(best.get("loss")),
        Cell(best.get("epoch"), f"{best['epoch']:.4g}" if best else NOT_TOLD),
        number(best.get("step")),
        loss(final.get("loss")),
        plain(run.fact("resolved.ds_config")),
        plain(run.fact("resolved.ranks")),
        plain(run.fact("resolved.precision")),
        plain(run.fact("settings.train.seed")),
    )


def _card_run_row(keys: list[str]) -> tuple[Cell, ...]:
    last = reference.CURVE[-1]
    told = {
        "run": Cell(CARD, CARD),
        "mode": Cell("full", "full"),
        "state": Cell("published", "published"),
        "trainable": number(float(str(reference.SETTINGS["trainable_parameters"]))),
        "share": Cell(1.0, "100%"),
        "best_val_loss": loss(last.val_loss),
        "best_epoch": Cell(last.epoch, str(last.epoch)),
        "best_step": number(last.step),
        "final_val_loss": loss(last.val_loss),
        "seed": plain(reference.SETTINGS["seed"]),
        "run_id": Cell(None, reference.NAME),
    }
    return tuple(told.get(key, Cell(None, "unknown")) for key in keys)


def samples(groups: Sequence[Group]) -> Table:
    """The prompts that were completed at each evaluation: the first and the last completion beside the reference."""
    columns = {"run": "run", "prompt": "prompt", "reference": "reference", "first": "at first", "last": "at last"}
    rows = []
    for run in (run for group in groups for run in group.runs if run.samples):
        first, last = run.samples[0], run.samples[-1]
        for before, after in zip(first.get("texts", ()), last.get("texts", ()), strict=False):
            cells = [_text(after["prompt"]), _text(after["reference"])]
            cells += [
                _text(f"(epoch {one['epoch']:.4g}) {text['completion']}")
                for one, text in ((first, before), (last, after))
            ]
            rows.append((Cell(run.name, run.name), *cells))
    notes = ("Completed greedily, the likeliest token each time.",)
    return Table("Samples", columns, tuple(rows), notes if rows else ())


def scores(groups: Sequence[Group]) -> Table:
    """What --metrics found at the last evaluation of each run that asked for it."""
    scored = [
        (run, run.samples[-1])
        for group in groups
        for run in group.runs
        if run.samples and run.samples[-1].get("scores")
    ]
    names = list(dict.fromkeys(name for _, told in scored for name in told["scores"]))
    columns = {"run": "run", "epoch": "epoch", "texts": "texts", **{name: SCORES.get(name, name) for name in names}}
    rows = tuple(
        (
            Cell(run.name, run.name), Cell(told["epoch"], f"{told['epoch']:.4g}"), number(told.get("scored")),
            *(loss(told["scores"].get(name)) for name in names),
        )
        for run, told in scored
    )  # fmt: skip
    return Table("Completions against their references", columns, rows)


#: headings of the scores
SCORES = {
    "exact_match": "exact match", "bleu": "BLEU (0-100)", "chrf": "chrF (0-100)", "rouge_l": "ROUGE-L",
    "date": "date right", "place": "place right", "fatalities": "fatalities right",
    "invented_deaths": "deaths invented", "reference/invented_deaths": "deaths beyond the record in references",
    "reference/date": "date in references", "reference/place": "place in references",
    "reference/fatalities": "fatalities in references",
}  # fmt: skip


def _text(text: str) -> Cell:
    """A text on one line, cut where it is very long."""
    line = " ".join(str(text).split())
    return Cell(text, line if len(line) <= MOST_TEXT else line[: MOST_TEXT - 1] + "…")


def diagnosis(groups: Sequence[Group]) -> Table:
    """What each run noticed of itself while it ran."""
    columns = {"run": "run", "step": "at step", "finding": "what it noticed, the likely cause, and what to try"}
    rows = tuple(
        (Cell(run.name, run.name), number(step), Cell(line, line))
        for group in groups for run in group.runs for step, line in run.findings
    )  # fmt: skip
    return Table("Diagnosis", columns, rows)


def same_and_different(groups: Sequence[Group], with_card: bool) -> tuple[Table, Table]:
    """Every setting and fact: those that differ, and those that are the same; the columns are groups and the card."""
    found = facts([group.runs for group in groups], with_card)
    names = ([CARD] if with_card else []) + [group.label for group in groups]
    columns = {"fact": "setting or fact", **{str(i): name for i, name in enumerate(names)}}
    different = tuple(_fact_row(fact) for fact in found if not fact.same)
    same = tuple(_fact_row(fact) for fact in found if fact.same)
    return Table("Different", columns, different), Table("Same, where known", columns, same)


def _fact_row(fact: Fact) -> tuple[Cell, ...]:
    cells = [
        Cell(value, _fact_text(fact.name, value) if known else "unknown")
        for value, known in zip(fact.values, fact.known, strict=True)
    ]
    return (Cell(fact.name, fact.name), *cells)


def _fact_text(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        return " | ".join(_fact_text(name, one) for one in value)
    if isinstance(value, list):
        return ", ".join(_fact_text(name, one) for one in value) or "none"
    if value is None:
        return "left out" if name.startswith("settings.") else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    if isinstance(value, str) and len(value) > HASH_LETTERS and re.fullmatch(r"[0-9a-f]{32,}", value):
        return f"{value[:HASH_LETTERS]}…"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def loss(value: float | None) -> Cell:
    """A loss in nats per token, to four digits as the card has them."""
    return Cell(value, NOT_TOLD if value is None else f"{value:.4f}")


def number(value: float | None) -> Cell:
    """A whole number with separators."""
    return Cell(value, NOT_TOLD if value is None else f"{value:,.0f}")


def plain(value: Any) -> Cell:
    """A value that reads as itself."""
    return Cell(value, NOT_TOLD if value is None else str(value))


def size(value: float | None) -> Cell:
    """Bytes, in MB or GB of ten."""
    if value is None:
        return Cell(None, NOT_TOLD)
    return Cell(value, f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB")


def duration(seconds: float | None) -> Cell:
    """Seconds, in the units a person would use."""
    if seconds is None:
        return Cell(None, NOT_TOLD)
    minutes = seconds / 60
    if minutes < 2:
        return Cell(seconds, f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s")
    return Cell(seconds, f"{minutes:.1f} min" if minutes < 60 else f"{int(minutes // 60)} h {minutes % 60:02.0f} min")


def _spread_cell(value: Spread | None, digits: int = 4) -> Cell:
    if value is None or not np.isfinite(value.mean):
        return Cell(None, NOT_TOLD)
    if value.sd is None:
        return Cell(value.mean, f"{value.mean:.{digits}f}")
    return Cell({"mean": value.mean, "sd": value.sd, "n": value.n}, f"{value.mean:.{digits}f} ± {value.sd:.{digits}f}")


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
