"""Rules on the losses, the gradient, the rate and the adapters: functions of the records, the same on every machine."""

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import fmean, median

from trainer.tracking.records import EvalRecord, StepRecord
from trainer.training.diagnostics.online_stats import Line, Mean, welch
from trainer.training.diagnostics.types import Facts, Finding

WINDOW = 20  # steps whose mean stands for the loss "now"
FLAT_STEPS, FLAT_SHARE = 50, 0.1  # a trend is looked for after so many steps, and this share of the run
FLAT_T = -2.0  # one-sided 2.3%: a slope that is no further below zero is not told from noise
FELL = 0.01  # a validation loss that fell by this share shows that the run learns
TINY_STEPS = 10  # steps over which rate and gradient must be next to nothing
ROUNDING = 2**-24 * 0.02  # half the spacing of float32 at 0.02, the standard deviation of GPT-2's initial weights
MASKED = 0.9
CLIPPED_STEPS, CLIPPED_TIMES = 50, 10.0
RISE, RISE_ERRORS = 0.1, 6.0
GENERALISATION_LOSS, FELL_ERRORS = 0.01, 2.0
HALVINGS, OVERFLOW_STEPS = 17, 100


@dataclass
class Learning:
    """What the rules remember of the records so far; of each length of run the same amount, evaluations aside."""

    facts: Facts
    line: Line = field(default_factory=Line)
    rate: float = 0.0  # the highest so far
    recent: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=CLIPPED_STEPS))
    lowest: Mean | None = None  # of the windows so far
    evals: list[EvalRecord] = field(default_factory=list)
    means: list[Mean] = field(default_factory=list)  # training loss between two evaluations
    between: list[float] = field(default_factory=list)  # the step losses since the last one
    skipped: deque[int] = field(default_factory=lambda: deque(maxlen=HALVINGS + 1))

    def step(self, row: StepRecord) -> list[Finding | None]:
        """What one more step shows."""
        self.line.add(row.step, row.loss)
        self.rate = max(self.rate, row.lr)
        self.recent.append(row)
        self.between.append(row.loss)
        found = [self.masked(), self.no_rate(), self.no_gradient(), self.always_clipped(), self.rising(), self.flat()]
        if self.line.n % WINDOW == 0:
            now = self.window()
            self.lowest = now if self.lowest is None or now.value < self.lowest.value else self.lowest
        return found

    def evaluation(self, row: EvalRecord) -> list[Finding | None]:
        """What one more evaluation shows."""
        if self.evals and self.between:
            one = Mean(self.between[0], self.line.noise)
            self.means.append(Mean.of(self.between) if len(self.between) > 1 else one)
        self.between = []
        self.evals.append(row)
        return [self.worse(), self.overfitting()]

    def window(self) -> Mean:
        """The mean loss of the last WINDOW steps."""
        return Mean.of(row.loss for row in list(self.recent)[-WINDOW:])

    def flat(self) -> Finding | None:
        """The loss does not fall: its slope over all steps so far is not told from noise (`Line.t`).

        Looked at when enough steps are done, at every doubling of that, and at the last step. The fall that this can
        tell in n steps is about 2 sd sqrt(12 / n): 0.05 nats at the card's 10% of 19,863 steps with sd 0.3.
        """
        first = max(FLAT_STEPS, math.ceil(FLAT_SHARE * self.facts.total_steps))
        n, last = self.line.n, self.recent[-1].step >= self.facts.total_steps
        doubled = n >= first and n % first == 0 and (n // first).bit_count() == 1
        if not (doubled or (last and n >= WINDOW)) or self.line.t <= FLAT_T or self._validation_fell():
            return None
        rows = list(self.recent)
        higher = len(self.evals) > 1 and self.evals[-1].loss > self.evals[0].loss * (1 + FELL)
        lr = self.facts.lr
        return Finding(
            code="flat_loss",
            seen=f"in {n} steps the training loss has no fall that stands out of its noise "
            f"(slope {self.line.slope:+.1e} a step, t {self.line.t:+.1f}, mean {self.line.y:.4f})",
            cause=f"the learning rate {lr:g} is too {'high' if higher else 'low'}",
            remedy=f"--lr {lr / 10 if higher else lr * 10:g}",
            evidence={"steps": n, "slope": self.line.slope, "t": _finite(self.line.t), "mean": self.line.y,
                      "recent": fmean(row.loss for row in rows[-WINDOW:])},
        )  # fmt: skip

    def _validation_fell(self) -> bool:
        return len(self.evals) > 1 and min(row.loss for row in self.evals[1:]) < self.evals[0].loss * (1 - FELL)

    def no_gradient(self) -> Finding | None:
        """The gradient's root mean square is under AdamW's epsilon.

        Adam moves a weight by lr g / (|g| + epsilon) (Kingma and Ba 2015, algorithm 1): under epsilon less than half
        of the rate is left of it. The norm over the square root of the number of weights is that mean.
        """
        rows = list(self.recent)[-TINY_STEPS:]
        norm = median(row.grad_norm for row in rows)
        rms = norm / math.sqrt(self.facts.trainable)
        if len(rows) < TINY_STEPS or rms >= self.facts.epsilon:
            return None
        half = self.facts.precision == "fp16"
        return Finding(
            code="no_gradient",
            seen=f"the gradient of the last {TINY_STEPS} steps is next to nothing "
            f"(norm {norm:.1e} over {self.facts.trainable:,} weights: below AdamW's epsilon {self.facts.epsilon:g})",
            cause="gradients underflow in fp16" if half else "what counts in the loss hardly depends on what trains",
            remedy="--precision bf16" if half else "--lora-targets with layers that matter" if self.facts.mode == "lora"
            else "--objective blocks, where every token counts",
            evidence={"grad_norm": norm, "rms": rms, "epsilon": self.facts.epsilon},
        )  # fmt: skip

    def no_rate(self) -> Finding | None:
        """The learning rate never rose above what float32 loses: a step of the rate is rounded away at 0.02."""
        highest, steps = self.rate, self.line.n
        if steps < TINY_STEPS or highest > ROUNDING:
            return None
        warming = self.facts.warmup_steps > self.recent[-1].step
        return Finding(
            code="no_rate",
            seen=f"the learning rate was at most {highest:.1e} in {steps} steps, less than weights can hold",
            cause=f"warm-up takes {self.facts.warmup_steps:,} steps" if warming else "--lr is too small",
            remedy="--warmup-steps 0" if warming else "--lr 3e-5",
            evidence={"lr": highest, "rounding": ROUNDING},
        )

    def masked(self) -> Finding | None:
        """Nine of ten training tokens do not count in the loss, so most of the work teaches nothing."""
        share = 1 - self.facts.counted_share
        if share < MASKED:
            return None
        return Finding(
            code="masked_labels",
            seen=f"{share:.1%} of the training tokens do not count in the loss",
            cause="prompts are long and completions short",
            remedy="--objective blocks, or a shorter --prompt",
            evidence={"masked_share": share},
        )

    def always_clipped(self) -> Finding | None:
        """Each of the last steps was clipped, to a tenth and less: the norm of most is CLIPPED_TIMES the limit."""
        rows, clip = self.recent, self.facts.clip
        if not clip or len(rows) < CLIPPED_STEPS or min(row.grad_norm for row in rows) <= clip:
            return None
        norm = median(row.grad_norm for row in rows)
        if norm < CLIPPED_TIMES * clip:
            return None
        return Finding(
            code="always_clipped",
            seen=f"each of the last {len(rows)} steps was clipped (median gradient norm {norm:.3g}, limit {clip:g})",
            cause="the limit is far below this model's gradients, so that only their direction is left",
            remedy=f"--clip {float(f'{norm:.1g}'):g}",
            evidence={"grad_norm": norm, "clip": clip, "steps": len(rows)},
        )

    def rising(self) -> Finding | None:
        """The loss has risen: the mean of the last window lies a tenth and six standard errors above the lowest one.

        Six, because of many windows the lowest is low by luck: two normal means differ by more once in 10^9 times.
        """
        if self.lowest is None or self.line.n < 2 * WINDOW:
            return None
        now = self.window()
        errors = welch(now, self.lowest)
        if now.value < self.lowest.value * (1 + RISE) or errors < RISE_ERRORS:
            return None
        return Finding(
            code="diverging",
            seen=f"the training loss rose to {now.value:.4f}, a mean of {WINDOW} steps, from {self.lowest.value:.4f} "
            f"at its lowest ({min(errors, 999):.0f} standard errors)",
            cause=f"the learning rate {self.facts.lr:g} is too high",
            remedy=f"--lr {self.facts.lr / 3:.1g}",
            evidence={"now": now.value, "lowest": self.lowest.value, "errors": _finite(errors)},
        )

    def worse(self) -> Finding | None:
        """The model is worse than before it was trained, on the validation and on the training rows, by a tenth."""
        first, now = self.evals[0], self.evals[-1]
        if first.step or not self.means:
            return None
        train = self.means[-1].value
        if min(now.loss, train) < first.loss * (1 + RISE):
            return None
        return Finding(
            code="diverging",
            seen=f"the model is worse than before training: validation loss {first.loss:.4f} -> {now.loss:.4f}, "
            f"training loss {train:.4f}",
            cause=f"the learning rate {self.facts.lr:g} is too high",
            remedy=f"--lr {self.facts.lr / 3:.1g}",
            evidence={"before": first.loss, "now": now.loss, "train": train},
        )

    def not_finite(self, step: int, message: str) -> Finding:
        """The loss or the gradient is no number any more."""
        return Finding(
            code="diverging",
            seen=message.split(";", 1)[0],
            cause=f"the learning rate {self.facts.lr:g} is too high"
            + (f" for {self.facts.precision}" if self.facts.precision != "fp32" else ""),
            remedy=f"--lr {self.facts.lr / 3:.1g}",
            evidence={"step": step},
        )

    def overfitting(self) -> Finding | None:
        """The validation loss lies over its lowest by 1%, for an epoch or two evaluations, and the training loss fell.

        Fell: by two standard errors, from the stretch before the lowest evaluation to the last one.
        The first is the generalisation loss GL of Prechelt, "Early stopping - but when?" (1998), equation 1, with
        his smallest threshold; the second tells it from diverging.
        """
        now = self.evals[-1]
        at = min(range(len(self.evals)), key=lambda i: self.evals[i].loss)
        best, since = self.evals[at], self.evals[at + 1 :]
        loss = now.loss / best.loss - 1
        long = len(since) >= 2 or now.epoch - best.epoch >= 1 - 1e-6
        if loss < GENERALISATION_LOSS or not long or len(self.means) < 2:
            return None
        before, last = self.means[max(0, at - 1)], self.means[-1]
        if welch(before, last) < FELL_ERRORS or last.value > self.evals[0].loss:
            return None
        epochs = now.epoch - best.epoch
        remedy = f"--dropout {min(0.5, self.facts.dropout + 0.1):.2g}" if self.facts.early_stop else (
            f"--early-stop {max(1, len(since) - 1)} --export best"
        )  # fmt: skip
        return Finding(
            code="overfitting",
            seen=f"the validation loss rose for {epochs:.3g} epochs, since epoch {best.epoch:.4g} (step {best.step}): "
            f"{best.loss:.4f} -> {now.loss:.4f}, while the training loss fell: {before.value:.4f} -> {last.value:.4f}",
            cause="the model learns the training rows by heart",
            remedy=remedy,
            evidence={"since_epoch": best.epoch, "since_step": best.step, "epochs": epochs, "evaluations": len(since),
                      "best": best.loss, "now": now.loss, "train_before": before.value, "train_now": last.value},
        )  # fmt: skip

    def overflow(self, step: int) -> Finding | None:
        """More updates were left out than a loss scale needs to come down: from 2^16, its start, to 1 it is halved 16
        times, the first overflow only counts (DeepSpeed's hysteresis of 2), and it grows once in 1,000 good steps.
        """
        self.skipped.append(step)
        if len(self.skipped) <= HALVINGS or step - self.skipped[0] >= OVERFLOW_STEPS:
            return None
        return Finding(
            code="overflow",
            seen=f"{len(self.skipped)} updates of the last {step - self.skipped[0] + 1} steps were left out",
            cause="gradients overflow in fp16 at every loss scale",
            remedy="--precision bf16",
            evidence={"skipped": len(self.skipped), "steps": step - self.skipped[0] + 1},
        )

    def adapter(self, largest: float) -> Finding | None:
        """Every B of the adapters is still zero, as it began: the adapted model is the base.

        `largest`: the largest entry of any B by size. AdamW moves each weight with a gradient by about the rate
        from its first step, so it is never zero by chance.
        """
        if largest:
            return None
        return Finding(
            code="adapter_still_zero",
            seen="every B of the LoRA adapters is still zero: the model is the base model",
            cause="no gradient reaches the adapters, or no update was applied",
            remedy="--lora-targets with layers that the model uses",
            evidence={"largest_b": largest},
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
