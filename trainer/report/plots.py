"""The pictures of the page, drawn with matplotlib (imported only when drawing): the first ones, and the curves.

A mode has one colour everywhere (Okabe and Ito's colour-blind safe palette), full is solid, LoRA and the card are
dashed. Lines of many steps are drawn as means of equal bins.
"""

import io
import itertools
import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.config import reference
from trainer.report.comparable import MODE_NAMES, SeedGroup, comparison_blockers, reference_blockers
from trainer.report.interval import LEVEL, PairedInterval
from trainer.report.judge import UNIT, FullVsLora, RateCurve
from trainer.report.run_data import LOSS, TRAINER_MODE, RunData, Series
from trainer.report.sentence import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"full": "#0072b2", "lora": "#d55e00", "card": "#767676", TRAINER_MODE: "#00785a", "good": "#1a7f37"}
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
    "axes.formatter.useoffset": False,
}
PLOT_SIZE_INCHES = (4.5, 3.4)  # of one plot, so that its text is still legible on a phone
PICTURE_SIZE_INCHES = (5.4, 3.1)  # of the first ones
DIFFERENCE_SIZE_INCHES = (5.4, 1.1)
MAX_VALUES = 40  # that a plot shows under the pointer
MAX_LINES_NAMED = 4  # groups of a mode that the legend names one by one
MAX_POINTS = 200  # of one line
LOSS_LABEL = "loss (nats per token)"
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
Draw = Callable[["Axes"], None]
Drawing = tuple[str, Draw, tuple[float, float]]  # title, how, size in inches


class PlotSpec(NamedTuple):
    """One plot by epoch: how it reads, and which column of which rows of a run."""

    title: str
    y_label: str
    rows_of: Callable[[RunData], Series]
    y: str
    reference_column: str = ""  #: of the card's curve

    def curve(self, run: RunData) -> Curve:
        """x and y of a run; a line of many points as means of equal bins, without what is not finite."""
        rows, steps_per_epoch = self.rows_of(run), run.get("resolved.steps_per_epoch")
        if not rows:
            return np.zeros(0), np.zeros(0)
        # an epoch's last batch may be short: by examples its step is one too, and a straight line would have a kink
        x, y = rows["step"] / steps_per_epoch if steps_per_epoch else rows["epoch"], rows[self.y]
        is_finite = np.isfinite(x) & np.isfinite(y)
        x, y = x[is_finite], y[is_finite]
        if len(x) <= MAX_POINTS:
            return x, y
        bin_starts = np.linspace(0, len(x), MAX_POINTS, endpoint=False).astype(int)
        bin_sizes = np.diff(np.append(bin_starts, len(x)))
        return np.add.reduceat(x, bin_starts) / bin_sizes, np.add.reduceat(y, bin_starts) / bin_sizes


LOSS_PLOT = PlotSpec("Validation loss by epoch", LOSS_LABEL, attrgetter("evals"), "loss", "val_loss")
PLOTS = (
    LOSS_PLOT,
    PlotSpec("Train loss by epoch", LOSS_LABEL, attrgetter("steps"), "loss", "train_loss"),
    PlotSpec("Learning rate", "learning rate", attrgetter("steps"), "lr"),
    PlotSpec("Gradient norm before clipping", "L2 norm of the gradient", attrgetter("steps"), "grad_norm"),
    PlotSpec("Speed", "tokens per second", attrgetter("steps"), "tokens_per_second"),
)


def plots_of(groups: Sequence[SeedGroup]) -> list[PlotSpec]:
    """All plots, with one for each further set of --val-data behind that of the first; of judged models none."""

    def val_set_plot(name: str) -> PlotSpec:
        return PlotSpec(
            f"Validation loss of {name} by epoch", LOSS_LABEL, lambda run: run.val_sets.get(name, {}), "loss"
        )

    if groups[0].runs[0].is_judged:
        return []
    names = {name for group in groups for run in group.runs for name in run.val_sets}
    return [LOSS_PLOT, *map(val_set_plot, sorted(names)), *PLOTS[1:]]


# --- SVG for the page ---


