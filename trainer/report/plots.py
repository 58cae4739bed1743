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
from trainer.report.paired_interval import Group
from trainer.report.plot_axes import COLOURS, Curve, Plot, draw, finish
from trainer.report.run_data import Run

#: every colour a figure may hold, and the CSS variable that takes its place in the HTML
INK, FAINT = "#222223", "#dadadb"
VARIABLES = {**{colour: f"--{name}" for name, colour in COLOURS.items()}, INK: "--ink", FAINT: "--faint"}
PNG_DPI = 120
SIZE = (4.5, 3.4)  # inches of one plot, so that its text is still legible on a phone


def _steps(x: str, y: str) -> Callable[[Run], Curve]:
    return lambda run: (run.steps[x], run.steps[y])


def _card_curve(column: str) -> Curve:
    return np.array([float(row.epoch) for row in reference.CURVE]), np.array(
        [getattr(row, column) for row in reference.CURVE]
    )


PLOTS = (
    Plot(
        "val_loss",
        "Validation loss by epoch",
        "epoch",
        "validation loss (nats per token)",
        lambda run: (run.evals["epoch"], run.evals["loss"]),
        card=_card_curve("val_loss"),
        markers=True,
        says_end=True,
    ),
    Plot(
        "train_loss",
        "Train loss by epoch",
        "epoch",
        "train loss (nats per token)",
        _steps("epoch", "loss"),
        card=_card_curve("train_loss"),
    ),
    Plot(
        "train_loss_tokens",
        "Train loss by tokens",
        "tokens seen",
        "train loss (nats per token)",
        _steps("tokens", "loss"),
    ),
    Plot("lr", "Learning rate", "epoch", "learning rate", _steps("epoch", "lr")),
    Plot(
        "grad_norm",
        "Gradient norm before clipping",
        "epoch",
        "L2 norm of the gradient",
        _steps("epoch", "grad_norm"),
        log_y=True,
    ),
    Plot("tokens_per_second", "Speed", "epoch", "tokens per second", _steps("epoch", "tokens_per_second")),
)
SCATTER = Plot(
    "parameters",
    "Best validation loss by trainable parameters",
    "trainable parameters",
    "best validation loss (nats per token)",
    lambda run: (
        np.array([float(run.fact("model.trainable") or np.nan)]),
        np.array([run.best["loss"] if run.best else np.nan]),
    ),
    scatter=True,
)


def save_page(groups: Sequence[Group], with_card: bool, folder: Path) -> None:
    """Write curves.png and curves.svg: all plots on one page, on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with _style():
        plots = (*PLOTS, SCATTER)
        figure = Figure(figsize=(2 * SIZE[0], (len(plots) + 1) // 2 * SIZE[1]), facecolor="white")
        axes = figure.subplots((len(plots) + 1) // 2, 2).ravel()
        drawn = [draw(axis, plot, groups, with_card) for axis, plot in zip(axes, plots, strict=False)]
        for axis in axes[len(plots) :]:
            axis.set_axis_off()
        finish(figure, drawn, columns=2)
        FigureCanvasSVG(figure).print_svg(folder / "curves.svg", metadata={"Date": None})
        figure.set_dpi(PNG_DPI)
        FigureCanvasAgg(figure).print_png(folder / "curves.png")


def svgs(groups: Sequence[Group], with_card: bool) -> dict[str, tuple[Plot, str]]:
    """Each plot as SVG text for one HTML page: its colours are CSS variables, its ids its own."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    result = {}
    with _style():
        for plot in (*PLOTS, SCATTER):
            figure = Figure(figsize=SIZE, facecolor="none")
            axis = figure.subplots()
            drawn = draw(axis, plot, groups, with_card)
            axis.set_title("")  # the page has it as a heading
            finish(figure, [drawn], columns=1)
            text = io.StringIO()
            FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
            result[plot.name] = (plot, _for_page(text.getvalue(), plot))
    return result


def _style() -> Any:
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
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.facecolor": "none",
            "grid.color": FAINT,
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


def _for_page(svg: str, plot: Plot) -> str:
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
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
