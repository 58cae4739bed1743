"""Markdown tables of what was measured."""

from collections.abc import Iterable, Iterator, Sequence


def table_lines(headings: Sequence[str], rows: Iterable[Sequence[str]], *, num_left: int = 1) -> Iterator[str]:
    """Line by line, as the rows come; the first `num_left` columns stand to the left, the others to the right."""
    yield _table_row(headings)
    yield "|" + "---|" * num_left + "--:|" * (len(headings) - num_left)
    yield from map(_table_row, rows)


def _table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
