"""Test and retained text: evaluated before the first step and at the weights that are exported.

The test says what training gains on records that nothing was chosen by; the retained text, of the base model's own
kind, what it forgets: its loss after less its loss before.
"""

from pathlib import Path
from typing import Literal

from trainer.config.errors import TrainingError
from trainer.data.dataset import PreparedDataset
from trainer.distributed.engine import Engine
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, write_evaluation
from trainer.tracking.records import EventRecord
from trainer.training.evaluation import Evaluation, evaluate
from trainer.training.run_plan import RunPlan
from trainer.training.train_state import TrainState

OtherSplit = Literal["test", "retain"]
OTHER_SPLITS: tuple[OtherSplit, ...] = ("test", "retain")  # beside validation
_NAMES = {"test": "test loss", "retain": "loss of retained text"}


def evaluate_other_split(
    plan: RunPlan, data: PreparedDataset, engine: Engine, split: OtherSplit, train_state: TrainState, step: int
) -> EventRecord | None:
    """The event of a split's loss, whose rows rank 0 writes; None where there is no such split. All ranks must call.

    `step`: of the weights that the engine holds, which may be those of an earlier checkpoint than `train_state`.
    """
    dataset = getattr(data, split)
    if not len(dataset):
        return None
    num_bytes = data.num_target_bytes(split)
    evaluation = evaluate(engine, dataset, plan.settings.train.eval_batch, num_bytes=num_bytes)
    folder = Path(plan.settings.run_folder)
    plan.dist_context.on_rank_zero(lambda: _write_rows(folder, data, split, step, evaluation))
    bits = f", {evaluation.bits_per_byte:.4f} bits per byte" if evaluation.bits_per_byte is not None else ""
    message = f"{_NAMES[split]} {evaluation.loss:.4f} nats per token{bits} over {len(dataset)} rows, with the weights "
    message += f"of step {step}"
    facts = {
        "step": step,
        "loss": evaluation.loss,
        "bits_per_byte": evaluation.bits_per_byte,
        "num_target_tokens": evaluation.num_target_tokens,
        "num_rows": len(dataset),
    }
    time = train_state.elapsed_seconds
    return EventRecord(event=f"{split}_evaluation", step=step, message=message, time=time, facts=facts)


def _write_rows(folder: Path, data: PreparedDataset, split: OtherSplit, step: int, evaluation: Evaluation) -> None:
    try:
        rows = data.row_info(split)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    write_evaluation(folder / EVAL_RECORDS_FOLDER, rows, step=step, split=split, nll=evaluation.row_nll)
