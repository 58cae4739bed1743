"""The comparison as Markdown that renders on GitHub; tables come from pandas, every text of a run escaped."""

import re
from collections.abc import Iterable

from trainer.report.comparison import Comparison
from trainer.report.tables import Table


def render(comparison: Comparison) -> str:
    """report.md; the picture lies beside it."""
    parts = [
        "# Full against LoRA",
        render_verdict(comparison),
        "![Validation loss, train loss, learning rate, gradient norm, speed and parameters](curves.png)",
    ]
    if comparison.problems:
        parts += ["## Not as it should be", render_list(map(str, comparison.problems))]
    for table in (comparison.by_epoch, comparison.by_run, *comparison.optional_tables):
        parts += [f"## {table.title}", render_table(table)]
    parts += ["## Same and different", render_list(comparison.comparability_notes)]
    parts += [f"### {comparison.differing_settings.title}", render_table(comparison.differing_settings)]
    shared = comparison.shared_settings
    parts += [f"<details><summary>{shared.title} ({len(shared)})</summary>", render_table(shared), "</details>"]
    return "\n\n".join(parts) + "\n"


def render_verdict(comparison: Comparison) -> str:
    """The sentence, the three numbers, and below them what explains them."""
    verdict = comparison.verdict
    lines = [f"**{escape(verdict.sentence)}**"]
    if verdict.headlines:
        lines.append(
            render_list(f"{headline.label}: {headline.value} ({headline.note})" for headline in verdict.headlines)
        )
    return "\n\n".join([*lines, *([render_list(verdict.details)] if verdict.details else [])])


def render_list(lines: Iterable[str]) -> str:
    """A bulleted list of texts."""
    return "\n".join(f"- {escape(line)}" for line in lines)


def render_table(table: Table) -> str:
    """A pipe table and its notes; numbers to the right."""
    if not len(table):
        return "(nothing)"
    text = table.to_text().map(escape)
    text.columns = text.columns.map(escape)
    alignment = ["right" if all(map(is_number, table.to_text().iloc[:, i])) else "left" for i in range(text.shape[1])]
    rendered = text.to_markdown(index=False, disable_numparse=True, colalign=alignment)
    return "\n".join([rendered, *(f"\n{escape(note)}" for note in table.notes)])


def is_number(text: str) -> bool:
    """Whether a cell reads as a number, or has no value."""
    return re.match(r"^[-+]?[\d,.]+|^-?$", text) is not None


def escape(text: str) -> str:
    """Text that Markdown and GitHub's HTML leave as it is, on one line."""
    text = " ".join(text.split())
    return re.sub(r"([\\`*_|<>\[\]#~$@&])", r"\\\1", text)
