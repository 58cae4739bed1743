"""One pass over an evaluation split: the loss of every row, the same however the rows are spread over ranks.

Beside validation there may be test records, which say what training gains on records that nothing was chosen by, and
retained text, of the base model's own kind: its loss after training less its loss before is what was forgotten.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config.errors import TrainingError
from trainer.data.dataset import PreparedDataset, TokenDataset
from trainer.data.sampler import eval_batches, eval_order
from trainer.distributed.engine import Engine
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, write_evaluation
from trainer.tracking.records import EventRecord, bits_per_byte
from trainer.training.run_plan import RunPlan
from trainer.training.schedule import TrainState

OtherSplit = Literal["test", "retain"]
OTHER_SPLITS: dict[OtherSplit, str] = {"test": "test loss", "retain": "loss of retained text"}  # beside validation


class StopRequested(Exception):
    """An evaluation was given up because the run is to stop."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The losses of one pass over all rows of a split."""

    row_nll: Sequence[float]  #: summed negative log-likelihood of each row in nats, in the split's order
    num_target_tokens: int
    num_bytes: int = 0  #: UTF-8 bytes of the targets, 0 where the text is not known

    @property
    def loss(self) -> float:
        """Nats per target token: the exact sum of all rows (`math.fsum`), divided once."""
        return math.fsum(self.row_nll) / self.num_target_tokens

    @property
    def bits_per_byte(self) -> float | None:
        return bits_per_byte(math.fsum(self.row_nll), self.num_bytes)


def evaluate(
    engine: Engine,
    dataset: TokenDataset,
    eval_batch_size: int,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    num_bytes: int = 0,
) -> Evaluation:
    """Evaluate all rows of `dataset`; every rank calls it and gets the whole result.

    Raises StopRequested, on all ranks alike, where any of them is to stop.
    """
    dist_context = engine.dist_context
    order = eval_order(dataset)
    batch_losses, row_indices = [], []  # losses stay on the device: nobody waits for one batch before the next
    for micro_batch in eval_batches(dataset, eval_batch_size, dist_context.rank, dist_context.world_size):
        if any(dist_context.all_gather_object(should_stop())):
            raise StopRequested
        indices = order[micro_batch.index : micro_batch.index + eval_batch_size]
        batch_losses.append(engine.evaluate(micro_batch)[: len(indices)])  # a rank without rows is fed a masked one
        row_indices += indices.tolist()
    local_losses = [loss for losses in batch_losses for loss in losses.tolist()]
    row_nll = [math.nan] * len(dataset)
    for rank_indices, rank_losses in dist_context.all_gather_object((row_indices, local_losses)):
        for index, loss in zip(rank_indices, rank_losses, strict=True):
            row_nll[index] = loss
    num_target_tokens = int(dataset.num_target_tokens().sum())
    return Evaluation(row_nll=row_nll, num_target_tokens=num_target_tokens, num_bytes=num_bytes)


def evaluate_other_splits(
    plan: RunPlan, data: PreparedDataset, engine: Engine, train_state: TrainState, *, step: int
) -> Iterator[EventRecord]:
    """The events of the test and retained losses, whose rows rank 0 writes. All ranks must call.

    `step`: of the weights that the engine holds, which may be those of an earlier checkpoint than `train_state`.
    """
    for split, name in OTHER_SPLITS.items():
        dataset = getattr(data, split)
        if not len(dataset):
            continue
        num_bytes = data.num_target_bytes(split)
        evaluation = evaluate(engine, dataset, plan.settings.train.eval_batch, num_bytes=num_bytes)
        plan.dist_context.on_rank_zero(lambda: _write_rows(plan, data, split, step, evaluation))  # noqa: B023
        bits = f", {evaluation.bits_per_byte:.4f} bits per byte" if evaluation.bits_per_byte is not None else ""
        yield EventRecord(
            event=f"{split}_evaluation",
            step=step,
            message=f"{name} {evaluation.loss:.4f} nats per token{bits} over {len(dataset)} rows, with the weights of "
            f"step {step}",
            time=train_state.elapsed_seconds,
            facts={
                "step": step,
                "loss": evaluation.loss,
                "bits_per_byte": evaluation.bits_per_byte,
                "num_target_tokens": evaluation.num_target_tokens,
                "num_rows": len(dataset),
            },
        )


def _write_rows(plan: RunPlan, data: PreparedDataset, split: OtherSplit, step: int, evaluation: Evaluation) -> None:
    try:
        rows = data.row_info(split)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    folder = Path(plan.settings.run_folder) / EVAL_RECORDS_FOLDER
    write_evaluation(folder, rows, step=step, split=split, nll=evaluation.row_nll)
