"""The comparison as one HTML file: no script, no other file, light and dark, and readable on a phone."""

import re
from html import escape
from typing import TYPE_CHECKING

from trainer.report import plot_axes, plots
from trainer.report.markdown import MOST_ACROSS, _is_number
from trainer.report.tables import CARD, Table

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


def page(comparison: "Comparison") -> str:
    """report.html."""
    title = "Full against LoRA" + (" against the card" if comparison.with_card else "")
    names = [group.label for group in comparison.groups]
    modes = {
        **{run.name: run.mode for run in comparison.runs},
        **{group.label: group.mode for group in comparison.groups},
        CARD: "card",
    }
    by_run = comparison.by_run
    by_run = by_run.turned() if len(by_run.rows) <= MOST_ACROSS else by_run
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}: {escape(', '.join(names[:4]))}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            f"<h1>{title}</h1>",
            f'<p class="verdict">{escape(comparison.verdict.sentence)}</p>',
            _list(comparison.verdict.details),
            _problems(comparison),
            f"<h2>{comparison.by_epoch.title}</h2>",
            _table(comparison.by_epoch, modes, heading=1, style="epochs"),
            f"<h2>{by_run.title}</h2>",
            _table(by_run, modes),
            *_optional(comparison.diagnosis, modes),
            *_optional(comparison.scores, modes),
            *_optional(comparison.samples, modes),
            "<h2>Same and different</h2>",
            _list(comparison.comparable),
            _details(comparison.different, modes, is_open=True),
            _details(comparison.same, modes, is_open=False),
            "<h2>Curves</h2>",
            _plots(comparison),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _optional(content: Table, modes: dict[str, str]) -> list[str]:
    return [f"<h2>{content.title}</h2>", _table(content, modes)] if content.rows else []


def _list(lines: tuple[str, ...]) -> str:
    return '<ul class="quiet">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _problems(comparison: "Comparison") -> str:
    if not comparison.problems:
        return ""
    lines = "".join(f"<li>{escape(str(problem))}</li>" for problem in comparison.problems)
    return f'<section class="warn"><h2>Not as it should be</h2><ul>{lines}</ul></section>'


def _details(content: Table, modes: dict[str, str], *, is_open: bool) -> str:
    count = len(content.rows)
    inner = _table(content, modes) if count else "<p>(nothing)</p>"
    return f"<details{' open' if is_open else ''}><summary>{escape(content.title)} ({count})</summary>{inner}</details>"


def _table(content: Table, modes: dict[str, str], heading: int = 0, style: str = "") -> str:
    """A table that scrolls by itself; `heading` is the column whose cells name their row, `style` its class."""
    headings = list(content.columns.values())
    right = [
        all(_is_number(row[i].text) or row[i].text == "unknown" for row in content.rows) for i in range(len(headings))
    ]
    head = "".join(
        f'<th scope="col"{_class(right[i] and "number", _mode(modes, name))}>{escape(name)}</th>'
        for i, name in enumerate(headings)
    )
    body, before = [], None
    for row in content.rows:
        cells = []
        for i, cell in enumerate(row):
            wide = len(cell.text) > 34
            tag, scope = ("th", ' scope="row"') if i == 0 else ("td", "")
            mode = _mode(modes, str(cell.value)) if i <= heading else ""
            cells.append(
                f"<{tag}{scope}{_class(right[i] and 'number', wide and 'wide', mode)}>{_breakable(cell.text)}</{tag}>"
            )
        starts = heading and before is not None and before != row[0].value
        body.append(f"<tr{_class(starts and 'starts')}>{''.join(cells)}</tr>")
        before = row[0].value
    notes = "".join(f"<p>{escape(note)}</p>" for note in content.notes)
    notes = notes and f'<div class="quiet notes">{notes}</div>'
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(content.title)}">'
        f"<table{_class(style)}><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{notes}"
    )


def _breakable(text: str) -> str:
    """Escaped text that may be broken within a dotted name."""
    return re.sub(r"(?<=[a-z])([._])(?=[a-z])", r"\1<wbr>", escape(text))


def _class(*names: object) -> str:
    given = [name for name in names if isinstance(name, str) and name]
    return f' class="{" ".join(given)}"' if given else ""


def _mode(modes: dict[str, str], name: str) -> str:
    return f"key {modes[name]}" if name in modes else ""


def _plots(comparison: "Comparison") -> str:
    drawn = plots.svgs(comparison.groups, comparison.with_card)
    figures = [f"<figure><figcaption>{escape(plot.title)}</figcaption>{svg}</figure>" for plot, svg in drawn.values()]
    note = plot_axes.bin_note(comparison.groups)
    key = "Full is drawn solid, LoRA dashed" + (", the card dashed and grey." if comparison.with_card else ".")
    return f'<p class="quiet">{key} {escape(note)}</p><div class="plots">{"".join(figures)}</div>'
