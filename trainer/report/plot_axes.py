"""How one plot is drawn: its lines, its ticks, and each line's name at its end, none over another."""

import itertools
import statistics
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.config import reference
from trainer.report.comparability import why_not_card
from trainer.report.paired_interval import MODE_NAMES, Group
from trainer.report.run_data import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"full": "#0072b2", "lora": "#d55e00", "card": "#767676"}  # light ground
DASHES: dict[str, Any] = {"full": "-", "lora": (0, (5, 2)), "card": (0, (2, 1.6))}
MOST_POINTS = 300  # of one line
ALL_POINTS = 4_000  # of one plot
LETTER = 0.078  # inches that a letter of a label takes at most
LINE = 0.055  # of the height of an axis: what a line of a label takes
FROM_LINE = 8.0  # points between the end of a line and its label
NEAR = 0.03  # of the height of an axis: a label further from its line is joined to it by a thin stroke

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Plot:
    """One plot: what is drawn of a run against what, and how the axes read."""

    name: str
    title: str
    x_label: str
    y_label: str
    curve: Callable[[Run], Curve]
    card: Curve | None = None
    log_y: bool = False
    markers: bool = False
    says_end: bool = False  #: whether the name of a line says the value that it ends at
    scatter: bool = False


@dataclass(frozen=True)
class Label:
    """A text beside the point (across, height), in data; across None is the right edge, where lines end."""

    height: float
    text: str
    colour: str
    across: float | None = None

    @property
    def tall(self) -> float:
        """The room it takes, as a share of its axis."""
        return LINE * (self.text.count("\n") + 1) + 0.015


@dataclass
class Drawn:
    """An axis and the labels that still want a place."""

    axis: "Axes"
    labels: list[Label]


