"""The pictures, drawn with matplotlib (imported only when drawing): the report's first, the curves, and their page.

A mode has one colour everywhere (Okabe and Ito's colour-blind safe palette), full is solid, LoRA and the card are
dashed. Lines of many steps are drawn as means of equal bins.
"""

import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.config import reference
from trainer.config.files import write_atomically
from trainer.report.comparable import MODE_NAMES, SeedGroup, comparison_blockers, reference_blockers
from trainer.report.interval import LEVEL, PairedInterval
from trainer.report.judge import UNIT, FullVsLora, RateCurve
from trainer.report.matched import LOSS
from trainer.report.run_data import TRAINER_MODE, RunData
from trainer.report.sentence import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"full": "#0072b2", "lora": "#d55e00", "card": "#767676", TRAINER_MODE: "#00785a"}
COLOURS["good"] = "#1a7f37"  # all for a light ground
DASHES: dict[str, Any] = {"full": "-", "lora": (0, (5, 2)), "card": (0, (2, 1.6)), TRAINER_MODE: "-."}
MORE_DASHES: tuple[Any, ...] = ((0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (9, 2)))
MARKERS = {"full": "o", "lora": "D", "card": "s", TRAINER_MODE: "^"}
PLOT_NAMES = {**MODE_NAMES, TRAINER_MODE: "HF Trainer"}
TEXT_COLOUR, GRID_COLOUR = "#222223", "#dadadb"
#: every colour a figure may hold, and the CSS variable that takes its place in the HTML
CSS_VARIABLES = {colour: f"--{name}" for name, colour in COLOURS.items()}
CSS_VARIABLES |= {TEXT_COLOUR: "--ink", GRID_COLOUR: "--faint"}
STYLE: Any = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), TEXT_COLOUR),
    "svg.fonttype": "none",
    "svg.hashsalt": "curves",  # an SVG of the same runs has the same bytes
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
    "axes.formatter.useoffset": False,
}
PNG_DPI = 120
PLOT_SIZE_INCHES = (4.5, 3.4)  # of one plot, so that its text is still legible on a phone
PICTURE_SIZE_INCHES = (5.4, 3.1)  # of the first ones
DIFFERENCE_SIZE_INCHES = (5.4, 1.1)
MAX_VALUES = 40  # that a plot shows under the pointer
MAX_LINES_NAMED = 4  # groups of a mode that the legend names one by one
MAX_POINTS = 200  # of one line
LOSS_LABEL = "loss (nats per token)"
RATES_TITLE = "Loss by learning rate"
TRADEOFF_TITLE = "Gain against forgetting"
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


class PlotSpec(NamedTuple):
    """One plot by epoch: which column of which rows of a run (steps or evals), and how it reads."""

    name: str
    title: str
    y_label: str
    series: str
    y: str
    reference_column: str = ""  #: of the card's curve
    val_set: str = ""  #: a further set of --val-data, whose evaluations are drawn

    def curve(self, run: RunData) -> Curve:
        """x and y of a run; a line of many points as means of equal bins, without what is not finite."""
        rows = run.val_sets.get(self.val_set, {}) if self.val_set else getattr(run, self.series)
        if not rows:
            return np.zeros(0), np.zeros(0)
        steps_per_epoch = run.get("resolved.steps_per_epoch")
        # an epoch's last batch may be short: by examples its step is one too, and a straight line would have a kink
        x, y = rows["step"] / steps_per_epoch if steps_per_epoch else rows["epoch"], rows[self.y]
        is_finite = np.isfinite(x) & np.isfinite(y)
        x, y = x[is_finite], y[is_finite]
        if len(x) <= MAX_POINTS:
            return x, y
        bin_starts = np.linspace(0, len(x), MAX_POINTS, endpoint=False).astype(int)
        bin_sizes = np.diff(np.append(bin_starts, len(x)))
        return np.add.reduceat(x, bin_starts) / bin_sizes, np.add.reduceat(y, bin_starts) / bin_sizes


LOSS_PLOT = PlotSpec("val_loss", "Validation loss by epoch", LOSS_LABEL, "evals", "loss", "val_loss")
PLOTS = (
    LOSS_PLOT,
    PlotSpec("train_loss", "Train loss by epoch", LOSS_LABEL, "steps", "loss", "train_loss"),
    PlotSpec("lr", "Learning rate", "learning rate", "steps", "lr"),
    PlotSpec("grad_norm", "Gradient norm before clipping", "L2 norm of the gradient", "steps", "grad_norm"),
    PlotSpec("tokens_per_second", "Speed", "tokens per second", "steps", "tokens_per_second"),
)


