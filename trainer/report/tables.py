"""The whole comparison, made once before it is written in any form: groups, verdict, and the tables as text."""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from trainer.config import reference
from trainer.config.text import flatten, format_bytes, format_duration, format_percent, list_some, shorten
from trainer.report.comparable import (
    COMPARABILITY_KEYS,
    IGNORED_METADATA,
    MODE_NAMES,
    SeedGroup,
    comparable_sets,
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
NOT_STATED = ""  # what the card's cell shows where the card says nothing
NOT_USED = "not used"  # the value of a LoRA setting where every weight is trained
MAX_SIDE_BY_SIDE = 8  # runs side by side; more are one below the other
MAX_TEXT_CHARS = 300  # characters of a text in a cell
MAX_HASH_CHARS = 12  # of a fingerprint in a cell
SCORE_NAMES = {"exact_match": "exact match", "bleu": "BLEU (0-100)", "chrf": "chrF (0-100)", "rouge_l": "ROUGE-L"}
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


def build_epoch_table(groups: Sequence[SeedGroup], with_reference: bool) -> Table:
    """Step, examples, losses and perplexity at each epoch, and the difference to the card where there may be one."""
    epochs = {float(row.epoch) for row in reference.CURVE} if with_reference else set[float]()
    for run in (run for group in groups for run in group.runs):  # whole epochs, and the end where it is within one
        evals, final = run.evals, run.final_eval
        epochs |= {float(round(e)) for e in evals["epoch"] if run.index_at_epoch(evals, round(e)) is not None}
        if final and run.index_at_epoch(evals, round(final["epoch"])) != len(evals["epoch"]) - 1:
            epochs.add(round(final["epoch"], 4))
    rows = []
    for epoch in sorted(epochs):
        for card in (row for row in reference.CURVE if with_reference and row.epoch == epoch):
            examples = "–".join(f"{number * card.epoch:,}" for number in reference.EXAMPLES_PER_EPOCH)
            losses = [f"{card.train_loss:.4f}", f"{card.val_loss:.4f}", f"{card.perplexity:.3f}"]
            rows.append([f"{epoch:g}", REFERENCE_LABEL, f"{card.step:,}", examples, *losses, NOT_STATED])
        for group in groups:
            places = [(run, i) for run in group.runs if (i := run.index_at_epoch(run.evals, epoch)) is not None]
            if not places:
                continue
            run, index = places[0]
            ends = [(run.epochs, run.index_at_epoch(run.epochs, epoch)) for run, _ in places if epoch > 0]
            gap = difference_to_reference(group, epoch)
            rows.append(
                [
                    f"{epoch:g}",
                    group.label + (f", n = {len(places)}" if len(group.runs) > 1 else ""),
                    *(_format_finite(run.evals[name][index], ",.0f") for name in ("step", "samples")),
                    _format_mean([series["train_loss"][row] for series, row in ends if row is not None]),
                    _format_mean([run.evals["loss"][row] for run, row in places]),
                    _format_mean([run.evals["perplexity"][row] for run, row in places], digits=3),
                    NO_VALUE if gap is None else f"{gap:+.4f}",
                ]
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
    headings = ["epoch", "run", "step", "examples", "train loss", "validation loss", "perplexity", "loss − card's"]
    if not with_reference:
        headings, rows = headings[:-1], [row[:-1] for row in rows]
    return Table(title="By epoch", headings=headings, rows=rows, notes=notes)


def _format_mean(values: Sequence[float], digits: int = 4) -> str:
    """The value of one run; of several their mean and sample standard deviation."""
    if not values or not np.isfinite(values).all():
        return NO_VALUE
    spread = f" ± {statistics.stdev(map(float, values)):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _format_finite(value: float, spec: str) -> str:
    return format(float(value), spec) if np.isfinite(value) else NO_VALUE


def build_run_table(groups: Sequence[SeedGroup], with_reference: bool) -> Table:
    """What each run cost and how good it got; in the order given, not by rank."""
    runs = [_run_cells(run) for group in groups for run in group.runs]
    headings = [heading for heading in runs[0] if any(cells[heading] is not None for cells in runs)]
    rows = [[cells[heading] or NO_VALUE for heading in headings] for cells in runs]
    if with_reference:
        last = reference.CURVE[-1]
        card = {
            "run": REFERENCE_LABEL,
            "id": reference.NAME,
            "mode": "full",
            "state": "published",
            "learning rate": f"{reference.SETTINGS['lr']:.4g}",
            "best validation loss": f"{last.val_loss:.4f}",
            "best at epoch": f"{last.epoch}",
            "best at step": f"{last.step:,}",
            "final validation loss": f"{last.val_loss:.4f}",
            "trainable parameters": f"{reference.SETTINGS['trainable_parameters']:,}",
            "share of its parameters": "100%",
            "seed": str(reference.SETTINGS["seed"]),
        }
        rows.insert(0, [card.get(heading, NOT_STATED) for heading in headings])
    if len(rows) <= MAX_SIDE_BY_SIDE:
        headings, *rows = map(list, zip(headings, *rows, strict=True))
    return Table(title="By run: quality and cost", headings=headings, rows=rows)


def _run_cells(run: RunData) -> dict[str, str | None]:
    """{heading: cell} of a run, None where the value is not known."""
    speeds = run.steps["tokens_per_second"]
    speeds = speeds[np.isfinite(speeds)]
    best, final = run.best_eval or {}, run.final_eval or {}

    def show(value: Any, spec: str = "") -> str | None:
        return None if value is None else format(value, spec)

    def cost(key: str) -> str | None:
        value = run.summary.get(key)
        if run.get("resumed") and key in ("peak_memory_bytes", "wall_seconds"):
            return "resumed: unknown"
        return None if value is None else format_duration(value) if key == "wall_seconds" else format_bytes(value)

    return {
        "run": run.name,
        "id": run.run_id,
        "mode": MODE_NAMES[run.mode],
        "state": run.state + (" (early stop)" if run.summary.get("early_stop") else ""),
        "learning rate": show(run.get("resolved.lr"), ".4g"),
        "best validation loss": show(best.get("loss"), ".4f"),
        "best at epoch": show(best.get("epoch"), ".4g"),
        "best at step": show(best.get("step"), ",.0f"),
        "final validation loss": show(final.get("loss"), ".4f"),
        "final bits per byte": next((f"{x:.4f}" for x in run.evals["bits_per_byte"][-1:] if np.isfinite(x)), None),
        "validation loss before training": show(run.initial_loss, ".4f"),
        "forgetting (nats per token)": show(run.forgetting, "+.4f"),
        "trainable parameters": show(run.get("model.trainable"), ",.0f"),
        "share of its parameters": format_percent(run.get("model.share")),
        "peak memory": cost("peak_memory_bytes"),
        "optimizer state": cost("optimizer_bytes"),
        "tokens/s (median)": f"{np.median(speeds):,.0f}" if len(speeds) else None,
        "wall time": cost("wall_seconds"),
        "device-hours": show(run.summary.get("device_hours"), ".4g"),
        "checkpoint size": cost("checkpoint_bytes"),
        "export size": cost("export_bytes"),
        "ZeRO file": show(run.get("resolved.ds_config")),
        "ranks": show(run.get("resolved.ranks")),
        "precision": show(run.get("resolved.precision")),
        "seed": show(run.get("settings.train.seed")),
    }


# --- below the fold: what runs noticed, generated texts and their scores, settings that differ and agree ---


def build_diagnostics_table(runs: Sequence[RunData]) -> Table:
    headings = ["run", "at step", "what it noticed, the likely cause, and what to try"]
    rows = [[run.name, f"{step:,.0f}", line] for run in runs for step, line in run.diagnostics]
    return Table(title="Diagnosis", headings=headings, rows=rows)


def build_score_table(runs: Sequence[RunData]) -> Table:
    """What --score-samples found at the last evaluation of each run that asked for it."""
    last = [(run.name, run.generations[-1]) for run in runs if run.generations and run.generations[-1]["scores"]]
    names = list(dict.fromkeys(name for _, facts in last for name in facts["scores"]))

    def show(value: float | None, spec: str) -> str:
        return NO_VALUE if value is None else format(value, spec)

    rows = [
        [run, show(facts.get("epoch"), ".4g"), show(facts.get("scored"), ",.0f")]
        + [show(facts["scores"].get(name), ".4f") for name in names]
        for run, facts in last
    ]
    headings = ["run", "epoch", "texts", *(SCORE_NAMES.get(name, name) for name in names)]
    return Table(title="Completions against their references", headings=headings, rows=rows)


def build_generation_table(groups: Sequence[SeedGroup]) -> Table:
    """What each base and the first run of each group, at its last evaluation, made of the validation prompts."""
    headings = {"prompt": "prompt", "reference": "reference"}
    rows: dict[str, dict[str, str]] = {}
    for run in filter(None, (next((run for run in group.runs if run.generations), None) for group in groups)):
        last = run.generations[-1]
        for text in last["texts"]:
            row = rows.setdefault(text["prompt"], {"prompt": text["prompt"], "reference": text["reference"]})
            if text.get("base") is not None:
                base = f"base {run.get('model.fingerprint')}"
                headings.setdefault(base, f"base ({PurePosixPath(run.get('model.name')).name})")
                row.setdefault(base, text["base"])
            headings[f"run {run.run_id}"] = f"{run.name}, epoch {last.get('epoch', math.nan):.4g}"
            row[f"run {run.run_id}"] = text["completion"]
    cells = [
        [shorten(row[key], MAX_TEXT_CHARS) if isinstance(row.get(key), str) else NO_VALUE for key in headings]
        for row in rows.values()
    ]
    notes = ["Completed greedily, the likeliest token each time; base: before the first step."]
    return Table(title="Samples", headings=list(headings.values()), rows=cells, notes=notes)


def build_settings_tables(groups: Sequence[SeedGroup], with_reference: bool) -> tuple[Table, Table]:
    """(what differs between groups or from the card, one column each; what is the same in all that know it, once)."""

    def is_of_lora(name: str) -> bool:  # run.json always has these; they count only where they were used
        return name.startswith("settings.lora.") or name == "model.lora_targets"

    def order(name: str) -> int:  # settings, what they came to, data, model, machine; where the output went is last
        section = name.split(".", 1)[0]
        return len(_SECTIONS) + 1 if name.startswith("settings.output.") else [*_SECTIONS, section].index(section)

    columns = [
        (
            group.label,
            [
                {
                    name: NOT_USED if run.mode == "full" and is_of_lora(name) else value
                    for name, value in flatten(run.metadata, ".", ignored=IGNORED_METADATA)
                }
                for run in group.runs
            ],
        )
        for group in groups
    ]
    names = sorted(dict.fromkeys(name for _, runs in columns for facts in runs for name in facts), key=order)
    if with_reference:
        not_used = dict.fromkeys(filter(is_of_lora, names), NOT_USED)
        columns.insert(0, (REFERENCE_LABEL, [{**REFERENCE_METADATA, **not_used}]))
    differing, shared = [], []
    for name in names:
        values = [[facts[name] for facts in runs if name in facts] for _, runs in columns]
        known = [value for values_of_column in values for value in values_of_column]
        if all(value == known[0] for value in known):
            shared.append([name, _format_fact(name, known[0])])
            continue
        cells = []
        for (label, _), members in zip(columns, values, strict=True):
            shown = members[:1] if all(value == members[0] for value in members) else members
            unknown = NOT_STATED if label == REFERENCE_LABEL else "unknown"
            cells.append(" | ".join(_format_fact(name, value) for value in shown) if shown else unknown)
        differing.append([name, *cells])
    headings = ["setting or fact", *(label for label, _ in columns)]
    return (
        Table(title="Different", headings=headings, rows=differing),
        Table(title="Same, where known", headings=["setting or fact", "value"], rows=shared),
    )


def _format_fact(name: str, value: Any) -> str:
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

    groups: Sequence[SeedGroup]
    problems: Sequence[LoadProblem]
    with_reference: bool
    verdict: Verdict
    comparability_notes: Sequence[str]  #: one line each on what may be held against what
    by_epoch: Table
    by_run: Table
    differing_settings: Table
    shared_settings: Table
    optional_tables: Sequence[Table]  #: what runs noticed, scored and generated, where there is any of it

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
    optional_tables = (build_diagnostics_table(runs), build_score_table(runs), build_generation_table(groups))
    return Comparison(
        groups=groups,
        problems=problems,
        with_reference=with_reference,
        verdict=build_verdict(groups, with_reference, options or ComparisonOptions()),
        comparability_notes=_comparability_notes(runs, with_reference),
        by_epoch=build_epoch_table(groups, with_reference),
        by_run=build_run_table(groups, with_reference),
        differing_settings=differing_settings,
        shared_settings=shared_settings,
        optional_tables=[table for table in optional_tables if table.rows],
    )


def _comparability_notes(runs: Sequence[RunData], with_reference: bool) -> list[str]:
    def name(members: Sequence[RunData]) -> str:
        return list_some((run.name for run in members), 4)

    lines = []
    first_set, *other_sets = comparable_sets(runs, lambda run: run)
    if not other_sets and len(runs) > 1:
        lines.append(f"The losses of all runs are on the same data: {', '.join(COMPARABILITY_KEYS)} agree.")
    for other_set in other_sets:
        reasons = "; ".join(comparison_blockers(other_set[0], first_set[0]))
        lines.append(f"{name(other_set)} and {name(first_set)} are not comparable: {reasons}.")
    if with_reference:
        by_reason: dict[str, list[RunData]] = {}
        for run in runs:
            by_reason.setdefault("; ".join(reference_blockers(run)), []).append(run)
        for reason, members in by_reason.items():
            are = f"{name(members)} {'is' if len(members) == 1 else 'are'}"
            if reason:
                lines.append(f"{are} not comparable with the card: {reason}.")
            else:
                lines.append(f"{are} comparable with the card as far as it tells: all that is known of it agrees.")
        lines.append(f"U{reference.UNKNOWN_REASON[1:]}.")
    return lines
