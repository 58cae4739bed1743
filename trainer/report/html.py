"""The comparison as one HTML file: no script, no other file, light and dark, and readable on a phone."""

import re
from html import escape
from typing import TYPE_CHECKING

from trainer.report import plot_axes, plots
from trainer.report.markdown import MAX_SIDE_BY_SIDE, _is_number
from trainer.report.tables import REFERENCE_LABEL, Table

if TYPE_CHECKING:
    from trainer.report.comparison import Comparison

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --raised: #f5f6f7;
  --ink: #1f2328; --quiet: #59636e; --faint: #d9dce0;
  --full: #0072b2; --lora: #c04f00; --card: #6b6f76; --warn: #8a5a00; --warn-ground: #fff6e0; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --raised: #1d2126;
  --ink: #e7eaee; --quiet: #a3abb5; --faint: #363c44;
  --full: #56b4e9; --lora: #ff9a5a; --card: #a9afb7; --warn: #f0c060; --warn-ground: #2d2615; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 4rem; max-width: 76rem;
  background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0 0 .3rem; }
p, ul { max-width: 62rem; }
ul { padding-left: 1.2rem; }
.verdict { font-size: 1.2rem; line-height: 1.5; margin: 0 0 .8rem; padding: .9rem 1.1rem; background: var(--raised);
  border-left: 4px solid var(--full);
  border-radius: 4px; max-width: none; overflow-wrap: anywhere; }
.quiet { color: var(--quiet); font-size: .92rem; overflow-wrap: anywhere; }
.notes p { margin: .4rem 0 0; }
.warn { background: var(--warn-ground); border-left: 4px solid var(--warn); border-radius: 4px;
  padding: .6rem 1.1rem; overflow-wrap: anywhere; }
.warn h2 { margin: 0; font-size: 1rem; color: var(--warn); }
.warn ul { margin: .3rem 0; }
.scroll { overflow-x: auto; border: 1px solid var(--faint); border-radius: 6px; }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .75rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--faint); }
td.wide { white-space: normal; min-width: 11rem; max-width: 30rem; overflow-wrap: anywhere; }
tr:last-child > * { border-bottom: 0; }
thead th { background: var(--raised); font-weight: 600; }
th:first-child { position: sticky; left: 0; background: var(--ground); font-weight: 500; }
tbody th:not(.number) { min-width: 14rem; }
thead th:first-child { background: var(--raised); }
.number { text-align: right; }
tr.starts > * { border-top: 2px solid var(--faint); }
.full { color: var(--full); } .lora { color: var(--lora); } .card { color: var(--card); }
.key { font-weight: 600; }
details { margin: .8rem 0; }
summary { cursor: pointer; padding: .3rem 0; font-weight: 600; }
summary:focus-visible, .scroll:focus-visible { outline: 2px solid var(--full); outline-offset: 2px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.6rem 2rem; }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 36rem; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
@media (max-width: 40rem) { body { padding-top: 1rem; } .verdict { font-size: 1.08rem; }
  th, td { padding: .35rem .55rem; } td.wide, tbody th { white-space: normal; }
  tbody th:not(.number) { min-width: 7rem; max-width: 9.5rem; overflow-wrap: anywhere; }
  .epochs tr { display: flex; } .epochs tr > * { flex: 0 0 5.2rem; min-width: 0; }  /* the losses first */
  .epochs tr > :nth-child(1) { flex-basis: 4.3rem; } .epochs tr > :nth-child(2) { flex-basis: 7.2rem;
    white-space: normal; position: sticky; left: 4.3rem; background: var(--ground); }
  .epochs thead tr > :nth-child(2) { background: var(--raised); }
  .epochs tr > :nth-child(n+5) { flex-basis: 9rem; }
  .epochs tr > :nth-child(3), .epochs tr > :nth-child(4) { order: 2; }
  .epochs tr > :nth-child(4) { flex-basis: 8.2rem; }
  .epochs tr > :nth-child(5), .epochs tr > :nth-child(n+7) { order: 1; } }
