"""A comparison written down: its tables, report.html and report.md for people, answer.json for machines, the curves."""

import base64
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from trainer.config import reference
from trainer.config.errors import UserError
from trainer.config.files import write_atomically
from trainer.config.text import (
    escape_markdown,
    flatten,
    format_bytes,
    format_duration,
    format_percent,
    is_number,
    list_some,
    markdown_table,
    shorten,
)
from trainer.report import plots
from trainer.report.answer_file import to_answer
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
from trainer.report.judge import DEFAULT_MARGIN, Margin, StudyContext, difference_to_reference
from trainer.report.load import LoadProblem
from trainer.report.run_data import TRAINER_MODE, RunData
from trainer.report.sentence import Verdict, build_verdict

FILES = ("report.html", "report.md", "curves.png", "curves.svg", "answer.json")
REFERENCE_LABEL = "card"
NO_VALUE = "-"  # what a cell shows that has no value
NOT_STATED = ""  # what the card's cell shows where the card says nothing
NOT_USED = "not used"  # the value of a LoRA setting where every weight is trained
MAX_SIDE_BY_SIDE = 8  # runs side by side; more are one below the other
MAX_TEXT_CHARS = 300  # characters of a text in a cell
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

    @property
    def is_numeric(self) -> list[bool]:
        """Whether a column holds numbers alone, which stand to the right."""
        columns = zip(*self.rows, strict=True)
        return [all(is_number(cell) or cell == "unknown" for cell in column) for column in columns]


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

    plotted_only: Sequence[SeedGroup] = ()  #: runs of Hugging Face's Trainer, which nothing else counts

    @property
    def runs(self) -> list[RunData]:
        return [run for group in self.groups for run in group.runs]


def compare(
    runs: Sequence[RunData],
    problems: Sequence[LoadProblem] = (),
    with_reference: bool = True,
    margin: Margin = DEFAULT_MARGIN,
    study: StudyContext | None = None,
    groups: Sequence[SeedGroup] | None = None,
) -> Comparison:
    """The comparison of `runs` with one another and, with `with_reference`, with the card.

    With `study` by its rule, which knows the groups: its first LoRA group is the primary one. UserError where all are
    runs of Hugging Face's Trainer.
    """
    plotted_only = [SeedGroup(run.name, run.mode, (run,)) for run in runs if run.mode == TRAINER_MODE]
    groups = group_by_seed([run for run in runs if run.mode != TRAINER_MODE]) if groups is None else groups
    if not groups:
        raise UserError("only runs of Hugging Face's Trainer: expected a run of this program beside them")
    runs = [run for group in groups for run in group.runs]
    differing_settings, shared_settings = build_settings_tables(groups, with_reference)
    optional_tables = (_build_diagnostics_table(runs), _build_score_table(runs), _build_samples_table(groups))
    return Comparison(
        groups=groups,
        problems=problems,
        with_reference=with_reference,
        verdict=build_verdict(groups, with_reference, margin, study),
        comparability_notes=[
            *_comparability_notes(runs, with_reference),
            *(f"{group.label} is a run of Hugging Face's Trainer: plotted, never ranked." for group in plotted_only),
        ],
        plotted_only=plotted_only,
        by_epoch=_build_epoch_table(groups, with_reference),
        by_run=_build_run_table(runs),
        differing_settings=differing_settings,
        shared_settings=shared_settings,
        optional_tables=[table for table in optional_tables if table.rows],
    )


def _comparability_notes(runs: Sequence[RunData], with_reference: bool) -> list[str]:
    def names(members: Sequence[RunData]) -> str:
        return list_some((run.name for run in members), 4)

    lines = []
    first_set, *other_sets = comparable_sets(runs, lambda run: run)
    if not other_sets and len(runs) > 1:
        lines.append(f"The losses of all runs are on the same data: {', '.join(COMPARABILITY_KEYS)} agree.")
    for other_set in other_sets:
        reasons = "; ".join(comparison_blockers(other_set[0], first_set[0]))
        lines.append(f"{names(other_set)} and {names(first_set)} are not comparable: {reasons}.")
    if with_reference:
        by_reason: dict[str, list[RunData]] = {}
        for run in runs:
            by_reason.setdefault("; ".join(reference_blockers(run)), []).append(run)
        for reason, members in by_reason.items():
            end = f"not comparable with the card: {reason}."
            if not reason:
                end = "comparable with the card as far as it tells: all that is known of it agrees."
            lines.append(f"{names(members)} {'is' if len(members) == 1 else 'are'} {end}")
        lines.append(f"U{reference.UNKNOWN_REASON[1:]}.")
    return lines


# --- the tables ---


