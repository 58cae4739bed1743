"""Tables below the fold: settings that differ and agree, what runs noticed, generated texts and their scores."""

import math
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from trainer.report.comparability import compare_metadata
from trainer.report.seed_groups import SeedGroup
from trainer.report.tables import NOT_STATED, REFERENCE_LABEL, Format, Table, format_count, format_loss, format_short

MAX_TEXT_CHARS = 300  # characters of a text in a cell
MAX_HASH_CHARS = 12  # of a fingerprint in a cell; comparison.json has it whole
#: headings of the scores
SCORE_HEADINGS = {
    "exact_match": "exact match",
    "bleu": "BLEU (0-100)",
    "chrf": "chrF (0-100)",
    "rouge_l": "ROUGE-L",
}


def build_generation_table(groups: Sequence[SeedGroup]) -> Table:
    """What each base and the first run of each group, at its last evaluation, made of the validation prompts."""
    headings = {"prompt": "prompt", "reference": "reference"}
    rows: dict[str, dict[str, Any]] = {}
    runs = (next((run for run in group.runs if run.generations), None) for group in groups)
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
    return Table(title="Samples", headings=headings, rows=list(rows.values()), format_text=_shorten, notes=notes)


def build_score_table(groups: Sequence[SeedGroup]) -> Table:
    """What --score-samples found at the last evaluation of each run that asked for it."""
    scored = [
        (run, run.generations[-1])
        for group in groups
        for run in group.runs
        if run.generations and run.generations[-1]["scores"]
    ]
    names = list(dict.fromkeys(name for _, event in scored for name in event["scores"]))
    headings = {"run": "run", "epoch": "epoch", "texts": "texts"} | {
        name: SCORE_HEADINGS.get(name, name) for name in names
    }
    rows = [
        {"run": run.name, "epoch": event.get("epoch"), "texts": event.get("scored"), **event["scores"]}
        for run, event in scored
    ]
    formats: dict[str, Format] = {"epoch": format_short, "texts": format_count, **dict.fromkeys(names, format_loss)}
    return Table(title="Completions against their references", headings=headings, rows=rows, formats=formats)


def build_diagnostics_table(groups: Sequence[SeedGroup]) -> Table:
    """What each run noticed of itself while it ran."""
    headings = {"run": "run", "step": "at step", "finding": "what it noticed, the likely cause, and what to try"}
    rows = [
        {"run": run.name, "step": step, "finding": line}
        for group in groups
        for run in group.runs
        for step, line in run.diagnostics
    ]
    return Table(title="Diagnosis", headings=headings, rows=rows, formats={"step": format_count})


def build_settings_tables(groups: Sequence[SeedGroup], with_reference: bool) -> tuple[Table, Table]:
    """(what differs between groups or from the card, one column each; what is the same in all that know it, once)."""
    fields = compare_metadata([group.runs for group in groups], with_reference)
    names = ([REFERENCE_LABEL] if with_reference else []) + [group.label for group in groups]
    headings = {"fact": "setting or fact", **{str(i): name for i, name in enumerate(names)}}
    differing = []
    for field in (field for field in fields if not field.is_same):
        unknown = {str(i): NOT_STATED if name == REFERENCE_LABEL else "unknown" for i, name in enumerate(names)}
        known = {str(i): _format_field(field.name, value) for i, value in field.values.items()}
        differing.append({"fact": field.name, **unknown, **known})
    shared = [
        {"fact": field.name, "value": _format_field(field.name, next(iter(field.values.values())))}
        for field in fields
        if field.is_same
    ]
    shared_headings = {"fact": "setting or fact", "value": "value"}
    return (
        Table(title="Different", headings=headings, rows=differing),
        Table(title="Same, where known", headings=shared_headings, rows=shared),
    )


def _format_field(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        return " | ".join(_format_field(name, item) for item in value)
    if isinstance(value, list):
        return ", ".join(_format_field(name, item) for item in value) or "none"
    if value is None:
        return "left out" if name.startswith("settings.") else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    if isinstance(value, str) and len(value) > MAX_HASH_CHARS and re.fullmatch(r"[0-9a-f]{32,}", value):
        return f"{value[:MAX_HASH_CHARS]}…"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _shorten(text: str) -> str:
    """A text on one line, cut where it is very long."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_TEXT_CHARS else line[: MAX_TEXT_CHARS - 1] + "…"