def plots_of(groups: Sequence[SeedGroup]) -> list[PlotSpec]:
    """All plots, with one for each further set of --val-data that a run has, behind that of the first; of judged models
    none."""
    if groups[0].runs[0].is_judged:
        return []
    names = sorted({name for group in groups for run in group.runs for name in run.val_sets})
    more = [PlotSpec(f"val-{n}", f"Validation loss of {n} by epoch", LOSS_LABEL, "", "loss", val_set=n) for n in names]
    return [PLOTS[0], *more, *PLOTS[1:]]


# --- files, and SVG for the page ---


def save_figure(groups: Sequence[SeedGroup], with_reference: bool, output_dir: Path) -> None:
    """Write curves.png and curves.svg: all plots on one page, on white; nothing where there is none."""
    plots = plots_of(groups)
    if not plots:
        return
    num_rows = -(-len(plots) // 2)
    with styled_figure((2 * PLOT_SIZE_INCHES[0], num_rows * PLOT_SIZE_INCHES[1])) as figure:
        axes = figure.subplots(num_rows, 2).ravel()
        for axis, plot in zip(axes, plots, strict=False):
            draw_plot(axis, plot, groups, with_reference)
        for axis in axes[len(plots) :]:
            axis.set_axis_off()
        add_legend(figure, axes)
        for file_format in ("svg", "png"):
            write_atomically(output_dir / f"curves.{file_format}", render(figure, file_format))


def render_pictures(groups: Sequence[SeedGroup], verdict: Verdict, with_reference: bool) -> list[tuple[str, str]]:
    """(title, SVG) of the first ones: the difference beside 0 and the margin, then loss against rate.

    Where no mode has several rates, the losses by epoch.
    """
    pair, pictures = verdict.primary, []
    if pair is not None and pair.excess is not None and not pair.blockers:
        digits, name = 4, f"{pair.lora.name} − {pair.full.name}, {pair.unit}"
        if pair.margin.measure != LOSS:
            digits, name = 1, f"Points that {pair.lora.name} has fewer"
        low, high = f"{pair.excess.low:+.{digits}f}", f"{pair.excess.high:+.{digits}f}"
        title = f"{name}: {pair.excess.estimate:+.{digits}f} [{low}, {high}]"
        draw_it = partial(draw_difference, pair=pair)
        pictures.append((title, _render_svg(draw_it, "difference", title, DIFFERENCE_SIZE_INCHES)))
    curves: Sequence[RateCurve] = verdict.study.rate_curves if verdict.study else ()
    if pair is not None and pair.is_judged:
        return pictures
    if pair is not None and not curves:
        full_run = pair.full.runs[0]
        comparable = [group for group in groups if not comparison_blockers(group.runs[0], full_run)]
        curves = rate_curves([group for group in comparable if group.mode != TRAINER_MODE])
    title, draw = LOSS_PLOT.title, partial(draw_plot, plot=LOSS_PLOT, groups=groups, with_reference=with_reference)
    if pair is not None and max((len(curve.losses) for curve in curves), default=0) > 1:
        title, draw = RATES_TITLE, partial(draw_rates, curves=curves, pair=pair)
    return [*pictures, (title, _render_svg(draw, "picture", title, PICTURE_SIZE_INCHES))]


def render_svgs(
    groups: Sequence[SeedGroup], verdict: Verdict, with_reference: bool, pictures: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """(title, SVG) of each plot beside `pictures` for one HTML page: its colours are CSS variables, its ids its own."""
    drawings, titles = render_excess(verdict), [title for title, _ in pictures]
    if any(pair.tradeoffs for pair in verdict.comparisons):
        draw = partial(draw_tradeoffs, pairs=verdict.comparisons)
        drawings.append((TRADEOFF_TITLE, _render_svg(draw, "tradeoff", TRADEOFF_TITLE, PLOT_SIZE_INCHES)))
    for plot in (plot for plot in plots_of(groups) if plot.title not in titles):
        draw = partial(draw_plot, plot=plot, groups=groups, with_reference=with_reference)
        drawings.append((plot.title, _render_svg(draw, plot.name, plot.title, PLOT_SIZE_INCHES)))
    return drawings


def render_excess(verdict: Verdict) -> list[tuple[str, str]]:
    """(title, SVG) of LoRA's excess by rank and by length of training, of what a study has several."""
    by_rank, drawings = [(float(result.rank), result.excess) for result in verdict.ranks], []
    by_length = [(float(steps), excess) for steps, excess in (verdict.study.by_length if verdict.study else ())]
    for name, points, unit in (("LoRA rank", by_rank, None), ("steps of a run", by_length, UNIT)):
        if len(points) > 1 and verdict.primary is not None:
            title = f"LoRA's excess by {name}"
            draw = partial(draw_excess, points=points, x_label=name, pair=verdict.primary, unit=unit)
            drawings.append((title, _render_svg(draw, name.replace(" ", "-"), title, PLOT_SIZE_INCHES)))
    return drawings


def draw_excess(
    axis: "Axes", points: Sequence[tuple[float, PairedInterval]], x_label: str, pair: FullVsLora, unit: str | None
) -> None:
    """Estimates with their intervals, 0 and, where it has the margin's unit, the margin."""
    unit = unit or pair.unit
    x, estimates = [x for x, _ in points], np.array([interval.estimate for _, interval in points])
    bars = np.abs([(interval.low, interval.high) for _, interval in points] - estimates[:, None]).T
    label = f"LoRA - full, {100 * LEVEL:g} % interval"
    axis.errorbar(x, estimates, yerr=bars, color=COLOURS["lora"], marker=MARKERS["lora"], capsize=3, label=label)
    axis.axhline(0, color=COLOURS["full"], linewidth=1.0, label="full")
    if pair.excess is not None and pair.contrast is not None and unit == pair.unit:
        margin = pair.excess.estimate - pair.contrast.estimate
        axis.axhline(margin, color=COLOURS["card"], linestyle=DASHES["card"], label="margin")
    axis.set_xscale("log", base=2)
    axis.set_xticks(x, [f"{value:,.0f}" for value in x])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set(xlabel=x_label, ylabel=f"excess ({unit})")


def _render_svg(draw: "Callable[[Axes], None]", name: str, title: str, size: tuple[float, float]) -> str:
    """The <svg> element alone, scaled by its container, with CSS variables for colours and ids that no other has.

    A browser shows the value of a point under the pointer.
    """
    with styled_figure(size, facecolor="none") as figure:
        axis = figure.subplots()
        draw(axis)
        axis.set_title("")  # the page has it as a heading
        add_legend(figure, [axis])
        svg = render(figure, "svg").decode()
        values = _point_values(figure, axis)
    opening, rest = svg[svg.index("<svg") :].split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    svg = opening.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1) + ">" + rest
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r"font: ([^;\"]*?)'[^;\"]*", r"font: \1sans-serif", svg)
    # hundredths of a point are enough
    svg = re.sub(r'(?<= [dxy]=")[^"]*', lambda match: re.sub(r"(\d\.\d\d)\d+", r"\1", match[0]), svg)
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.rstrip().removesuffix("</svg>") + values + "</svg>\n"


