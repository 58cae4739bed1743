"""The pictures, drawn with matplotlib (imported only when drawing): the report's first, the curves, and their page.

A mode has one colour everywhere (Okabe and Ito's colour-blind safe palette), full is solid, LoRA and the card are
dashed. Lines of many steps are drawn as means of equal bins.
"""

import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.config import reference
from trainer.config.files import write_atomically
from trainer.report.comparable import MODE_NAMES, SeedGroup, comparison_blockers, reference_blockers
from trainer.report.judge import FullVsLora, RateCurve
from trainer.report.run_data import RunData
from trainer.report.sentence import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"full": "#0072b2", "lora": "#d55e00", "card": "#767676"}  # light ground
DASHES: dict[str, Any] = {"full": "-", "lora": (0, (5, 2)), "card": (0, (2, 1.6))}
MORE_DASHES: tuple[Any, ...] = ((0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (9, 2)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = {"full": "o", "lora": "D", "card": "s"}
TEXT_COLOUR, GRID_COLOUR = "#222223", "#dadadb"
#: every colour a figure may hold, and the CSS variable that takes its place in the HTML
CSS_VARIABLES = {colour: f"--{name}" for name, colour in COLOURS.items()}
CSS_VARIABLES |= {TEXT_COLOUR: "--ink", GRID_COLOUR: "--faint"}
PNG_DPI = 120
PLOT_SIZE_INCHES = (4.5, 3.4)  # of one plot, so that its text is still legible on a phone
PICTURE_SIZE_INCHES = (4.8, 3.6)  # of the first one
MAX_LINES_NAMED = 4  # groups of a mode that the legend names one by one
MAX_POINTS_PER_LINE = 300  # of one line
MAX_POINTS_PER_PLOT = 4_000  # of one plot
LOSS_LABEL = "loss (nats per token)"
RATES_TITLE = "Loss by learning rate"
LOWEST_TITLE = "Lowest validation loss of any setting, by step"
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


class PlotSpec(NamedTuple):
    """One plot: which columns of which rows are drawn against one another, and how the axes read."""

    name: str
    title: str
    y_label: str
    series: str  #: rows of a run: steps or evals; "" for one point a run on a logarithmic x axis
    y: str
    x: str = "epoch"
    x_label: str = "epoch"
    reference_column: str = ""  #: of the card's curve, which lies by epoch

    def curve(self, run: RunData) -> Curve:
        if not self.series:
            loss = run.best_eval["loss"] if run.best_eval else np.nan
            return np.array([float(run.get("model.trainable") or np.nan)]), np.array([loss])
        rows = getattr(run, self.series)
        return rows[self.x], rows[self.y]


LOSS_PLOT = PlotSpec("val_loss", "Validation loss by epoch", LOSS_LABEL, "evals", "loss", reference_column="val_loss")
PLOTS = (
    LOSS_PLOT,
    PlotSpec("train_loss", "Train loss by epoch", LOSS_LABEL, "steps", "loss", reference_column="train_loss"),
    PlotSpec("train_loss_tokens", "Train loss by tokens", LOSS_LABEL, "steps", "loss", "tokens", "tokens seen"),
    PlotSpec("lr", "Learning rate", "learning rate", "steps", "lr"),
    PlotSpec("grad_norm", "Gradient norm before clipping", "L2 norm of the gradient", "steps", "grad_norm"),
    PlotSpec("tokens_per_second", "Speed", "tokens per second", "steps", "tokens_per_second"),
    PlotSpec(
        "parameters",
        "Best validation loss by trainable parameters",
        "best loss (nats per token)",
        series="",
        y="",
        x="",
        x_label="trainable parameters",
    ),
)


# --- files, and SVG for the page ---


def save_figure(groups: Sequence[SeedGroup], with_reference: bool, output_dir: Path) -> None:
    """Write curves.png and curves.svg: all plots on one page, on white."""
    num_rows = (len(PLOTS) + 1) // 2
    with styled_figure((2 * PLOT_SIZE_INCHES[0], num_rows * PLOT_SIZE_INCHES[1])) as figure:
        axes = figure.subplots(num_rows, 2).ravel()
        for axis, plot in zip(axes, PLOTS, strict=False):
            draw_plot(axis, plot, groups, with_reference)
        for axis in axes[len(PLOTS) :]:
            axis.set_axis_off()
        add_legend(figure, axes)
        write_atomically(output_dir / "curves.svg", render(figure, "svg"))
        write_atomically(output_dir / "curves.png", render(figure, "png"))


def render_picture(groups: Sequence[SeedGroup], verdict: Verdict, with_reference: bool) -> tuple[str, str]:
    """(title, SVG) of the first picture: loss against rate where a mode has several, else the curves by epoch."""
    pair = verdict.primary
    curves: tuple[RateCurve, ...] = verdict.study.rate_curves if verdict.study else ()
    if pair is not None and not curves:
        full_run = pair.full.runs[0]
        curves = rate_curves([group for group in groups if not comparison_blockers(group.runs[0], full_run)])
    if pair is not None and max((len(curve.losses) for curve in curves), default=0) > 1:
        draw = partial(draw_rates, curves=curves, pair=pair)
        return RATES_TITLE, _render_svg(draw, "picture", RATES_TITLE, PICTURE_SIZE_INCHES)
    draw = partial(draw_plot, plot=LOSS_PLOT, groups=groups, with_reference=with_reference)
    return LOSS_PLOT.title, _render_svg(draw, "picture", LOSS_PLOT.title, PICTURE_SIZE_INCHES)


def render_svgs(groups: Sequence[SeedGroup], with_reference: bool) -> list[tuple[str, str]]:
    """(title, SVG) of each plot for one HTML page: its colours are CSS variables, its ids its own."""
    drawings: list[tuple[str, str, partial[None]]] = []
    if any(len({group.lr for group in groups if group.mode == mode}) > 1 for mode in MODE_NAMES):
        drawings.append(("lowest", LOWEST_TITLE, partial(draw_lowest, groups=groups)))
    for plot in PLOTS:
        draw = partial(draw_plot, plot=plot, groups=groups, with_reference=with_reference)
        drawings.append((plot.name, plot.title, draw))
    return [(title, _render_svg(draw, name, title, PLOT_SIZE_INCHES)) for name, title, draw in drawings]


def _render_svg(draw: "Callable[[Axes], None]", name: str, title: str, size: tuple[float, float]) -> str:
    """The <svg> element alone, scaled by its container, with CSS variables for colours and ids that no other has."""
    with styled_figure(size, facecolor="none") as figure:
        axis = figure.subplots()
        draw(axis)
        axis.set_title("")  # the page has it as a heading
        add_legend(figure, [axis])
        svg = render(figure, "svg").decode()
    opening, rest = svg[svg.index("<svg") :].split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    svg = opening.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1) + ">" + rest
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r"font: ([^;\"]*?)'[^;\"]*", r"font: \1sans-serif", svg)
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def render(figure: "Figure", file_format: str) -> bytes:
    """The figure as a file; an SVG of the same runs has the same bytes."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if file_format == "svg" else {}
    figure.savefig(buffer, format=file_format, dpi=PNG_DPI, metadata=metadata)
    return buffer.getvalue()


def plot_lr_range_test(
    path: Path,
    *,
    mode: str,
    lrs: Sequence[float],
    losses: Sequence[float],
    smoothed_losses: Sequence[float],
    suggested_lr: float | None,
    name: str,
) -> None:
    """Write a PNG: losses of the steps as dots, smoothed as a line, the suggested rate as an upright line."""
    with styled_figure((1.4 * PLOT_SIZE_INCHES[0], 1.2 * PLOT_SIZE_INCHES[1])) as figure:
        axis = figure.subplots()
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")  # the page's style draws no formulas
        axis.plot(lrs, losses, ".", color=TEXT_COLOUR, alpha=0.3, markersize=4)
        axis.plot(lrs, smoothed_losses, "-", color=COLOURS[mode], linewidth=2)
        if smoothed_losses:
            min_loss, first_loss = min(*smoothed_losses, *losses), smoothed_losses[0]
            loss_range = max(first_loss - min_loss, 0.1 * first_loss)
            # what diverges leaves the picture
            axis.set_ylim(min_loss - 0.1 * loss_range, first_loss + 0.8 * loss_range)
        if suggested_lr is not None:
            axis.axvline(suggested_lr, color=TEXT_COLOUR, linestyle="--", linewidth=1)
            axis.text(suggested_lr, 0.02, f" {suggested_lr:g}", transform=axis.get_xaxis_transform(), va="bottom")
        title = f"Learning-rate range test: {name}"
        axis.set(title=title, xlabel="learning rate", ylabel="train loss (nats per token)")
        write_atomically(path, render(figure, "png"))


@contextlib.contextmanager
def styled_figure(size: tuple[float, float], facecolor: str = "white") -> "Iterator[Figure]":
    """A figure to be drawn and written inside the context, by matplotlib's settings for every plot."""
    import matplotlib
    from matplotlib.figure import Figure

    # on a new machine it says that it looks through the fonts: no word of ours, and nothing to act on
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    text_keys = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    style: Any = {
        **dict.fromkeys(text_keys, TEXT_COLOUR),
        "svg.fonttype": "none",
        "svg.hashsalt": "curves",
        "text.parse_math": False,
        "font.size": 9,
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "grid.color": GRID_COLOUR,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.linewidth": 0.6,
        "axes.linewidth": 0.8,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "path.simplify": True,
    }
    with matplotlib.rc_context(style):
        yield Figure(figsize=size, facecolor=facecolor, layout="constrained")


