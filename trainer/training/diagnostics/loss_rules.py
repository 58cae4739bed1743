"""Rules on the losses, the gradient, the rate and the adapters: functions of the records, the same on every machine."""

import math
from collections import deque
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any

from trainer.tracking.records import EvalRecord, StepRecord
from trainer.training.diagnostics.online_stats import MeanEstimate, OnlineLinearRegression, welch_t
from trainer.training.diagnostics.types import Diagnostic, RunInfo

WINDOW_STEPS = 20  # steps whose mean stands for the loss "now"
FLAT_STEPS, FLAT_SHARE = 50, 0.1  # a trend is looked for after so many steps, and this share of the run
FLAT_MAX_T = -2.0  # one-sided 2.3%: a slope that is no further below zero is not told from noise
MIN_VAL_DROP = 0.01  # a validation loss that fell by this share shows that the run learns
TINY_STEPS = 10  # steps over which rate and gradient must be next to nothing
# Half the spacing of float32 at 0.02, the standard deviation of GPT-2's initial weights.
MIN_EFFECTIVE_LR = 2**-24 * 0.02
MAX_MASKED_SHARE = 0.9
CLIPPED_STEPS, MIN_CLIPPED_RATIO = 50, 10.0
MIN_RISE, RISE_STD_ERRORS = 0.1, 6.0
GENERALISATION_LOSS, FALL_STD_ERRORS = 0.01, 2.0
NUM_HALVINGS, OVERFLOW_STEPS = 17, 100