def _point_values(figure: "Figure", axis: "Axes") -> str:
    """Unseen circles over the points of the lines, each with its value; of many points some."""
    lines = [line for line in axis.get_lines() if len(np.asarray(line.get_xdata())) and line.get_linestyle() != "None"]
    stride = -(-sum(len(np.asarray(line.get_xdata())) for line in lines) // MAX_VALUES)
    scale, circles = 72 / figure.dpi, []  # an SVG has 72 points an inch
    for line in lines:
        name = str(line.get_label())
        x, y = (np.asarray(data, float)[::stride] for data in line.get_data())
        for (x_pixel, y_pixel), x_value, y_value in zip(axis.transData.transform(np.c_[x, y]), x, y, strict=True):
            text = f"{'' if name.startswith('_') else name + ', '}{axis.get_xlabel()} {x_value:.4g}: {y_value:.4g}"
            place = f'cx="{x_pixel * scale:.1f}" cy="{figure.bbox.height * scale - y_pixel * scale:.1f}"'
            circles.append(f'<circle {place} r="5" fill="transparent"><title>{escape(text)}</title></circle>')
    return "".join(circles)


def render(figure: "Figure", file_format: str) -> bytes:
    """The figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, dpi=PNG_DPI, metadata={"Date": None} if file_format == "svg" else {})
    return buffer.getvalue()


@contextlib.contextmanager
def styled_figure(size: tuple[float, float], facecolor: str = "white") -> "Iterator[Figure]":
    """A figure to be drawn and written inside the context, by matplotlib's settings for every plot."""
    import matplotlib
    from matplotlib.figure import Figure

    # on a new machine it says that it looks through the fonts: no word of ours, and nothing to act on
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=size, facecolor=facecolor, layout="constrained")


