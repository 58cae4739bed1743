"""`--find-lr`: raise the learning rate from step to step of an engine that trains nothing else, and suggest one."""

import json
import math

from trainer.config.cli import LRRange
from trainer.config.files import write_atomically
from trainer.data.dataset import PreparedDataset
from trainer.distributed.engine import Engine
from trainer.distributed.stepper import NonFiniteError
from trainer.report.plots import plot_lr_range_test
from trainer.tools.finders.files import output_folder
from trainer.tools.finders.lr_curve import LRSuggestion, geometric_lrs, has_diverged, smooth, smoothing_beta, suggest_lr
from trainer.training.run_plan import RunPlan
from trainer.training.schedule import TrainSchedule

NUM_PROGRESS_LINES = 10  # lines while it runs


def find_lr(lr_range: LRRange, plan: RunPlan, data: PreparedDataset, engine: Engine) -> int:
    """Sweep, and leave find-lr.json and find-lr.png in the run folder; the engine's weights are of no more use.

    0, also without a suggestion.
    """
    lrs = geometric_lrs(lr_range.start, lr_range.end, lr_range.steps)
    losses = sweep(engine, data, plan.schedule, lrs)
    plan.dist_context.on_rank_zero(lambda: _report(lr_range, plan, lrs[: len(losses)], losses))
    return 0


def sweep(engine: Engine, data: PreparedDataset, schedule: TrainSchedule, lrs: list[float]) -> list[float]:
    """The loss of each step, the token mean over its global batch *before* its update; ends where it diverges.

    The steps are those of a run: same order, same batches, same dropout; only the rates are others. Every rank sees the
    same numbers, so all end at the same step.
    """
    losses: list[float] = []
    for batch in schedule.batches(data.train, engine.dist_context.rank)(0, len(lrs)):
        try:
            _, result = next(engine.run([batch], lrs.__getitem__))
            losses.append(result.loss_sum / batch.num_target_tokens)
        except NonFiniteError:
            losses.append(math.nan)
            engine.stepper.discard_step()
        if has_diverged(losses, len(lrs)):
            break
        if engine.dist_context.rank == 0 and len(losses) % max(1, len(lrs) // NUM_PROGRESS_LINES) == 0:
            print(f"step {len(losses)}/{len(lrs)}  lr {lrs[len(losses) - 1]:.1e}  loss {losses[-1]:.4f}", flush=True)
    return losses


def _report(lr_range: LRRange, plan: RunPlan, lrs: list[float], losses: list[float]) -> None:
    """On one rank: the verdict in words, as JSON and as a picture."""
    settings = plan.settings
    suggestion = suggest_lr(lrs, losses, lr_range.steps)
    finite_losses = [loss for loss in losses if math.isfinite(loss)]
    content = {
        "format": 1,
        "mode": settings.mode,
        "range": [lr_range.start, lr_range.end],
        "steps": lr_range.steps,
        "lr": lrs,
        "loss": [loss if math.isfinite(loss) else None for loss in losses],
        "smoothed": smooth(finite_losses, smoothing_beta(lr_range.steps)),
        "suggestion": suggestion.lr,
        "lowest": suggestion.lr_at_lowest_loss,
        "steepest": suggestion.lr_at_steepest_fall,
        "warning": suggestion.warning,
        "settings": settings.as_dict(),
        "resolved": plan.resolved(),
        "data": plan.data_info["fingerprint"],
    }
    with output_folder(plan) as folder:
        write_atomically(folder / "find-lr.json", json.dumps(content, indent=1) + "\n")
        plot_lr_range_test(
            folder / "find-lr.png",
            mode=settings.mode,
            lrs=lrs[: len(finite_losses)],
            losses=finite_losses,
            smoothed_losses=content["smoothed"],
            suggested_lr=suggestion.lr,
            name=settings.run_name,
        )
    for line in format_lines(suggestion, settings.mode, settings.train.lr):
        print(line, flush=True)
    print(f"plot           {folder / 'find-lr.png'}, numbers in find-lr.json; nothing was trained", flush=True)


def format_lines(suggestion: LRSuggestion, mode: str, lr: float) -> list[str]:
    """The verdict for people."""
    lines = ["suggestion     none"]
    if suggestion.lr is not None:
        lines = [
            f"suggestion     --lr {suggestion.lr:g} for --mode {mode} (a tenth of {suggestion.lr_at_lowest_loss:.1e}, "
            f"where the loss is lowest; it falls fastest at {suggestion.lr_at_steepest_fall:.1e}; these settings have "
            f"{lr:g})"
        ]
    if suggestion.warning:
        lines.append(f"range          {suggestion.warning}: --find-lr START:END")
    return lines
