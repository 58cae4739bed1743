"""How one plot is drawn: a line a run in the colour of its mode, ticks that people read, a legend outside the axes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.report.comparability import reference_blockers
from trainer.report.full_vs_lora import FullVsLora
from trainer.report.options import RateCurve
from trainer.report.run_data import RunData
from trainer.report.seed_groups import MODE_NAMES, SeedGroup, best_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"full": "#0072b2", "lora": "#d55e00", "card": "#767676"}  # light ground
DASHES: dict[str, Any] = {"full": "-", "lora": (0, (5, 2)), "card": (0, (2, 1.6))}
MORE_DASHES: tuple[Any, ...] = ((0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (9, 2)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = {"full": "o", "lora": "D", "card": "s"}
MAX_LINES_NAMED = 4  # groups of a mode that the legend names one by one
MAX_POINTS_PER_LINE = 300  # of one line
MAX_POINTS_PER_PLOT = 4_000  # of one plot

RATES_TITLE = "Loss by learning rate"
LOWEST_TITLE = "Lowest validation loss of any setting, by step"

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
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
    is_scatter: bool = False  #: one point a run on a logarithmic x axis


def draw_plot(axis: "Axes", plot: PlotSpec, groups: Sequence[SeedGroup], with_reference: bool) -> None:
    """Draw `plot` of all groups on `axis`, and the card where a group is comparable with it; lines have names."""
    axis.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label)
    num_runs = sum(len(group.runs) for group in groups)
    for group, dash, name in _styled_groups(groups):
        curves = [downsample(*plot.curve(run), _max_points(num_runs)) for run in group.runs]
        curves = [(x, y) for x, y in curves if len(x)]
        for i, (x, y) in enumerate(curves):
            axis.plot(
                x,
                y,
                color=COLOURS[group.mode],
                linestyle="none" if plot.is_scatter else dash,
                linewidth=1.6 if num_runs <= 6 else 0.8,
                alpha=1.0 if num_runs <= 6 else 0.6,
                marker=MARKERS[group.mode] if plot.is_scatter or (plot.has_markers and len(x) <= 30) else None,
                markersize=6 if plot.is_scatter else 3,
                label=_line_label(plot, name, curves) if name and i == 0 else None,
            )
    if with_reference and plot.reference_curve is not None and is_reference_comparable(groups):
        x, y = plot.reference_curve
        label = f"card: {y[-1]:.4f}" if plot.shows_end_value else "card"
        axis.plot(
            x, y, color=COLOURS["card"], linestyle=DASHES["card"], linewidth=1.6, marker="s", markersize=3, label=label
        )
    if plot.log_y and _needs_log_scale(axis):
        axis.set_yscale("log")
    if plot.is_scatter:
        axis.set_xscale("log")
        axis.margins(x=0.15, y=0.15)
    _set_ticks(axis, plot)


def is_reference_comparable(groups: Sequence[SeedGroup]) -> bool:
    """Whether a run may be held against the card: else its axes would squeeze the curves for nothing."""
    return any(not reference_blockers(run) for group in groups for run in group.runs)


def _styled_groups(groups: Sequence[SeedGroup]) -> Iterator[tuple[SeedGroup, Any, str]]:
    """Each group with its dash and its name in the legend; many of a mode share one name, at the first."""
    for mode in MODE_NAMES:
        members = [group for group in groups if group.mode == mode]
        is_many = len(members) > MAX_LINES_NAMED
        dashes = [DASHES[mode], *MORE_DASHES]
        num_runs = sum(len(group.runs) for group in members)
        for i, group in enumerate(members):
            name = group.label if not is_many else f"{MODE_NAMES[mode]}, {num_runs} runs" if i == 0 else ""
            yield group, DASHES[mode] if is_many else dashes[i % len(dashes)], name


def _line_label(plot: PlotSpec, name: str, curves: Sequence[Curve]) -> str:
    """The name of a group, its number of runs, and the value at its end where all end at one place."""
    if len(curves) > 1 and "runs" not in name:
        name += f", n = {len(curves)}"
    ends = {round(float(x[-1]), 6) for x, _ in curves}
    if plot.shows_end_value and len(ends) == 1 and "runs" not in name:
        return f"{name}: {np.mean([y[-1] for _, y in curves]):.4f}"
    return name


def rate_curves(groups: Sequence[SeedGroup]) -> tuple[RateCurve, ...]:
    """Each mode's lowest validation loss at each rate, of runs of any settings."""
    curves = []
    for mode in MODE_NAMES:
        lowest: dict[float, float] = {}
        for group in (group for group in groups if group.mode == mode and group.finished_runs):
            loss = best_loss(group)
            lowest[group.lr] = min(loss, lowest.get(group.lr, loss))
        curves += [RateCurve(mode=mode, losses=dict(sorted(lowest.items())))] if lowest else []
    return tuple(curves)