# --- one plot ---


def draw_plot(axis: "Axes", plot: PlotSpec, groups: Sequence[SeedGroup], with_reference: bool) -> None:
    """Draw `plot` of all groups on `axis`, and the card where a group is comparable with it; lines have names.

    Groups of a mode differ by their dashes; many of them share one name in the legend, at the first.
    """
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    is_scatter, is_loss_plot = not plot.series, plot.name == LOSS_PLOT.name
    num_runs = sum(len(group.runs) for group in groups)
    for mode in MODE_NAMES:
        members = [group for group in groups if group.mode == mode]
        are_named = len(members) <= MAX_LINES_NAMED
        dashes = [DASHES[mode], *MORE_DASHES] if are_named else [DASHES[mode]]
        for number, group in enumerate(members):
            curves = [downsample(*plot.curve(run), _max_points(num_runs)) for run in group.runs]
            curves = [(x, y) for x, y in curves if len(x)]
            name: str | None = group.label + (f", n = {len(curves)}" if len(curves) > 1 else "")
            if not are_named:
                num_mode_runs = sum(len(group.runs) for group in members)
                name = f"{MODE_NAMES[mode]}, {num_mode_runs} runs" if number == 0 else None
            elif is_loss_plot and len({round(float(x[-1]), 6) for x, _ in curves}) == 1:  # all end at one place
                name = f"{name}: {np.mean([y[-1] for _, y in curves]):.4f}"
            for i, (x, y) in enumerate(curves):
                axis.plot(
                    x,
                    y,
                    color=COLOURS[mode],
                    linestyle="none" if is_scatter else dashes[number % len(dashes)],
                    linewidth=1.6 if num_runs <= 6 else 0.8,
                    alpha=1.0 if num_runs <= 6 else 0.6,
                    marker=MARKERS[mode] if is_scatter or (is_loss_plot and len(x) <= 30) else None,
                    markersize=6 if is_scatter else 3,
                    label=name if i == 0 else None,
                )
    if with_reference and plot.reference_column and is_reference_comparable(groups):
        losses = [getattr(row, plot.reference_column) for row in reference.CURVE]
        label = f"card: {losses[-1]:.4f}" if is_loss_plot else "card"
        _draw_line(axis, "card", [float(row.epoch) for row in reference.CURVE], losses, label=label)
    if plot.name == "grad_norm":
        values = np.concatenate([np.zeros(0), *(np.asarray(line.get_ydata(), float) for line in axis.get_lines())])
        if len(values) and 0 < values.min() < values.max() / 20:  # a linear scale would flatten most of them
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_minor_formatter(NullFormatter())
    # few ticks, whole epochs where there are several, and plain numbers without an offset
    is_count = is_scatter or plot.x == "tokens"
    if is_scatter:
        axis.set_xscale("log")
        axis.margins(x=0.15, y=0.15)
    else:
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=not is_count and axis.get_xlim()[1] > 1.5))
    if is_count:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_formatter(NullFormatter())
    _label_axes(axis, plot.title, plot.x_label, plot.y_label)


