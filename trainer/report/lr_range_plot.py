"""The picture of a learning-rate range test."""

import io
from collections.abc import Sequence
from pathlib import Path

from trainer.config.files import write_atomically
from trainer.report.plot_axes import COLOURS
from trainer.report.plots import PLOT_SIZE_INCHES, PNG_DPI, TEXT_COLOUR, styled_figure


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
    """Write a PNG: losses of the steps as dots, smoothed as a line, the suggested rate as an upright line.

    Parameters: what is drawn, each from another source.
    """
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
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=PNG_DPI)
    write_atomically(path, png.getvalue())