def add_legend(figure: "Figure", axes: Sequence["Axes"]) -> None:
    """One legend under the plots, of every name once; constrained layout keeps it off axes and edges."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        num_columns = int(figure.get_size_inches()[0] / (0.45 + 0.063 * max(map(len, entries))))
        style: dict[str, Any] = {"loc": "outside lower left", "frameon": False, "fontsize": 8.5}
        figure.legend(entries.values(), entries, ncols=max(1, min(len(entries), num_columns)), **style)


# --- one plot ---


def draw_plot(axis: "Axes", plot: PlotSpec, groups: Sequence[SeedGroup], with_reference: bool) -> None:
    """Draw `plot` of all groups on `axis`, and the card where a group is comparable with it; lines have names.

    Groups of a mode differ by their dashes; many of them share one name in the legend, at the first.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator

    num_runs = sum(len(group.runs) for group in groups)
    width, alpha = (1.6, 1.0) if num_runs <= 6 else (0.8, 0.6)
    style: dict[str, Any] = {"linewidth": width, "alpha": alpha, "markersize": 3}
    for mode in PLOT_NAMES:
        members = [group for group in groups if group.mode == mode]
        are_named = len(members) <= MAX_LINES_NAMED
        for number, group in enumerate(members):
            curves = [(x, y) for x, y in map(plot.curve, group.runs) if len(x)]
            name: str | None = group.label + (f", n = {len(curves)}" if len(curves) > 1 else "")
            if not are_named:
                name = f"{PLOT_NAMES[mode]}, {sum(len(group.runs) for group in members)} runs" if number == 0 else None
            elif plot is LOSS_PLOT and len({round(float(x[-1]), 6) for x, _ in curves}) == 1:  # all end at one place
                name = f"{name}: {np.mean([y[-1] for _, y in curves]):.4f}"
            for x, y in curves:
                style["marker"] = MARKERS[mode] if plot is LOSS_PLOT and len(x) <= 30 else None
                style["linestyle"] = [DASHES[mode], *MORE_DASHES][number if are_named else 0]
                axis.plot(x, y, color=COLOURS[mode], label=name, **style)
                name = None
    if with_reference and plot.reference_column and is_reference_comparable(groups):
        losses = [getattr(row, plot.reference_column) for row in reference.CURVE]
        label = f"card: {losses[-1]:.4f}" if plot is LOSS_PLOT else "card"
        style |= {"linestyle": DASHES["card"], "marker": MARKERS["card"]}
        axis.plot([row.epoch for row in reference.CURVE], losses, color=COLOURS["card"], label=label, **style)
    if plot.name == "grad_norm":
        values = np.concatenate([np.zeros(0), *(np.asarray(line.get_ydata(), float) for line in axis.get_lines())])
        if len(values) and 0 < values.min() < values.max() / 20:  # a linear scale would flatten most of them
            axis.set_yscale("log")
    # few ticks, whole epochs where there are several
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=axis.get_xlim()[1] > 1.5))
    if plot.name in ("lr", "tokens_per_second"):
        axis.yaxis.set_major_formatter(EngFormatter(sep="") if plot.name == "tokens_per_second" else format_power)
    elif axis.get_yscale() == "log":
        axis.yaxis.set_major_formatter("{x:g}")
    axis.set(title=plot.title, xlabel="epoch", ylabel=plot.y_label)


def is_reference_comparable(groups: Sequence[SeedGroup]) -> bool:
    """Whether a run may be held against the card: else its axes would squeeze the curves for nothing."""
    runs = [run for group in groups for run in group.runs if run.mode != TRAINER_MODE]
    return not all(map(reference_blockers, runs))


def rate_curves(groups: Sequence[SeedGroup]) -> list[RateCurve]:
    """Each mode's lowest validation loss at each rate, of runs of any settings."""
    curves = []
    for mode in MODE_NAMES:
        lowest: dict[float, float] = {}
        for group in (group for group in groups if group.mode == mode and group.finished_runs):
            lowest[group.lr] = min(group.best_loss, lowest.get(group.lr, np.inf))
        curves += [RateCurve(mode=mode, losses=dict(sorted(lowest.items())))] if lowest else []
    return curves