def is_reference_comparable(groups: Sequence[SeedGroup]) -> bool:
    """Whether a run may be held against the card: else its axes would squeeze the curves for nothing."""
    return any(not reference_blockers(run) for group in groups for run in group.runs)


def rate_curves(groups: Sequence[SeedGroup]) -> tuple[RateCurve, ...]:
    """Each mode's lowest validation loss at each rate, of runs of any settings."""
    curves = []
    for mode in MODE_NAMES:
        lowest: dict[float, float] = {}
        for group in (group for group in groups if group.mode == mode and group.finished_runs):
            lowest[group.lr] = min(group.best_loss, lowest.get(group.lr, np.inf))
        curves += [RateCurve(mode=mode, losses=dict(sorted(lowest.items())))] if lowest else []
    return tuple(curves)


def draw_rates(axis: "Axes", curves: Sequence[RateCurve], pair: FullVsLora) -> None:
    """Validation loss against learning rate, a line a mode and length of run; the chosen points ringed.

    The interval stands at LoRA's chosen rate: full's loss there and the interval of the difference.
    """
    lengths = sorted({curve.num_steps for curve in curves})
    groups, chosen = {"full": pair.full, "lora": pair.lora}, dict[str, float]()
    for curve in sorted(curves, key=lambda curve: curve.num_steps):  # the longest last: it is the one chosen by
        label = MODE_NAMES[curve.mode] + (f", {curve.num_steps:,} steps" if len(lengths) > 1 else "")
        alpha = (1 + lengths.index(curve.num_steps)) / len(lengths)
        _draw_line(axis, curve.mode, curve.losses, curve.losses.values(), label=label, alpha=alpha, markersize=4)
        chosen[curve.mode] = curve.losses.get(groups[curve.mode].lr, groups[curve.mode].best_loss)
    for mode, group in groups.items():
        ring: dict[str, Any] = {"marker": "o", "markersize": 11, "fillstyle": "none", "markeredgewidth": 1.5}
        axis.plot([group.lr], [chosen[mode]], linestyle="none", color=COLOURS[mode], **ring)
    if pair.excess is not None:
        ends = [chosen["full"] + pair.excess.low, chosen["full"] + pair.excess.high]
        bar: dict[str, Any] = {"color": COLOURS["lora"], "linewidth": 2.4, "marker": "_", "markersize": 9}
        axis.plot(
            [pair.lora.lr * 1.3] * 2, ends, label=f"{100 * pair.excess.level:.3g} % interval of LoRA's loss", **bar
        )
        axis.axhline(chosen["full"], color=COLOURS["full"], linewidth=0.7, alpha=0.7)
    # leave out what ended above the loss before training: diverged runs would flatten the rest
    base = [run.initial_loss for run in (*pair.full.runs, *pair.lora.runs) if run.initial_loss is not None]
    low, high = axis.get_ylim()
    if base and low < max(base) < high:
        axis.set_ylim(low, max(base))
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _label_axes(axis, RATES_TITLE, "learning rate", "validation loss (nats per token)")


