"""The test split: evaluated before the first step, for what training gains, and at the weights that are exported."""

from pathlib import Path

from trainer.config.errors import TrainingError
from trainer.data.dataset import PreparedDataset
from trainer.distributed.engine import Engine
from trainer.tracking.eval_records import EVAL_RECORDS_FILE, append_evaluation, evaluation_table
from trainer.tracking.records import EventRecord
from trainer.training.checkpoint import Checkpoint
from trainer.training.evaluation import Evaluation, evaluate
from trainer.training.run_plan import RunPlan


def evaluate_test(
    plan: RunPlan, data: PreparedDataset, engine: Engine, *, step: int, elapsed_seconds: float
) -> EventRecord | None:
    """The event of the test loss, whose rows rank 0 writes; None where there is no test. All ranks must call."""
    if not len(data.test):
        return None
    batch_size, num_bytes = plan.settings.train.eval_batch, data.num_target_bytes("test")
    evaluation = evaluate(engine, data.test, batch_size, num_bytes=num_bytes)
    plan.dist_context.on_rank_zero(lambda: _write_rows(Path(plan.settings.run_folder), data, step, evaluation))
    bits = f", {evaluation.bits_per_byte:.4f} bits per byte" if evaluation.bits_per_byte is not None else ""
    message = f"test loss {evaluation.loss:.4f} nats per token{bits} over {len(data.test)} rows, with the weights of "
    facts = {
        "step": step, "loss": evaluation.loss, "bits_per_byte": evaluation.bits_per_byte,
        "num_target_tokens": evaluation.num_target_tokens, "num_rows": len(data.test),
    }  # fmt: skip
    return EventRecord(
        event="test_evaluation", step=step, message=f"{message}step {step}", time=elapsed_seconds, facts=facts
    )


def load_chosen_weights(engine: Engine, chosen: Checkpoint) -> None:
    """Put the weights of an earlier checkpoint into the engine, where nothing is trained any more."""
    state = chosen.train_state
    engine.state.load_state_dict(
        chosen.tensor_reader(engine.dist_context.device), state.step - state.skipped_steps,
        chosen.metadata.get("loss_scale"),
    )  # fmt: skip


def _write_rows(folder: Path, data: PreparedDataset, step: int, evaluation: Evaluation) -> None:
    try:
        rows = data.row_info("test")
    except ValueError as error:
        raise TrainingError(str(error)) from error
    table = evaluation_table(rows, step=step, split="test", nll=evaluation.row_nll)
    append_evaluation(folder / EVAL_RECORDS_FILE, table)
