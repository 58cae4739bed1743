"""The steps and the evaluations of one run, as a stream of records.

Knows no mode, no rank, no file and no sink: it draws micro-batches, has the engine accumulate and step, sums loss and
tokens over the global batch, divides once and yields what happened. Where the device is not to wait, the next step is
asked for before this one's numbers are read.
"""

import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

from trainer.config.errors import RunFailed
from trainer.config.schema import Batch, Settings
from trainer.data.dataset import Prepared
from trainer.data.sampler import MicroBatch, epoch_order, eval_batches, step_batches, step_counts
from trainer.data.token_dataset import Rows
from trainer.distributed.engine import Engine, Step
from trainer.distributed.steppers import NotFinite
from trainer.tracking.records import EpochRecord, EvalRecord, EventRecord, Record, StepRecord, perplexity
from trainer.training.checkpoint import Best, Checkpoints, Progress
from trainer.training.lr_schedule import learning_rate

PAD_ID = 0  # any id will do: padded positions are neither counted nor looked at


@dataclass(frozen=True, kw_only=True)
class Course:
    """How far and in which strides: what the loop needs of a plan."""

    settings: Settings
    batch: Batch
    total_steps: int
    steps_per_epoch: int

    def due(self, every: str, step: int) -> bool:
        """Whether something done `every` N steps, every epoch or never is due after `step`; always at the end."""
        if step == self.total_steps:
            return True
        stride = {"epoch": self.steps_per_epoch, "never": self.total_steps}.get(every) or int(every)
        return step % stride == 0

    def quiet(self, step: int) -> bool:
        """Whether nothing is due after `step`: no evaluation, no checkpoint, no end."""
        output = self.settings.output
        ends = step % self.steps_per_epoch == 0
        return not (ends or self.due(output.eval_every, step) or self.due(output.save_every, step))

    def out_of_patience(self, progress: Progress) -> bool:
        """Whether the validation loss has not fallen for as many evaluations as --early-stop allows."""
        patience = self.settings.train.patience
        return patience is not None and progress.stale >= patience

    def ended(self, progress: Progress) -> bool:
        """Whether this was the last step, and nothing that is due after it is still to come."""
        return not progress.pending and (progress.step >= self.total_steps or self.out_of_patience(progress))


