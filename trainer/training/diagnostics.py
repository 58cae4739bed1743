"""What is wrong with a run while it runs: records and seconds in, findings out. Pure: no torch, no file, no clock.

A finding is made once a run and kept as an event record, so a resumed run takes the rows it left (`replay`) and says
nothing twice. The rules on losses say the same on every machine; those on time do not.
"""

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from trainer.tracking.records import EvalRecord, EventRecord, Record, StepRecord

WINDOW_STEPS = 20  # steps whose mean stands for the loss "now"
FLAT_STEPS, FLAT_SHARE = 50, 0.1  # a trend is looked for after so many steps, and this share of the run
FLAT_MAX_T = -2.0  # one-sided 2.3%: a slope that is no further below zero is not told from noise
FLAT_VISIBLE_FALL = 0.1  # of the loss; where the noise would hide even this, as of batches of one, nothing is said
MIN_VAL_DROP = 0.01  # a validation loss that fell by this share shows that the run learns
JUMP_STEPS, MIN_JUMP, JUMP_STD_ERRORS = 5, 0.2, 4.0
MIN_RISE, RISE_STD_ERRORS = 0.1, 6.0
GENERALISATION_LOSS, FALL_STD_ERRORS = 0.01, 2.0
MIN_RUN_SECONDS = 60.0  # a shorter run need not be faster
MAX_DATA_SHARE, MAX_EVALUATION_SHARE = 0.2, 0.4
#: every code and what it means for the user
TOPICS = {
    "flat_loss": "not learning",
    "diverging": "diverging",
    "overfitting": "overfitting",
    "waiting_for_data": "too slow",
    "much_evaluation": "too slow",
}


@dataclass(frozen=True)
class Diagnostic:
    """Something that is wrong with a run: how it was seen, what it likely comes from, and the flag that may help."""

    code: str
    seen: str  #: the evidence in words
    cause: str
    remedy: str  #: a flag with a value, as it would be typed

    def to_record(self, step: int, time: float) -> EventRecord:
        topic = TOPICS[self.code]
        message = f"{topic}: {self.seen}. Likely cause: {self.cause}; try {self.remedy}"
        facts = {"topic": topic, **vars(self)}
        return EventRecord(event="diagnosis", step=step, message=message, time=time, facts=facts)


class MeanEstimate(NamedTuple):
    """The mean of some values and the variance of that mean."""

    value: float
    variance: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """(slope, variance of y around the line, t of the slope) of the least squares line through (x, y). Draper and
    Smith, Applied Regression Analysis, chapter 1. t is 0 for too few points, infinite without noise."""
    dx, dy = np.asarray(x, float) - fmean(x), np.asarray(y, float) - fmean(y)
    sum_xx, sum_xy, sum_yy = float(dx @ dx), float(dx @ dy), float(dy @ dy)
    slope = sum_xy / sum_xx if sum_xx else 0.0
    variance = max(0.0, sum_yy - slope * sum_xy) / max(1, len(x) - 2)
    return slope, variance, _in_std_errors(slope, variance / sum_xx) if len(x) > 2 and sum_xx else 0.0


def estimate_mean(values: Sequence[float]) -> MeanEstimate:
    """Of one value the variance is 0. In floats: statistics.variance takes fractions, 100 us for a step's 20 values."""
    mean, n = fmean(values), len(values)
    return MeanEstimate(mean, math.fsum((value - mean) ** 2 for value in values) / max(1, n - 1) / n)


def welch_t(a: MeanEstimate, b: MeanEstimate) -> float:
    """By how many standard errors `a` lies above `b`, each with its own variance (Welch, Biometrika 34, 1947)."""
    return _in_std_errors(a.value - b.value, a.variance + b.variance)


def _in_std_errors(value: float, variance: float) -> float:
    if not value or not variance:
        return math.copysign(math.inf, value) if value else 0.0
    return value / math.sqrt(variance)