def render_pictures(
    groups: Sequence[SeedGroup], verdict: Verdict, with_reference: bool
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(title, SVG) of the page's first plots, and of the others. The first are the difference beside 0 and the margin,
    then loss against rate; where no mode has several rates, the losses by epoch."""
    pair, study = verdict.primary, verdict.study
    first: list[Drawing] = []
    others: list[Drawing] = []
    curves: Sequence[RateCurve] = ()
    if pair is not None:
        if pair.excess is not None and not pair.blockers:
            digits, name = 4, f"{pair.lora.name} − {pair.full.name}, {pair.unit}"
            if pair.margin.measure != LOSS:
                digits, name = 1, f"Points that {pair.lora.name} has fewer"
            value, low, high = (f"{x:+.{digits}f}" for x in (pair.excess.estimate, pair.excess.low, pair.excess.high))
            title = f"{name}: {value} [{low}, {high}]"
            first.append((title, partial(draw_difference, pair=pair, digits=digits), DIFFERENCE_SIZE_INCHES))
        comparable = [g for g in groups if not comparison_blockers(g.runs[0], pair.full.runs[0])]
        curves = () if pair.is_judged else (study.rate_curves if study else ()) or rate_curves(comparable)
        by_rank = [(float(result.rank), result.excess) for result in verdict.ranks]
        by_length = [(float(steps), excess) for steps, excess in (study.by_length if study else ())]
        for x_label, points, unit in (("LoRA rank", by_rank, pair.unit), ("steps of a run", by_length, UNIT)):
            if len(points) > 1:
                draw: Draw = partial(draw_excess, points=points, x_label=x_label, pair=pair, unit=unit)
                others.append((f"LoRA's excess by {x_label}", draw, PLOT_SIZE_INCHES))
        if any(each.tradeoffs for each in verdict.comparisons):
            draw = partial(draw_tradeoffs, pairs=verdict.comparisons)
            others.append(("Gain against forgetting", draw, PLOT_SIZE_INCHES))
    for plot in (plots := plots_of(groups)):
        draw = partial(draw_plot, plot=plot, groups=groups, with_reference=with_reference)
        others.append((plot.title, draw, PLOT_SIZE_INCHES))
    if pair is not None and any(len(curve.losses) > 1 for curve in curves):
        first.append(("Loss by learning rate", partial(draw_rates, curves=curves, pair=pair), PICTURE_SIZE_INCHES))
    elif plots:
        first += [(*others.pop(-len(plots))[:2], PICTURE_SIZE_INCHES)]
    svgs = [(drawing[0], _render_svg(f"p{number}", *drawing)) for number, drawing in enumerate(first + others)]
    return svgs[: len(first)], svgs[len(first) :]


def _render_svg(prefix: str, title: str, draw: Draw, size: tuple[float, float]) -> str:
    """The <svg> element alone, scaled by its container, with CSS variables for colours and `prefix` before its ids. A
    browser shows the value of a point under the pointer."""
    import matplotlib
    from matplotlib.figure import Figure

    # on a new machine it says that it looks through the fonts: no word of ours, and nothing to act on
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, facecolor="none", layout="constrained")
        axis, buffer = figure.subplots(), io.StringIO()
        draw(axis)
        handles, labels = axis.get_legend_handles_labels()
        if labels:  # under the plot; constrained layout keeps it off axes and edges
            num_columns = max(1, min(len(labels), int(size[0] / (0.45 + 0.063 * max(map(len, labels))))))
            figure.legend(handles, labels, ncols=num_columns, loc="outside lower left", frameon=False, fontsize=8.5)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        svg, values = buffer.getvalue(), _point_values(figure, axis)
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    svg = re.sub(r' (width|height)="[^"]*"', "", svg, count=2)  # of the whole
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\1{prefix}-", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "sans-serif", svg)  # else a list of fonts behind each word
    svg = re.sub(r'\n +| transform="rotate\(-0 [^"]*"', "\n", svg)
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
        name = "" if str(line.get_label()).startswith("_") else f"{line.get_label()}, "
        points = np.asarray(line.get_xydata(), float)[::stride]
        for (x_pixel, y_pixel), (x, y) in zip(axis.transData.transform(points), points, strict=True):
            place = f'cx="{x_pixel * scale:.1f}" cy="{(figure.bbox.height - y_pixel) * scale:.1f}"'
            text = escape(f"{name}{axis.get_xlabel()} {x:.4g}: {y:.4g}")
            circles.append(f'<circle {place} r="5" fill="transparent"><title>{text}</title></circle>')
    return "".join(circles)


# --- one plot ---


def draw_plot(axis: "Axes", plot: PlotSpec, groups: Sequence[SeedGroup], with_reference: bool) -> None:
    """Draw `plot` of all groups on `axis`, and the card where a group is comparable with it; lines have names. Groups
    of a mode differ by their dashes; many of them share one name in the legend, at the first."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    is_crowded = sum(len(group.runs) for group in groups) > 6
    style: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.6} if is_crowded else {"linewidth": 1.6}
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
                marker = MARKERS[mode] if plot is LOSS_PLOT and len(x) <= 30 else None
                dash = [DASHES[mode], *MORE_DASHES][number if are_named else 0]
                axis.plot(x, y, color=COLOURS[mode], linestyle=dash, marker=marker, markersize=3, label=name, **style)
                name = None
    runs = [run for group in groups for run in group.runs if run.mode != TRAINER_MODE]
    # where no run may be held against the card, its axes would squeeze the curves for nothing
    if with_reference and plot.reference_column and not all(map(reference_blockers, runs)):
        losses = [getattr(row, plot.reference_column) for row in reference.CURVE]
        label = f"card: {losses[-1]:.4f}" if plot is LOSS_PLOT else "card"
        style |= {"linestyle": DASHES["card"], "marker": MARKERS["card"], "markersize": 3, "color": COLOURS["card"]}
        axis.plot([row.epoch for row in reference.CURVE], losses, label=label, **style)
    # few ticks, whole epochs where there are several
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=axis.get_xlim()[1] > 1.5))
    low, high = axis.dataLim.intervaly
    if plot.y == "lr":
        axis.yaxis.set_major_formatter(format_power)
    elif plot.y == "tokens_per_second":
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
    elif 0 < low < high / 5:  # a linear scale would lay the ends of the curves on one another
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
    axis.set(xlabel="epoch", ylabel=plot.y_label)


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
    """Validation loss against learning rate, a line a mode and length of run; the chosen points ringed. What ended far
    above the loss before training is beyond the upper edge: it would flatten the rest."""
    lengths = sorted({curve.num_steps for curve in curves})
    for curve in sorted(curves, key=lambda curve: curve.num_steps):  # the longest last: it is the one chosen by
        colour, is_longest = COLOURS[curve.mode], curve.num_steps == lengths[-1]
        style: dict[str, Any] = {"color": colour, "alpha": (1 + lengths.index(curve.num_steps)) / len(lengths)}
        label = MODE_NAMES[curve.mode] + (f", {curve.num_steps:,} steps" if len(lengths) > 1 else "")
        style |= {"markersize": 4, "linewidth": 1.6, "label": label if is_longest else f"_{label}"}
        rates, losses = np.array(list(curve.losses)), np.array(list(curve.losses.values()))
        axis.plot(rates, losses, linestyle=DASHES[curve.mode], marker=MARKERS[curve.mode], **style)
        if is_longest:
            group = pair.full if curve.mode == "full" else pair.lora
            ring: dict[str, Any] = {"marker": "o", "markersize": 11, "fillstyle": "none", "markeredgewidth": 1.5}
            chosen = curve.losses.get(group.lr, group.best_loss)
            axis.plot([group.lr], [chosen], linestyle="none", color=colour, **ring)
    if len(lengths) > 1:
        shorter = " and ".join(f"{steps:,}" for steps in lengths[:-1])
        axis.plot([], [], color=TEXT_COLOUR, alpha=0.4, label=f"pale: runs of {shorter} steps")
    base = [run.initial_loss for run in (*pair.full.runs, *pair.lora.runs) if run.initial_loss is not None]
    lowest = min((loss for curve in curves for loss in curve.losses.values()), default=0.0)
    top = min(axis.get_ylim()[1], 1.1 * max(lowest, max(base, default=np.inf)))  # lowest: nothing may have improved
    axis.set_ylim(lowest - (top - lowest) / 10, top)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(format_power)
    axis.set(xlabel="learning rate", ylabel="validation loss (nats per token)")


