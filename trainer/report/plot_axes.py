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
from trainer.report.comparability import reference_blockers
from trainer.report.run_data import RunData
from trainer.report.seed_groups import MODE_NAMES, SeedGroup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"full": "#0072b2", "lora": "#d55e00", "card": "#767676"}  # light ground
DASHES: dict[str, Any] = {"full": "-", "lora": (0, (5, 2)), "card": (0, (2, 1.6))}
MAX_POINTS_PER_LINE = 300  # of one line
MAX_POINTS_PER_PLOT = 4_000  # of one plot
CHAR_WIDTH_INCHES = 0.078  # inches that a letter of a label takes at most
LINE_HEIGHT_FRACTION = 0.055  # of the height of an axis: what a line of a label takes
LABEL_OFFSET_POINTS = 8.0  # points between the end of a line and its label
LEADER_LINE_THRESHOLD = 0.03  # of the height of an axis: a label further from its line is joined to it by a thin stroke

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class PlotSpec:
    """One plot: what is drawn of a run against what, and how the axes read."""

    name: str
    title: str
    x_label: str
    y_label: str
    curve: Callable[[RunData], Curve]
    reference_curve: Curve | None = None
    log_y: bool = False
    has_markers: bool = False
    shows_end_value: bool = False  #: whether the name of a line says the value that it ends at
    is_scatter: bool = False


@dataclass(frozen=True)
class LineLabel:
    """A text beside the point (x, y), in data; x None is the right edge, where lines end."""

    y: float
    text: str
    colour: str
    x: float | None = None

    @property
    def height_fraction(self) -> float:
        """The room it takes, as a share of its axis."""
        return LINE_HEIGHT_FRACTION * (self.text.count("\n") + 1) + 0.015


@dataclass
class AxisLayout:
    """An axis and the labels that still want a place."""

    axis: "Axes"
    labels: list[LineLabel]


