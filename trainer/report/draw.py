"""How one plot is drawn: its lines, its ticks, and each line's name at its end, none over another."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer import reference
from trainer.report.comparable import why_not_card
from trainer.report.runs import Run
from trainer.report.seeds import MODE_NAMES, Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"full": "#0072b2", "lora": "#d55e00", "card": "#767676"}  # light ground
DASHES: dict[str, Any] = {"full": "-", "lora": (0, (5, 2)), "card": (0, (2, 1.6))}
MOST_POINTS = 300  # of one line
ALL_POINTS = 4_000  # of one plot
MOST_LABELS = 8
LETTER = 0.078  # inches that a letter of a label takes at most

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
    scatter: bool = False


@dataclass
class Drawn:
    """An axis and the labels that still want a place: (height in data, text, colour), and where across.

    `across` is a label's place in data, by its text; one that has none goes to the right edge, where lines end.
    """

    axis: "Axes"
    labels: list[tuple[float, str, str]]
    across: dict[str, float] = field(default_factory=dict)


def draw(axis: "Axes", plot: Plot, groups: Sequence[Group], with_card: bool) -> Drawn:
    """Draw `plot` of all groups on `axis`; the names of the lines are placed by `finish`."""
    axis.set_title(plot.title)
    axis.set_xlabel(plot.x_label)
    axis.set_ylabel(plot.y_label)
    if plot.scatter:
        return _draw_scatter(axis, plot, groups, with_card)
    labels: list[tuple[float, str, str]] = []
    count = sum(len(group.runs) for group in groups)
    points = max(40, min(MOST_POINTS, ALL_POINTS // max(1, count)))
    for group in groups:
        ends = []
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
            ends.append(float(y[-1]))
        if ends:
            name = group.label + (f", n = {len(ends)}" if len(group.runs) > 1 else "")
            labels.append((float(np.mean(ends)), _folded(name), COLOURS[group.mode]))
    if with_card and plot.card is not None:
        axis.plot(*plot.card, color=COLOURS["card"], linestyle=DASHES["card"], linewidth=1.6, marker="s", markersize=3)
        labels.append((float(plot.card[1][-1]), _card_label(groups), COLOURS["card"]))
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
    from matplotlib.ticker import FuncFormatter

    axis.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.4g}" if abs(value) < 10_000 else f"{value / 1000:,.6g}k")
    )


def _draw_scatter(axis: "Axes", plot: Plot, groups: Sequence[Group], with_card: bool) -> Drawn:
    """One point a run, with the name of its group beside it."""
    from matplotlib.ticker import EngFormatter, NullFormatter

    places: list[tuple[float, float, str, str]] = []
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
            places.append((float(np.nanmean(xs)), float(np.nanmean(ys)), _folded(group.label), COLOURS[group.mode]))
    if with_card:
        x, y = float(reference.SETTINGS["trainable_parameters"]), reference.CURVE[-1].val_loss  # type: ignore[arg-type]
        axis.plot([x], [y], linestyle="none", marker="s", markersize=6, color=COLOURS["card"])
        places.append((x, y, _card_label(groups), COLOURS["card"]))
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.12, y=0.15)
    _plain_numbers(axis)
    labels = _few([(y, label, colour) for _, y, label, colour in places], groups)
    return Drawn(axis, labels, {label: x for x, _, label, _ in places} if len(labels) == len(places) else {})


def _folded(label: str) -> str:
    """A label in lines of a width that leaves room for the plot."""
    return textwrap.fill(label, 17, break_on_hyphens=False, max_lines=4)


def _card_label(groups: Sequence[Group]) -> str:
    apart = all(why_not_card(run) for group in groups for run in group.runs)
    return "card (not\ncomparable)" if apart else "card"


def _few(labels: list[tuple[float, str, str]], groups: Sequence[Group]) -> list[tuple[float, str, str]]:
    """The labels; one a mode where there are too many to read."""
    if len(labels) <= MOST_LABELS:
        return labels
    merged = []
    for mode, colour in COLOURS.items():
        heights = [height for height, _, its in labels if its == colour]
        if heights:
            count = sum(len(group.runs) for group in groups if group.mode == mode)
            merged.append(
                (float(np.mean(heights)), f"{MODE_NAMES[mode]}, {count} runs" if mode in MODE_NAMES else "card", colour)
            )
    return merged


def finish(figure: "Figure", drawn: Sequence[Drawn], columns: int) -> None:
    """Give the axes their places, and write each label to the right of its axis at the height of its line.

    The places are set, not searched for (matplotlib's own layouts draw everything twice): axis labels have a fixed
    room, line labels one by the length of their text.
    """
    wide, high = figure.get_size_inches()
    rows = -(-len(drawn) // columns)
    longest = max((len(line) for one in drawn for _, text, _ in one.labels for line in text.split("\n")), default=0)
    right = 0.15 + LETTER * longest
    top, bottom, left = (0.3 if columns > 1 else 0.1), 0.5, 0.72
    for i, one in enumerate(drawn):
        row, column = divmod(i, columns)
        x, y = column * wide / columns + left, (rows - 1 - row) * high / rows + bottom
        size = (wide / columns - left - right, high / rows - top - bottom)
        one.axis.set_position((x / wide, y / high, size[0] / wide, size[1] / high))
    _place_labels(drawn)


def _place_labels(drawn: Sequence[Drawn]) -> None:
    """The labels, pushed apart so that none overlaps another."""
    for one in drawn:
        if not one.labels:
            continue
        one.axis.margins(x=0.02) if one.axis.get_xscale() == "linear" else None
        low, high = one.axis.get_ylim()
        scale = one.axis.yaxis.get_transform().transform
        bottom, top = (float(scale(np.array([edge]))[0]) for edge in (low, high))
        one.axis.set_ylim(low, high)
        ordered = sorted(one.labels)
        lines = [text.count("\n") + 1 for _, text, _ in ordered]
        wanted = [(float(scale(np.array([height]))[0]) - bottom) / (top - bottom) for height, _, _ in ordered]
        for (_, text, colour), at in zip(ordered, spaced(wanted, [0.065 * n for n in lines]), strict=True):
            across = one.across.get(text)
            place = (
                (1.0, at)
                if across is None
                else (float((one.axis.transScale + one.axis.transLimits).transform((across, low))[0]), at)
            )
            one.axis.annotate(
                text,
                place,
                xycoords="axes fraction",
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                ha="left",
                color=colour,
                fontsize=8.5,
                fontweight="bold",
                annotation_clip=False,
            )


def spaced(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Places from low to high, as near to the wanted ones (ascending) as heights allow, within 0..1 if they fit."""
    places = list(wanted)
    for _ in range(50):
        moved = False
        for i in range(len(places) - 1):
            room = (heights[i] + heights[i + 1]) / 2
            lacking = room - (places[i + 1] - places[i])
            if lacking > 1e-6:
                places[i] -= lacking / 2
                places[i + 1] += lacking / 2
                moved = True
        if not moved:
            break
    shift = max(0.0, -places[0]) if places else 0.0
    over = max(0.0, places[-1] - 1.0) if places else 0.0
    return [place + shift - (over if not shift else 0.0) for place in places]


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
