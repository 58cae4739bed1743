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

from trainer.config.batch_config import BatchConfig
from trainer.config.errors import TrainingError
from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset
from trainer.data.sampler import PAD_ID, MicroBatch, epoch_order, step_batches, step_counts
from trainer.data.token_dataset import TokenDataset
from trainer.distributed.engine import Engine, StepResult
from trainer.distributed.steppers import NonFiniteError
from trainer.tracking.records import EpochRecord, EvalRecord, EventRecord, Record, StepRecord, perplexity
from trainer.training.checkpoint import BestCheckpoint, CheckpointManager, TrainState
from trainer.training.evaluation import StopRequested, evaluate
from trainer.training.lr_schedule import learning_rate


@dataclass(frozen=True, kw_only=True)
class TrainSchedule:
    """How far and in which strides: what the loop needs of a plan."""

    settings: Settings
    batch: BatchConfig
    total_steps: int
    steps_per_epoch: int

    def is_due(self, every: str, step: int) -> bool:
        """Whether something done `every` N steps, every epoch or never is due after `step`; always at the end."""
        if step == self.total_steps:
            return True
        stride = {"epoch": self.steps_per_epoch, "never": self.total_steps}.get(every) or int(every)
        return step % stride == 0

    def no_boundary_at(self, step: int) -> bool:
        """Whether nothing is due after `step`: no evaluation, no checkpoint, no end."""
        output = self.settings.output
        is_epoch_end = step % self.steps_per_epoch == 0
        return not (is_epoch_end or self.is_due(output.eval_every, step) or self.is_due(output.save_every, step))

    def early_stopping_triggered(self, state: TrainState) -> bool:
        """Whether the validation loss has not fallen for as many evaluations as --early-stop allows."""
        patience = self.settings.train.patience
        return patience is not None and state.evals_without_improvement >= patience

    def is_done(self, state: TrainState) -> bool:
        """Whether this was the last step, and nothing that is due after it is still to come."""
        return not state.eval_pending and (state.step >= self.total_steps or self.early_stopping_triggered(state))


def train(
    engine: Engine,
    data: PreparedDataset,
    schedule: TrainSchedule,
    state: TrainState,
    checkpoint_manager: CheckpointManager,
    should_stop: Callable[[], bool],
    add_data_time: Callable[[float], None] = lambda seconds: None,
) -> Generator[Record, None, TrainState]:
    """Run from `state` to the last step, or to an interruption, and return where it ended.

    `add_data_time` is told how long each step's rows took to be drawn.

    Raises TrainingError, after saving the last finite state, on NaN or infinity.
    """
    output = schedule.settings.output
    stopwatch = Stopwatch(state.elapsed_seconds)
    launcher = StepLauncher(engine, data, schedule, should_stop, add_data_time)
    next_step, stop_requested, last_saved_step = None, False, state.step
    if state.eval_pending:  # a run that begins is evaluated first; one that was stopped had no time for what was due
        state, stop_requested = yield from _run_due_actions(engine, data, schedule, state, stopwatch, should_stop)
        if state.step and not stop_requested:
            checkpoint_manager.update_train_state(state)
    while not ((stop_requested and next_step is None) or schedule.is_done(state)):
        in_flight = next_step or launcher.launch(state.step)
        should_launch_next = (
            engine.supports_steps_in_flight and not stop_requested and schedule.no_boundary_at(state.step + 1)
        )
        next_step = launcher.launch(state.step + 1) if should_launch_next else None
        try:
            result = in_flight.wait()
        except NonFiniteError as error:
            dump_name = checkpoint_manager.dump_batch(state.step + 1, in_flight.micro_batches)
            if state.step > last_saved_step:
                checkpoint_manager.save(engine, state)
            message = f"step {state.step + 1}: {error}; the weights are those after step {state.step}"
            message += f", the rows are in {dump_name}"
            yield EventRecord(
                event="not_finite",
                step=state.step + 1,
                message=message,
                time=stopwatch(),
                facts={"rows": in_flight.row_indices},
            )
            raise TrainingError(f"{message}; {_NON_FINITE_HINT}") from error

        stop_requested = stop_requested or result.stop_requested
        state = replace(
            state, step=state.step + 1, examples_seen=state.examples_seen + len(in_flight.row_indices),
            tokens_seen=state.tokens_seen + in_flight.num_tokens, epoch_loss_sum=state.epoch_loss_sum + result.loss_sum,
            epoch_target_tokens=state.epoch_target_tokens + in_flight.num_target_tokens, elapsed_seconds=stopwatch(),
            skipped_steps=state.skipped_steps + result.was_skipped, eval_pending=True,
        )  # fmt: skip
        yield StepRecord(
            **record_axes(state, schedule, len(data.train)), loss=result.loss_sum / in_flight.num_target_tokens,
            lr=in_flight.lr,
            grad_norm=result.grad_norm, tokens_per_second=in_flight.num_tokens / launcher.lap_seconds(in_flight),
        ) if not result.was_skipped else EventRecord(
            event="skipped_step", step=state.step, time=stopwatch(),
            message=f"step {state.step}: gradient overflow in fp16, update skipped and loss scale lowered",
        )  # fmt: skip
        if next_step is not None:  # nothing is due, and the weights are no longer those after this step
            state = replace(state, eval_pending=False)
            continue
        if not stop_requested:
            state, stop_requested = yield from _run_due_actions(engine, data, schedule, state, stopwatch, should_stop)
        is_best = output.export == "best" and state.best is not None and state.best.step == state.step
        if stop_requested or is_best or schedule.is_done(state) or schedule.is_due(output.save_every, state.step):
            state = replace(state, elapsed_seconds=stopwatch())
            checkpoint_manager.save(engine, state)
            last_saved_step = state.step
    if stop_requested:
        message = f"stopped by a signal after step {state.step}; --resume goes on from there"
        yield EventRecord(event="interrupted", step=state.step, message=message, time=stopwatch())
    return state


