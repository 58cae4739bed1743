"""`--find-lr`: raise the learning rate from step to step of an engine that trains nothing else, and suggest one.

The test: Smith, "Cyclical Learning Rates for Training Neural Networks" (2017, arXiv 1506.01186), section 3.3: raise the
rate step by step and watch the loss. The exponential sweep, the smoothing and the rule "a tenth of the rate at the
lowest loss" are those of fastai (Howard and Gugger 2020, arXiv 2002.04688).
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from trainer.config.cli import LRRange
from trainer.data.dataset import PreparedDataset
from trainer.distributed.engine import Engine
from trainer.distributed.stepper import NonFiniteError
from trainer.report.plots import plot_lr_range_test
from trainer.tools.trial_engine import write_result
from trainer.training.run_plan import RunPlan
from trainer.training.schedule import TrainSchedule

#: Share of the sweep that smoothing looks back; fastai's 0.98 looks 50 steps back, half of a sweep of 100.
SMOOTHING_SHARE = 0.1
BASELINE_SHARE = 0.1  # share of the sweep, its lowest rates, that says where the loss stands and how much it jumps
#: Share of the loss at the start above it that counts as diverging; of its fall, as having risen again.
RISE_SHARE = 0.25
FALL_SHARE = 0.02  # share of it below it that counts as learning
MIN_STANDARD_ERRORS = 4.0  # standard errors that a rise or a fall must have as well


def find_lr(lr_range: LRRange, plan: RunPlan, data: PreparedDataset, engine: Engine) -> int:
    """Sweep, and leave find-lr.json and find-lr.png in the run folder; the engine's weights are of no more use.

    0, also without a suggestion.
    """
    rates = np.geomspace(lr_range.start, lr_range.end, lr_range.steps).tolist()
    losses = sweep(engine, data, plan.schedule, rates)

    def report() -> None:
        settings, (lr, lowest, warning) = plan.settings, suggest_lr(rates, losses)
        finite_losses = [loss for loss in losses if math.isfinite(loss)]
        smoothed = smooth(finite_losses, lr_range.steps)
        content = {
            "range": [lr_range.start, lr_range.end],
            "steps": lr_range.steps,
            "lr": rates[: len(losses)],
            "loss": [loss if math.isfinite(loss) else None for loss in losses],
            "smoothed": smoothed,
            "suggestion": lr,
            "lowest": lowest,
            "warning": warning,
        }
        plot = write_result("find-lr.json", plan, content).with_suffix(".png")
        plot_lr_range_test(
            plot,
            lrs=rates[: len(finite_losses)],
            losses=finite_losses,
            smoothed_losses=smoothed,
            suggested_lr=lr,
            mode=settings.mode,
            name=settings.run_name,
        )
        line = "none"
        if lr is not None:
            line = f"--lr {lr:g} for --mode {settings.mode} (a tenth of {lowest:.1e}, where the loss is lowest; these "
            line += f"settings have {settings.train.lr:g})"
        print(f"suggestion     {line}")
        if warning:
            print(f"range          {warning}: --find-lr START:END")
        print(f"plot           {plot}, numbers in find-lr.json; nothing was trained", flush=True)

    plan.dist_context.on_rank_zero(report)
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
        if engine.dist_context.rank == 0 and len(losses) % max(1, len(lrs) // 10) == 0:
            print(f"step {len(losses)}/{len(lrs)}  lr {lrs[len(losses) - 1]:.1e}  loss {losses[-1]:.4f}", flush=True)
    return losses


def smooth(losses: Sequence[float], steps: int) -> list[float]:
    """The exponential mean of what came so far, without the pull of its start at zero (fastai's; Adam's correction).

    The weight of what came before is 0.9 for a sweep of 100 steps.
    """
    return pd.Series(losses, dtype=float).ewm(alpha=_newest_weight(steps), adjust=True).mean().tolist()


def _newest_weight(steps: int) -> float:
    return min(0.5, 1 / (SMOOTHING_SHARE * steps))


def _estimate_baseline(losses: Sequence[float], steps: int) -> tuple[int, float, float]:
    """(number of steps at the start that it is of, the loss there, standard error of a smoothed loss against it).

    The noise is that of the differences from step to step, so that a steady rise is none.
    """
    num_steps, weight = max(5, round(BASELINE_SHARE * steps)), _newest_weight(steps)
    first_losses = losses[:num_steps]
    noise = float(np.std(np.diff(first_losses), ddof=1)) / math.sqrt(2) if len(first_losses) > 2 else 0.0
    num_start_losses = max(3, len(first_losses) // 2)
    standard_error = noise * math.sqrt(weight / (2 - weight) + 1 / num_start_losses)
    return num_steps, float(np.mean(first_losses[:num_start_losses])), standard_error


def has_diverged(losses: Sequence[float], steps: int) -> bool:
    """Whether the newest smoothed loss stands well above the start's, or is no number any more."""
    if not math.isfinite(losses[-1]):
        return True
    num_baseline_steps, start_loss, standard_error = _estimate_baseline(losses, steps)
    min_rise = max(RISE_SHARE * start_loss, MIN_STANDARD_ERRORS * standard_error)
    return len(losses) > num_baseline_steps and smooth(losses, steps)[-1] > start_loss + min_rise


def suggest_lr(lrs: Sequence[float], losses: Sequence[float]) -> tuple[float | None, float | None, str]:
    """(suggestion, rate at the lowest smoothed loss, how the range fell short) of a sweep over `lrs` that ended after
    `losses`; None where the curve says nothing."""
    steps, finite_losses = len(lrs), [loss for loss in losses if math.isfinite(loss)]
    is_diverged = has_diverged(losses, steps)
    num_baseline_steps, start_loss, standard_error = _estimate_baseline(finite_losses, steps)
    if len(finite_losses) <= num_baseline_steps:
        return None, None, f"the loss diverges from the start: begin lower than {lrs[0]:g}"
    last_lr, smoothed = lrs[len(finite_losses) - 1], smooth(finite_losses, steps)
    best = num_baseline_steps - 1 + int(np.argmin(smoothed[num_baseline_steps - 1 :]))
    fall, min_change = start_loss - smoothed[best], MIN_STANDARD_ERRORS * standard_error
    if fall <= max(FALL_SHARE * start_loss, min_change):
        if is_diverged:
            return None, None, f"the loss never falls before it rises: begin lower than {lrs[0]:g}, or take more steps"
        return None, None, f"the loss neither falls nor rises up to {last_lr:g}: end higher"
    warning = ""
    # A small model's loss need not climb above where it began: it settles where the weights say nothing any more.
    has_risen = smoothed[-1] - smoothed[best] > max(RISE_SHARE * fall, min_change)
    if not (is_diverged or has_risen):
        warning = f"the loss does not rise again up to {last_lr:g}: end higher, the best rate may lie above"
    elif best < 2 * num_baseline_steps:
        warning = f"the loss is at its lowest close to the start of the range: begin lower than {lrs[0]:g}"
    return float(f"{max(lrs[best] / 10, lrs[0]):.1e}"), lrs[best], warning  # two digits: a range test knows no more