def draw(axis: "Axes", plot: Plot, groups: Sequence[Group], with_card: bool) -> Drawn:
    """Draw `plot` of all groups on `axis`; the names of the lines are placed by `finish`."""
    axis.set_title(plot.title)
    axis.set_xlabel(plot.x_label)
    axis.set_ylabel(plot.y_label)
    if plot.scatter:
        return _draw_scatter(axis, plot, groups, with_card)
    labels: list[Label] = []
    count = sum(len(group.runs) for group in groups)
    points = max(40, min(MOST_POINTS, ALL_POINTS // max(1, count)))
    for group in groups:
        ends: list[tuple[float, float]] = []
        for run in group.runs:
            x, y = thin(*plot.curve(run), points)
            if not len(x):
                continue
            axis.plot(
                x,
                y,
                color=COLOURS[group.mode],
                linestyle=DASHES[group.mode],
                linewidth=1.6 if count <= 6 else 0.8,
                alpha=1.0 if count <= 6 else 0.6,
                marker="o" if plot.markers and len(x) <= 30 else None,
                markersize=3,
            )
            ends.append((float(x[-1]), float(y[-1])))
        if ends:
            height = float(np.mean([y for _, y in ends]))
            name = group.label + (f", n = {len(ends)}" if len(group.runs) > 1 else "")
            if plot.says_end and len({round(x, 6) for x, _ in ends}) == 1:  # else it were a mean of different places
                name += f": {height:.4f}"
            labels.append(Label(height, _folded(name), COLOURS[group.mode]))
    if with_card and plot.card is not None:
        axis.plot(*plot.card, color=COLOURS["card"], linestyle=DASHES["card"], linewidth=1.6, marker="s", markersize=3)
        height = float(plot.card[1][-1])
        labels.append(Label(height, _card_label(groups, height if plot.says_end else None), COLOURS["card"]))
    if plot.log_y and _wide_range(axis):
        axis.set_yscale("log")
    _ticks(axis, plot)
    return Drawn(axis, _few(labels, groups))


def _wide_range(axis: "Axes") -> bool:
    """Whether the lines are all above zero and span so much that a linear scale would flatten most of them."""
    values = [np.asarray(line.get_ydata(), dtype=np.float64) for line in axis.get_lines()]
    low = min((float(np.min(value)) for value in values if len(value)), default=0.0)
    high = max((float(np.max(value)) for value in values if len(value)), default=0.0)
    return low > 0 and high / low > 20


def _ticks(axis: "Axes", plot: Plot) -> None:
    """Few ticks, whole epochs where there are several, and plain numbers without an offset."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    tokens = plot.x_label.startswith("tokens")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=not tokens and axis.get_xlim()[1] > 1.5))
    if tokens:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if axis.get_yscale() == "log":
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_formatter(NullFormatter())
    _plain_numbers(axis)


def _plain_numbers(axis: "Axes") -> None:
    """Numbers as people write them: 2.5, 425k, and 3e-4 where all are small; each is short, for its room is fixed."""
    from matplotlib.ticker import FuncFormatter

    small = max(map(abs, axis.get_ylim())) < 0.01

    def text(value: float, _: object) -> str:
        if small and value:
            digits, exponent = f"{value:.2e}".split("e")
            return f"{float(digits):g}e{int(exponent)}"
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value / 1000:,.6g}k"

    axis.yaxis.set_major_formatter(FuncFormatter(text))


def _draw_scatter(axis: "Axes", plot: Plot, groups: Sequence[Group], with_card: bool) -> Drawn:
    """One point a run, with the name of its group beside it."""
    from matplotlib.ticker import EngFormatter, NullFormatter

    labels: list[Label] = []
    for group in groups:
        xs, ys = zip(*((float(x[0]), float(y[0])) for x, y in map(plot.curve, group.runs)), strict=True)
        axis.plot(
            xs,
            ys,
            linestyle="none",
            marker="o" if group.mode == "full" else "D",
            markersize=6,
            color=COLOURS[group.mode],
        )
        if np.isfinite(ys[0]) and np.isfinite(xs[0]):
            labels.append(Label(float(np.nanmean(ys)), _folded(group.label), COLOURS[group.mode], float(np.nanmax(xs))))
    if with_card:
        x, y = float(reference.SETTINGS["trainable_parameters"]), reference.CURVE[-1].val_loss  # type: ignore[arg-type]
        axis.plot([x], [y], linestyle="none", marker="s", markersize=6, color=COLOURS["card"])
        labels.append(Label(y, _card_label(groups), COLOURS["card"], x))
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.12, y=0.15)
    _plain_numbers(axis)
    return Drawn(axis, _few(labels, groups, room=0.6))  # among the points more would hide them


def _folded(label: str) -> str:
    """A label in lines of a width that leaves room for the plot."""
    return textwrap.fill(label, 17, break_on_hyphens=False, max_lines=4)


def _card_label(groups: Sequence[Group], end: float | None = None) -> str:
    apart = all(why_not_card(run) for group in groups for run in group.runs)
    return "card" + ("" if end is None else f": {end:.4f}") + (",\nnot comparable" if apart else "")


def _few(labels: list[Label], groups: Sequence[Group], room: float = 1.0) -> list[Label]:
    """The labels; one a mode, at its rightmost point, where all of them would take more than `room` of the height."""
    if sum(label.tall for label in labels) <= room:
        return labels
    merged = []
    for mode, colour in COLOURS.items():
        its = [label for label in labels if label.colour == colour]
        if mode not in MODE_NAMES or len(its) < 2:
            merged += its
            continue
        count = sum(len(group.runs) for group in groups if group.mode == mode)
        height = float(np.mean([label.height for label in its]))
        last = max(its, key=lambda label: label.across or 0.0)
        merged.append(
            Label(
                height if last.across is None else last.height, f"{MODE_NAMES[mode]}, {count} runs", colour, last.across
            )
        )
    return merged


def finish(figure: "Figure", drawn: Sequence[Drawn], columns: int) -> None:
    """Give the axes their places, and write each label to the right of its axis at the height of its line.

    The places are set, not searched for (matplotlib's own layouts draw everything twice): axis labels have a fixed
    room, line labels one by the length of their text.
    """
    wide, high = figure.get_size_inches()
    rows = -(-len(drawn) // columns)
    longest = max((len(line) for one in drawn for label in one.labels for line in label.text.split("\n")), default=0)
    right = FROM_LINE / 72 + 0.05 + LETTER * longest
    top, bottom, left = (0.3 if columns > 1 else 0.1), 0.5, 0.8
    for i, one in enumerate(drawn):
        row, column = divmod(i, columns)
        x, y = column * wide / columns + left, (rows - 1 - row) * high / rows + bottom
        size = (wide / columns - left - right, high / rows - top - bottom)
        one.axis.set_position((x / wide, y / high, size[0] / wide, size[1] / high))
    for one in drawn:
        _place_labels(one, wide)


def _place_labels(one: Drawn, wide: float) -> None:
    """Write the labels, those beside one another pushed apart so that none overlaps another; `wide`: the figure's."""
    axis = one.axis
    if axis.get_xscale() == "linear":
        axis.margins(x=0.02)
    right, (low, high) = axis.get_xlim()[1], axis.get_ylim()
    axis.set_ylim(low, high)  # no text moves it
    inches = wide * axis.get_position().width
    gap = FROM_LINE / 72 / inches
    places = axis.transData + axis.transAxes.inverted()
    points = [places.transform((right if label.across is None else label.across, label.height)) for label in one.labels]
    widths = [gap + LETTER * max(map(len, label.text.split("\n"))) / inches for label in one.labels]
    for beside in _columns([float(x) for x, _ in points], widths):
        beside.sort(key=lambda i: float(points[i][1]))
        heights = spaced([float(points[i][1]) for i in beside], [one.labels[i].tall for i in beside])
        for i, height in zip(beside, heights, strict=True):
            x, y = (float(place) for place in points[i])
            _write(axis, one.labels[i], (x, y), (x + gap, height))


def _write(axis: "Axes", label: Label, point: tuple[float, float], place: tuple[float, float]) -> None:
    """The label at `place`, joined to its `point` by a stroke where it is not beside it; both as shares of the axis."""
    stroke = {
        "arrowstyle": "-",
        "color": label.colour,
        "linewidth": 0.6,
        "relpos": (0, 0.5),
        "patchA": None,
        "shrinkA": 0,
        "shrinkB": 1,
    }
    axis.annotate(
        label.text,
        point,
        xycoords="axes fraction",
        xytext=place,
        textcoords="axes fraction",
        va="center",
        ha="left",
        color=label.colour,
        fontsize=8.5,
        fontweight="bold",
        annotation_clip=False,
        arrowprops=stroke if abs(place[1] - point[1]) > NEAR else None,
    )


def _columns(lefts: Sequence[float], widths: Sequence[float]) -> Iterator[list[int]]:
    """The labels in sets that lie side by side, from left to right: those of one set could overlap."""
    found: list[int] = []
    edge = 0.0
    for i in sorted(range(len(lefts)), key=lambda i: lefts[i]):
        if found and lefts[i] >= edge:
            yield found
            found = []
        edge = lefts[i] + widths[i] if not found else max(edge, lefts[i] + widths[i])
        found.append(i)
    if found:
        yield found


def spaced(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Places from low to high, as near to the wanted ones (ascending) as heights allow, within 0..1 if they fit.

    The least squares answer: neighbours that would overlap move as one around the mean of what they want.
    """
    rooms = [(a + b) / 2 for a, b in itertools.pairwise(heights)]
    below = [sum(rooms[:i]) for i in range(len(wanted))]  # how far each is above the lowest where all touch
    blocks: list[list[float]] = []
    for want, room in zip(wanted, below, strict=True):
        blocks.append([want - room])
        while len(blocks) > 1 and statistics.fmean(blocks[-2]) > statistics.fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    low = heights[0] / 2 if heights else 0.0
    high = 1 - heights[-1] / 2 - below[-1] if heights else 0.0
    if high < low:  # they do not fit: as much too much above as below
        low = high = (low + high) / 2
    lowest = [min(max(statistics.fmean(block), low), high) for block in blocks for _ in block]
    return [place + room for place, room in zip(lowest, below, strict=True)]


def thin(x: NDArray[np.float64], y: NDArray[np.float64], points: int) -> Curve:
    """At most `points` points of a curve: means of equal bins; values that are not finite are left out."""
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    if len(x) <= points:
        return x, y
    starts = np.linspace(0, len(x), points, endpoint=False).astype(int)
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def bin_note(groups: Sequence[Group]) -> str:
    """What to say under plots whose lines are bin means, "" where every step is drawn."""
    count = sum(len(group.runs) for group in groups)
    points = max(40, min(MOST_POINTS, ALL_POINTS // max(1, count)))
    longest = max((len(run.steps["step"]) for group in groups for run in group.runs), default=0)
    return (
        f"Each point of a line with more than {points} steps is the mean of a bin "
        f"(up to {-(-longest // points)} steps)."
        if longest > points
        else ""
    )