def draw_difference(axis: "Axes", pair: FullVsLora, digits: int) -> None:
    """The difference with its interval on its own axis, and 0 and the margin as lines: the decision."""
    excess, colour, names = pair.excess, COLOURS["lora"], {0.0: "equal"}
    assert excess is not None
    axis.axvline(0, color=TEXT_COLOUR, linewidth=1.2)
    if pair.contrast is not None:
        margin = excess.estimate - pair.contrast.estimate
        names[margin] = f"margin {margin:.{digits}f}"
        axis.axvline(margin, color=COLOURS["good"], linewidth=1.6, linestyle=(0, (4, 2)))
        axis.axvspan(-9 * abs(margin) + min(0, excess.low), margin, color=COLOURS["good"], alpha=0.10, linewidth=0)
    axis.plot([excess.low, excess.high], [0, 0], color=colour, linewidth=3, marker="|", markersize=13, label="_")
    axis.plot([excess.estimate], [0], color=colour, marker="D", markersize=8, label="_difference")
    for place, name in names.items():
        side, offset = ("left", 4) if place == max(names) else ("right", -4)
        axis.annotate(name, (place, -0.7), (offset, 0), textcoords="offset points", ha=side, va="center", fontsize=8.5)
    ends = [*names, excess.low, excess.high]
    space = 0.22 * (max(ends) - min(ends) or 1.0)
    axis.set(ylim=(-1.2, 0.8), xlim=(min(ends) - space, max(ends) + space), yticks=[])
    axis.spines["left"].set_visible(False)
    axis.grid(visible=False)