@dataclass(frozen=True, kw_only=True)
class StepInFlight:
    """A step that the engine has been asked for."""

    micro_batches: list[MicroBatch]  #: this rank's
    row_indices: list[int]  #: of the whole global batch
    num_tokens: int
    num_target_tokens: int  #: targets among them
    lr: float
    start_time: float
    wait: Callable[[], StepResult]  #: waits for it; raises NonFiniteError


class StepLauncher:
    """Draws a step's rows and has the engine begin with it."""

    def __init__(
        self, engine: Engine, data: PreparedDataset, schedule: TrainSchedule, should_stop: Callable[[], bool],
        add_data_time: Callable[[float], None],
    ):  # fmt: skip
        self.engine, self.data, self.schedule, self.should_stop, self.add_data_time = (
            engine,
            data,
            schedule,
            should_stop,
            add_data_time,
        )
        self._permutation: Any = None
        self._epoch = -1
        self._last_end_time = 0.0

    def launch(self, step: int) -> StepInFlight:
        """The step after `step` others."""
        draw_start_time = time.perf_counter()
        schedule, batch, train_settings = self.schedule, self.schedule.batch, self.schedule.settings.train
        epoch, step_in_epoch = divmod(step, schedule.steps_per_epoch)
        if self._permutation is None or self._epoch != epoch:
            self._permutation, self._epoch = _epoch_permutation(self.data.train, schedule, epoch), epoch
        micro_batches = step_batches(
            self.data.train, self._permutation, step_in_epoch, batch, self.engine.dist_context.rank, PAD_ID
        )
        num_examples, num_tokens, num_target_tokens = step_counts(
            self.data.train, self._permutation, step_in_epoch, batch.global_batch
        )
        lr = learning_rate(
            step, peak_lr=train_settings.lr, warmup_steps=train_settings.warmup_steps, total_steps=schedule.total_steps
        )
        start_time = time.perf_counter()
        self.add_data_time(start_time - draw_start_time)
        loss_sums = [
            self.engine.forward_backward(micro_batch, step=step, num_target_tokens=num_target_tokens)
            for micro_batch in micro_batches
        ]
        try:
            wait = self.engine.launch_step(lr, loss_sums, should_stop=self.should_stop())
        except NonFiniteError as error:
            wait = _deferred_error(error)
        row_indices = self._permutation[step_in_epoch * batch.global_batch :][:num_examples].tolist()
        return StepInFlight(
            micro_batches=micro_batches,
            row_indices=row_indices,
            num_tokens=num_tokens,
            num_target_tokens=num_target_tokens,
            lr=lr,
            start_time=start_time,
            wait=wait,
        )

    def lap_seconds(self, in_flight: StepInFlight) -> float:
        """Seconds that a step took which has just been told of: since it began, or since the one before it ended."""
        start_time, self._last_end_time = max(in_flight.start_time, self._last_end_time), time.perf_counter()
        return self._last_end_time - start_time


def _deferred_error(error: NonFiniteError) -> Callable[[], StepResult]:
    def wait() -> StepResult:
        raise error

    return wait


_NON_FINITE_HINT = "a lower --lr or --precision fp32 may help"