def draw_plot(axis: "Axes", plot: PlotSpec, groups: Sequence[SeedGroup], with_reference: bool) -> AxisLayout:
    """Draw `plot` of all groups on `axis`; the names of the lines are placed by `finish_layout`."""
    axis.set_title(plot.title)
    axis.set_xlabel(plot.x_label)
    axis.set_ylabel(plot.y_label)
    if plot.is_scatter:
        return _draw_scatter(axis, plot, groups, with_reference)
    labels: list[LineLabel] = []
    num_runs = sum(len(group.runs) for group in groups)
    max_points = max(40, min(MAX_POINTS_PER_LINE, MAX_POINTS_PER_PLOT // max(1, num_runs)))
    for group in groups:
        end_points: list[tuple[float, float]] = []
        for run in group.runs:
            x, y = downsample(*plot.curve(run), max_points)
            if not len(x):
                continue
            axis.plot(
                x,
                y,
                color=COLOURS[group.mode],
                linestyle=DASHES[group.mode],
                linewidth=1.6 if num_runs <= 6 else 0.8,
                alpha=1.0 if num_runs <= 6 else 0.6,
                marker="o" if plot.has_markers and len(x) <= 30 else None,
                markersize=3,
            )
            end_points.append((float(x[-1]), float(y[-1])))
        if end_points:
            end_y = float(np.mean([y for _, y in end_points]))
            name = group.label + (f", n = {len(end_points)}" if len(group.runs) > 1 else "")
            if (
                plot.shows_end_value and len({round(x, 6) for x, _ in end_points}) == 1
            ):  # else it were a mean of different places
                name += f": {end_y:.4f}"
            labels.append(LineLabel(end_y, _wrap_label(name), COLOURS[group.mode]))
    if with_reference and plot.reference_curve is not None:
        axis.plot(
            *plot.reference_curve,
            color=COLOURS["card"],
            linestyle=DASHES["card"],
            linewidth=1.6,
            marker="s",
            markersize=3,
        )
        end_y = float(plot.reference_curve[1][-1])
        labels.append(
            LineLabel(end_y, _reference_label(groups, end_y if plot.shows_end_value else None), COLOURS["card"])
        )
    if plot.log_y and _needs_log_scale(axis):
        axis.set_yscale("log")
    _set_ticks(axis, plot)
    return AxisLayout(axis, _merge_labels(labels, groups))


def _needs_log_scale(axis: "Axes") -> bool:
    """Whether the lines are all above zero and span so much that a linear scale would flatten most of them."""
    values = [np.asarray(line.get_ydata(), dtype=np.float64) for line in axis.get_lines()]
    low = min((float(np.min(value)) for value in values if len(value)), default=0.0)
    high = max((float(np.max(value)) for value in values if len(value)), default=0.0)
    return low > 0 and high / low > 20


def _set_ticks(axis: "Axes", plot: PlotSpec) -> None:
    """Few ticks, whole epochs where there are several, and plain numbers without an offset."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    is_token_axis = plot.x_label.startswith("tokens")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=not is_token_axis and axis.get_xlim()[1] > 1.5))
    if is_token_axis:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if axis.get_yscale() == "log":
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_formatter(NullFormatter())
    _format_y_ticks(axis)


def _format_y_ticks(axis: "Axes") -> None:
    """Numbers as people write them: 2.5, 425k, and 3e-4 where all are small; each is short, for its room is fixed."""
    from matplotlib.ticker import FuncFormatter

    is_small = max(map(abs, axis.get_ylim())) < 0.01

    def format_tick(value: float, _: object) -> str:
        if is_small and value:
            digits, exponent = f"{value:.2e}".split("e")
            return f"{float(digits):g}e{int(exponent)}"
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value / 1000:,.6g}k"

    axis.yaxis.set_major_formatter(FuncFormatter(format_tick))


def _draw_scatter(axis: "Axes", plot: PlotSpec, groups: Sequence[SeedGroup], with_reference: bool) -> AxisLayout:
    """One point a run, with the name of its group beside it."""
    from matplotlib.ticker import EngFormatter, NullFormatter

    labels: list[LineLabel] = []
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
            labels.append(
                LineLabel(float(np.nanmean(ys)), _wrap_label(group.label), COLOURS[group.mode], float(np.nanmax(xs)))
            )
    if with_reference:
        x, y = float(reference.SETTINGS["trainable_parameters"]), reference.CURVE[-1].val_loss  # type: ignore[arg-type]
        axis.plot([x], [y], linestyle="none", marker="s", markersize=6, color=COLOURS["card"])
        labels.append(LineLabel(y, _reference_label(groups), COLOURS["card"], x))
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.12, y=0.15)
    _format_y_ticks(axis)
    return AxisLayout(
        axis, _merge_labels(labels, groups, max_height_fraction=0.6)
    )  # among the points more would hide them


def _wrap_label(label: str) -> str:
    """A label in lines of a width that leaves room for the plot."""
    return textwrap.fill(label, 17, break_on_hyphens=False, max_lines=4)


def _reference_label(groups: Sequence[SeedGroup], end_value: float | None = None) -> str:
    is_incomparable = all(reference_blockers(run) for group in groups for run in group.runs)
    return (
        "card" + ("" if end_value is None else f": {end_value:.4f}") + (",\nnot comparable" if is_incomparable else "")
    )


def _merge_labels(
    labels: list[LineLabel], groups: Sequence[SeedGroup], max_height_fraction: float = 1.0
) -> list[LineLabel]:
    """The labels; one a mode, at its rightmost point, where all would take over `max_height_fraction` of the height."""
    if sum(label.height_fraction for label in labels) <= max_height_fraction:
        return labels
    merged = []
    for mode, colour in COLOURS.items():
        mode_labels = [label for label in labels if label.colour == colour]
        if mode not in MODE_NAMES or len(mode_labels) < 2:
            merged += mode_labels
            continue
        num_runs = sum(len(group.runs) for group in groups if group.mode == mode)
        mean_y = float(np.mean([label.y for label in mode_labels]))
        rightmost = max(mode_labels, key=lambda label: label.x or 0.0)
        merged.append(
            LineLabel(
                mean_y if rightmost.x is None else rightmost.y,
                f"{MODE_NAMES[mode]}, {num_runs} runs",
                colour,
                rightmost.x,
            )
        )
    return merged


def finish_layout(figure: "Figure", layouts: Sequence[AxisLayout], num_columns: int) -> None:
    """Give the axes their places, and write each label to the right of its axis at the height of its line.

    The places are set, not searched for (matplotlib's own layouts draw everything twice): axis labels have a fixed
    room, line labels one by the length of their text.
    """
    width_inches, height_inches = figure.get_size_inches()
    num_rows = -(-len(layouts) // num_columns)
    max_label_chars = max(
        (len(line) for layout in layouts for label in layout.labels for line in label.text.split("\n")), default=0
    )
    right_margin = LABEL_OFFSET_POINTS / 72 + 0.05 + CHAR_WIDTH_INCHES * max_label_chars
    top_margin, bottom_margin, left_margin = (0.3 if num_columns > 1 else 0.1), 0.5, 0.8
    for i, layout in enumerate(layouts):
        row, column = divmod(i, num_columns)
        x, y = (
            column * width_inches / num_columns + left_margin,
            (num_rows - 1 - row) * height_inches / num_rows + bottom_margin,
        )
        size = (
            width_inches / num_columns - left_margin - right_margin,
            height_inches / num_rows - top_margin - bottom_margin,
        )
        layout.axis.set_position((x / width_inches, y / height_inches, size[0] / width_inches, size[1] / height_inches))
    for layout in layouts:
        _place_labels(layout, width_inches)


def _place_labels(layout: AxisLayout, figure_width_inches: float) -> None:
    """Write the labels, those beside one another pushed apart so that none overlaps another."""
    axis = layout.axis
    if axis.get_xscale() == "linear":
        axis.margins(x=0.02)
    right, (low, high) = axis.get_xlim()[1], axis.get_ylim()
    axis.set_ylim(low, high)  # no text moves it
    axis_width_inches = figure_width_inches * axis.get_position().width
    label_gap = LABEL_OFFSET_POINTS / 72 / axis_width_inches
    to_axis_fraction = axis.transData + axis.transAxes.inverted()
    points = [to_axis_fraction.transform((right if label.x is None else label.x, label.y)) for label in layout.labels]
    widths = [
        label_gap + CHAR_WIDTH_INCHES * max(map(len, label.text.split("\n"))) / axis_width_inches
        for label in layout.labels
    ]
    for column in _label_columns([float(x) for x, _ in points], widths):
        column.sort(key=lambda i: float(points[i][1]))
        label_ys = space_labels(
            [float(points[i][1]) for i in column], [layout.labels[i].height_fraction for i in column]
        )
        for i, label_y in zip(column, label_ys, strict=True):
            x, y = (float(coordinate) for coordinate in points[i])
            _annotate(axis, layout.labels[i], (x, y), (x + label_gap, label_y))


def _annotate(axis: "Axes", label: LineLabel, point: tuple[float, float], text_position: tuple[float, float]) -> None:
    """The label at `text_position`, joined to its `point` by a stroke unless beside it; both as shares of the axis."""
    leader_line = {
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
        xytext=text_position,
        textcoords="axes fraction",
        va="center",
        ha="left",
        color=label.colour,
        fontsize=8.5,
        fontweight="bold",
        annotation_clip=False,
        arrowprops=leader_line if abs(text_position[1] - point[1]) > LEADER_LINE_THRESHOLD else None,
    )


def _label_columns(lefts: Sequence[float], widths: Sequence[float]) -> Iterator[list[int]]:
    """The labels in sets that lie side by side, from left to right: those of one set could overlap."""
    column: list[int] = []
    right_edge = 0.0
    for i in sorted(range(len(lefts)), key=lambda i: lefts[i]):
        if column and lefts[i] >= right_edge:
            yield column
            column = []
        right_edge = lefts[i] + widths[i] if not column else max(right_edge, lefts[i] + widths[i])
        column.append(i)
    if column:
        yield column


def space_labels(targets: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Places from low to high, as near to the wanted ones (ascending) as heights allow, within 0..1 if they fit.

    The least squares answer: neighbours that would overlap move as one around the mean of what they want.
    """
    gaps = [(a + b) / 2 for a, b in itertools.pairwise(heights)]
    offsets = [sum(gaps[:i]) for i in range(len(targets))]  # how far each is above the lowest where all touch
    blocks: list[list[float]] = []
    for target, offset in zip(targets, offsets, strict=True):
        blocks.append([target - offset])
        while len(blocks) > 1 and statistics.fmean(blocks[-2]) > statistics.fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    low = heights[0] / 2 if heights else 0.0
    high = 1 - heights[-1] / 2 - offsets[-1] if heights else 0.0
    if high < low:  # they do not fit: as much too much above as below
        low = high = (low + high) / 2
    block_starts = [min(max(statistics.fmean(block), low), high) for block in blocks for _ in block]
    return [start + offset for start, offset in zip(block_starts, offsets, strict=True)]


def downsample(x: NDArray[np.float64], y: NDArray[np.float64], max_points: int) -> Curve:
    """At most `max_points` points of a curve: means of equal bins; values that are not finite are left out."""
    is_finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[is_finite], y[is_finite]
    if len(x) <= max_points:
        return x, y
    bin_starts = np.linspace(0, len(x), max_points, endpoint=False).astype(int)
    bin_sizes = np.diff(np.append(bin_starts, len(x)))
    return np.add.reduceat(x, bin_starts) / bin_sizes, np.add.reduceat(y, bin_starts) / bin_sizes


def bin_note(groups: Sequence[SeedGroup]) -> str:
    """What to say under plots whose lines are bin means, "" where every step is drawn."""
    num_runs = sum(len(group.runs) for group in groups)
    max_points = max(40, min(MAX_POINTS_PER_LINE, MAX_POINTS_PER_PLOT // max(1, num_runs)))
    max_steps = max((len(run.steps["step"]) for group in groups for run in group.runs), default=0)
    return (
        f"Each point of a line with more than {max_points} steps is the mean of a bin "
        f"(up to {-(-max_steps // max_points)} steps)."
        if max_steps > max_points
        else ""
    )