def draw_excess(
    axis: "Axes", points: Sequence[tuple[float, PairedInterval]], x_label: str, pair: FullVsLora, unit: str
) -> None:
    """Estimates with their intervals, 0 and, where it has the margin's unit, the margin."""
    x, estimates = [x for x, _ in points], np.array([interval.estimate for _, interval in points])
    bars = np.abs([(interval.low, interval.high) for _, interval in points] - estimates[:, None]).T
    label = f"LoRA − full, {100 * LEVEL:g} % interval"
    axis.errorbar(x, estimates, yerr=bars, color=COLOURS["lora"], marker=MARKERS["lora"], capsize=3, label=label)
    axis.axhline(0, color=COLOURS["full"], linewidth=1.0, label="full")
    if pair.excess is not None and pair.contrast is not None and unit == pair.unit:
        margin = pair.excess.estimate - pair.contrast.estimate
        axis.axhline(margin, color=COLOURS["card"], linestyle=DASHES["card"], label="margin")
    axis.set_xscale("log", base=2)
    axis.set_xticks(x, [f"{value:,.0f}" for value in x])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set(xlabel=x_label, ylabel=f"excess ({unit})")


def draw_tradeoffs(axis: "Axes", pairs: Sequence[FullVsLora]) -> None:
    """What each setting gained against what it forgot, both with their intervals."""
    tradeoffs = {
        (pair.full if mode == "full" else pair.lora).label_with_lr: (mode, tradeoff)
        for pair in pairs
        for mode, tradeoff in pair.tradeoffs.items()
    }
    for (label, (mode, tradeoff)), marker in zip(tradeoffs.items(), itertools.cycle("oDsv^Pp*")):
        x, y = tradeoff.forgetting, tradeoff.gain
        x_bar, y_bar = ([[each.estimate - each.low], [each.high - each.estimate]] for each in (x, y))
        style: dict[str, Any] = {"color": COLOURS[mode], "marker": marker, "capsize": 3, "markersize": 6}
        axis.errorbar([x.estimate], [y.estimate], xerr=x_bar, yerr=y_bar, label=label, linestyle="none", **style)
    axis.set(xlabel="forgotten (nats per token)", ylabel="gained (nats per token)")


def format_power(value: float, position: float = 0) -> str:
    """`1e-4`, `2.5e-3` and `0`: one way for all rates."""
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"
