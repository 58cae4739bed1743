"""The whole comparison, made once before it is written in any form: groups, verdict, and the tables.

A table has values for JSON, and the same as text for pages and the console.
"""

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from trainer.config import reference
from trainer.config.text import format_bytes, format_duration, format_percent, list_some, shorten
from trainer.report.comparable import (
    COMPARABILITY_KEYS,
    MODE_NAMES,
    SeedGroup,
    comparable_sets,
    compare_metadata,
    comparison_blockers,
    group_by_seed,
    reference_blockers,
)
from trainer.report.judge import ComparisonOptions, difference_to_reference
from trainer.report.load import LoadProblem
from trainer.report.run_data import RunData
from trainer.report.sentence import Verdict, build_verdict

REFERENCE_LABEL = "card"
NO_VALUE = "-"  # what a cell shows that has no value
NOT_STATED = ""  # what the card's row shows where the card says nothing
MAX_SIDE_BY_SIDE = 8  # runs side by side; more are one below the other
MAX_TEXT_CHARS = 300  # characters of a text in a cell
MAX_HASH_CHARS = 12  # of a fingerprint in a cell; comparison.json has it whole
EPOCH_HEADINGS = {
    "epoch": "epoch",
    "run": "run",
    "step": "step",
    "examples": "examples",
    "train_loss": "train loss",
    "val_loss": "validation loss",
    "perplexity": "perplexity",
    "to_card": "loss − card's",
}
RUN_HEADINGS = {
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
SCORE_HEADINGS = {
    "exact_match": "exact match",
    "bleu": "BLEU (0-100)",
    "chrf": "chrF (0-100)",
    "rouge_l": "ROUGE-L",
}
Format = Callable[[Any], str]


class MeanStd(NamedTuple):
    """Mean and sample standard deviation of n values, two or more."""

    mean: float
    sd: float
    n: int


def format_loss(value: float | MeanStd, digits: int = 4, sign: str = "") -> str:
    """A loss in nats per token, to four digits as the card has them; with its spread over several seeds."""
    if isinstance(value, MeanStd):
        return f"{value.mean:{sign}.{digits}f} ± {value.sd:.{digits}f}"
    return f"{value:{sign}.{digits}f}"


def format_count(value: float | list[int]) -> str:
    """A whole number with separators, or the range of two."""
    return "–".join(f"{bound:,}" for bound in value) if isinstance(value, list) else f"{value:,.0f}"


def format_short(value: float) -> str:
    return f"{value:.4g}"


#: how the numbers of a column read, in every table that has it
COLUMN_FORMATS: dict[str, Format] = {
    **dict.fromkeys(("train_loss", "val_loss", "base_val_loss", "best_val_loss", "final_val_loss"), format_loss),
    **dict.fromkeys(("step", "examples", "trainable", "tokens_per_second", "best_step", "texts"), format_count),
    **dict.fromkeys(("peak_memory_bytes", "optimizer_bytes", "checkpoint_bytes", "export_bytes"), format_bytes),
    **dict.fromkeys(("best_epoch", "lr", "device_hours"), format_short),
    **dict.fromkeys(("to_card", "forgetting"), lambda value: format_loss(value, sign="+")),
    "epoch": lambda value: f"{value:g}",
    "perplexity": lambda value: format_loss(value, digits=3),
    "bits_per_byte": format_loss,
    "share": format_percent,
    "wall_seconds": format_duration,
}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows by column, how each column is headed, and notes to read with it."""

    title: str
    rows: Sequence[Mapping[str, Any]]
    headings: Mapping[str, str]
    formats: Mapping[str, Format] = field(default_factory=dict)  #: of columns that `COLUMN_FORMATS` does not know
    format_text: Callable[[str], str] = str
    notes: Sequence[str] = ()
    is_transposed: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def to_records(self) -> list[dict[str, Any]]:
        """The rows as {key: value}, for comparison.json."""
        records = [{key: row.get(key) for key in self.headings} for row in self.rows]
        return [
            {
                key: value._asdict() if isinstance(value, MeanStd) else None if value == NOT_STATED else value
                for key, value in record.items()
            }
            for record in records
        ]

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
        if isinstance(value, str):
            return self.format_text(value)
        return {**COLUMN_FORMATS, **self.formats}.get(key, str)(value)


# --- by epoch ---


def build_epoch_table(groups: Sequence[SeedGroup], with_reference: bool) -> Table:
    """Step, examples, losses and perplexity at each epoch, and the difference to the card where there may be one."""
    epochs = {float(row.epoch) for row in reference.CURVE} if with_reference else set[float]()
    for run in (run for group in groups for run in group.runs):  # whole epochs, and the end where it is within one
        evals, final = run.evals, run.final_eval
        epochs |= {float(round(e)) for e in evals["epoch"] if run.index_at_epoch(evals, round(e)) is not None}
        if final and run.index_at_epoch(evals, round(final["epoch"])) != len(evals["epoch"]) - 1:
            epochs.add(round(final["epoch"], 4))
    rows: list[Mapping[str, Any]] = []
    for epoch in sorted(epochs):
        for card_row in (row for row in reference.CURVE if with_reference and row.epoch == epoch):
            examples = [num_examples * card_row.epoch for num_examples in reference.EXAMPLES_PER_EPOCH]
            rows.append({**vars(card_row), "run": REFERENCE_LABEL, "examples": examples, "to_card": NOT_STATED})
        for group in groups:
            places = [(run, i) for run in group.runs if (i := run.index_at_epoch(run.evals, epoch)) is not None]
            if not places:
                continue
            run, index = places[0]
            train_places = [(run, run.index_at_epoch(run.epochs, epoch)) for run, _ in places if epoch > 0]
            train_losses = [run.epochs["train_loss"][row] for run, row in train_places if row is not None]
            rows.append(
                {
                    "epoch": epoch,
                    "run": group.label + (f", n = {len(places)}" if len(group.runs) > 1 else ""),
                    "step": _finite_or_none(run.evals["step"][index]),
                    "examples": _finite_or_none(run.evals["samples"][index]),
                    "train_loss": _mean_value(train_losses),
                    "val_loss": _mean_value([run.evals["loss"][row] for run, row in places]),
                    "perplexity": _mean_value([run.evals["perplexity"][row] for run, row in places]),
                    "to_card": difference_to_reference(group, epoch),
                }
            )
    notes = [
        "Losses in nats per token. The train loss of a run is the token mean of the epoch; "
        "the card's is the last value its program logged."
    ]
    incomparable = [group.label for group in groups if any(reference_blockers(run) for run in group.runs)]
    if with_reference and incomparable:
        notes.append(f"No difference to the card for {', '.join(incomparable)}: not comparable with it.")
    if any(len(group.runs) > 1 for group in groups):
        notes.append("Several seeds: mean ± one sample standard deviation, n is the number of runs.")
    headings = {key: name for key, name in EPOCH_HEADINGS.items() if with_reference or key != "to_card"}
    return Table(title="By epoch", headings=headings, rows=rows, notes=notes)


def _mean_value(values: Sequence[float]) -> float | MeanStd | None:
    if not values or not np.isfinite(values).all():
        return None
    mean = statistics.fmean(values)
    return mean if len(values) == 1 else MeanStd(mean, statistics.stdev(map(float, values)), len(values))


def _finite_or_none(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


# --- by run ---


def build_run_table(groups: Sequence[SeedGroup], with_reference: bool) -> Table:
    """What each run cost and how good it got; in the order given, not by rank."""
    rows = [_run_row(run) for group in groups for run in group.runs]
    headings = {key: name for key, name in RUN_HEADINGS.items() if any(row[key] is not None for row in rows)}
    if with_reference:
        last_row = reference.CURVE[-1]
        card_row = {
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
        rows.insert(0, {key: card_row.get(key, NOT_STATED) for key in headings})
    return Table(
        title="By run: quality and cost", headings=headings, rows=rows, is_transposed=len(rows) <= MAX_SIDE_BY_SIDE
    )


def _run_row(run: RunData) -> dict[str, Any]:
    rates = run.steps["tokens_per_second"]
    rates = rates[np.isfinite(rates)]
    best, final = run.best_eval or {}, run.final_eval or {}
    costs = ("optimizer_bytes", "device_hours", "checkpoint_bytes", "export_bytes", "peak_memory_bytes", "wall_seconds")
    row = {
        "run": run.name,
        "run_id": run.run_id,
        "mode": MODE_NAMES[run.mode],
        "state": run.state + (" (early stop)" if run.summary.get("early_stop") else ""),
        "trainable": run.get("model.trainable"),
        "share": run.get("model.share"),
        "tokens_per_second": float(np.median(rates)) if len(rates) else None,
        **{key: run.summary.get(key) for key in costs},
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
    if run.get("resumed"):
        row |= {"peak_memory_bytes": "resumed: unknown", "wall_seconds": "resumed: unknown"}
    return row


# --- below the fold: what runs noticed, generated texts and their scores, settings that differ and agree ---


def build_diagnostics_table(groups: Sequence[SeedGroup]) -> Table:
    headings = {"run": "run", "step": "at step", "finding": "what it noticed, the likely cause, and what to try"}
    rows = [
        {"run": run.name, "step": step, "finding": line}
        for group in groups
        for run in group.runs
        for step, line in run.diagnostics
    ]
    return Table(title="Diagnosis", headings=headings, rows=rows)


def build_score_table(groups: Sequence[SeedGroup]) -> Table:
    """What --score-samples found at the last evaluation of each run that asked for it."""
    runs = [run for group in groups for run in group.runs if run.generations and run.generations[-1]["scores"]]
    rows = []
    for run in runs:
        last = run.generations[-1]
        rows.append({"run": run.name, "epoch": last.get("epoch"), "texts": last.get("scored"), **last["scores"]})
    names = list(dict.fromkeys(name for run in runs for name in run.generations[-1]["scores"]))
    headings = {"run": "run", "epoch": "epoch", "texts": "texts"}
    headings |= {name: SCORE_HEADINGS.get(name, name) for name in names}
    formats = {"epoch": format_short, **dict.fromkeys(names, format_loss)}
    return Table(title="Completions against their references", headings=headings, rows=rows, formats=formats)


def build_generation_table(groups: Sequence[SeedGroup]) -> Table:
    """What each base and the first run of each group, at its last evaluation, made of the validation prompts."""
    headings = {"prompt": "prompt", "reference": "reference"}
    rows: dict[str, dict[str, str]] = {}
    runs = [next((run for run in group.runs if run.generations), None) for group in groups]
    for number, run in enumerate(run for run in runs if run is not None):
        last = run.generations[-1]
        for text in last["texts"]:
            row = rows.setdefault(text["prompt"], {"prompt": text["prompt"], "reference": text["reference"]})
            if text.get("base") is not None:
                base = f"base {run.get('model.fingerprint')}"
                headings.setdefault(base, f"base ({PurePosixPath(run.get('model.name')).name})")
                row.setdefault(base, text["base"])
            headings[f"run {number}"] = f"{run.name}, epoch {last.get('epoch', math.nan):.4g}"
            row[f"run {number}"] = text["completion"]
    notes = ["Completed greedily, the likeliest token each time; base: before the first step."]
    return Table(
        title="Samples",
        headings=headings,
        rows=list(rows.values()),
        format_text=lambda text: shorten(text, MAX_TEXT_CHARS),
        notes=notes,
    )


def build_settings_tables(groups: Sequence[SeedGroup], with_reference: bool) -> tuple[Table, Table]:
    """(what differs between groups or from the card, one column each; what is the same in all that know it, once)."""
    names = ([REFERENCE_LABEL] if with_reference else []) + [group.label for group in groups]
    differing, shared = [], []
    for fact in compare_metadata([group.runs for group in groups], with_reference):
        known = {str(i): _format_fact(fact.name, value) for i, value in fact.values.items()}
        unknown = {str(i): NOT_STATED if name == REFERENCE_LABEL else "unknown" for i, name in enumerate(names)}
        if fact.is_same:
            shared.append({"fact": fact.name, "value": next(iter(known.values()))})
        else:
            differing.append({"fact": fact.name, **unknown, **known})
    headings = {"fact": "setting or fact", **{str(i): name for i, name in enumerate(names)}}
    shared_headings = {"fact": "setting or fact", "value": "value"}
    return (
        Table(title="Different", headings=headings, rows=differing),
        Table(title="Same, where known", headings=shared_headings, rows=shared),
    )


def _format_fact(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        return " | ".join(_format_fact(name, item) for item in value)
    if isinstance(value, list):
        return ", ".join(_format_fact(name, item) for item in value) or "none"
    if value is None:
        return "left out" if name.startswith("settings.") else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    if isinstance(value, str) and len(value) > MAX_HASH_CHARS and re.fullmatch(r"[0-9a-f]{32,}", value):
        return f"{value[:MAX_HASH_CHARS]}…"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# --- the whole comparison ---


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs by group, what they come to, and the tables."""

    groups: tuple[SeedGroup, ...]
    problems: tuple[LoadProblem, ...]
    with_reference: bool
    verdict: Verdict
    comparability_notes: tuple[str, ...]  #: one line each on what may be held against what
    by_epoch: Table
    by_run: Table
    differing_settings: Table
    shared_settings: Table
    diagnostics: Table
    scores: Table
    generations: Table

    @property
    def optional_tables(self) -> list[Table]:
        """What runs noticed, scored and generated, where there is any of it."""
        return [table for table in (self.diagnostics, self.scores, self.generations) if len(table)]

    @property
    def runs(self) -> list[RunData]:
        return [run for group in self.groups for run in group.runs]


def compare(
    runs: Sequence[RunData],
    problems: Sequence[LoadProblem] = (),
    with_reference: bool = True,
    options: ComparisonOptions | None = None,
) -> Comparison:
    """The comparison of `runs` with one another and, with `with_reference`, with the card."""
    return compare_run_groups(group_by_seed(runs), problems, with_reference, options)


def compare_run_groups(
    groups: Sequence[SeedGroup],
    problems: Sequence[LoadProblem] = (),
    with_reference: bool = True,
    options: ComparisonOptions | None = None,
) -> Comparison:
    """The same of runs whose groups are known."""
    runs = [run for group in groups for run in group.runs]
    differing_settings, shared_settings = build_settings_tables(groups, with_reference)
    return Comparison(
        groups=tuple(groups),
        problems=tuple(problems),
        with_reference=with_reference,
        verdict=build_verdict(groups, with_reference, options),
        comparability_notes=tuple(_comparability_notes(runs, with_reference)),
        by_epoch=build_epoch_table(groups, with_reference),
        by_run=build_run_table(groups, with_reference),
        differing_settings=differing_settings,
        shared_settings=shared_settings,
        diagnostics=build_diagnostics_table(groups),
        scores=build_score_table(groups),
        generations=build_generation_table(groups),
    )


def _comparability_notes(runs: Sequence[RunData], with_reference: bool) -> list[str]:
    lines = []
    first_set, *other_sets = comparable_sets(runs, lambda run: run)
    if not other_sets and len(runs) > 1:
        lines.append(f"The losses of all runs are on the same data: {', '.join(COMPARABILITY_KEYS)} agree.")
    for other_set in other_sets:
        reasons = comparison_blockers(other_set[0], first_set[0])
        others, first = (list_some((run.name for run in members), 4) for members in (other_set, first_set))
        lines.append(f"{others} and {first} are not comparable: {'; '.join(reasons)}.")
    if with_reference:
        by_reason: dict[tuple[str, ...], list[RunData]] = {}
        for run in runs:
            by_reason.setdefault(tuple(reference_blockers(run)), []).append(run)
        for reason, members in by_reason.items():
            are = f"{list_some((run.name for run in members), 4)} {'is' if len(members) == 1 else 'are'}"
            if reason:
                lines.append(f"{are} not comparable with the card: {'; '.join(reason)}.")
            else:
                lines.append(f"{are} comparable with the card as far as it tells: all that is known of it agrees.")
        lines.append(f"U{reference.UNKNOWN_REASON[1:]}.")
    return lines