def _build_epoch_table(groups: Sequence[SeedGroup], with_reference: bool) -> Table:
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
                    *(_show(run.evals[name][index], ",.0f") for name in ("step", "samples")),
                    _show_mean([series["train_loss"][row] for series, row in ends if row is not None], 4),
                    _show_mean([run.evals["loss"][row] for run, row in places], 4),
                    _show_mean([run.evals["perplexity"][row] for run, row in places], 3),
                    _show(gap, "+.4f"),
                ]
            )
    notes = [
        "Losses in nats per token. The train loss of a run is the token mean of the epoch"
        + ("; the card's is the last value its program logged." if with_reference else ".")
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


def _show_mean(values: Sequence[float], digits: int) -> str:
    """The value of one run; of several their mean and sample standard deviation."""
    if not values or not np.isfinite(values).all():
        return NO_VALUE
    spread = f" ± {statistics.stdev(map(float, values)):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _show(value: Any, spec: str = "") -> str:
    is_known = value is not None and (isinstance(value, str) or math.isfinite(value))
    return format(value, spec) if is_known else NO_VALUE


def _build_run_table(runs: Sequence[RunData]) -> Table:
    """What each run cost and how good it got; in the order given, not by rank."""

    def cost(run: RunData, key: str) -> str:
        if run.get("resumed") and key in ("peak_memory_bytes", "wall_seconds"):
            return "resumed: unknown"
        return (format_duration if key == "wall_seconds" else format_bytes)(run.summary.get(key))

    columns: dict[str, list[str]] = {}
    for run in runs:
        best, final = run.best_eval or {}, run.final_eval or {}
        speeds = run.steps["tokens_per_second"]
        bits_per_byte = run.evals["bits_per_byte"]
        cells = {
            "run": run.name,
            "id": run.run_id,
            "mode": MODE_NAMES[run.mode],
            "state": run.state + (" (early stop)" if run.summary.get("early_stop") else ""),
            "learning rate": _show(run.get("resolved.lr"), ".4g"),
            "best validation loss": _show(best.get("loss"), ".4f"),
            "best at epoch": _show(best.get("epoch"), ".4g"),
            "best at step": _show(best.get("step"), ",.0f"),
            "final validation loss": _show(final.get("loss"), ".4f"),
            "final bits per byte": _show(bits_per_byte[-1] if len(bits_per_byte) else None, ".4f"),
            "validation loss before training": _show(run.initial_loss, ".4f"),
            "forgetting (nats per token)": _show(run.forgetting, "+.4f"),
            "trainable parameters": _show(run.get("model.trainable"), ",.0f"),
            "share of its parameters": format_percent(run.get("model.share")),
            "peak memory": cost(run, "peak_memory_bytes"),
            "optimizer state": cost(run, "optimizer_bytes"),
            "tokens/s (median)": _show(np.median(speeds[np.isfinite(speeds)]) if len(speeds) else None, ",.0f"),
            "wall time": cost(run, "wall_seconds"),
            "device-hours": _show(run.summary.get("device_hours"), ".4g"),
            "checkpoint size": cost(run, "checkpoint_bytes"),
            "export size": cost(run, "export_bytes"),
            "ZeRO file": run.get("resolved.ds_config"),
            "ranks": _show(run.get("resolved.ranks")),
            "precision": run.get("resolved.precision"),
            "seed": _show(run.get("settings.train.seed")),
        }
        for heading, cell in cells.items():
            columns.setdefault(heading, []).append(cell)
    lines = [[heading, *cells] for heading, cells in columns.items() if set(cells) != {NO_VALUE}]
    if len(runs) > MAX_SIDE_BY_SIDE:
        lines = [list(line) for line in zip(*lines, strict=True)]
    return Table(title="By run: quality and cost", headings=lines[0], rows=lines[1:])


def _build_diagnostics_table(runs: Sequence[RunData]) -> Table:
    headings = ["run", "at step", "what it noticed, the likely cause, and what to try"]
    rows = [[run.name, f"{step:,.0f}", line] for run in runs for step, line in run.diagnostics]
    return Table(title="Diagnosis", headings=headings, rows=rows)


def _build_score_table(runs: Sequence[RunData]) -> Table:
    """What --score-samples found at the last evaluation of each run that asked for it."""
    scored = [(run.name, run.samples, run.samples.scores) for run in runs if run.samples and run.samples.scores]
    names = list(dict.fromkeys(name for *_, scores in scored for name in scores))
    rows = [
        [run, f"{samples.epoch:.4g}", _show(samples.scored, ",.0f"), *(_show(scores.get(n), ".4f") for n in names)]
        for run, samples, scores in scored
    ]
    headings = ["run", "epoch", "texts", *(SCORE_NAMES.get(name, name) for name in names)]
    return Table(title="Completions against their references", headings=headings, rows=rows)


def _build_samples_table(groups: Sequence[SeedGroup]) -> Table:
    """What each base and the first run of each group, at its last evaluation, made of the validation prompts."""
    texts: list[dict[str, str]] = []
    for run in filter(None, (next((run for run in group.runs if run.samples), None) for group in groups)):
        assert run.samples is not None
        base, name = f"base ({PurePosixPath(run.get('model.name')).name})", f"{run.name}, epoch {run.samples.epoch:.4g}"
        for text in run.samples.texts:
            completions = ({base: text.base} if text.base is not None else {}) | {name: text.completion}
            texts.append({"prompt": text.prompt, "reference": text.reference, **completions})
    if not texts:
        return Table(title="Samples", headings=(), rows=())
    frame = pd.DataFrame(texts).groupby("prompt", sort=False, as_index=False).first().fillna(NO_VALUE)
    rows = [[shorten(cell, MAX_TEXT_CHARS) for cell in row] for row in frame.itertuples(index=False)]
    notes = ["Completed greedily, the likeliest token each time; base: before the first step."]
    return Table(title="Samples", headings=list(frame), rows=rows, notes=notes)


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
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32,}", value):
        return f"{value[:12]}…"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# --- the files ---