def train(
    engine: Engine,
    data: Prepared,
    course: Course,
    progress: Progress,
    checkpoints: Checkpoints,
    interrupted: Callable[[], bool],
    drew: Callable[[float], None] = lambda seconds: None,
) -> Generator[Record, None, Progress]:
    """Run from `progress` to the last step, or to an interruption, and return where it ended.

    `drew` is told how long each step's rows took to be drawn.

    Raises RunFailed, after saving the last finite state, on NaN or infinity.
    """
    output = course.settings.output
    clock = Clock(progress.seconds)
    asker = Asker(engine, data, course, interrupted, drew)
    ahead, stop, saved = None, False, progress.step
    if progress.pending:  # a run that begins is evaluated first; one that was stopped had no time for what was due
        progress, stop = yield from _due(engine, data, course, progress, clock, interrupted)
        if progress.step and not stop:
            checkpoints.amend(progress)
    while not ((stop and ahead is None) or course.ended(progress)):
        asked = ahead or asker.ask(progress.step)
        wants = engine.lags and not stop and course.quiet(progress.step + 1)
        ahead = asker.ask(progress.step + 1) if wants else None
        try:
            done = asked.told()
        except NotFinite as problem:
            dump = checkpoints.dump_batch(progress.step + 1, asked.micros)
            if progress.step > saved:
                checkpoints.save(engine, progress)
            message = f"step {progress.step + 1}: {problem}; the weights are those after step {progress.step}"
            message += f", the rows are in {dump}"
            yield EventRecord(
                event="not_finite", step=progress.step + 1, message=message, time=clock(), facts={"rows": asked.rows}
            )
            raise RunFailed(f"{message}; {_LOWER}") from problem

        stop = stop or done.stop
        progress = replace(
            progress, step=progress.step + 1, samples=progress.samples + len(asked.rows),
            tokens=progress.tokens + asked.tokens, epoch_nll=progress.epoch_nll + done.nll,
            epoch_counted=progress.epoch_counted + asked.counted, seconds=clock(),
            skipped=progress.skipped + done.skipped, pending=True,
        )  # fmt: skip
        yield StepRecord(
            **position(progress, course, len(data.train)), loss=done.nll / asked.counted, lr=asked.rate,
            grad_norm=done.grad_norm, tokens_per_second=asked.tokens / asker.lap(asked),
        ) if not done.skipped else EventRecord(
            event="skipped_step", step=progress.step, time=clock(),
            message=f"step {progress.step}: gradient overflow in fp16, update skipped and loss scale lowered",
        )  # fmt: skip
        if ahead is not None:  # nothing is due, and the weights are no longer those after this step
            progress = replace(progress, pending=False)
            continue
        if not stop:
            progress, stop = yield from _due(engine, data, course, progress, clock, interrupted)
        lowest = output.export == "best" and progress.best is not None and progress.best.step == progress.step
        if stop or lowest or course.ended(progress) or course.due(output.save_every, progress.step):
            progress = replace(progress, seconds=clock())
            checkpoints.save(engine, progress)
            saved = progress.step
    if stop:
        message = f"stopped by a signal after step {progress.step}; --resume goes on from there"
        yield EventRecord(event="interrupted", step=progress.step, message=message, time=clock())
    return progress


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A step that the engine has been asked for."""

    micros: list[MicroBatch]  #: this rank's
    rows: list[int]  #: of the whole global batch
    tokens: int
    counted: int  #: targets among them
    rate: float
    began: float
    told: Callable[[], Step]  #: waits for it; raises NotFinite


class Asker:
    """Draws a step's rows and has the engine begin with it."""

    def __init__(
        self, engine: Engine, data: Prepared, course: Course, interrupted: Callable[[], bool],
        drew: Callable[[float], None],
    ):  # fmt: skip
        self.engine, self.data, self.course, self.interrupted, self.drew = engine, data, course, interrupted, drew
        self._order: Any = None
        self._epoch = -1
        self._ended = 0.0

    def ask(self, step: int) -> Asked:
        """The step after `step` others."""
        asked = time.perf_counter()
        course, batch, rule = self.course, self.course.batch, self.course.settings.train
        epoch, place = divmod(step, course.steps_per_epoch)
        if self._order is None or self._epoch != epoch:
            self._order, self._epoch = _order(self.data.train, course, epoch), epoch
        micros = step_batches(self.data.train, self._order, place, batch, self.engine.world.rank, PAD_ID)
        examples, tokens, counted = step_counts(self.data.train, self._order, place, batch.global_batch)
        rate = learning_rate(step, peak=rule.lr, warmup=rule.warmup_steps, total=course.total_steps)
        began = time.perf_counter()
        self.drew(began - asked)
        sums = [self.engine.accumulate(micro, step=step, counted=counted) for micro in micros]
        try:
            told = self.engine.ask(rate, sums, stop=self.interrupted())
        except NotFinite as problem:
            told = _raising(problem)
        rows = self._order[place * batch.global_batch :][:examples].tolist()
        return Asked(micros=micros, rows=rows, tokens=tokens, counted=counted, rate=rate, began=began, told=told)

    def lap(self, asked: Asked) -> float:
        """Seconds that a step took which has just been told of: since it began, or since the one before it ended."""
        began, self._ended = max(asked.began, self._ended), time.perf_counter()
        return self._ended - began


def _raising(problem: NotFinite) -> Callable[[], Step]:
    def told() -> Step:
        raise problem

    return told


_LOWER = "a lower --lr or --precision fp32 may help"


def _due(
    engine: Engine, data: Prepared, course: Course, progress: Progress, clock: "Clock", interrupted: Callable[[], bool]
) -> Generator[Record, None, tuple[Progress, bool]]:
    """Evaluation and the epoch's row, where due after a step. Returns (progress, whether the run is to stop first)."""
    if course.due(course.settings.output.eval_every, progress.step):
        try:
            progress, record = _evaluate(engine, data, course, progress, clock, interrupted)
        except Interrupted:
            return progress, True
        except NotFinite as problem:
            message = f"evaluation after step {progress.step}: {problem}; the checkpoints before it are whole"
            yield EventRecord(event="not_finite", step=progress.step, message=message, time=clock())
            raise RunFailed(f"{message}; {_LOWER}") from problem
        yield record
    ended = progress.step % course.steps_per_epoch == 0
    early = course.out_of_patience(progress) and progress.step < course.total_steps
    if progress.step and (ended or early or progress.step == course.total_steps):
        at = position(progress, course, len(data.train)) | {"time": clock()}
        yield EpochRecord(**at, train_loss=progress.epoch_nll / progress.epoch_counted)
        if ended:  # else a longer schedule may go on within the epoch
            progress = replace(progress, epoch_nll=0.0, epoch_counted=0)
    if early:
        yield _early_stop(course, progress, clock())
    return replace(progress, pending=False), False


