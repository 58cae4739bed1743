"""A comparison written down: report.html and report.md for people, answer.json for machines, and the curves."""

import base64
import json
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from trainer.config.errors import UserError
from trainer.config.files import write_atomically
from trainer.config.text import escape_markdown, is_number, markdown_table
from trainer.report import plots
from trainer.report.sentence import to_answer
from trainer.report.tables import REFERENCE_LABEL, Comparison, Table

FILES = ("report.html", "report.md", "curves.png", "curves.svg", "answer.json")
MAX_NARROW_CHARS = 34  # of a cell whose text is not broken into lines


def write_report(comparison: Comparison, output_dir: Path) -> list[Path]:
    """Write all FILES and return their paths; a folder that cannot be written is a UserError."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(output_dir / "answer.json", json_text(to_answer(comparison.verdict)))
        plots.save_figure(comparison.groups, comparison.with_reference, output_dir)
        write_atomically(output_dir / "report.md", render_markdown(comparison))
        write_atomically(output_dir / "report.html", render_html(comparison))
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: cannot write there ({error.strerror or error})") from error
    return [output_dir / name for name in FILES]


def json_text(content: Any) -> str:
    """Indented JSON in UTF-8: NaN and infinity as null, bytes of a path that are not UTF-8 as `\\udcff`."""

    def to_json_value(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): to_json_value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [to_json_value(item) for item in value]
        if isinstance(value, float):
            return float(value) if value - value == 0 else None
        return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value

    return json.dumps(to_json_value(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


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


# --- HTML ---


def render_html(comparison: Comparison) -> str:
    groups, verdict, with_reference = comparison.groups, comparison.verdict, comparison.with_reference
    modes = {run.name: run.mode for run in comparison.runs} | {group.label: group.mode for group in groups}
    modes[REFERENCE_LABEL] = "card"
    files = {"rule.json": verdict.study.rule} if verdict.study else {}
    files |= {"answer.json": to_answer(verdict)}
    is_card_drawn = with_reference and plots.is_reference_comparable(groups)
    legend = "Full is blue, LoRA orange" + (", the card grey." if is_card_drawn else ".")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # a dotted name may be broken at its dots
    environment.filters["break_hints"] = lambda text: Markup(
        re.sub(r"(?<=[a-z])([._])(?=[a-z])", r"\1<wbr>", escape(text))
    )
    return environment.get_template("page.html.j2").render(
        comparison=comparison,
        verdict=verdict,
        labels=[group.label for group in groups[:4]],
        downloads={name: base64.b64encode(json_text(content).encode()).decode() for name, content in files.items()},
        picture=plots.render_picture(groups, verdict, with_reference),
        plots=plots.render_svgs(groups, with_reference),
        legend=f"{legend} {plots.bin_note(groups)}",
        lay_out=lambda table: lay_out_cells(table, modes),
    )


def lay_out_cells(table: Table, modes: dict[str, str]) -> list[list[tuple[str, Markup]]]:
    """Headings and rows as (text, class attribute): numbers to the right, long texts broken, modes in colour."""
    is_numeric = [
        all(is_number(cell) or cell == "unknown" for cell in column) for column in zip(*table.rows, strict=True)
    ]
    lines = []
    for row in (table.headings, *table.rows):
        is_heading, cells = row is table.headings, []
        for column, cell in enumerate(row):
            mode = modes.get(cell.split(", n = ")[0]) if column < 2 or is_heading else None  # what names its row
            names = ["number"] * is_numeric[column] + ["wide"] * (len(cell) > MAX_NARROW_CHARS and not is_heading)
            names += [f"key {mode}"] if mode else []
            cells.append((cell, Markup(f' class="{" ".join(names)}"' if names else "")))
        lines.append(cells)
    return lines
