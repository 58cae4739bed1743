"""Rules on the losses, the gradient and the adapters: functions of the records, the same on every machine."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any

from trainer.tracking.records import EvalRecord, EventRecord, StepRecord

WINDOW_STEPS = 20  # steps whose mean stands for the loss "now"
FLAT_STEPS, FLAT_SHARE = 50, 0.1  # a trend is looked for after so many steps, and this share of the run
FLAT_MAX_T = -2.0  # one-sided 2.3%: a slope that is no further below zero is not told from noise
MIN_VAL_DROP = 0.01  # a validation loss that fell by this share shows that the run learns
TINY_STEPS = 10  # steps over which the gradient must be next to nothing
MAX_MASKED_SHARE = 0.9
MIN_RISE, RISE_STD_ERRORS = 0.1, 6.0
GENERALISATION_LOSS, FALL_STD_ERRORS = 0.01, 2.0
NUM_HALVINGS, OVERFLOW_STEPS = 17, 100
#: every code and what it means for the user; codes of one meaning are different ways to see it
TOPICS = {
    "flat_loss": "not learning",
    "no_gradient": "not learning",
    "adapter_still_zero": "not learning",
    "masked_labels": "not learning",
    "diverging": "diverging",
    "overfitting": "overfitting",
    "overflow": "overflow",
    "waiting_for_data": "too slow",
    "slow_logging": "too slow",
    "much_evaluation": "too slow",
}


@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """Something that is wrong with a run: how it was seen, what it likely comes from, and the flag that may help."""

    code: str
    seen: str  #: the evidence in words
    cause: str
    remedy: str  #: a flag with a value, as it would be typed
    evidence: dict[str, Any] = field(default_factory=dict)  #: the numbers

    def to_record(self, step: int, time: float) -> EventRecord:
        """The event that keeps it; its message is the one line for the console."""
        topic = TOPICS[self.code]
        message = f"{topic}: {self.seen}; likely cause: {self.cause}; try {self.remedy}"
        facts = {"code": self.code, "topic": topic, **vars(self)}
        return EventRecord(event="diagnosis", step=step, message=message, time=time, facts=facts)


@dataclass
class OnlineLinearRegression:
    """A straight line through (x, y) by least squares, from running sums: a run of any length costs the same."""

    n: int = 0
    mean_x: float = 0.0
    mean_y: float = 0.0
    sum_xx: float = 0.0  #: sums of products of deviations from the means
    sum_yy: float = 0.0
    sum_xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        """Take one more point; the update of mean and deviations is Welford's (Technometrics 4, 1962)."""
        self.n += 1
        delta_x, delta_y = x - self.mean_x, y - self.mean_y
        self.mean_x += delta_x / self.n
        self.mean_y += delta_y / self.n
        self.sum_xx += delta_x * (x - self.mean_x)
        self.sum_yy += delta_y * (y - self.mean_y)
        self.sum_xy += delta_x * (y - self.mean_y)

    @property
    def slope(self) -> float:
        """Change of y for one x; 0 where it is not determined."""
        return self.sum_xy / self.sum_xx if self.sum_xx else 0.0

    @property
    def residual_variance(self) -> float:
        """The variance of y around the line."""
        residual = self.sum_yy - (self.sum_xy**2 / self.sum_xx if self.sum_xx else 0.0)
        return max(0.0, residual) / max(1, self.n - 2)

    @property
    def t_statistic(self) -> float:
        """The slope over its own standard error, sqrt(noise / sum of squares of x).

        Draper and Smith, Applied Regression Analysis, chapter 1. It answers how far the trend stands out of the noise
        around it; 0 where there are too few points, infinite where there is no noise at all.
        """
        if self.n < 3 or not self.sum_xx:
            return 0.0
        return _in_std_errors(self.slope, self.residual_variance / self.sum_xx)


@dataclass(frozen=True)
class MeanEstimate:
    """The mean of some values and the variance of that mean."""

    value: float
    variance: float


