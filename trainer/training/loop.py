"""The steps and the evaluations of one run, as a stream of records.

Knows no mode, rank, file or logger: hands global batches to the engine, divides sums by counts, yields what happened.
"""

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

from trainer.config.errors import TrainingError
from trainer.data.dataset import PreparedDataset
from trainer.data.sampler import GlobalBatch
from trainer.distributed.engine import Engine, StepResult
from trainer.distributed.stepper import NonFiniteError
from trainer.tracking.records import (
    EpochRecord,
    EvalRecord,
    EventRecord,
    OtherEvalRecord,
    Record,
    StepRecord,
    perplexity,
)
from trainer.training.checkpoint import CheckpointManager
from trainer.training.evaluation import StopRequested, evaluate
from trainer.training.schedule import TrainSchedule, TrainState

_NON_FINITE_HINT = "a lower --lr or --precision fp32 may help"


def train(
    engine: Engine,
    data: PreparedDataset,
    schedule: TrainSchedule,
    state: TrainState,
    checkpoints: CheckpointManager,
    should_stop: Callable[[], bool],
    base_nll: Sequence[float] | None = None,
) -> Generator[Record, None, TrainState]:
    """Run from `state` to the last step, or until a rank should stop, and return where it ended. `base_nll`: the
    validation losses before the first step, where another run has evaluated the same base. Raises TrainingError, after
    saving the last finite state, on NaN or infinity."""
    state, start_time = replace(state, stop_requested=False), time.perf_counter() - state.elapsed_seconds

    def stopwatch() -> float:
        return time.perf_counter() - start_time

    batches = schedule.batches(data.train, engine.dist_context.rank)
    last_saved_step = state.step
    if state.eval_pending:  # a run that begins is evaluated first; one that was stopped had no time for what was due
        base_nll = None if state.step else base_nll
        state = yield from _run_due_actions(engine, data, schedule, state, stopwatch, should_stop, base_nll)
        if state.step and not state.stop_requested:
            checkpoints.update_train_state(state)
    while not (state.stop_requested or schedule.is_done(state)):
        try:
            until_boundary = batches(state.step, schedule.next_boundary(state.step))
            for batch, result in engine.run(until_boundary, schedule.lr, should_stop):
                state = state.after(batch, result, stopwatch())
                yield _step_record(schedule, state, batch, result)
        except NonFiniteError as error:
            step, rows = state.step + 1, error.batch.example_ids if error.batch else []
            if state.step > last_saved_step:
                yield _save(checkpoints, engine, state)
            message = f"step {step}: {error}; the weights are those after step {state.step}"
            yield EventRecord(event="not_finite", step=step, message=message, time=stopwatch(), facts={"rows": rows})
            raise TrainingError(f"{message}; {_NON_FINITE_HINT}") from error
        if not state.stop_requested:
            state = yield from _run_due_actions(engine, data, schedule, state, stopwatch, should_stop)
        if schedule.is_save_due(state):
            state = replace(state, elapsed_seconds=stopwatch())
            yield _save(checkpoints, engine, state)
            last_saved_step = state.step
    if state.stop_requested:
        where = f"after step {state.step}, checkpoint saved" if state.step else "before the first step"
        message = f"interrupted {where}; continue with the same command and --resume"
        yield EventRecord(event="interrupted", step=state.step, message=message, time=stopwatch())
    return state


def _save(checkpoints: CheckpointManager, engine: Engine, state: TrainState) -> EventRecord:
    """Save a checkpoint; its row comes after it, so that no row names one that is not there."""
    checkpoints.save(engine, state)
    return EventRecord(event="checkpoint", step=state.step, message="", time=state.elapsed_seconds)


def _step_record(schedule: TrainSchedule, state: TrainState, batch: GlobalBatch, result: StepResult) -> Record:
    if result.is_skipped:
        message = f"step {state.step}: gradient overflow in fp16, update skipped and loss scale lowered"
        return EventRecord(event="skipped_step", step=state.step, message=message, time=state.elapsed_seconds)
    return StepRecord(
        **schedule.record_axes(state),
        loss=result.loss_sum / batch.num_target_tokens,
        lr=result.lr,
        grad_norm=result.grad_norm,
        tokens_per_second=batch.num_tokens / result.elapsed_seconds,
    )


def _run_due_actions(
    engine: Engine,
    data: PreparedDataset,
    schedule: TrainSchedule,
    state: TrainState,
    stopwatch: Callable[[], float],
    should_stop: Callable[[], bool],
    row_nll: Sequence[float] | None = None,
) -> Generator[Record, None, TrainState]:
    """Evaluation, the epoch's row and early stopping, where due after a step; `stop_requested` where it was cut off."""
    settings, step = schedule.settings.train, state.step
    if schedule.is_eval_due(step):
        num_bytes, batch = data.metadata["val"].get("target_bytes", 0), settings.eval_batch
        try:
            results = {"": evaluate(engine, data.val, batch, should_stop, num_bytes=num_bytes, row_nll=row_nll)}
            for name, rows in data.val_sets.items():
                num_bytes = data.metadata[f"val-{name}"]["target_bytes"]
                results[name] = evaluate(engine, rows, batch, should_stop, num_bytes=num_bytes)
        except StopRequested:
            return replace(state, stop_requested=True)
        for evaluation in results.values():
            if not math.isfinite(perplexity(evaluation.loss)):  # no row of metrics.jsonl holds it
                message = f"evaluation after step {step}: validation loss {evaluation.loss}; checkpoints are whole"
                yield EventRecord(event="not_finite", step=step, message=message, time=stopwatch())
                raise TrainingError(f"{message}; {_NON_FINITE_HINT}")
        axes = schedule.record_axes(state) | {"time": stopwatch()}
        state = state.after_evaluation(results[""].loss, epoch=axes["epoch"])
        for val_set, evaluation in results.items():
            values: dict[str, Any] = {**axes, "loss": evaluation.loss, "perplexity": perplexity(evaluation.loss)}
            values |= {"eval_tokens": evaluation.num_target_tokens, "bits_per_byte": evaluation.bits_per_byte}
            if val_set:
                yield OtherEvalRecord(**values, val_set=val_set)
            else:
                yield EvalRecord(**values, row_nll=evaluation.row_nll)

    is_early_stop = schedule.is_stopped_early(state) and step < schedule.total_steps
    is_epoch_end = schedule.is_epoch_end(step)
    if step and (is_epoch_end or is_early_stop or step == schedule.total_steps):
        axes = schedule.record_axes(state) | {"time": stopwatch()}
        yield EpochRecord(**axes, train_loss=state.epoch_loss_sum / state.epoch_target_tokens)
        if is_epoch_end:  # else a longer schedule may go on within the epoch
            state = replace(state, epoch_loss_sum=0.0, epoch_target_tokens=0)

    if is_early_stop:
        assert state.best is not None, "evaluated"
        message = f"stopped early after step {step} of {schedule.total_steps}: no lower validation loss than "
        message += f"{state.best.loss:.4f} of step {state.best.step} since (--early-stop {settings.early_stop})"
        facts = {"patience": settings.early_stop, "best": vars(state.best)}
        yield EventRecord(event="early_stop", step=step, message=message, time=stopwatch(), facts=facts)
    return replace(state, eval_pending=False)