def draw_rates(axis: "Axes", curves: Sequence[RateCurve], pair: FullVsLora) -> None:
    """Validation loss against learning rate, a line a mode and length of run; the chosen points ringed.

    What ended above the loss before training stands at the upper edge, as an arrow: it would flatten the rest.
    """
    lengths = sorted({curve.num_steps for curve in curves})
    groups = {"full": pair.full, "lora": pair.lora}
    base = [run.initial_loss for run in (*pair.full.runs, *pair.lora.runs) if run.initial_loss is not None]
    top = max(base, default=np.inf)
    for curve in sorted(curves, key=lambda curve: curve.num_steps):  # the longest last: it is the one chosen by
        mode, is_longest = curve.mode, curve.num_steps == lengths[-1]
        style: dict[str, Any] = {"color": COLOURS[mode], "marker": MARKERS[mode], "markersize": 4}
        style["alpha"] = (1 + lengths.index(curve.num_steps)) / len(lengths)
        label = MODE_NAMES[mode] + (f", {curve.num_steps:,} steps" if len(lengths) > 1 else "")
        rates, losses = np.array(list(curve.losses)), np.array(list(curve.losses.values()))
        is_inside = losses <= top
        axis.plot(
            rates[is_inside],
            losses[is_inside],
            label=label if is_longest else f"_{label}",
            linestyle=DASHES[mode],
            linewidth=1.6,
            **style,
        )
        arrows = {**style, "marker": "^", "linestyle": "none"}
        axis.plot(rates[~is_inside], np.full((~is_inside).sum(), top), **arrows)
        if is_longest:
            group = groups[mode]
            ring: dict[str, Any] = {"marker": "o", "markersize": 11, "fillstyle": "none", "markeredgewidth": 1.5}
            chosen = curve.losses.get(group.lr, group.best_loss)
            axis.plot([group.lr], [chosen], linestyle="none", color=COLOURS[mode], **ring)
    if len(lengths) > 1:
        shorter = " and ".join(f"{steps:,}" for steps in lengths[:-1])
        axis.plot([], [], color=TEXT_COLOUR, alpha=0.4, label=f"pale: runs of {shorter} steps")
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(format_power)
    axis.set(title=RATES_TITLE, xlabel="learning rate", ylabel="validation loss (nats per token)")


def draw_difference(axis: "Axes", pair: FullVsLora) -> None:
    """The difference with its interval on its own axis, and 0 and the margin as lines: the decision."""
    excess, colour = pair.excess, COLOURS["lora"]
    assert excess is not None
    ends, digits = [0.0, excess.low, excess.high], 4 if pair.margin.measure == LOSS else 1
    axis.axvline(0, color=TEXT_COLOUR, linewidth=1.2)
    names = {0.0: "equal"}
    if pair.contrast is not None:
        margin = excess.estimate - pair.contrast.estimate
        ends.append(margin)
        names[margin] = f"margin {margin:.{digits}f}"
        axis.axvline(margin, color=COLOURS["good"], linewidth=1.6, linestyle=(0, (4, 2)))
        axis.axvspan(min(ends) - 9 * abs(margin), margin, color=COLOURS["good"], alpha=0.10, linewidth=0)
    width = max(ends) - min(ends) or 1.0
    axis.plot(
        [excess.low, excess.high], [0, 0], color=colour, linewidth=3, marker="|", markersize=13, label="_interval"
    )
    axis.plot([excess.estimate], [0], color=colour, marker="D", markersize=8, linestyle="-", label="_difference")
    for place, name in names.items():
        axis.text(place, -0.45, f" {name} ", ha="left" if place == max(names) else "right", va="top", fontsize=8.5)
    axis.set(ylim=(-1.2, 0.8), xlim=(min(ends) - 0.22 * width, max(ends) + 0.22 * width), yticks=[])
    axis.spines["left"].set_visible(False)
    axis.grid(visible=False)


def draw_tradeoffs(axis: "Axes", pairs: Sequence[FullVsLora]) -> None:
    """What each setting gained against what it forgot, both with their intervals."""
    drawn = set[str]()
    for pair in pairs:
        for mode, tradeoff in pair.tradeoffs.items():
            label = (pair.full if mode == "full" else pair.lora).label_with_lr
            if label in drawn:
                continue
            drawn.add(label)
            x, y = tradeoff.forgetting, tradeoff.gain
            bars = [[[i.estimate - i.low], [i.high - i.estimate]] for i in (x, y)]
            style: dict[str, Any] = {"color": COLOURS[mode], "marker": MARKERS[mode], "capsize": 3, "markersize": 6}
            axis.errorbar(
                [x.estimate], [y.estimate], xerr=bars[0], yerr=bars[1], label=label, linestyle="none", **style
            )
    axis.set(title=TRADEOFF_TITLE, xlabel="forgotten (nats per token)", ylabel="gained (nats per token)")


def format_power(value: float, position: float = 0) -> str:
    """`1e-4`, `2.5e-3` and `0`: one way for all rates."""
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


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
        axis.xaxis.set_major_formatter(format_power)
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
