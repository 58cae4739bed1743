"""A comparison written down: report.html and report.md for people, answer.json and comparison.json for machines."""

import base64
import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from trainer.config import reference
from trainer.config.errors import UserError
from trainer.config.files import write_atomically
from trainer.config.text import escape_markdown, is_number, markdown_table
from trainer.report import plots
from trainer.report.comparable import comparable_sets, compare_metadata, reference_blockers
from trainer.report.sentence import to_answer
from trainer.report.tables import REFERENCE_LABEL, Comparison, Table

FILES = ("report.html", "report.md", "curves.png", "curves.svg", "answer.json", "comparison.json")
MAX_NARROW_CHARS = 34  # of a cell whose text is not broken into lines


def write_report(comparison: Comparison, output_dir: Path, checks: Sequence[dict[str, Any]] = ()) -> list[Path]:
    """Write all FILES and return their paths; a folder that cannot be written is a UserError."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(output_dir / "answer.json", json_text(to_answer(comparison.verdict)))
        write_atomically(output_dir / "comparison.json", json_text(to_json(comparison, checks)))
        plots.save_figure(comparison.groups, comparison.with_reference, output_dir)
        write_atomically(output_dir / "report.md", render_markdown(comparison))
        write_atomically(output_dir / "report.html", render_html(comparison))
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: cannot write there ({error.strerror or error})") from error
    return [output_dir / name for name in FILES]


# --- JSON ---


def json_text(content: Any) -> str:
    """Indented JSON; what is no JSON number becomes null."""
    return json.dumps(replace_non_finite(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def replace_non_finite(value: Any) -> Any:
    """`value` with NaN and infinity, which JSON does not know, as null."""
    if isinstance(value, dict):
        return {str(key): replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(item) for item in value]
    if isinstance(value, float):
        return float(value) if value - value == 0 else None
    return value


def to_json(comparison: Comparison, checks: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The content of comparison.json: everything in the tables, with numbers as numbers."""
    runs, groups = comparison.runs, comparison.groups
    names = ([REFERENCE_LABEL] if comparison.with_reference else []) + [group.label for group in groups]
    return {
        "format": 1,
        "verdict": {**to_answer(comparison.verdict), "details": list(comparison.verdict.details)},
        "comparable": {
            "lines": list(comparison.comparability_notes),
            "sets": [[run.run_id for run in members] for members in comparable_sets(runs, lambda run: run)],
            "card": {
                run.run_id: {"comparable": not reference_blockers(run), "reasons": reference_blockers(run)}
                for run in runs
            }
            if comparison.with_reference
            else None,
            "unknown_of_card": list(reference.UNKNOWN_DATA),
        },
        "groups": [
            {"label": group.label, "mode": group.mode, "runs": [run.run_id for run in group.runs]} for group in groups
        ],
        "by_epoch": comparison.by_epoch.to_records(),
        "by_run": comparison.by_run.to_records(),
        "diagnosis": comparison.diagnostics.to_records(),
        "scores": comparison.scores.to_records(),
        "samples": comparison.generations.to_records(),
        "facts": {
            fact.name: {
                "same": fact.is_same,
                "values": {name: fact.values.get(column, "unknown") for column, name in enumerate(names)},
            }
            for fact in compare_metadata([group.runs for group in groups], comparison.with_reference)
        },
        "evaluations": {
            run.run_id: [
                dict(zip(run.evals, map(float, row), strict=True)) for row in zip(*run.evals.values(), strict=True)
            ]
            for run in runs
        },
        "problems": [
            {"source": problem.source, "text": problem.text, "left_out": problem.is_excluded}
            for problem in comparison.problems
        ],
        "checks": list(checks),
    }


# --- Markdown that renders on GitHub; every text of a run is escaped ---


def render_markdown(comparison: Comparison) -> str:
    """report.md; the picture lies beside it."""
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
    parts += [f"<details><summary>{shared.title} ({len(shared)})</summary>", markdown_section(shared), "</details>"]
    return "\n\n".join(parts) + "\n"


def markdown_verdict(comparison: Comparison) -> str:
    """The sentence, the three numbers, and below them what explains them."""
    verdict = comparison.verdict
    numbers = [f"{number.label}: {number.value} ({number.note})" for number in verdict.headlines]
    lists = [markdown_list(lines) for lines in (numbers, verdict.details) if lines]
    return "\n\n".join([f"**{escape_markdown(verdict.sentence)}**", *lists])


def markdown_list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escape_markdown(line)}" for line in lines)


def markdown_section(table: Table) -> str:
    if not len(table):
        return "(nothing)"
    text = table.to_text()
    rendered = markdown_table(list(text.columns), text.to_numpy().tolist())
    return "\n".join([rendered, *(f"\n{escape_markdown(note)}" for note in table.notes)])


# --- HTML ---


def render_html(comparison: Comparison) -> str:
    groups, verdict, with_reference = comparison.groups, comparison.verdict, comparison.with_reference
    modes = {run.name: run.mode for run in comparison.runs} | {group.label: group.mode for group in groups}
    modes[REFERENCE_LABEL] = "card"
    files = {"rule.json": verdict.study.rule} if verdict.study else {}
    files |= {"answer.json": to_answer(verdict)}
    tables = ("by_epoch", "by_run", "differing_settings", "shared_settings")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["break_hints"] = _add_break_hints
    is_card_drawn = with_reference and plots.is_reference_comparable(groups)
    legend = "Full is blue, LoRA orange" + (", the card grey." if is_card_drawn else ".")
    return environment.get_template("page.html.j2").render(
        labels=[group.label for group in groups[:4]],
        verdict=verdict,
        downloads={name: base64.b64encode(json_text(content).encode()).decode() for name, content in files.items()},
        picture=plots.render_picture(groups, verdict, with_reference),
        plots=plots.render_svgs(groups, with_reference),
        legend=f"{legend} {plots.bin_note(groups)}",
        problems=comparison.problems,
        comparability_notes=comparison.comparability_notes,
        optional_tables=[_lay_out(table, modes) for table in comparison.optional_tables],
        **{name: _lay_out(getattr(comparison, name), modes) for name in tables},
    )


def _lay_out(table: Table, modes: dict[str, str]) -> dict[str, Any]:
    """The cells of a table as (text, class attribute): numbers to the right, long texts broken, modes in colour."""
    text = table.to_text()
    columns = [text.iloc[:, i].tolist() for i in range(text.shape[1])]
    is_numeric = [all(is_number(cell) or cell == "unknown" for cell in column) for column in columns]

    def lay_out_cell(cell: str, column: int, *, is_heading: bool = False) -> tuple[str, Markup]:
        mode = modes.get(cell.split(", n = ")[0]) if column < 2 or is_heading else None  # two columns name their row
        is_wide = len(cell) > MAX_NARROW_CHARS and not is_heading
        names = ["number"] * is_numeric[column] + ["wide"] * is_wide + ([f"key {mode}"] if mode else [])
        return cell, Markup(f' class="{" ".join(names)}"' if names else "")

    return {
        "title": table.title,
        "notes": table.notes,
        "num_rows": len(table),
        "headings": [lay_out_cell(heading, i, is_heading=True) for i, heading in enumerate(text.columns)],
        "rows": [
            [lay_out_cell(cell, i) for i, cell in enumerate(row)] for row in text.itertuples(index=False, name=None)
        ],
    }


def _add_break_hints(text: str) -> Markup:
    """Escaped text that may be broken within a dotted name."""
    return Markup(re.sub(r"(?<=[a-z])([._])(?=[a-z])", r"\1<wbr>", escape(text)))
