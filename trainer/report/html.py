"""The comparison as one HTML file: no script, no other file; tables come from pandas, every text of a run escaped."""

import base64
import re
from collections.abc import Iterable
from html import escape
from typing import Any

import pandas as pd

from trainer.report import plot_axes, plots
from trainer.report.answer_json import json_text, to_answer
from trainer.report.comparison import Comparison
from trainer.report.markdown import is_number
from trainer.report.page_style import STYLE
from trainer.report.tables import REFERENCE_LABEL, Table

MAX_NARROW_CHARS = 34  # of a cell whose text is not broken into lines


def render(comparison: Comparison) -> str:
    """report.html."""
    title = "Full against LoRA"
    group_labels = [group.label for group in comparison.groups]
    modes = {
        **{run.name: run.mode for run in comparison.runs},
        **{group.label: group.mode for group in comparison.groups},
        REFERENCE_LABEL: "card",
    }
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}: {escape(', '.join(group_labels[:4]))}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            _render_first_screen(comparison, title),
            _render_list(comparison.verdict.details, "rule"),
            _render_problems(comparison),
            _render_section(comparison.by_epoch, modes, "epochs"),
            _render_section(comparison.by_run, modes, "runs"),
            "<h2>Curves</h2>",
            _render_plots(comparison),
            *(_render_section(table, modes) for table in comparison.optional_tables),
            "<h2>Same and different</h2>",
            _render_list(comparison.comparability_notes),
            _render_details(comparison.differing_settings, modes, is_open=True),
            _render_details(comparison.shared_settings, modes, is_open=False),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _render_first_screen(comparison: Comparison, title: str) -> str:
    """The sentence, three numbers, and one picture."""
    verdict = comparison.verdict
    numbers = "".join(
        f"<div><dt>{escape(headline.label)}</dt><dd>{escape(headline.value)}</dd><dd>{escape(headline.note)}</dd></div>"
        for headline in verdict.headlines
    )
    caption, svg = plots.render_picture(comparison.groups, verdict, comparison.with_reference)
    links = ['<a href="#rule">what it rests on</a>'] if verdict.details else []
    links += [_download("rule.json", verdict.study.rule)] if verdict.study else []
    links += [_download("answer.json", to_answer(verdict)), '<a href="#runs">the runs</a>']
    return (
        f'<section class="first"><div><h1>{title}</h1><p class="verdict">{escape(verdict.sentence)}</p>'
        f'<dl class="numbers">{numbers}</dl><p class="quiet">{", ".join(links)}</p></div>'
        f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure></section>"
    )


def _download(name: str, content: Any) -> str:
    """A link to a JSON file that the page itself holds."""
    packed = base64.b64encode(json_text(content).encode()).decode()
    return f'<a download="{name}" href="data:application/json;base64,{packed}">{name}</a>'


def _render_list(lines: Iterable[str], anchor: str = "") -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    attributes = f'id="{anchor}" class="quiet"' if anchor else 'class="quiet"'
    return f"<ul {attributes}>{items}</ul>" if items else ""


def _render_problems(comparison: Comparison) -> str:
    if not comparison.problems:
        return ""
    lines = "".join(f"<li>{escape(str(problem))}</li>" for problem in comparison.problems)
    return f'<section class="warn"><h2>Not as it should be</h2><ul>{lines}</ul></section>'


def _render_section(table: Table, modes: dict[str, str], anchor: str = "") -> str:
    heading = f'<h2 id="{anchor}">' if anchor else "<h2>"
    return f"{heading}{escape(table.title)}</h2>{_render_table(table, modes, anchor)}"


def _render_details(table: Table, modes: dict[str, str], *, is_open: bool) -> str:
    body = _render_table(table, modes) if len(table) else "<p>(nothing)</p>"
    title = f"{escape(table.title)} ({len(table)})"
    return f"<details{' open' if is_open else ''}><summary>{title}</summary>{body}</details>"


def _render_table(table: Table, modes: dict[str, str], css_class: str = "") -> str:
    """A table that scrolls by itself; the first two columns name their row."""
    text = table.to_text()
    headings = [str(heading) for heading in text.columns]
    text.columns = pd.RangeIndex(len(headings))
    is_numeric = [all(is_number(value) or value == "unknown" for value in text[i]) for i in text]
    classes = pd.DataFrame(
        {i: [_cell_class(value, is_numeric[i], modes if i < 2 else {}) for value in text[i]] for i in text},
        index=text.index,
    )
    styler = text.style.hide(axis="index").set_td_classes(classes).format(_add_break_hints)
    styler = styler.format_index(lambda i: escape(headings[i]), axis=1)
    html = styler.set_table_attributes(f'class="{css_class}"').to_html(cell_ids=False, doctype_html=False)
    html = re.sub(r"<style.*?</style>\s*|\s*id=\"[^\"]*\"", "", html, flags=re.DOTALL)
    html = re.sub(
        r'<th class="col_heading level0 col(\d+)"[^>]*>',
        lambda match: _heading_tag(headings[int(match[1])], is_numeric[int(match[1])], modes),
        html,
    )
    html = re.sub(r'<td class="data row\d+ col0 ?([^"]*)"\s*>(.*?)</td>', r'<th scope="row" class="\1">\2</th>', html)
    html = re.sub(r'<td class="data row\d+ col\d+ ?([^"]*)"\s*>', r'<td class="\1">', html).replace(' class=""', "")
    notes = "".join(f"<p>{escape(note)}</p>" for note in table.notes)
    notes = notes and f'<div class="quiet notes">{notes}</div>'
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">{html}</div>{notes}'


def _heading_tag(heading: str, is_numeric: bool, modes: dict[str, str]) -> str:
    return f'<th scope="col" class="{_cell_class(heading, is_numeric, modes, is_heading=True)}">'


def _cell_class(text: str, is_numeric: bool, modes: dict[str, str], *, is_heading: bool = False) -> str:
    mode = modes.get(text.split(", n = ")[0])
    is_wide = len(text) > MAX_NARROW_CHARS and not is_heading
    return " ".join([*["number"] * is_numeric, *["wide"] * is_wide, *([f"key {mode}"] if mode else [])])


def _add_break_hints(text: str) -> str:
    """Escaped text that may be broken within a dotted name."""
    return re.sub(r"(?<=[a-z])([._])(?=[a-z])", r"\1<wbr>", escape(text))


def _render_plots(comparison: Comparison) -> str:
    figures = [
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"
        for title, svg in plots.render_svgs(comparison.groups, comparison.with_reference)
    ]
    is_card_drawn = comparison.with_reference and plot_axes.is_reference_comparable(comparison.groups)
    legend = "Full is blue, LoRA orange" + (", the card grey." if is_card_drawn else ".")
    note = plot_axes.bin_note(comparison.groups)
    return f'<p class="quiet">{legend} {escape(note)}</p><div class="plots">{"".join(figures)}</div>'
