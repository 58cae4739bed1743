"""The comparison as Markdown that renders on GitHub."""

import re
from typing import TYPE_CHECKING

from trainer.report.tables import Table

if TYPE_CHECKING:
    from trainer.report.comparison import Comparison

MAX_SIDE_BY_SIDE = 8  # runs side by side; more are one below the other


def render(comparison: "Comparison") -> str:
    """report.md; the picture lies beside it."""
    parts = [
        "# Full against LoRA" + (" against the card" if comparison.with_reference else ""),
        render_verdict(comparison),
    ]
    if comparison.problems:
        parts.append(
            "## Not as it should be\n\n" + "\n".join(f"- {escape(str(problem))}" for problem in comparison.problems)
        )
    parts += [
        f"## {comparison.by_epoch.title}",
        render_table(comparison.by_epoch),
        f"## {comparison.by_run.title}",
        render_run_table(comparison),
    ]
    for optional_table in (comparison.diagnostics, comparison.scores, comparison.generations):
        if optional_table.rows:
            parts += [f"## {optional_table.title}", render_table(optional_table)]
    parts += ["## Same and different", "\n".join(f"- {escape(line)}" for line in comparison.comparability_notes)]
    parts += [f"### {comparison.differing_settings.title}", render_table(comparison.differing_settings)]
    parts += [
        f"<details><summary>{comparison.shared_settings.title} ({len(comparison.shared_settings.rows)})</summary>",
        render_table(comparison.shared_settings),
        "</details>",
    ]
    parts += [
        "## Curves",
        "![Validation loss, train loss, learning rate, gradient norm, speed and parameters](curves.png)",
    ]
    return "\n\n".join(parts) + "\n"


def render_verdict(comparison: "Comparison") -> str:
    """The sentence, and below it what explains it."""
    lines = "\n".join(f"- {escape(line)}" for line in comparison.verdict.details)
    return f"**{escape(comparison.verdict.sentence)}**" + (f"\n\n{lines}" if lines else "")


def render_run_table(comparison: "Comparison") -> str:
    """The table per run, turned where the runs fit side by side."""
    by_run = comparison.by_run
    return render_table(by_run.transpose() if len(by_run.rows) <= MAX_SIDE_BY_SIDE else by_run)


def render_table(table: Table) -> str:
    """A pipe table and its notes; numbers to the right."""
    headings = list(table.columns.values())
    if not table.rows:
        return "(nothing)"
    numeric = [all(_is_number(row[i].text) for row in table.rows) for i in range(len(headings))]
    lines = [
        "| " + " | ".join(map(escape, headings)) + " |",
        "|" + "|".join("--:" if is_right else ":--" for is_right in numeric) + "|",
    ]
    lines += ["| " + " | ".join(escape(cell.text) for cell in row) + " |" for row in table.rows]
    return "\n".join([*lines, *(f"\n{escape(note)}" for note in table.notes)])


def _is_number(text: str) -> bool:
    return re.match(r"^[-+]?[\d,.]+|^-?$", text) is not None


def escape(text: str) -> str:
    """Text that Markdown and GitHub's HTML leave as it is, on one line."""
    text = " ".join(text.split())
    return re.sub(r"([\\`*_|<>\[\]#~$@])", r"\\\1", text)
