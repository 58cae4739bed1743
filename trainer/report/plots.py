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
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.config import reference
from trainer.config.files import write_atomically
from trainer.report.comparability import comparison_blockers
from trainer.report.options import RateCurve
from trainer.report.plot_axes import (
    COLOURS,
    LOWEST_TITLE,
    RATES_TITLE,
    Curve,
    PlotSpec,
    add_legend,
    draw_lowest,
    draw_plot,
    draw_rates,
    rate_curves,
)
from trainer.report.run_data import RunData
from trainer.report.seed_groups import MODE_NAMES, SeedGroup
from trainer.report.verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: every colour a figure may hold, and the CSS variable that takes its place in the HTML
TEXT_COLOUR, GRID_COLOUR = "#222223", "#dadadb"
CSS_VARIABLES = {
    **{colour: f"--{name}" for name, colour in COLOURS.items()},
    TEXT_COLOUR: "--ink",
    GRID_COLOUR: "--faint",
}
PNG_DPI = 120
PLOT_SIZE_INCHES = (4.5, 3.4)  # of one plot, so that its text is still legible on a phone
PICTURE_SIZE_INCHES = (4.8, 3.6)  # of the first one


def _step_curve(x: str, y: str) -> Callable[[RunData], Curve]:
    return lambda run: (run.steps[x], run.steps[y])


def _reference_curve(column: str) -> Curve:
    epochs = np.array([float(row.epoch) for row in reference.CURVE])
    return epochs, np.array([getattr(row, column) for row in reference.CURVE])


def _trainable_and_loss(run: RunData) -> Curve:
    loss = run.best_eval["loss"] if run.best_eval else np.nan
    return np.array([float(run.get("model.trainable") or np.nan)]), np.array([loss])


LOSS_PLOT = PlotSpec(
    name="val_loss",
    title="Validation loss by epoch",
    x_label="epoch",
    y_label="loss (nats per token)",
    curve=lambda run: (run.evals["epoch"], run.evals["loss"]),
    reference_curve=_reference_curve("val_loss"),
    has_markers=True,
    shows_end_value=True,
)
PLOTS = (
    LOSS_PLOT,
    PlotSpec(
        name="train_loss",
        title="Train loss by epoch",
        x_label="epoch",
        y_label="loss (nats per token)",
        curve=_step_curve("epoch", "loss"),
        reference_curve=_reference_curve("train_loss"),
    ),
    PlotSpec(
        name="train_loss_tokens",
        title="Train loss by tokens",
        x_label="tokens seen",
        y_label="loss (nats per token)",
        curve=_step_curve("tokens", "loss"),
    ),
    PlotSpec(
        name="lr", title="Learning rate", x_label="epoch", y_label="learning rate", curve=_step_curve("epoch", "lr")
    ),
    PlotSpec(
        name="grad_norm",
        title="Gradient norm before clipping",
        x_label="epoch",
        y_label="L2 norm of the gradient",
        curve=_step_curve("epoch", "grad_norm"),
        log_y=True,
    ),
    PlotSpec(
        name="tokens_per_second",
        title="Speed",
        x_label="epoch",
        y_label="tokens per second",
        curve=_step_curve("epoch", "tokens_per_second"),
    ),
    PlotSpec(
        name="parameters",
        title="Best validation loss by trainable parameters",
        x_label="trainable parameters",
        y_label="best loss (nats per token)",
        curve=_trainable_and_loss,
        is_scatter=True,
    ),
)


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
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", dpi=PNG_DPI)
    write_atomically(output_dir / "curves.svg", svg.getvalue())
    write_atomically(output_dir / "curves.png", png.getvalue())


def render_picture(groups: Sequence[SeedGroup], verdict: Verdict, with_reference: bool) -> tuple[str, str]:
    """(title, SVG) of the first picture: loss against rate where a mode has several, else the curves by epoch."""
    pair = verdict.primary
    curves: tuple[RateCurve, ...] = verdict.study.rate_curves if verdict.study else ()
    if pair is not None and not curves:
        full_run = pair.full.runs[0]
        curves = rate_curves([group for group in groups if not comparison_blockers(group.runs[0], full_run)])
    if pair is None or max((len(curve.losses) for curve in curves), default=0) < 2:
        plot = partial(draw_plot, plot=LOSS_PLOT, groups=groups, with_reference=with_reference)
        return LOSS_PLOT.title, _render_svg(plot, "picture", LOSS_PLOT.title, PICTURE_SIZE_INCHES)
    picture = partial(draw_rates, curves=curves, pair=pair)
    return RATES_TITLE, _render_svg(picture, "picture", RATES_TITLE, PICTURE_SIZE_INCHES)


def render_svgs(groups: Sequence[SeedGroup], with_reference: bool) -> list[tuple[str, str]]:
    """(title, SVG) of each plot for one HTML page: its colours are CSS variables, its ids its own."""
    pictures: list[tuple[str, str, Callable[[Axes], None]]] = [
        (plot.name, plot.title, partial(draw_plot, plot=plot, groups=groups, with_reference=with_reference))
        for plot in PLOTS
    ]
    if any(len({group.lr for group in groups if group.mode == mode}) > 1 for mode in MODE_NAMES):
        pictures.insert(0, ("lowest", LOWEST_TITLE, partial(draw_lowest, groups=groups)))
    return [(title, _render_svg(draw, name, title, PLOT_SIZE_INCHES)) for name, title, draw in pictures]


def _render_svg(draw: "Callable[[Axes], None]", name: str, title: str, size: tuple[float, float]) -> str:
    with styled_figure(size, facecolor="none") as figure:
        axis = figure.subplots()
        draw(axis)
        axis.set_title("")  # the page has it as a heading
        add_legend(figure, [axis])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _adapt_svg_for_html(buffer.getvalue(), name, title)


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


def _adapt_svg_for_html(svg: str, name: str, title: str) -> str:
    """The <svg> element alone, scaled by its container, with CSS variables for colours and ids that no other has."""
    svg = svg[svg.index("<svg") :]
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    svg = opening.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1) + ">" + rest
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r"font: ([^;\"]*?)'[^;\"]*", r"font: \1sans-serif", svg)
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
