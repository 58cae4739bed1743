"""The tables of a comparison: texts under headings, which every form of the report shows."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from trainer.config import reference
from trainer.config.files import name_data, split_weights
from trainer.config.text import flatten, format_bytes, format_duration, format_percent, is_number
from trainer.report.comparable import IGNORED_METADATA, SeedGroup, reference_blockers
from trainer.report.judge import FullVsLora
from trainer.report.run_data import RunData
from trainer.tracking.records import perplexity

REFERENCE_LABEL = "card"
NO_VALUE = "-"  # what a cell shows that has no value
NOT_STATED = ""  # what the card's cell shows where the card says nothing
NOT_USED = "not used"  # the value of a LoRA setting where every weight is trained
MAX_GROUPS = 4  # side by side by epoch
MAX_EVALS = 12  # of a run, which are all shown
#: what the card states of a fact of run.json, by the last part of its path in these blocks
_CARD_BLOCKS = ("settings", "settings.train", "settings.data", "resolved", "data", "model")
_CARD_FACTS = {
    **reference.SETTINGS,
    **reference.KNOWN_DATA,
    **{"name": "gpt2", "init": "pretrained", "parameters": 124_439_808, "trainable": 124_439_808, "share": 1.0},
    **{"steps_per_epoch": reference.STEPS_PER_EPOCH, "total_steps": 3 * reference.STEPS_PER_EPOCH},
}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of texts under their headings, and notes to read with them."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    @property
    def is_numeric(self) -> list[bool]:
        """Whether a column stands to the right: it holds numbers alone."""
        columns = zip(*self.rows, strict=True)
        return [all(is_number(cell) or cell == "unknown" for cell in column) for column in columns]


def build_epoch_table(groups: Sequence[SeedGroup], with_reference: bool, pair: FullVsLora | None) -> Table:
    """One row an epoch: validation losses side by side, their differences, then training losses. Of more than
    MAX_GROUPS groups one row each, with its validation loss at each epoch. `pair`: of the difference; its groups are
    shown by their paired runs alone, others by those that are finished, where any is."""
    paired = [run for runs in pair.pairs for run in runs] if pair is not None and not pair.blockers else []
    groups = [
        replace(group, runs=tuple(run for run in group.runs if run in paired) or group.finished_runs or group.runs)
        for group in groups
    ]
    runs = [run for group in groups for run in group.runs]
    cards = {float(row.epoch): row for row in reference.CURVE if with_reference}
    epoch_set = set(cards)
    for run in runs:  # of many evaluations those at whole epochs, and the last
        epochs_of_run = run.evals["epoch"].tolist()
        for index, epoch in enumerate(epochs_of_run, start=1):
            is_whole = run.index_at_epoch(run.evals, round(epoch)) == index - 1
            if is_whole or len(epochs_of_run) <= MAX_EVALS or index == len(epochs_of_run):
                epoch_set.add(float(round(epoch)) if is_whole else round(epoch, 9))  # 4 digits miss a step of 10,000
    epochs = sorted(epoch_set)
    epoch_texts = [f"{round(epoch, 4):g}" for epoch in epochs]
    columns: dict[str, list[str]] = {}  # by heading, a cell each epoch
    train_columns: dict[str, list[str]] = {}
    if cards:
        columns[REFERENCE_LABEL] = [f"{cards[e].val_loss:.4f}" if e in cards else NOT_STATED for e in epochs]
        train_losses = [f"{cards[e].train_loss:.4f}" if e in cards else NOT_STATED for e in epochs]
        train_columns[f"{REFERENCE_LABEL}, train"] = train_losses
    for group in groups:
        name = group.label + (f", n = {len(group.runs)}" if len(group.runs) > 1 else "")
        columns[name] = [_show_mean(group.at_epoch("evals", "loss", epoch)) for epoch in epochs]
        cells = [_show_mean(group.at_epoch("epochs", "train_loss", epoch) if epoch else []) for epoch in epochs]
        if set(cells) != {NO_VALUE}:
            train_columns[f"{group.label}, train"] = cells
    notes = ["Validation loss, and the token mean of an epoch's training loss, in nats per token"]
    notes[0] += "; the card's training loss is the last value its program logged." if with_reference else "."
    if len(runs) > len(groups):
        notes.append("Several seeds: mean ± one sample standard deviation, n is the number of runs.")
    if len(groups) > MAX_GROUPS:
        headings = ["validation loss", *(f"epoch {text}" for text in epoch_texts)]
        return Table(title="By epoch", headings=headings, rows=[[n, *c] for n, c in columns.items()], notes=notes)
    if paired:
        both = [group for group in groups if group.runs[0] in paired]
        losses = [[group.at_epoch("evals", "loss", e) or math.nan for group in both] for e in epochs]
        columns["LoRA − full"] = [_show(float(np.mean(lora) - np.mean(full)), "+.4f") for full, lora in losses]
    for group in groups if with_reference else ():
        at_card = {e: group.at_epoch("evals", "loss", e) for e in cards if not any(map(reference_blockers, group.runs))}
        if any(at_card.values()):
            gaps = [statistics.fmean(at_card[e]) - cards[e].val_loss if at_card.get(e) else None for e in epochs]
            columns[f"{group.label} − card"] = [_show(gap, "+.4f") for gap in gaps]
    epoch_sizes = {run.get("resolved.steps_per_epoch") for run in runs}
    num_steps = epoch_sizes.pop() if len(epoch_sizes) == 1 else None
    steps = [_show(num_steps and epoch * num_steps, ",.0f") for epoch in epochs]
    columns = {"epoch": epoch_texts, "step": steps} | columns | train_columns
    return Table(title="By epoch", headings=list(columns), rows=list(zip(*columns.values(), strict=True)), notes=notes)


def _show_mean(values: Sequence[float]) -> str:
    if not values or not np.isfinite(values).all():
        return NO_VALUE
    spread = f" ± {statistics.stdev(map(float, values)):.4f}" if len(set(values)) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def _show(value: Any, spec: str = "") -> str:
    is_known = value is not None and (isinstance(value, str) or math.isfinite(value))
    return format(value, spec) if is_known else NO_VALUE


def build_run_tables(runs: Sequence[RunData]) -> list[Table]:
    """How good each run got, and what it cost; a row each. What all share is said once."""
    facts: dict[str, list[dict[str, str]]] = {"Quality": [], "Cost": []}
    for run in runs:
        best, final, get = run.best_eval or {}, run.final_eval or {}, run.summary.get
        speeds = run.steps["tokens_per_second"]
        unknown = "resumed: unknown" if run.get("resumed") else ""
        quality = {
            "state": run.state + (" (early stop)" if get("early_stop") else ""),
            "validation loss before training": _show(run.initial_loss, ".4f"),
            "best validation loss": _show(best.get("loss"), ".4f"),
            "best at epoch": _show(best.get("epoch"), ".4g"),
            "final validation loss": _show(final.get("loss"), ".4f"),
            "final perplexity": _show(perplexity(final["loss"]) if final else None, ".3f"),
            "final bits per byte": _show(next(reversed(run.evals["bits_per_byte"].tolist()), None), ".4f"),
            "forgetting (nats per token)": _show(run.forgetting, "+.4f"),
            **{f"{name}, test records": _show(score, ".4f") for name, score in run.scores.items()},
        }
        cost = {
            "trainable parameters": _show(run.get("model.trainable"), ",.0f"),
            "trainable share": format_percent(run.get("model.share")),
            "peak memory": unknown or format_bytes(get("peak_memory_bytes")),
            "optimizer state": format_bytes(get("optimizer_bytes")),
            "tokens/s (median)": _show(np.median(speeds[np.isfinite(speeds)]) if len(speeds) else None, ",.0f"),
            "wall time": unknown or format_duration(get("wall_seconds")),
            "device-hours": _show(get("device_hours"), ".2g"),
            "checkpoint size": format_bytes(get("checkpoint_bytes")),
            "export size": format_bytes(get("export_bytes")),
        }
        for rows, row in zip(facts.values(), (quality, cost), strict=True):
            rows.append(row)
    tables = []
    for title, rows in facts.items():
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name, NO_VALUE) for row in rows] for name in names}
        shared = {n: cells[0] for n, cells in columns.items() if len(set(cells)) == 1 and len(runs) > 1}
        said = [f"{name} {cell}" for name, cell in shared.items() if cell != NO_VALUE]
        columns = {"run": [run.name for run in runs]} | {n: c for n, c in columns.items() if n not in shared}
        body = list(zip(*columns.values(), strict=True)) if len(columns) > 1 else []
        notes = [f"The same in all: {', '.join(said)}."] if said else []
        tables.append(Table(title=title, headings=list(columns), rows=body, notes=notes))
    return tables


def build_samples(groups: Sequence[SeedGroup]) -> dict[str, dict[str, str]]:
    """{validation prompt: {name: text}}: its reference, and what each base and each group's first run made of it."""
    before: dict[str, dict[str, str]] = {}  # by prompt
    after: dict[str, dict[str, str]] = {}
    for group in groups:
        run = next((run for run in group.runs if run.samples), None)
        for text in run.samples if run else ():
            texts = before.setdefault(text.prompt, {"reference": text.reference})
            if text.base is not None and run:
                texts.setdefault(f"base ({PurePosixPath(run.get('model.name')).name})", text.base)
            after.setdefault(text.prompt, {})[group.label] = text.completion
    return {prompt: texts | after[prompt] for prompt, texts in before.items()}


