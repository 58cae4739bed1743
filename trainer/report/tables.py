"""The tables of a comparison: texts under headings, which every form of the report shows."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from trainer.config import reference
from trainer.config.files import name_data, split_weights
from trainer.config.text import flatten, format_bytes, format_duration, format_percent, is_number
from trainer.report.comparable import IGNORED_METADATA, MODE_NAMES, SeedGroup, reference_blockers
from trainer.report.judge import FullVsLora, difference_to_reference
from trainer.report.run_data import RunData

REFERENCE_LABEL = "card"
NO_VALUE = "-"  # what a cell shows that has no value
NOT_STATED = ""  # what the card's cell shows where the card says nothing
NOT_USED = "not used"  # the value of a LoRA setting where every weight is trained
MAX_SIDE_BY_SIDE = 8  # runs side by side; more are one below the other
MAX_GROUPS = 4  # side by side by epoch
MAX_EVALS = 12  # of a run, which are all shown
MIN_DEVICE_HOURS = 0.01  # fewer are no cost
_SECTIONS = ("settings", "resolved", "data", "model", "deepspeed", "hardware", "versions", "git")
_NO_TRAIN_SETTINGS = ("schedule", "dropout", "optimizer", "mode", "model", "trainable_parameters")
#: what the card states, by our names for it
REFERENCE_METADATA = {
    "settings.mode": "full",
    "settings.model.init": "pretrained",
    "model.name": "gpt2",
    "model.parameters": 124_439_808,
    "model.trainable": 124_439_808,
    "model.share": 1.0,
    "resolved.steps_per_epoch": reference.STEPS_PER_EPOCH,
    "resolved.total_steps": 3 * reference.STEPS_PER_EPOCH,
    **{f"data.{name}": value for name, value in reference.KNOWN_DATA.items()},
    **{f"resolved.{name}": reference.SETTINGS[name] for name in ("lr", "dropout", "global_batch")},
    **{f"settings.data.{name}": reference.KNOWN_DATA[name] for name in ("objective", "block_size")},
    **{f"settings.train.{name}": v for name, v in reference.SETTINGS.items() if name not in _NO_TRAIN_SETTINGS},
}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of texts under their headings, and notes to read with them."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    is_sideways: bool = False  #: whether a row is a fact and a column what it is of

    @property
    def is_numeric(self) -> list[bool]:
        """Whether a column stands to the right: it holds numbers alone, or one fact of each kind below another."""
        if self.is_sideways:
            return [False, *[True] * (len(self.headings) - 1)]
        columns = zip(*self.rows, strict=True)
        return [all(is_number(cell) or cell == "unknown" for cell in column) for column in columns]


def build_epoch_table(groups: Sequence[SeedGroup], with_reference: bool, pair: FullVsLora | None) -> Table:
    """One row an epoch: validation losses side by side, their differences, then training losses.

    Of more than MAX_GROUPS groups one row each, with its validation loss at each epoch. `pair`: of the difference.
    """
    epochs = {float(row.epoch) for row in reference.CURVE} if with_reference else set[float]()
    for run in (run for group in groups for run in group.runs):
        evals, final = run.evals, run.final_eval
        if len(evals["epoch"]) <= MAX_EVALS:
            epochs |= {round(float(epoch), 4) for epoch in evals["epoch"]}
            continue  # of many evaluations those at whole epochs, and the end where it is within one
        epochs |= {float(round(e)) for e in evals["epoch"] if run.index_at_epoch(evals, round(e)) is not None}
        if final and run.index_at_epoch(evals, round(final["epoch"])) != len(evals["epoch"]) - 1:
            epochs.add(round(final["epoch"], 4))
    columns: dict[str, list[str]] = {}  # by heading, a cell each epoch
    train_columns, ordered = dict[str, list[str]](), sorted(epochs)
    cards = {float(row.epoch): row for row in reference.CURVE if with_reference}
    if cards:
        columns[REFERENCE_LABEL] = [f"{cards[e].val_loss:.4f}" if e in cards else NOT_STATED for e in ordered]
        train_losses = [f"{cards[e].train_loss:.4f}" if e in cards else NOT_STATED for e in ordered]
        train_columns[f"{REFERENCE_LABEL}, train"] = train_losses
    for group in groups:
        name = group.label + (f", n = {len(group.runs)}" if len(group.runs) > 1 else "")
        columns[name] = [_show_mean(group.at_epoch("evals", "loss", epoch)) for epoch in ordered]
        losses = [group.at_epoch("epochs", "train_loss", epoch) if epoch else [] for epoch in ordered]
        train_columns[f"{group.label}, train"] = [_show_mean(of_epoch) for of_epoch in losses]
    if len(groups) > MAX_GROUPS:
        rows = [[name, *cells] for name, cells in columns.items()]
        headings = ["validation loss", *(f"epoch {epoch:g}" for epoch in ordered)]
        return Table(title="By epoch", headings=headings, rows=rows, notes=_epoch_notes(groups, with_reference))
    differences: dict[str, list[str]] = {}
    if pair is not None and not pair.blockers:
        means = [
            [np.mean(group.at_epoch("evals", "loss", epoch) or math.nan) for group in (pair.full, pair.lora)]
            for epoch in ordered
        ]
        differences["LoRA − full"] = [_show(float(lora - full), "+.4f") for full, lora in means]
    for group in groups if with_reference else ():
        gaps = [difference_to_reference(group, epoch) for epoch in ordered]
        if any(gap is not None for gap in gaps):
            differences[f"{group.label} − card"] = [_show(gap, "+.4f") for gap in gaps]
    runs = [run for group in groups for run in group.runs]
    steps = [
        {f"{run.evals['step'][i]:,.0f}" for run in runs if (i := run.index_at_epoch(run.evals, epoch)) is not None}
        for epoch in ordered
    ]
    step_cells = [of_epoch.pop() if len(of_epoch) == 1 else NO_VALUE for of_epoch in steps]
    columns = {"epoch": [f"{epoch:g}" for epoch in ordered], "step": step_cells} | columns | differences
    columns |= {name: cells for name, cells in train_columns.items() if set(cells) != {NO_VALUE}}
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return Table(title="By epoch", headings=list(columns), rows=rows, notes=_epoch_notes(groups, with_reference))


def _epoch_notes(groups: Sequence[SeedGroup], with_reference: bool) -> list[str]:
    notes = ["Validation loss, and the token mean of an epoch's training loss, in nats per token"]
    notes[0] += "; the card's training loss is the last value its program logged." if with_reference else "."
    incomparable = [group.label for group in groups if any(reference_blockers(run) for run in group.runs)]
    if with_reference and incomparable:
        notes.append(f"No difference to the card for {', '.join(incomparable)}: not comparable with it.")
    if any(len(group.runs) > 1 for group in groups):
        notes.append("Several seeds: mean ± one sample standard deviation, n is the number of runs.")
    return notes


def _show_mean(values: Sequence[float]) -> str:
    """The value of one run; of several their mean and sample standard deviation."""
    if not values or not np.isfinite(values).all():
        return NO_VALUE
    spread = f" ± {statistics.stdev(map(float, values)):.4f}" if len(set(values)) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def _show(value: Any, spec: str = "") -> str:
    is_known = value is not None and (isinstance(value, str) or math.isfinite(value))
    return format(value, spec) if is_known else NO_VALUE


def build_run_tables(runs: Sequence[RunData]) -> list[Table]:
    """How good each run got, what it cost, and its settings; in the order given. What all share is said once."""

    def cost(run: RunData, key: str) -> str:
        if run.get("resumed") and key in ("peak_memory_bytes", "wall_seconds"):
            return "resumed: unknown"
        return (format_duration if key == "wall_seconds" else format_bytes)(run.summary.get(key))

    tables: dict[str, dict[str, list[str]]] = {"Quality": {}, "Cost": {}, "Settings": {}}
    for run in runs:
        best, final = run.best_eval or {}, run.final_eval or {}
        speeds = run.steps["tokens_per_second"]
        bits_per_byte = run.evals["bits_per_byte"]
        hours = run.summary.get("device_hours")
        quality = {
            "validation loss before training": _show(run.initial_loss, ".4f"),
            "best validation loss": _show(best.get("loss"), ".4f"),
            "best at epoch": _show(best.get("epoch"), ".4g"),
            "best at step": _show(best.get("step"), ",.0f"),
            "final validation loss": _show(final.get("loss"), ".4f"),
            "final perplexity": _show(math.exp(final["loss"]) if final and final["loss"] < 700 else None, ".3f"),
            "final bits per byte": _show(bits_per_byte[-1] if len(bits_per_byte) else None, ".4f"),
            "forgetting (nats per token)": _show(run.forgetting, "+.4f"),
        }
        costs = {
            "trainable parameters": _show(run.get("model.trainable"), ",.0f"),
            "share of its parameters": format_percent(run.get("model.share")),
            "peak memory": cost(run, "peak_memory_bytes"),
            "optimizer state": cost(run, "optimizer_bytes"),
            "tokens/s (median)": _show(np.median(speeds[np.isfinite(speeds)]) if len(speeds) else None, ",.0f"),
            "wall time": cost(run, "wall_seconds"),
            "device-hours": _show(hours if hours and hours >= MIN_DEVICE_HOURS else None, ".4g"),
            "checkpoint size": cost(run, "checkpoint_bytes"),
            "export size": cost(run, "export_bytes"),
        }
        settings = {
            "id": run.run_id,
            "mode": MODE_NAMES[run.mode],
            "state": run.state + (" (early stop)" if run.summary.get("early_stop") else ""),
            "learning rate": _show(run.get("resolved.lr"), ".4g"),
            "seed": _show(run.get("settings.train.seed")),
            "ZeRO file": str(run.get("resolved.ds_config")),
            "ranks": _show(run.get("resolved.ranks")),
            "precision": str(run.get("resolved.precision")),
        }
        for columns, cells in zip(tables.values(), (quality, costs, settings), strict=True):
            for heading, cell in cells.items():
                columns.setdefault(heading, []).append(cell)
    return [_fold_constant(title, [run.name for run in runs], columns) for title, columns in tables.items()]


def _fold_constant(title: str, names: Sequence[str], columns: Mapping[str, Sequence[str]]) -> Table:
    """A row each that differs between runs, below MAX_SIDE_BY_SIDE of them side by side; what all share is a note."""
    shared = {heading: cells[0] for heading, cells in columns.items() if len(names) > 1 and len(set(cells)) == 1}
    lines = [["run", *names], *([heading, *cells] for heading, cells in columns.items() if heading not in shared)]
    if len(names) > MAX_SIDE_BY_SIDE:
        lines = [list(line) for line in zip(*lines, strict=True)]
    lines = [line for line in lines if set(line[1:]) != {NO_VALUE}]
    known = [f"{heading} {cell}" for heading, cell in shared.items() if cell != NO_VALUE]
    notes = [f"The same in all: {', '.join(known)}."] if known else []
    is_sideways = len(names) <= MAX_SIDE_BY_SIDE
    return Table(title=title, headings=lines[0], rows=lines[1:], notes=notes, is_sideways=is_sideways)


def build_diagnostics_table(runs: Sequence[RunData]) -> Table:
    headings = ["run", "at step", "what it noticed, the likely cause, and what to try"]
    rows = [[run.name, f"{step:,.0f}", line] for run in runs for step, line in run.diagnostics]
    return Table(title="Diagnosis", headings=headings, rows=rows)


def build_score_table(runs: Sequence[RunData]) -> Table:
    """The mean scores of the test records (--score), of each run that has them."""
    names = list(dict.fromkeys(name for run in runs for name in run.scores))
    rows = [[run.name, *(_show(run.scores.get(name), ".4f") for name in names)] for run in runs if run.scores]
    return Table(title="Scores of the test records, 0 to 1", headings=["run", *names], rows=rows)


class Sample(NamedTuple):
    """A validation prompt, and by whom it was completed how: the reference, the base, a run of each group."""

    prompt: str
    texts: dict[str, str]


def build_samples(groups: Sequence[SeedGroup]) -> list[Sample]:
    """What each base and the first run of each group, at its last evaluation, made of the validation prompts."""
    texts: dict[str, dict[str, str]] = {}  # by prompt
    for group in groups:
        run = next((run for run in group.runs if run.samples), None)
        for text in run.samples.texts if run and run.samples else ():
            answers = texts.setdefault(text.prompt, {"reference": text.reference})
            if text.base is not None and run:
                answers.setdefault(f"base ({PurePosixPath(run.get('model.name')).name})", text.base)
            answers[group.label] = text.completion
    cut = {"reference": 0, "base": 1}  # these two first, whatever the order of the runs
    return [
        Sample(prompt, dict(sorted(answers.items(), key=lambda item: cut.get(item[0].split(" (")[0], 2))))
        for prompt, answers in texts.items()
    ]


def build_settings_tables(groups: Sequence[SeedGroup], with_reference: bool) -> tuple[Table, Table]:
    """(what differs between groups or from the card, one column each; what is the same in all that know it, once)."""

    def is_of_lora(name: str) -> bool:  # run.json always has these; they count only where they were used
        return name.startswith("settings.lora.") or name == "model.lora_targets"

    def order(name: str) -> int:  # settings, what they came to, data, model, machine; where the output went is last
        section = name.split(".", 1)[0]
        return len(_SECTIONS) + 1 if name.startswith("settings.output.") else [*_SECTIONS, section].index(section)

    columns: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        facts_of_runs = [dict(flatten(run.metadata, ".", ignored=IGNORED_METADATA)) for run in group.runs]
        for facts in facts_of_runs if group.mode == "full" else ():
            facts |= dict.fromkeys(filter(is_of_lora, facts), NOT_USED)
        columns[group.label] = facts_of_runs
    names = sorted(dict.fromkeys(name for runs in columns.values() for facts in runs for name in facts), key=order)
    if with_reference:
        not_used = dict.fromkeys(filter(is_of_lora, names), NOT_USED)
        columns = {REFERENCE_LABEL: [{**REFERENCE_METADATA, **not_used}], **columns}
    differing, shared = [], []
    for name in names:
        cells = {}
        for label, runs in columns.items():
            known = dict.fromkeys(_format_fact(name, facts[name]) for facts in runs if name in facts)
            cells[label] = " | ".join(known) or (NOT_STATED if label == REFERENCE_LABEL else "unknown")
        values = set(cells.values()) - {NOT_STATED, "unknown"}
        if len(values) == 1:
            shared.append([name, *values])
        else:
            differing.append([name, *cells.values()])
    headings = ["setting or fact", *columns]
    return (
        Table(title="Different", headings=headings, rows=differing),
        Table(title="The same in all runs", headings=["setting or fact", "value"], rows=shared),
    )


def _format_fact(name: str, value: Any) -> str:
    if name == "execution" and isinstance(value, list):  # plans, one after the other
        return " then ".join(dict.fromkeys(str(plan.get("path")) for plan in value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_format_fact(name, item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_format_fact(name, item) for item in value) or "none"
    if value is None:
        return "left out" if name.startswith("settings.") else "none"
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
