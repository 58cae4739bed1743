"""The comparison as Markdown that renders on GitHub."""

import re
from typing import TYPE_CHECKING

from trainer.report.tables import Table

if TYPE_CHECKING:
    from trainer.report.comparison import Comparison

MOST_ACROSS = 8  # runs side by side; more are one below the other


def page(comparison: "Comparison") -> str:
    """report.md; the picture lies beside it."""
    parts = ["# Full against LoRA" + (" against the card" if comparison.with_card else ""), verdict(comparison)]
    if comparison.problems:
        parts.append(
            "## Not as it should be\n\n" + "\n".join(f"- {escape(str(problem))}" for problem in comparison.problems)
        )
    parts += [
        f"## {comparison.by_epoch.title}",
        table(comparison.by_epoch),
        f"## {comparison.by_run.title}",
        runs_table(comparison),
    ]
    for optional in (comparison.diagnosis, comparison.scores, comparison.samples):
        if optional.rows:
            parts += [f"## {optional.title}", table(optional)]
    parts += ["## Same and different", "\n".join(f"- {escape(line)}" for line in comparison.comparable)]
    parts += [f"### {comparison.different.title}", table(comparison.different)]
    parts += [
        f"<details><summary>{comparison.same.title} ({len(comparison.same.rows)})</summary>",
        table(comparison.same),
        "</details>",
    ]
    parts += [
        "## Curves",
        "![Validation loss, train loss, learning rate, gradient norm, speed and parameters](curves.png)",
    ]
    return "\n\n".join(parts) + "\n"


def verdict(comparison: "Comparison") -> str:
    """The sentence, and below it what explains it."""
    lines = "\n".join(f"- {escape(line)}" for line in comparison.verdict.details)
    return f"**{escape(comparison.verdict.sentence)}**" + (f"\n\n{lines}" if lines else "")


def runs_table(comparison: "Comparison") -> str:
    """The table per run, turned where the runs fit side by side."""
    by_run = comparison.by_run
    return table(by_run.turned() if len(by_run.rows) <= MOST_ACROSS else by_run)


def table(content: Table) -> str:
    """A pipe table and its notes; numbers to the right."""
    headings = list(content.columns.values())
    if not content.rows:
        return "(nothing)"
    right = [all(_is_number(row[i].text) for row in content.rows) for i in range(len(headings))]
    lines = [
        "| " + " | ".join(map(escape, headings)) + " |",
        "|" + "|".join("--:" if one else ":--" for one in right) + "|",
    ]
    lines += ["| " + " | ".join(escape(cell.text) for cell in row) + " |" for row in content.rows]
    return "\n".join([*lines, *(f"\n{escape(note)}" for note in content.notes)])


def _is_number(text: str) -> bool:
    return re.match(r"^[-+]?[\d,.]+|^-?$", text) is not None


def escape(text: str) -> str:
    """Text that Markdown and GitHub's HTML leave as it is, on one line."""
    text = " ".join(text.split())
    return re.sub(r"([\\`*_|<>\[\]#~$@])", r"\\\1", text)