def build_settings_tables(groups: Sequence[SeedGroup], with_reference: bool) -> tuple[Table, Table]:
    """(what differs between groups or from the card, one column each; what is the same in all that know it, once)."""
    facts_by_label = {
        group.label: [dict(flatten(run.metadata, ".", ignored=IGNORED_METADATA)) for run in group.runs]
        for group in groups
    }
    names = dict.fromkeys(name for runs in facts_by_label.values() for facts in runs for name in facts)
    without_lora = {group.label for group in groups if group.mode == "full"} | {REFERENCE_LABEL}
    if with_reference:
        parts = [(name, *name.rpartition(".")[::2]) for name in names]
        card = {name: _CARD_FACTS[key] for name, block, key in parts if block in _CARD_BLOCKS and key in _CARD_FACTS}
        facts_by_label = {REFERENCE_LABEL: [card], **facts_by_label}

    def cell(name: str, label: str) -> str:
        # run.json always has those of LoRA; they count only where they were used
        if label in without_lora and (name.startswith("settings.lora.") or name == "model.lora_targets"):
            return NOT_USED
        known = dict.fromkeys(_format_fact(name, facts[name]) for facts in facts_by_label[label] if name in facts)
        return " | ".join(known) or (NOT_STATED if label == REFERENCE_LABEL else "unknown")

    differing, shared = [], []
    for name in names:
        cells = [cell(name, label) for label in facts_by_label]
        values = set(cells) - {NOT_STATED, "unknown"}
        if len(values) == 1:
            shared.append([name, *values])
        else:
            differing.append([name, *cells])
    return (
        Table(title="Different", headings=["setting or fact", *facts_by_label], rows=differing),
        Table(title="The same in all runs", headings=["setting or fact", "value"], rows=shared),
    )


def _format_fact(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_format_fact(name, item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_format_fact(name, item) for item in value) or "none"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "model.share":
        return format_percent(value)
    if isinstance(value, int) and abs(value) >= 1_000 and not name.endswith("seed"):
        return f"{value:,}"
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32,}", value):
        return f"{value[:12]}…"
    if name in ("data.source", "settings.data.data") and len(split_weights(str(value))) > 1:
        return name_data(str(value))
    if isinstance(value, str) and value.startswith(("/", "~")):  # the page is sent to others
        return f"…/{PurePosixPath(value).name}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