def _run_due_actions(
    engine: Engine,
    data: PreparedDataset,
    schedule: TrainSchedule,
    state: TrainState,
    stopwatch: "Stopwatch",
    should_stop: Callable[[], bool],
) -> Generator[Record, None, tuple[TrainState, bool]]:
    """Evaluation and the epoch's row, where due after a step. Returns (state, whether the run is to stop first)."""
    if schedule.is_due(schedule.settings.output.eval_every, state.step):
        try:
            state, record = _evaluate(engine, data, schedule, state, stopwatch, should_stop)
        except StopRequested:
            return state, True
        except NonFiniteError as error:
            message = f"evaluation after step {state.step}: {error}; the checkpoints before it are whole"
            yield EventRecord(event="not_finite", step=state.step, message=message, time=stopwatch())
            raise TrainingError(f"{message}; {_NON_FINITE_HINT}") from error
        yield record
    is_epoch_end = state.step % schedule.steps_per_epoch == 0
    is_early_stop = schedule.early_stopping_triggered(state) and state.step < schedule.total_steps
    if state.step and (is_epoch_end or is_early_stop or state.step == schedule.total_steps):
        axes = record_axes(state, schedule, len(data.train)) | {"time": stopwatch()}
        yield EpochRecord(**axes, train_loss=state.epoch_loss_sum / state.epoch_target_tokens)
        if is_epoch_end:  # else a longer schedule may go on within the epoch
            state = replace(state, epoch_loss_sum=0.0, epoch_target_tokens=0)
    if is_early_stop:
        yield _early_stop_event(schedule, state, stopwatch())
    return replace(state, eval_pending=False), False


def _early_stop_event(schedule: TrainSchedule, state: TrainState, elapsed_seconds: float) -> EventRecord:
    train_settings, best = schedule.settings.train, state.best
    assert best is not None, "evaluated"
    margin = f" by more than {train_settings.min_delta:g}" if train_settings.min_delta else ""
    evaluations = (
        "1 evaluation"
        if state.evals_without_improvement == 1
        else f"{state.evals_without_improvement} evaluations in a row"
    )
    message = (
        f"stopped early after step {state.step} of {schedule.total_steps}: {evaluations} did not lower "
        f"the validation loss{margin} (best {best.loss:.4f} at step {best.step})"
    )
    details = {
        "patience": train_settings.patience,
        "min_delta": train_settings.min_delta,
        "stale": state.evals_without_improvement,
        "best": vars(best),
    }
    return EventRecord(event="early_stop", step=state.step, message=message, time=elapsed_seconds, facts=details)


class Stopwatch:
    """Seconds since the run began, going on from where a resumed run stood."""

    def __init__(self, elapsed_seconds: float):
        self.start_time = time.perf_counter() - elapsed_seconds

    def __call__(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self.start_time


def _epoch_permutation(dataset: TokenDataset, schedule: TrainSchedule, epoch: int):  # type: ignore[no-untyped-def]
    settings = schedule.settings
    return epoch_order(
        dataset, seed=settings.train.seed, epoch=epoch, global_batch=schedule.batch.global_batch,
        shuffle=settings.data.shuffle, group_by_length=settings.data.objective == "completion",
    )  # fmt: skip


def record_axes(state: TrainState, schedule: TrainSchedule, num_examples: int) -> dict[str, Any]:
    """The columns that every record shares; `epoch` is the number of passes done, as a fraction."""
    epochs, steps = divmod(state.step, schedule.steps_per_epoch)
    fraction = min(steps * schedule.batch.global_batch, num_examples) / num_examples
    return {
        "step": state.step, "epoch": epochs + fraction, "samples": state.examples_seen, "tokens": state.tokens_seen,
        "time": state.elapsed_seconds,
    }  # fmt: skip


def _evaluate(
    engine: Engine,
    data: PreparedDataset,
    schedule: TrainSchedule,
    state: TrainState,
    stopwatch: Stopwatch,
    should_stop: Callable[[], bool],
) -> tuple[TrainState, EvalRecord]:
    evaluation = evaluate(
        engine, data.val, schedule.settings.train.eval_batch, should_stop, num_bytes=data.num_target_bytes("val")
    )
    loss = evaluation.loss
    if not math.isfinite(loss):
        raise NonFiniteError(f"validation loss {loss}")
    axes = record_axes(state, schedule, len(data.train)) | {"time": stopwatch()}
    record = EvalRecord(
        **axes, loss=loss, perplexity=perplexity(loss), eval_tokens=evaluation.num_target_tokens,
        bits_per_byte=evaluation.bits_per_byte, row_nll=evaluation.row_nll,
    )  # fmt: skip
    best = state.best
    if best is None or loss < best.loss:
        best = BestCheckpoint(step=state.step, epoch=record.epoch, loss=loss)
    has_improved = state.best_for_patience is None or loss < state.best_for_patience - schedule.settings.train.min_delta
    state = replace(
        state,
        best_for_patience=loss if has_improved else state.best_for_patience,
        evals_without_improvement=0 if has_improved else state.evals_without_improvement + 1,
    )
    return replace(state, val_loss=loss, val_step=state.step, best=best), record