def draw_lowest(axis: "Axes", groups: Sequence[SeedGroup]) -> None:
    """The lowest validation loss that any setting of a mode has, evaluation by evaluation (means over seeds)."""
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
            steps = sorted(lowest)
            _draw_line(axis, mode, steps, [lowest[step] for step in steps], label=mode_name, linewidth=1.5)
    _label_axes(axis, LOWEST_TITLE, "step", LOSS_LABEL)


def _draw_line(axis: "Axes", mode: str, x: Iterable[float], y: Iterable[float], **style: Any) -> None:
    style = {"linewidth": 1.6, "markersize": 3, **style}
    axis.plot(list(x), list(y), color=COLOURS[mode], linestyle=DASHES[mode], marker=MARKERS[mode], **style)


def _label_axes(axis: "Axes", title: str, x_label: str, y_label: str) -> None:
    """Titles, and losses, rates and speeds as people write them: 2.5, 425k, and 3e-4 where all are small."""
    is_small = max(map(abs, axis.get_ylim())) < 0.01

    def format_tick(value: float, _: object) -> str:
        if is_small and value:
            digits, exponent = f"{value:.2e}".split("e")
            return f"{float(digits):g}e{int(exponent)}"
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value / 1000:,.6g}k"

    axis.yaxis.set_major_formatter(format_tick)
    axis.set(title=title, xlabel=x_label, ylabel=y_label)


def add_legend(figure: "Figure", axes: Sequence["Axes"]) -> None:
    """One legend under the plots, of every name once; constrained layout keeps it off axes and edges."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        longest = max(map(len, entries))
        num_columns = min(len(entries), max(1, int(figure.get_size_inches()[0] / (0.45 + 0.063 * longest))))
        style: dict[str, Any] = {"loc": "outside lower left", "frameon": False, "fontsize": 8.5, "ncols": num_columns}
        figure.legend(list(entries.values()), list(entries), **style)


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
