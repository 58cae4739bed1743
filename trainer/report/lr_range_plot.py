"""The picture of a learning-rate range test."""

from collections.abc import Sequence
from pathlib import Path

from trainer.report.plot_axes import COLOURS
from trainer.report.plots import INK, PNG_DPI, SIZE, _style


def draw_range_test(
    path: Path, *, mode: str, rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float],
    suggestion: float | None, name: str,
) -> None:  # fmt: skip
    """Write a PNG: losses of the steps as dots, smoothed as a line, the suggested rate as an upright line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(1.4 * SIZE[0], 1.2 * SIZE[1]), facecolor="white", dpi=PNG_DPI, layout="constrained")
        axis = figure.subplots()
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")  # the page's style draws no formulas
        axis.plot(rates, losses, ".", color=INK, alpha=0.3, markersize=4)
        axis.plot(rates, smoothed, "-", color=COLOURS[mode], linewidth=2)
        if smoothed:
            low, first = min(*smoothed, *losses), smoothed[0]
            room = max(first - low, 0.1 * first)
            axis.set_ylim(low - 0.1 * room, first + 0.8 * room)  # what diverges leaves the picture
        if suggestion is not None:
            axis.axvline(suggestion, color=INK, linestyle="--", linewidth=1)
            axis.annotate(
                f" {suggestion:g}", (suggestion, 0.02), xycoords=("data", "axes fraction"), color=INK, va="bottom"
            )
        axis.set(
            title=f"Learning-rate range test: {name}", xlabel="learning rate", ylabel="train loss (nats per token)"
        )
        FigureCanvasAgg(figure).print_png(path)