def _early_stop(course: Course, progress: Progress, seconds: float) -> EventRecord:
    rule, best = course.settings.train, progress.best
    assert best is not None, "evaluated"
    more = f" by more than {rule.min_delta:g}" if rule.min_delta else ""
    stale = "1 evaluation" if progress.stale == 1 else f"{progress.stale} evaluations in a row"
    message = (
        f"stopped early after step {progress.step} of {course.total_steps}: {stale} did not lower "
        f"the validation loss{more} (best {best.loss:.4f} at step {best.step})"
    )
    facts = {"patience": rule.patience, "min_delta": rule.min_delta, "stale": progress.stale, "best": vars(best)}
    return EventRecord(event="early_stop", step=progress.step, message=message, time=seconds, facts=facts)


class Interrupted(Exception):
    """An evaluation was given up because the run is to stop."""


def evaluate(
    engine: Engine, rows: Rows, eval_batch: int, interrupted: Callable[[], bool] = lambda: False
) -> tuple[float, int]:
    """(token mean of the loss over all `rows`, targets it is the mean of): one number, however the rows are spread.

    Each row's sum is kept apart and all are added exactly (`math.fsum`), so neither ranks nor order can move it.
    Raises Interrupted, on all ranks alike, where any of them is to stop.
    """
    world = engine.world
    sums = []  # on the device: nobody waits for one batch before the next has begun
    for micro in eval_batches(rows, eval_batch, world.rank, world.size, PAD_ID):
        if any(world.gather(interrupted())):
            raise Interrupted
        sums.append(engine.evaluate(micro))
    mine = [nll for part in sums for nll in part.tolist()]
    counted = int(rows.counted().sum())
    return math.fsum(nll for part in world.gather(mine) for nll in part) / counted, counted


class Clock:
    """Seconds since the run began, going on from where a resumed run stood."""

    def __init__(self, before: float):
        self.start = time.perf_counter() - before

    def __call__(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self.start


def _order(rows: Rows, course: Course, epoch: int):  # type: ignore[no-untyped-def]
    settings = course.settings
    return epoch_order(
        rows, seed=settings.train.seed, epoch=epoch, global_batch=course.batch.global_batch,
        shuffle=settings.data.shuffle, by_length=settings.data.objective == "completion",
    )  # fmt: skip


def position(progress: Progress, course: Course, examples: int) -> dict[str, Any]:
    """The columns that every record shares; `epoch` is the number of passes done, as a fraction."""
    epochs, steps = divmod(progress.step, course.steps_per_epoch)
    share = min(steps * course.batch.global_batch, examples) / examples
    return {
        "step": progress.step, "epoch": epochs + share, "samples": progress.samples, "tokens": progress.tokens,
        "time": progress.seconds,
    }  # fmt: skip


def _evaluate(
    engine: Engine, data: Prepared, course: Course, progress: Progress, clock: Clock, interrupted: Callable[[], bool]
) -> tuple[Progress, EvalRecord]:
    loss, counted = evaluate(engine, data.val, course.settings.train.eval_batch, interrupted)
    if not math.isfinite(loss):
        raise NotFinite(f"validation loss {loss}")
    at = position(progress, course, len(data.train)) | {"time": clock()}
    record = EvalRecord(**at, loss=loss, perplexity=perplexity(loss), eval_tokens=counted)
    best = progress.best
    if best is None or loss < best.loss:
        best = Best(step=progress.step, epoch=record.epoch, loss=loss)
    fell = progress.mark is None or loss < progress.mark - course.settings.train.min_delta
    progress = replace(progress, mark=loss if fell else progress.mark, stale=0 if fell else progress.stale + 1)
    return replace(progress, val_loss=loss, val_step=progress.step, best=best), record