@media print { .scroll { overflow: visible; } }
"""


def render(comparison: "Comparison") -> str:
    """report.html."""
    title = "Full against LoRA" + (" against the card" if comparison.with_reference else "")
    group_labels = [group.label for group in comparison.groups]
    modes = {
        **{run.name: run.mode for run in comparison.runs},
        **{group.label: group.mode for group in comparison.groups},
        REFERENCE_LABEL: "card",
    }
    by_run = comparison.by_run
    by_run = by_run.transpose() if len(by_run.rows) <= MAX_SIDE_BY_SIDE else by_run
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
            f"<h1>{title}</h1>",
            f'<p class="verdict">{escape(comparison.verdict.sentence)}</p>',
            _render_list(comparison.verdict.details),
            _render_problems(comparison),
            f"<h2>{comparison.by_epoch.title}</h2>",
            _render_table(comparison.by_epoch, modes, last_heading_column=1, css_class="epochs"),
            f"<h2>{by_run.title}</h2>",
            _render_table(by_run, modes),
            *_optional_section(comparison.diagnostics, modes),
            *_optional_section(comparison.scores, modes),
            *_optional_section(comparison.generations, modes),
            "<h2>Same and different</h2>",
            _render_list(comparison.comparability_notes),
            _render_details(comparison.differing_settings, modes, is_open=True),
            _render_details(comparison.shared_settings, modes, is_open=False),
            "<h2>Curves</h2>",
            _render_plots(comparison),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _optional_section(table: Table, modes: dict[str, str]) -> list[str]:
    return [f"<h2>{table.title}</h2>", _render_table(table, modes)] if table.rows else []


def _render_list(lines: tuple[str, ...]) -> str:
    return '<ul class="quiet">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _render_problems(comparison: "Comparison") -> str:
    if not comparison.problems:
        return ""
    lines = "".join(f"<li>{escape(str(problem))}</li>" for problem in comparison.problems)
    return f'<section class="warn"><h2>Not as it should be</h2><ul>{lines}</ul></section>'


def _render_details(table: Table, modes: dict[str, str], *, is_open: bool) -> str:
    num_rows = len(table.rows)
    body = _render_table(table, modes) if num_rows else "<p>(nothing)</p>"
    return f"<details{' open' if is_open else ''}><summary>{escape(table.title)} ({num_rows})</summary>{body}</details>"


def _render_table(table: Table, modes: dict[str, str], last_heading_column: int = 0, css_class: str = "") -> str:
    """A table that scrolls by itself; cells up to `last_heading_column` name their row."""
    headings = list(table.columns.values())
    numeric = [
        all(_is_number(row[i].text) or row[i].text == "unknown" for row in table.rows) for i in range(len(headings))
    ]
    header_cells = "".join(
        f'<th scope="col"{_class_attribute(numeric[i] and "number", _mode_class(modes, name))}>{escape(name)}</th>'
        for i, name in enumerate(headings)
    )
    body_rows, previous_value = [], None
    for row in table.rows:
        cells = []
        for i, cell in enumerate(row):
            is_wide = len(cell.text) > 34
            tag, scope = ("th", ' scope="row"') if i == 0 else ("td", "")
            mode_class = _mode_class(modes, str(cell.value)) if i <= last_heading_column else ""
            cells.append(
                f"<{tag}{scope}{_class_attribute(numeric[i] and 'number', is_wide and 'wide', mode_class)}>"
                f"{_add_break_hints(cell.text)}</{tag}>"
            )
        is_group_start = last_heading_column and previous_value is not None and previous_value != row[0].value
        body_rows.append(f"<tr{_class_attribute(is_group_start and 'starts')}>{''.join(cells)}</tr>")
        previous_value = row[0].value
    notes = "".join(f"<p>{escape(note)}</p>" for note in table.notes)
    notes = notes and f'<div class="quiet notes">{notes}</div>'
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">'
        f"<table{_class_attribute(css_class)}><thead><tr>{header_cells}</tr></thead><tbody>{''.join(body_rows)}</tbody></table></div>{notes}"
    )


def _add_break_hints(text: str) -> str:
    """Escaped text that may be broken within a dotted name."""
    return re.sub(r"(?<=[a-z])([._])(?=[a-z])", r"\1<wbr>", escape(text))


def _class_attribute(*names: object) -> str:
    class_names = [name for name in names if isinstance(name, str) and name]
    return f' class="{" ".join(class_names)}"' if class_names else ""


def _mode_class(modes: dict[str, str], name: str) -> str:
    return f"key {modes[name]}" if name in modes else ""


def _render_plots(comparison: "Comparison") -> str:
    svgs_by_name = plots.render_svgs(comparison.groups, comparison.with_reference)
    figures = [
        f"<figure><figcaption>{escape(plot.title)}</figcaption>{svg}</figure>" for plot, svg in svgs_by_name.values()
    ]
    note = plot_axes.bin_note(comparison.groups)
    legend = "Full is drawn solid, LoRA dashed" + (", the card dashed and grey." if comparison.with_reference else ".")
    return f'<p class="quiet">{legend} {escape(note)}</p><div class="plots">{"".join(figures)}</div>'
