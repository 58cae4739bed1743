"""A comparison written down: its tables, report.html for people, answer.json for machines."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from trainer.config import reference
from trainer.config.errors import UserError
from trainer.config.files import name_data, write_atomically
from trainer.config.text import capitalize, escape_markdown, list_some, markdown_table
from trainer.report import plots
from trainer.report.answer_file import to_answer
from trainer.report.comparable import (
    COMPARABILITY_KEYS,
    SeedGroup,
    comparable_sets,
    comparison_blockers,
    group_by_seed,
    reference_blockers,
)
from trainer.report.judge import DEFAULT_MARGIN, Margin, StudyContext
from trainer.report.load import LoadProblem
from trainer.report.run_data import TRAINER_MODE, RunData
from trainer.report.sentence import Verdict, build_verdict
from trainer.report.tables import (
    REFERENCE_LABEL,
    Table,
    build_epoch_table,
    build_run_tables,
    build_samples,
    build_settings_tables,
)

#: by answer: class, mark and words of the first line
JUDGEMENTS = {
    "better": ("good", "✓", "{} was better"),
    "good enough": ("good", "✓", "{} was good enough"),
    "worse": ("bad", "✗", "{} was not good enough"),
    "cannot tell": ("unsure", "?", "Cannot tell yet"),
    "not ranked": ("unsure", "–", "No answer"),
}
FILES = ("report.html", "answer.json")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs by group, what they come to, and the tables."""

    groups: Sequence[SeedGroup]
    problems: Sequence[LoadProblem]
    with_reference: bool
    verdict: Verdict
    comparability_notes: Sequence[str]  #: one line each on what may be held against what
    by_epoch: Table
    by_run: Sequence[Table]  #: quality and cost
    settings: tuple[Table, Table]  #: what differs, and what is the same
    diagnosis: Table  #: what runs noticed of themselves
    samples: Mapping[str, Mapping[str, str]]  #: {prompt: {name: text}}
    plotted_only: Sequence[SeedGroup] = ()  #: runs of Hugging Face's Trainer, which nothing else counts

    @property
    def question(self) -> str:
        """With the data and the base model of what is compared first."""
        pair = self.verdict.primary
        run = pair.full.runs[0] if pair else self.runs[0]
        data, model = name_data(str(run.get("data.source"))), PurePosixPath(str(run.get("model.name"))).name
        if pair and pair.is_judged:
            return f"Was {pair.lora.name} as good as {pair.full.name} on {data}?"
        return f"Was LoRA good enough for {data} on {model}?"

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
    models: Table | None = None,
) -> Comparison:
    """The comparison of `runs` with one another and, with `with_reference`, with the card. With `study` by its rule,
    which knows the groups: its first LoRA group is the primary one. `models`: of judged models, in place of the tables
    of runs. UserError where all are runs of Hugging Face's Trainer."""
    plotted_only = [SeedGroup(run.name, run.mode, (run,)) for run in runs if run.mode == TRAINER_MODE]
    groups = group_by_seed([run for run in runs if run.mode != TRAINER_MODE]) if groups is None else groups
    if not groups:
        raise UserError("only runs of Hugging Face's Trainer: expected a run of this program beside them")
    runs = [run for group in groups for run in group.runs]
    verdict = build_verdict(groups, margin, study)
    return Comparison(
        groups=groups,
        problems=problems,
        with_reference=with_reference,
        verdict=verdict,
        comparability_notes=[
            *_comparability_notes(runs, with_reference),
            *(f"{group.label} is a run of Hugging Face's Trainer: plotted, never ranked." for group in plotted_only),
        ],
        plotted_only=plotted_only,
        by_epoch=models or build_epoch_table(groups, with_reference, verdict.primary),
        by_run=() if models else build_run_tables(runs),
        settings=build_settings_tables(groups, with_reference),
        diagnosis=Table(
            title="Diagnosis",
            headings=["run", "at step", "what it noticed, the likely cause, and what to try"],
            rows=[(run.name, f"{step:,.0f}", line) for run in runs for step, line in run.diagnostics],
        ),
        samples=build_samples(groups),
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
            answer = f"not comparable with the card: {reason}" if reason else "comparable with all that the card tells"
            lines.append(f"{names(members)}: {answer}.")
        lines.append(f"U{reference.UNKNOWN_REASON[1:]}.")
    return lines


# --- the files ---


def write_report(comparison: Comparison, output_dir: Path) -> list[Path]:
    """Write all FILES and return their paths; a folder that cannot be written is a UserError."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(output_dir / "answer.json", json_text(to_answer(comparison.verdict)))
        write_atomically(output_dir / "report.html", render_html(comparison))
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: cannot write there ({error.strerror or error})") from error
    return [output_dir / name for name in FILES]


def json_text(content: Any) -> str:
    """Indented JSON, as the files and the page hold it."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def markdown_sections(comparison: Comparison) -> list[tuple[str, str]]:
    """(title, Markdown) of the sections of a W&B Report, whose panels have the rest; every text of a run is escaped."""
    verdict, table = comparison.verdict, comparison.by_epoch
    numbers, details, problems, notes = (
        "\n".join(f"- {escape_markdown(line)}" for line in lines)
        for lines in (
            map(str, verdict.headlines),
            verdict.details,
            [problem.without_place for problem in comparison.problems],
            comparison.comparability_notes,
        )
    )
    sentence, advice = f"**{escape_markdown(verdict.sentence)}**", escape_markdown(verdict.next_step)
    by_epoch = [markdown_table(table.headings, table.rows), *map(escape_markdown, table.notes)]
    sections = {
        "Verdict": [sentence, advice, numbers, details],
        "Problems": [problems],
        table.title: by_epoch,
        "What may be compared": [notes],
    }
    return [(title, "\n\n".join(filter(None, texts))) for title, texts in sections.items() if any(texts)]


def render_html(comparison: Comparison) -> str:
    """report.html from page.html.j2: every text is escaped, a mode has its colour wherever its name is a whole cell."""
    groups, verdict, with_reference = comparison.groups, comparison.verdict, comparison.with_reference
    plotted = [*groups, *comparison.plotted_only]
    modes = {run.name: run.mode for run in comparison.runs} | {group.label: group.mode for group in groups}
    files = {"rule.json": verdict.study.rule} if verdict.study else {}
    files |= {"answer.json": to_answer(verdict)}
    pictures, other_plots = plots.render_pictures(plotted, verdict, with_reference)
    css_class, mark, words = JUDGEMENTS[verdict.answer or "not ranked"]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        comparison=comparison,
        verdict=verdict,
        downloads={name: base64.b64encode(json_text(content).encode()).decode() for name, content in files.items()},
        judgement=(css_class, mark, words.format(verdict.primary.lora.name if verdict.primary else "")),
        losses=next(iter(verdict.headlines), None),
        tiles=verdict.headlines[1:],
        claim=capitalize(verdict.statement.claim),
        others=verdict.sentence.removeprefix(str(verdict.statement)),
        pictures=pictures,
        plots=other_plots,
        modes=modes | {REFERENCE_LABEL: "card"},
    )