class DiagnosticsMonitor:
    """Takes the records of a run in order and gives back what is new to say. Remembers the losses of all steps and
    evaluations, and a window of the rest."""

    def __init__(self, metadata: Mapping[str, Any]):
        self.metadata, self.settings = metadata, metadata.get("resumed", metadata)["settings"]
        self.lr = self.settings["train"]["lr"]
        self.reported_codes: set[str] = set()
        self.steps, self.losses = array("d"), array("d")  # 16 bytes a step
        self.lowest_window: MeanEstimate | None = None  # of the windows so far
        self.evals: list[EvalRecord] = []
        self.num_steps_at_eval = 0
        self.train_loss_means: list[MeanEstimate] = []  # training loss between two evaluations
        self.seconds = {"data": 0.0, "evaluation": 0.0}  #: that were spent waiting for rows, and on evaluations
        self._start_time: float | None = None  # time of the first row of this process
        self._previous_time = 0.0  # time of the row before
        self._num_evaluations = 0  # after the one before the first step

    def replay(self, records: Iterable[Record]) -> list[Diagnostic]:
        """Take the rows that an earlier process left; returns what it had no time to say. Their times do not count."""
        first_of_code: dict[str, Diagnostic] = {}
        for record in records:
            if isinstance(record, EventRecord) and record.event == "diagnosis":
                self.reported_codes.add(str(record.facts.get("code")))
            for diagnostic in self._apply_rules(record):
                first_of_code.setdefault(diagnostic.code, diagnostic)
        return self._select_new(first_of_code.values())

    def on_record(self, record: Record) -> list[Diagnostic]:
        if self._start_time is None:
            self._start_time = record.time
        elif isinstance(record, EvalRecord):
            self.seconds["evaluation"] += record.time - self._previous_time
            self._num_evaluations += 1
        self._previous_time = record.time
        return self._select_new([*self._apply_rules(record), *self._find_slow_parts(record.time - self._start_time)])

    def _select_new(self, diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
        new_ones = {d.code: d for d in diagnostics if d.code not in self.reported_codes}
        self.reported_codes |= set(new_ones)
        return list(new_ones.values())

    def _apply_rules(self, record: Record) -> Iterator[Diagnostic]:
        if isinstance(record, StepRecord):
            yield from self._check_step(record)
        elif isinstance(record, EvalRecord):
            yield from self._check_evaluation(record)
        elif isinstance(record, EventRecord) and record.event == "not_finite":
            yield self._diverging(record.message.split(";", 1)[0])

    def _diverging(self, seen: str, *, lr_divisor: float = 3) -> Diagnostic:
        cause = f"the learning rate {self.lr:g} is too high"
        return Diagnostic("diverging", seen, cause, f"--lr {self.lr / lr_divisor:.1g}")

    def _check_step(self, record: StepRecord) -> Iterator[Diagnostic]:
        self.steps.append(record.step)
        self.losses.append(record.loss)
        n, total_steps = len(self.losses), self.metadata["resolved"]["total_steps"]

        # The mean of five steps after the first update lies above the loss before it by a fifth and 4 standard errors,
        # or, of pretrained weights, above a guess among all tokens. Of 2,400 simulated runs that learn, whose losses
        # vary by 10 to 80% a step, one was reported; losses of one to four times the first were after 7 steps (median).
        window, recent = estimate_mean(self.losses[-WINDOW_STEPS:]), self.losses[max(1, n - WINDOW_STEPS) :]
        if n > JUMP_STEPS and self.evals and not self.evals[0].step:
            start, guess = max(self.evals[0].loss, self.losses[0]), math.log(self.metadata["data"]["vocabulary"])
            is_pretrained = self.metadata["model"]["init"] == "pretrained" and start < guess
            jump_loss = min((1 + MIN_JUMP) * start, guess if is_pretrained else math.inf)
            mean, variance = fmean(recent[-JUMP_STEPS:]), estimate_mean(recent).variance * len(recent) / JUMP_STEPS
            if mean >= jump_loss and welch_t(MeanEstimate(mean, variance), MeanEstimate(start, 0)) >= JUMP_STD_ERRORS:
                seen = f"the training loss of the last {JUMP_STEPS} steps is {mean:.4f}, and it was {start:.4f} before "
                yield self._diverging(f"{seen}training", lr_divisor=10)

        # The mean of the last window lies a tenth and six standard errors above the lowest one. Six, because of many
        # windows the lowest is low by luck: two normal means differ by more once in 10^9 times.
        lowest = self.lowest_window
        if lowest and n >= 2 * WINDOW_STEPS and window.value >= lowest.value * (1 + MIN_RISE):
            std_errors = welch_t(window, lowest)
            if std_errors >= RISE_STD_ERRORS:
                seen = f"the training loss rose to {window.value:.4f}, a mean of {WINDOW_STEPS} steps, from "
                seen += f"{lowest.value:.4f} at its lowest ({min(std_errors, 999):.0f} standard errors)"
                yield self._diverging(seen)
        if n % WINDOW_STEPS == 0 and (lowest is None or window.value < lowest.value):
            self.lowest_window = window

        # The slope of the loss over all steps so far is not told from noise. Looked at when enough steps are done, at
        # every doubling of that, and at the last step. The fall that this can tell in n steps is about
        # 2 sd sqrt(12 / n): 0.05 nats at the card's 10% of 19,863 steps with sd 0.3.
        num_checks, remainder = divmod(n, max(FLAT_STEPS, math.ceil(FLAT_SHARE * total_steps)))
        is_doubled = not remainder and num_checks.bit_count() == 1
        first_loss, *later_losses = [row.loss for row in self.evals] or [math.inf]
        has_fallen = min(later_losses, default=math.inf) < first_loss * (1 - MIN_VAL_DROP)
        if (is_doubled or (record.step >= total_steps and n >= WINDOW_STEPS)) and not has_fallen:
            slope, variance, t = fit_line(self.steps, self.losses)
            is_visible = FLAT_VISIBLE_FALL * fmean(self.losses) >= 4 * math.sqrt(12 * variance / n)
            if t > FLAT_MAX_T and is_visible:
                has_risen = bool(later_losses) and later_losses[-1] > first_loss * (1 + MIN_VAL_DROP)
                mean, new_lr = fmean(self.losses), self.lr / 10 if has_risen else self.lr * 10
                seen = f"the training loss did not measurably fall in {n} steps (mean {mean:.4f}, slope {slope:+.1e} a "
                seen += f"step, t {t:+.1f})"
                cause = f"the learning rate {self.lr:g} is too {'high' if has_risen else 'low'}"
                yield Diagnostic("flat_loss", seen, cause, f"--lr {new_lr:g}")

    def _check_evaluation(self, record: EvalRecord) -> Iterator[Diagnostic]:
        if self.evals and (losses := self.losses[self.num_steps_at_eval :]):
            mean = estimate_mean(losses)
            if len(losses) == 1:
                mean = MeanEstimate(mean.value, fit_line(self.steps, self.losses)[1])
            self.train_loss_means.append(mean)
        self.num_steps_at_eval = len(self.losses)
        self.evals.append(replace(record, row_nll=None))
        if len(self.train_loss_means) < 2:
            return
        last, train_loss, start = self.evals[-1], self.train_loss_means[-1], max(self.evals[0].loss, self.losses[0])

        # The validation loss lies over its lowest by 1%, for an epoch or two evaluations, and the training loss fell by
        # two standard errors, from the stretch before the lowest evaluation to the last one. The first is the
        # generalisation loss GL of Prechelt, "Early stopping - but when?" (1998), equation 1, with his smallest
        # threshold; the second tells it from diverging.
        best_index, best = min(enumerate(self.evals), key=lambda pair: pair[1].loss)
        num_later, num_epochs = len(self.evals) - best_index - 1, last.epoch - best.epoch
        is_sustained = num_later >= 2 or num_epochs >= 1 - 1e-6
        is_worse = last.loss > (1 + GENERALISATION_LOSS) * best.loss  # which may be 0
        before = self.train_loss_means[max(0, best_index - len(self.evals) + len(self.train_loss_means))]
        has_learned = welch_t(before, train_loss) >= FALL_STD_ERRORS and train_loss.value <= start
        if is_worse and is_sustained and has_learned:
            seen = f"the validation loss rose for {num_epochs:.3g} epochs, since epoch {best.epoch:.4g} (step "
            seen += f"{best.step}): {best.loss:.4f} -> {last.loss:.4f}, while the training loss fell: "
            seen += f"{before.value:.4f} -> {train_loss.value:.4f}"
            remedy = f"--early-stop {max(1, num_later - 1)} --export best"
            if self.settings["train"]["early_stop"]:
                remedy = f"--dropout {min(0.5, self.metadata['resolved']['dropout'] + 0.1):.2g}"
            yield Diagnostic("overfitting", seen, "the model learns the training rows by heart", remedy)

    def _find_slow_parts(self, elapsed_seconds: float) -> Iterator[Diagnostic]:
        if elapsed_seconds < MIN_RUN_SECONDS:
            return
        waiting, evaluating = (self.seconds[name] / elapsed_seconds for name in ("data", "evaluation"))
        if waiting >= MAX_DATA_SHARE:
            seen, cause = f"{waiting:.0%} of {elapsed_seconds:.0f} s went by waiting for training rows", "a slow disk"
            yield Diagnostic("waiting_for_data", seen, cause, "TRAINER_CACHE=FOLDER on a local disk")
        if evaluating >= MAX_EVALUATION_SHARE and self._num_evaluations > 1:  # each run has one after the last step
            seen = f"{evaluating:.0%} of {elapsed_seconds:.0f} s went into evaluations and their samples"
            rarer, larger = "--eval-every epoch", f"--eval-batch {2 * self.settings['train']['eval_batch']}"
            is_rare = self.settings["output"]["eval_every"] == "epoch"
            cause = f"their batches are small{', or they are frequent' * (not is_rare)}"
            yield Diagnostic("much_evaluation", seen, cause, larger if is_rare else rarer)