@dataclass
class LossRules:
    """What the rules remember of the records so far; of each length of run the same amount, evaluations aside."""

    run_info: RunInfo
    loss_trend: OnlineLinearRegression = field(default_factory=OnlineLinearRegression)
    max_lr: float = 0.0  # the highest so far
    recent_steps: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=CLIPPED_STEPS))
    lowest_window: MeanEstimate | None = None  # of the windows so far
    eval_records: list[EvalRecord] = field(default_factory=list)
    train_loss_means: list[MeanEstimate] = field(default_factory=list)  # training loss between two evaluations
    trend_since_eval: OnlineLinearRegression = field(default_factory=OnlineLinearRegression)  # since the last one
    skipped_steps: deque[int] = field(default_factory=lambda: deque(maxlen=NUM_HALVINGS + 1))

    def on_step(self, record: StepRecord) -> list[Diagnostic | None]:
        """What one more step shows."""
        self.loss_trend.add(record.step, record.loss)
        self.max_lr = max(self.max_lr, record.lr)
        self.recent_steps.append(record)
        self.trend_since_eval.add(record.step, record.loss)
        diagnostics = [
            self.check_masked_labels(),
            self.check_no_rate(),
            self.check_no_gradient(),
            self.check_always_clipped(),
            self.check_rising(),
            self.check_flat_loss(),
        ]
        if self.loss_trend.n % WINDOW_STEPS == 0:
            windows = filter(None, (self.lowest_window, MeanEstimate.from_values(self._recent_losses())))
            self.lowest_window = min(windows, key=lambda window: window.value)
        return diagnostics

    def on_eval(self, record: EvalRecord) -> list[Diagnostic | None]:
        """What one more evaluation shows."""
        since_eval = self.trend_since_eval
        if self.eval_records and since_eval.n:
            variance = since_eval.mean_variance if since_eval.n > 1 else self.loss_trend.residual_variance
            self.train_loss_means.append(MeanEstimate(since_eval.mean_y, variance))
        self.trend_since_eval = OnlineLinearRegression()
        self.eval_records.append(replace(record, row_nll=None))
        return [self.check_worse_than_start(), self.check_overfitting()]

    def _recent_losses(self) -> list[float]:
        return [row.loss for row in list(self.recent_steps)[-WINDOW_STEPS:]]

    def check_flat_loss(self) -> Diagnostic | None:
        """The loss does not fall: its slope over all steps so far is not told from noise
        (`OnlineLinearRegression.t_statistic`).

        Looked at when enough steps are done, at every doubling of that, and at the last step. The fall that this can
        tell in n steps is about 2 sd sqrt(12 / n): 0.05 nats at the card's 10% of 19,863 steps with sd 0.3.
        """
        first_check_step = max(FLAT_STEPS, math.ceil(FLAT_SHARE * self.run_info.total_steps))
        trend, n = self.loss_trend, self.loss_trend.n
        is_last_step = self.recent_steps[-1].step >= self.run_info.total_steps
        is_doubled = n >= first_check_step and n % first_check_step == 0 and (n // first_check_step).bit_count() == 1
        is_due = is_doubled or (is_last_step and n >= WINDOW_STEPS)
        if not is_due or trend.t_statistic <= FLAT_MAX_T:
            return None
        first_loss, *later_losses = [row.loss for row in self.eval_records] or [math.inf]
        if later_losses and min(later_losses) < first_loss * (1 - MIN_VAL_DROP):
            return None
        has_risen = bool(later_losses) and later_losses[-1] > first_loss * (1 + MIN_VAL_DROP)
        lr = self.run_info.lr
        return Diagnostic(
            code="flat_loss",
            seen=f"in {n} steps the training loss has no fall that stands out of its noise "
            f"(slope {trend.slope:+.1e} a step, t {trend.t_statistic:+.1f}, mean {trend.mean_y:.4f})",
            cause=f"the learning rate {lr:g} is too {'high' if has_risen else 'low'}",
            remedy=f"--lr {lr / 10 if has_risen else lr * 10:g}",
            evidence={
                "steps": n,
                "slope": trend.slope,
                "t": _finite_or_none(trend.t_statistic),
                "mean": trend.mean_y,
                "recent": fmean(self._recent_losses()),
            },
        )

    def check_no_gradient(self) -> Diagnostic | None:
        """The gradient's root mean square is under AdamW's epsilon.

        Adam moves a weight by lr g / (|g| + epsilon) (Kingma and Ba 2015, algorithm 1): under epsilon less than half
        of the rate is left of it. The norm over the square root of the number of weights is that mean.
        """
        run_info, recent_steps = self.run_info, list(self.recent_steps)[-TINY_STEPS:]
        norm = median(row.grad_norm for row in recent_steps)
        rms = norm / math.sqrt(run_info.num_trainable_params)
        if len(recent_steps) < TINY_STEPS or rms >= run_info.epsilon:
            return None
        cause, remedy = "gradients underflow in fp16", "--precision bf16"
        if run_info.precision != "fp16":
            cause = "what counts in the loss hardly depends on what trains"
            remedy = "--objective blocks, where every token counts"
            if run_info.mode == "lora":
                remedy = "--lora-target-modules with layers that matter"
        return Diagnostic(
            code="no_gradient",
            seen=f"the gradient of the last {TINY_STEPS} steps is next to nothing (norm {norm:.1e} over "
            f"{run_info.num_trainable_params:,} weights: below AdamW's epsilon {run_info.epsilon:g})",
            cause=cause,
            remedy=remedy,
            evidence={"grad_norm": norm, "rms": rms, "epsilon": run_info.epsilon},
        )

    def check_no_rate(self) -> Diagnostic | None:
        """The learning rate never rose above what float32 loses: a step of the rate is rounded away at 0.02."""
        max_lr, num_steps = self.max_lr, self.loss_trend.n
        if num_steps < TINY_STEPS or max_lr > MIN_EFFECTIVE_LR:
            return None
        is_warming_up = self.run_info.warmup_steps > self.recent_steps[-1].step
        return Diagnostic(
            code="no_rate",
            seen=f"the learning rate was at most {max_lr:.1e} in {num_steps} steps, less than weights can hold",
            cause=f"warm-up takes {self.run_info.warmup_steps:,} steps" if is_warming_up else "--lr is too small",
            remedy="--warmup-steps 0" if is_warming_up else "--lr 3e-5",
            evidence={"lr": max_lr, "rounding": MIN_EFFECTIVE_LR},
        )

    def check_masked_labels(self) -> Diagnostic | None:
        """Nine of ten training tokens do not count in the loss, so most of the work teaches nothing."""
        masked_share = 1 - self.run_info.target_token_share
        if masked_share < MAX_MASKED_SHARE:
            return None
        return Diagnostic(
            code="masked_labels",
            seen=f"{masked_share:.1%} of the training tokens do not count in the loss",
            cause="prompts are long and completions short",
            remedy="--objective blocks, or a shorter --prompt",
            evidence={"masked_share": masked_share},
        )

    def check_always_clipped(self) -> Diagnostic | None:
        """Each of the last steps was clipped, to a tenth and less: the norm of most is MIN_CLIPPED_RATIO times the
        limit."""
        limit = self.run_info.max_grad_norm
        if not limit or self.recent_steps[-1].grad_norm <= limit:  # as nearly always: the others need no look
            return None
        norms = [row.grad_norm for row in self.recent_steps]
        norm = median(norms)
        if len(norms) < CLIPPED_STEPS or min(norms) <= limit or norm < MIN_CLIPPED_RATIO * limit:
            return None
        return Diagnostic(
            code="always_clipped",
            seen=f"each of the last {len(norms)} steps was clipped (median gradient norm {norm:.3g}, limit {limit:g})",
            cause="the limit is far below this model's gradients, so that only their direction is left",
            remedy=f"--max-grad-norm {float(f'{norm:.1g}'):g}",
            evidence={"grad_norm": norm, "clip": limit, "steps": len(norms)},
        )

    def check_rising(self) -> Diagnostic | None:
        """The loss has risen: the mean of the last window lies a tenth and six standard errors above the lowest one.

        Six, because of many windows the lowest is low by luck: two normal means differ by more once in 10^9 times.
        """
        lowest, losses = self.lowest_window, self._recent_losses()
        if lowest is None or self.loss_trend.n < 2 * WINDOW_STEPS or fmean(losses) < lowest.value * (1 + MIN_RISE):
            return None
        window_mean = MeanEstimate.from_values(losses)
        std_errors = welch_t(window_mean, lowest)
        if std_errors < RISE_STD_ERRORS:
            return None
        return self._diverging(
            f"the training loss rose to {window_mean.value:.4f}, a mean of {WINDOW_STEPS} steps, from "
            f"{lowest.value:.4f} at its lowest ({min(std_errors, 999):.0f} standard errors)",
            {"now": window_mean.value, "lowest": lowest.value, "errors": _finite_or_none(std_errors)},
        )

    def check_worse_than_start(self) -> Diagnostic | None:
        """The model is worse than before it was trained, on the validation and on the training rows, by a tenth."""
        first_eval, last_eval = self.eval_records[0], self.eval_records[-1]
        if first_eval.step or not self.train_loss_means:
            return None
        train_loss = self.train_loss_means[-1].value
        if min(last_eval.loss, train_loss) < first_eval.loss * (1 + MIN_RISE):
            return None
        return self._diverging(
            f"the model is worse than before training: validation loss {first_eval.loss:.4f} -> {last_eval.loss:.4f}, "
            f"training loss {train_loss:.4f}",
            {"before": first_eval.loss, "now": last_eval.loss, "train": train_loss},
        )

    def on_non_finite(self, step: int, message: str) -> Diagnostic:
        """The loss or the gradient is no number any more."""
        precision = self.run_info.precision
        return self._diverging(
            message.split(";", 1)[0], {"step": step}, f" for {precision}" if precision != "fp32" else ""
        )

    def _diverging(self, seen: str, evidence: dict[str, Any], for_precision: str = "") -> Diagnostic:
        lr = self.run_info.lr
        return Diagnostic(
            code="diverging",
            seen=seen,
            cause=f"the learning rate {lr:g} is too high{for_precision}",
            remedy=f"--lr {lr / 3:.1g}",
            evidence=evidence,
        )

    def check_overfitting(self) -> Diagnostic | None:
        """The validation loss lies over its lowest by 1%, for an epoch or two evaluations, and the training loss fell.

        Fell: by two standard errors, from the stretch before the lowest evaluation to the last one.
        The first is the generalisation loss GL of Prechelt, "Early stopping - but when?" (1998), equation 1, with
        his smallest threshold; the second tells it from diverging.
        """
        evals, last_eval = self.eval_records, self.eval_records[-1]
        best_index = min(range(len(evals)), key=lambda i: evals[i].loss)
        best_eval, num_later = evals[best_index], len(evals) - best_index - 1
        num_epochs = last_eval.epoch - best_eval.epoch
        is_sustained = num_later >= 2 or num_epochs >= 1 - 1e-6
        if last_eval.loss / best_eval.loss - 1 < GENERALISATION_LOSS or not is_sustained:
            return None
        if len(self.train_loss_means) < 2:
            return None
        mean_before, mean_after = self.train_loss_means[max(0, best_index - 1)], self.train_loss_means[-1]
        if welch_t(mean_before, mean_after) < FALL_STD_ERRORS or mean_after.value > evals[0].loss:
            return None
        remedy = f"--early-stop {max(1, num_later - 1)} --export best"
        if self.run_info.has_early_stopping:
            remedy = f"--dropout {min(0.5, self.run_info.dropout + 0.1):.2g}"
        return Diagnostic(
            code="overfitting",
            seen=f"the validation loss rose for {num_epochs:.3g} epochs, since epoch {best_eval.epoch:.4g} (step "
            f"{best_eval.step}): {best_eval.loss:.4f} -> {last_eval.loss:.4f}, while the training loss fell: "
            f"{mean_before.value:.4f} -> {mean_after.value:.4f}",
            cause="the model learns the training rows by heart",
            remedy=remedy,
            evidence={
                "since_epoch": best_eval.epoch,
                "since_step": best_eval.step,
                "epochs": num_epochs,
                "evaluations": num_later,
                "best": best_eval.loss,
                "now": last_eval.loss,
                "train_before": mean_before.value,
                "train_now": mean_after.value,
            },
        )

    def on_skipped_step(self, step: int) -> Diagnostic | None:
        """More updates were left out than a loss scale needs to come down: from 2^16, its start, to 1 it is halved 16
        times, the first overflow only counts (DeepSpeed's hysteresis of 2), and it grows once in 1,000 good steps.
        """
        self.skipped_steps.append(step)
        num_skipped, num_steps = len(self.skipped_steps), step - self.skipped_steps[0] + 1
        if num_skipped <= NUM_HALVINGS or num_steps > OVERFLOW_STEPS:
            return None
        return Diagnostic(
            code="overflow",
            seen=f"{num_skipped} updates of the last {num_steps} steps were left out",
            cause="gradients overflow in fp16 at every loss scale",
            remedy="--precision bf16",
            evidence={"skipped": num_skipped, "steps": num_steps},
        )

    def check_adapter(self, max_abs_b: float) -> Diagnostic | None:
        """Every B of the adapters is still zero, as it began: the adapted model is the base.

        `max_abs_b`: the largest entry of any B by size. AdamW moves each weight with a gradient by about the rate
        from its first step, so it is never zero by chance.
        """
        if max_abs_b:
            return None
        return Diagnostic(
            code="adapter_still_zero",
            seen="every B of the LoRA adapters is still zero: the model is the base model",
            cause="no gradient reaches the adapters, or no update was applied",
            remedy="--lora-target-modules with layers that the model uses",
            evidence={"largest_b": max_abs_b},
        )


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