def estimate_mean(values: Sequence[float]) -> MeanEstimate:
    """Of two values or more. In floats: statistics.variance takes fractions, 100 us for the 20 values of every step."""
    mean = fmean(values)
    return MeanEstimate(mean, math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def welch_t(a: MeanEstimate, b: MeanEstimate) -> float:
    """By how many standard errors `a` lies above `b`, each with its own variance (Welch, Biometrika 34, 1947)."""
    return _in_std_errors(a.value - b.value, a.variance + b.variance)


def _in_std_errors(value: float, variance: float) -> float:
    if not value or not variance:
        return math.copysign(math.inf, value) if value else 0.0
    return value / math.sqrt(variance)


class LossRules:
    """What the rules remember of the records so far; of each length of run the same amount, evaluations aside."""

    def __init__(self, metadata: Mapping[str, Any]):
        train, data = metadata.get("resumed", metadata)["settings"]["train"], metadata["data"]["train"]
        self.mode, self.num_trainable_params = metadata["mode"], metadata["model"]["trainable"]
        self.lr, self.epsilon, self.has_early_stopping = train["lr"], train["epsilon"], bool(train.get("early_stop"))
        self.precision, self.dropout = metadata["resolved"]["precision"], metadata["resolved"]["dropout"]
        self.total_steps = metadata["resolved"]["total_steps"]
        self.masked_share = 1 - data["counted_tokens"] / max(1, data["tokens"])
        self.loss_trend = OnlineLinearRegression()
        self.recent_steps: deque[StepRecord] = deque(maxlen=WINDOW_STEPS)
        self.lowest_window: MeanEstimate | None = None  # of the windows so far
        self.eval_records: list[EvalRecord] = []
        self.train_loss_means: list[MeanEstimate] = []  # training loss between two evaluations
        self.trend_since_eval = OnlineLinearRegression()
        self.skipped_steps: deque[int] = deque(maxlen=NUM_HALVINGS + 1)

    def on_step(self, record: StepRecord) -> Iterator[Diagnostic]:
        """What one more step shows."""
        self.loss_trend.add(record.step, record.loss)
        self.trend_since_eval.add(record.step, record.loss)
        self.recent_steps.append(record)
        if self.masked_share >= MAX_MASKED_SHARE:
            yield Diagnostic(
                code="masked_labels",
                seen=f"{self.masked_share:.1%} of the training tokens are not target tokens: the loss ignores them",
                cause="prompts are long and completions short",
                remedy="--objective blocks, or a shorter --prompt",
                evidence={"masked_share": self.masked_share},
            )
        yield from self._find_no_gradient()
        recent_losses = [row.loss for row in self.recent_steps]
        yield from self._find_rising(recent_losses)
        yield from self._find_flat_loss(recent_losses)
        if self.loss_trend.n % WINDOW_STEPS == 0:
            window = estimate_mean(recent_losses)
            if self.lowest_window is None or window.value < self.lowest_window.value:
                self.lowest_window = window

    def on_eval(self, record: EvalRecord) -> Iterator[Diagnostic]:
        """What one more evaluation shows."""
        trend = self.trend_since_eval
        if self.eval_records and trend.n:
            variance = trend.sum_yy / (trend.n - 1) / trend.n if trend.n > 1 else self.loss_trend.residual_variance
            self.train_loss_means.append(MeanEstimate(trend.mean_y, variance))
        self.trend_since_eval = OnlineLinearRegression()
        self.eval_records.append(replace(record, row_nll=None))
        yield from self._find_worse_than_start()
        yield from self._find_overfitting()

    def on_skipped_step(self, step: int) -> Iterator[Diagnostic]:
        """More updates were left out than a loss scale needs to come down: from 2^16, its start, to 1 it is halved 16
        times, the first overflow only counts (DeepSpeed's hysteresis of 2), and it grows once in 1,000 good steps.
        """
        self.skipped_steps.append(step)
        num_skipped, num_steps = len(self.skipped_steps), step - self.skipped_steps[0] + 1
        if num_skipped > NUM_HALVINGS and num_steps <= OVERFLOW_STEPS:
            yield Diagnostic(
                code="overflow",
                seen=f"{num_skipped} updates of the last {num_steps} steps were left out",
                cause="gradients overflow in fp16 at every loss scale",
                remedy="--precision bf16",
                evidence={"skipped": num_skipped, "steps": num_steps},
            )

    def on_non_finite(self, step: int, message: str) -> Diagnostic:
        """The loss or the gradient is no number any more."""
        for_precision = f" for {self.precision}" if self.precision != "fp32" else ""
        return self._diverging(message.split(";", 1)[0], {"step": step}, for_precision)

    def find_zero_adapter(self, max_abs_b: float) -> Iterator[Diagnostic]:
        """Every B of the adapters is still zero, as it began: the adapted model is the base.

        AdamW moves each weight with a gradient by about the rate from its first step, so it is never zero by chance.
        """
        if not max_abs_b:
            yield Diagnostic(
                code="adapter_still_zero",
                seen="every B of the LoRA adapters is still zero: the model is the base model",
                cause="no gradient reaches the adapters, or no update was applied",
                remedy="--lora-target-modules with layers that the model uses",
                evidence={"largest_b": max_abs_b},
            )

    def _find_flat_loss(self, recent_losses: Sequence[float]) -> Iterator[Diagnostic]:
        """The loss does not fall: its slope over all steps so far is not told from noise
        (`OnlineLinearRegression.t_statistic`).

        Looked at when enough steps are done, at every doubling of that, and at the last step. The fall that this can
        tell in n steps is about 2 sd sqrt(12 / n): 0.05 nats at the card's 10% of 19,863 steps with sd 0.3.
        """
        first_check_step = max(FLAT_STEPS, math.ceil(FLAT_SHARE * self.total_steps))
        trend, n = self.loss_trend, self.loss_trend.n
        is_last_step = self.recent_steps[-1].step >= self.total_steps
        is_doubled = n >= first_check_step and n % first_check_step == 0 and (n // first_check_step).bit_count() == 1
        is_due = is_doubled or (is_last_step and n >= WINDOW_STEPS)
        if not is_due or trend.t_statistic <= FLAT_MAX_T:
            return
        first_loss, *later_losses = [row.loss for row in self.eval_records] or [math.inf]
        if later_losses and min(later_losses) < first_loss * (1 - MIN_VAL_DROP):
            return
        has_risen = bool(later_losses) and later_losses[-1] > first_loss * (1 + MIN_VAL_DROP)
        yield Diagnostic(
            code="flat_loss",
            seen=f"in {n} steps the training loss has no fall that stands out of its noise "
            f"(slope {trend.slope:+.1e} a step, t {trend.t_statistic:+.1f}, mean {trend.mean_y:.4f})",
            cause=f"the learning rate {self.lr:g} is too {'high' if has_risen else 'low'}",
            remedy=f"--lr {self.lr / 10 if has_risen else self.lr * 10:g}",
            evidence={
                "steps": n,
                "slope": trend.slope,
                "t": _finite_or_none(trend.t_statistic),
                "mean": trend.mean_y,
                "recent": fmean(recent_losses),
            },
        )

    def _find_no_gradient(self) -> Iterator[Diagnostic]:
        """The gradient's root mean square is under AdamW's epsilon.

        Adam moves a weight by lr g / (|g| + epsilon) (Kingma and Ba 2015, algorithm 1): under epsilon less than half
        of the rate is left of it. The norm over the square root of the number of weights is that mean.
        """
        norms = [row.grad_norm for row in self.recent_steps][-TINY_STEPS:]
        norm = median(norms)
        rms = norm / math.sqrt(self.num_trainable_params)
        if len(norms) < TINY_STEPS or rms >= self.epsilon:
            return
        cause, remedy = "gradients underflow in fp16", "--precision bf16"
        if self.precision != "fp16":
            cause = "what counts in the loss hardly depends on what trains"
            remedy = "--objective blocks, where every token counts"
            if self.mode == "lora":
                remedy = "--lora-target-modules with layers that matter"
        yield Diagnostic(
            code="no_gradient",
            seen=f"the gradient of the last {TINY_STEPS} steps is next to nothing (norm {norm:.1e} over "
            f"{self.num_trainable_params:,} weights: below AdamW's epsilon {self.epsilon:g})",
            cause=cause,
            remedy=remedy,
            evidence={"grad_norm": norm, "rms": rms, "epsilon": self.epsilon},
        )

    def _find_rising(self, recent_losses: Sequence[float]) -> Iterator[Diagnostic]:
        """The loss has risen: the mean of the last window lies a tenth and six standard errors above the lowest one.

        Six, because of many windows the lowest is low by luck: two normal means differ by more once in 10^9 times.
        """
        lowest = self.lowest_window
        if lowest is None or self.loss_trend.n < 2 * WINDOW_STEPS:
            return
        if fmean(recent_losses) < lowest.value * (1 + MIN_RISE):
            return
        window_mean = estimate_mean(recent_losses)
        std_errors = welch_t(window_mean, lowest)
        if std_errors >= RISE_STD_ERRORS:
            yield self._diverging(
                f"the training loss rose to {window_mean.value:.4f}, a mean of {WINDOW_STEPS} steps, from "
                f"{lowest.value:.4f} at its lowest ({min(std_errors, 999):.0f} standard errors)",
                {"now": window_mean.value, "lowest": lowest.value, "errors": _finite_or_none(std_errors)},
            )

    def _find_worse_than_start(self) -> Iterator[Diagnostic]:
        """The model is worse than before it was trained, on the validation and on the training rows, by a tenth."""
        first_eval, last_eval = self.eval_records[0], self.eval_records[-1]
        if first_eval.step or not self.train_loss_means:
            return
        train_loss = self.train_loss_means[-1].value
        if min(last_eval.loss, train_loss) >= first_eval.loss * (1 + MIN_RISE):
            yield self._diverging(
                f"the model is worse than before training: validation loss {first_eval.loss:.4f} -> "
                f"{last_eval.loss:.4f}, training loss {train_loss:.4f}",
                {"before": first_eval.loss, "now": last_eval.loss, "train": train_loss},
            )

    def _diverging(self, seen: str, evidence: dict[str, Any], for_precision: str = "") -> Diagnostic:
        return Diagnostic(
            code="diverging",
            seen=seen,
            cause=f"the learning rate {self.lr:g} is too high{for_precision}",
            remedy=f"--lr {self.lr / 3:.1g}",
            evidence=evidence,
        )

    def _find_overfitting(self) -> Iterator[Diagnostic]:
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
            return
        if len(self.train_loss_means) < 2:
            return
        mean_before, mean_after = self.train_loss_means[max(0, best_index - 1)], self.train_loss_means[-1]
        if welch_t(mean_before, mean_after) < FALL_STD_ERRORS or mean_after.value > evals[0].loss:
            return
        remedy = f"--early-stop {max(1, num_later - 1)} --export best"
        if self.has_early_stopping:
            remedy = f"--dropout {min(0.5, self.dropout + 0.1):.2g}"
        yield Diagnostic(
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


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
