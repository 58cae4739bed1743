"""The curves, drawn with matplotlib (imported only when drawing): a page of all of them, and one SVG each for the HTML.

A mode has one colour everywhere (Okabe and Ito's colour-blind safe palette), full is solid, LoRA and the card are
dashed, and each line says its name at its end. Lines of many steps are drawn as means of equal bins.
"""

import io
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import reference
from trainer.report.plot_axes import COLOURS, Curve, PlotSpec, draw_plot, finish_layout
from trainer.report.run_data import RunData
from trainer.report.seed_groups import SeedGroup

#: every colour a figure may hold, and the CSS variable that takes its place in the HTML
TEXT_COLOUR, GRID_COLOUR = "#222223", "#dadadb"
CSS_VARIABLES = {
    **{colour: f"--{name}" for name, colour in COLOURS.items()},
    TEXT_COLOUR: "--ink",
    GRID_COLOUR: "--faint",
}
PNG_DPI = 120
PLOT_SIZE_INCHES = (4.5, 3.4)  # inches of one plot, so that its text is still legible on a phone


def _step_curve(x: str, y: str) -> Callable[[RunData], Curve]:
    return lambda run: (run.steps[x], run.steps[y])


def _reference_curve(column: str) -> Curve:
    return np.array([float(row.epoch) for row in reference.CURVE]), np.array(
        [getattr(row, column) for row in reference.CURVE]
    )


LINE_PLOTS = (
    PlotSpec(
        "val_loss",
        "Validation loss by epoch",
        "epoch",
        "validation loss (nats per token)",
        lambda run: (run.evals["epoch"], run.evals["loss"]),
        reference_curve=_reference_curve("val_loss"),
        has_markers=True,
        shows_end_value=True,
    ),
    PlotSpec(
        "train_loss",
        "Train loss by epoch",
        "epoch",
        "train loss (nats per token)",
        _step_curve("epoch", "loss"),
        reference_curve=_reference_curve("train_loss"),
    ),
    PlotSpec(
        "train_loss_tokens",
        "Train loss by tokens",
        "tokens seen",
        "train loss (nats per token)",
        _step_curve("tokens", "loss"),
    ),
    PlotSpec("lr", "Learning rate", "epoch", "learning rate", _step_curve("epoch", "lr")),
    PlotSpec(
        "grad_norm",
        "Gradient norm before clipping",
        "epoch",
        "L2 norm of the gradient",
        _step_curve("epoch", "grad_norm"),
        log_y=True,
    ),
    PlotSpec("tokens_per_second", "Speed", "epoch", "tokens per second", _step_curve("epoch", "tokens_per_second")),
)
SCATTER_PLOT = PlotSpec(
    "parameters",
    "Best validation loss by trainable parameters",
    "trainable parameters",
    "best validation loss (nats per token)",
    lambda run: (
        np.array([float(run.get("model.trainable") or np.nan)]),
        np.array([run.best_eval["loss"] if run.best_eval else np.nan]),
    ),
    is_scatter=True,
)


def save_figure(groups: Sequence[SeedGroup], with_reference: bool, output_dir: Path) -> None:
    """Write curves.png and curves.svg: all plots on one page, on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with plot_style():
        plots = (*LINE_PLOTS, SCATTER_PLOT)
        figure = Figure(
            figsize=(2 * PLOT_SIZE_INCHES[0], (len(plots) + 1) // 2 * PLOT_SIZE_INCHES[1]), facecolor="white"
        )
        axes = figure.subplots((len(plots) + 1) // 2, 2).ravel()
        layouts = [draw_plot(axis, plot, groups, with_reference) for axis, plot in zip(axes, plots, strict=False)]
        for axis in axes[len(plots) :]:
            axis.set_axis_off()
        finish_layout(figure, layouts, num_columns=2)
        FigureCanvasSVG(figure).print_svg(output_dir / "curves.svg", metadata={"Date": None})
        figure.set_dpi(PNG_DPI)
        FigureCanvasAgg(figure).print_png(output_dir / "curves.png")


def render_svgs(groups: Sequence[SeedGroup], with_reference: bool) -> dict[str, tuple[PlotSpec, str]]:
    """Each plot as SVG text for one HTML page: its colours are CSS variables, its ids its own."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    svgs_by_name = {}
    with plot_style():
        for plot in (*LINE_PLOTS, SCATTER_PLOT):
            figure = Figure(figsize=PLOT_SIZE_INCHES, facecolor="none")
            axis = figure.subplots()
            layout = draw_plot(axis, plot, groups, with_reference)
            axis.set_title("")  # the page has it as a heading
            finish_layout(figure, [layout], num_columns=1)
            buffer = io.StringIO()
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
            svgs_by_name[plot.name] = (plot, _adapt_svg_for_html(buffer.getvalue(), plot))
    return svgs_by_name


def plot_style() -> Any:
    """matplotlib's settings for every plot, as a context."""
    import matplotlib

    # on a new machine it says that it looks through the fonts: no word of ours, and nothing to act on
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "curves",
            "text.parse_math": False,
            "font.size": 9,
            "font.family": "sans-serif",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": TEXT_COLOUR,
            "axes.labelcolor": TEXT_COLOUR,
            "text.color": TEXT_COLOUR,
            "xtick.color": TEXT_COLOUR,
            "ytick.color": TEXT_COLOUR,
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
    )


def _adapt_svg_for_html(svg: str, plot: PlotSpec) -> str:
    """The <svg> element alone, scaled by its container, with CSS variables for colours and ids that no other has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', rf'<svg role="img" aria-label="{plot.title}" \1', svg, count=1
    )
    svg = re.sub(
        r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"',
        rf'<svg role="img" aria-label="{plot.title}" \1\2',
        svg,
        count=1,
    )
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\1{plot.name}-", svg)
    svg = re.sub(r"font: ([^;\"]*?)'[^;\"]*", r"font: \1sans-serif", svg)
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
