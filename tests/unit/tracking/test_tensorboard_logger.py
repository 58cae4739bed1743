"""TensorBoard gets the rows of W&B under the same names; what fails there does not cost the run."""

import pytest
from helpers.fake_runs import make_metadata, make_records
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.tracking.tensorboard_logger import TensorBoardLogger
from trainer.tracking.wandb_keys import AXES, wandb_row
from trainer.tracking.wandb_logger import OptionalLogger

RECORDS = make_records(make_metadata("lora"))  # 90 steps in 3 epochs, 4 evaluations, 3 means, the end


def test_tensorboard_has_every_record_once_also_after_a_resume_and_its_failure_is_one_line(tmp_path, caplog):
    """A run that is killed after step 40, with its newest checkpoint at step 30, and then resumed."""
    for rows, resume_step in (([r for r in RECORDS if r.step <= 40], None), ([r for r in RECORDS if r.step > 30], 30)):
        logger = TensorBoardLogger(tmp_path, resume_step)
        for record in rows:
            logger.log(record)
        logger.close(0)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    actual: dict[tuple[str, int], list[float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            actual.setdefault((name, event.step), []).append(event.value)
    expected = {(name, row.step): value for row in RECORDS for name, value in wandb_row(row).items()}
    assert {key: values[-1] for key, values in actual.items()} == pytest.approx(expected, rel=1e-7)  # in float32
    assert all(len(values) == 1 for (name, _), values in actual.items() if name not in AXES)
    (tmp_path / "file").touch()
    optional = OptionalLogger("TensorBoard", lambda: TensorBoardLogger(tmp_path / "file", None), tmp_path)
    optional.log(RECORDS[0])
    optional.close(0)
    message = caplog.messages[-1]
    assert message.startswith("TensorBoard failed (")
    assert message.endswith("; going on without it: metrics.jsonl has every row")