def write_report(comparison: Comparison, output_dir: Path) -> list[Path]:
    """Write all FILES and return their paths; a folder that cannot be written is a UserError."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(output_dir / "answer.json", json_text(to_answer(comparison.verdict)))
        plots.save_figure([*comparison.groups, *comparison.plotted_only], comparison.with_reference, output_dir)
        write_atomically(output_dir / "report.md", render_markdown(comparison))
        write_atomically(output_dir / "report.html", render_html(comparison))
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: cannot write there ({error.strerror or error})") from error
    return [output_dir / name for name in FILES]


def json_text(content: Any) -> str:
    """Indented JSON, as the files and the page hold it."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def render_markdown(comparison: Comparison) -> str:
    """report.md, which renders on GitHub: every text of a run is escaped; the picture lies beside it."""
    parts = [
        "# Full against LoRA",
        markdown_verdict(comparison),
        "![Validation loss, train loss, learning rate, gradient norm, speed and parameters](curves.png)",
    ]
    if comparison.problems:
        parts += ["## Not as it should be", markdown_list(map(str, comparison.problems))]
    for table in (comparison.by_epoch, comparison.by_run, *comparison.optional_tables):
        parts += [f"## {table.title}", markdown_section(table)]
    differing, shared = comparison.differing_settings, comparison.shared_settings
    parts += ["## Same and different", markdown_list(comparison.comparability_notes)]
    parts += [f"### {differing.title}", markdown_section(differing)]
    summary = f"<details><summary>{shared.title} ({len(shared.rows)})</summary>"
    return "\n\n".join([*parts, summary, markdown_section(shared), "</details>"]) + "\n"


def markdown_verdict(comparison: Comparison) -> str:
    """The sentence, the three numbers, and below them what explains them."""
    verdict = comparison.verdict
    lists = [markdown_list(lines) for lines in (map(str, verdict.headlines), verdict.details)]
    return "\n\n".join(filter(None, [f"**{escape_markdown(verdict.sentence)}**", *lists]))


def markdown_list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escape_markdown(line)}" for line in lines)


def markdown_section(table: Table) -> str:
    if not table.rows:
        return "(nothing)"
    notes = [f"\n{escape_markdown(note)}" for note in table.notes]
    return "\n".join([markdown_table(table.headings, table.rows), *notes])


def render_html(comparison: Comparison) -> str:
    """report.html from page.html.j2: every text is escaped, a mode has its colour wherever its name is a whole cell."""
    groups, verdict, with_reference = comparison.groups, comparison.verdict, comparison.with_reference
    plotted = [*groups, *comparison.plotted_only]
    modes = {run.name: run.mode for run in comparison.runs} | {group.label: group.mode for group in groups}
    files = {"rule.json": verdict.study.rule} if verdict.study else {}
    files |= {"answer.json": to_answer(verdict)}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.j2").render(
        comparison=comparison,
        verdict=verdict,
        labels=[group.label for group in groups[:4]],
        downloads={name: base64.b64encode(json_text(content).encode()).decode() for name, content in files.items()},
        picture=plots.render_picture(plotted, verdict, with_reference),
        plots=plots.render_svgs(plotted, with_reference),
        modes=modes | {REFERENCE_LABEL: "card"},
    )