def draw_rates(axis: "Axes", curves: Sequence[RateCurve], pair: FullVsLora) -> None:
    """Validation loss against learning rate, a line a mode and length of run; the chosen points ringed.

    The interval stands at LoRA's chosen rate: full's loss there and the interval of the difference.
    """
    axis.set(title=RATES_TITLE, xlabel="learning rate", ylabel="validation loss (nats per token)")
    lengths = sorted({curve.num_steps for curve in curves})
    chosen: dict[str, float] = {}
    for curve in sorted(curves, key=lambda curve: curve.num_steps):  # the longest last: it is the one chosen by
        group = pair.full if curve.mode == "full" else pair.lora
        steps = f", {curve.num_steps:,} steps" if len(lengths) > 1 else ""
        alpha = (1 + lengths.index(curve.num_steps)) / len(lengths)
        axis.plot(
            list(curve.losses),
            list(curve.losses.values()),
            color=COLOURS[curve.mode],
            alpha=alpha,
            linestyle=DASHES[curve.mode],
            linewidth=1.6,
            marker=MARKERS[curve.mode],
            markersize=4,
            label=MODE_NAMES[curve.mode] + steps,
        )
        chosen[curve.mode] = curve.losses.get(group.lr, best_loss(group))
    for group in (pair.full, pair.lora):
        axis.plot(
            [group.lr],
            [chosen[group.mode]],
            linestyle="none",
            marker="o",
            markersize=11,
            fillstyle="none",
            markeredgewidth=1.5,
            color=COLOURS[group.mode],
        )
    if pair.excess is not None:
        low, high = chosen["full"] + pair.excess.low, chosen["full"] + pair.excess.high
        label = f"{100 * pair.excess.level:.3g} % interval of LoRA's loss"
        axis.plot(
            [pair.lora.lr * 1.3] * 2,
            [low, high],
            color=COLOURS["lora"],
            linewidth=2.4,
            marker="_",
            markersize=9,
            label=label,
        )
        axis.axhline(chosen["full"], color=COLOURS["full"], linewidth=0.7, alpha=0.7)
    _limit_to_base(axis, [*pair.full.runs, *pair.lora.runs])
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _format_y_ticks(axis)


def draw_lowest(axis: "Axes", groups: Sequence[SeedGroup]) -> None:
    """The lowest validation loss that any setting of a mode has, evaluation by evaluation (means over seeds)."""
    axis.set(title=LOWEST_TITLE, xlabel="step", ylabel="loss (nats per token)")
    for mode, mode_name in MODE_NAMES.items():
        lowest: dict[float, float] = {}
        for group in (group for group in groups if group.mode == mode):
            losses: dict[float, list[float]] = {}
            for run in group.runs:
                for step, loss in zip(run.evals["step"].tolist(), run.evals["loss"].tolist(), strict=True):
                    losses.setdefault(step, []).append(loss)
            for step, values in losses.items():
                if len(values) == len(group.runs):
                    lowest[step] = min(float(np.mean(values)), lowest.get(step, np.inf))
        if lowest:
            axis.plot(
                sorted(lowest),
                [lowest[step] for step in sorted(lowest)],
                color=COLOURS[mode],
                linestyle=DASHES[mode],
                marker=MARKERS[mode],
                markersize=3,
                label=mode_name,
            )
    _format_y_ticks(axis)


def _limit_to_base(axis: "Axes", runs: Sequence[RunData]) -> None:
    """Leave out what ended above the loss before training: diverged runs would flatten the rest."""
    base = [run.initial_loss for run in runs if run.initial_loss is not None]
    low, high = axis.get_ylim()
    if base and low < max(base) < high:
        axis.set_ylim(low, max(base))


def add_legend(figure: "Figure", axes: Sequence["Axes"]) -> None:
    """One legend under the plots, of every name once; constrained layout keeps it off axes and edges."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        longest = max(map(len, entries))
        num_columns = min(len(entries), max(1, int(figure.get_size_inches()[0] / (0.45 + 0.063 * longest))))
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside lower left",
            frameon=False,
            fontsize=8.5,
            ncols=num_columns,
        )


def _needs_log_scale(axis: "Axes") -> bool:
    """Whether the lines are all above zero and span so much that a linear scale would flatten most of them."""
    values = [np.asarray(line.get_ydata(), dtype=np.float64) for line in axis.get_lines()]
    low = min((float(np.min(value)) for value in values if len(value)), default=0.0)
    high = max((float(np.max(value)) for value in values if len(value)), default=0.0)
    return low > 0 and high / low > 20


def _set_ticks(axis: "Axes", plot: PlotSpec) -> None:
    """Few ticks, whole epochs where there are several, and plain numbers without an offset."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    is_count = plot.is_scatter or plot.x_label.startswith("tokens")
    if not plot.is_scatter:
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=not is_count and axis.get_xlim()[1] > 1.5))
    if is_count:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_formatter(NullFormatter())
    if axis.get_yscale() == "log":
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_formatter(NullFormatter())
    _format_y_ticks(axis)


def _format_y_ticks(axis: "Axes") -> None:
    """Numbers as people write them: 2.5, 425k, and 3e-4 where all are small."""
    is_small = max(map(abs, axis.get_ylim())) < 0.01

    def format_tick(value: float, _: object) -> str:
        if is_small and value:
            digits, exponent = f"{value:.2e}".split("e")
            return f"{float(digits):g}e{int(exponent)}"
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value / 1000:,.6g}k"

    axis.yaxis.set_major_formatter(format_tick)


def _max_points(num_runs: int) -> int:
    return max(40, min(MAX_POINTS_PER_LINE, MAX_POINTS_PER_PLOT // max(1, num_runs)))


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
    max_points = _max_points(sum(len(group.runs) for group in groups))
    max_steps = max((int(run.steps["step"][-1]) for g in groups for run in g.runs if len(run.steps["step"])), default=0)
    if max_steps <= max_points:
        return ""
    bin_steps = -(-max_steps // max_points)
    return f"Each point of a line with more than {max_points} steps is the mean of a bin (up to {bin_steps} steps)."
