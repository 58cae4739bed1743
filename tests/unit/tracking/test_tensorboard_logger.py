"""`--report-to tensorboard`: the rows that W&B gets, under the same names, read back from the event files."""

import pytest
import torch.utils.tensorboard
from helpers.fake_runs import make_metadata, make_records

from trainer.config.errors import UserError
from trainer.config.settings import OutputSettings
from trainer.tracking.records import Record
from trainer.tracking.tensorboard_logger import TensorBoardLogger, check_loggers
from trainer.tracking.wandb_keys import AXES, wandb_row

METADATA = make_metadata("lora")
RECORDS = make_records(METADATA)  # 90 steps in 3 epochs, 4 evaluations, 3 means, the end
EXPECTED_VALUES = {(name, row.step): value for row in RECORDS for name, value in wandb_row(row).items()}


def log_records(logger: TensorBoardLogger, records: list[Record]) -> None:
    for record in records:
        logger.log(record)
    logger.close(0)


def test_tensorboard_has_every_record_once_also_after_a_resume(tmp_path, caplog):
    """A run that is killed after step 40, with its newest checkpoint at step 30, and then resumed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    caplog.set_level("INFO", "trainer")
    for rows, resume_step in (([r for r in RECORDS if r.step <= 40], -1), ([r for r in RECORDS if r.step > 30], 30)):
        log_records(TensorBoardLogger(METADATA, tmp_path, resume_step=resume_step), rows)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("trainer")]
    assert "`tensorboard --logdir" in messages[0]
    assert len(messages) == 2, "nothing went wrong"
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    actual: dict[tuple[str, int], list[float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            actual.setdefault((name, event.step), []).append(event.value)
    last_values = {key: values[-1] for key, values in actual.items()}
    assert last_values == pytest.approx(EXPECTED_VALUES, rel=1e-7)  # in float32
    assert all(len(values) == 1 for (name, _), values in actual.items() if name not in AXES)


def test_an_extra_logger_that_fails_is_reported_once_and_dropped(tmp_path, monkeypatch, caplog):
    calls: list[int] = []

    class BrokenWriter:
        def __init__(self, *args, **options):
            pass

        def add_text(self, *args):
            pass

        def add_scalar(self, name, value, step):
            calls.append(step)
            raise OSError("no space left")

        def close(self):
            raise AssertionError("it was dropped")

    monkeypatch.setattr(torch.utils.tensorboard, "SummaryWriter", BrokenWriter)
    log_records(TensorBoardLogger(METADATA, tmp_path, resume_step=-1), RECORDS)
    assert len(calls) == 1
    assert caplog.messages == [
        "tensorboard stopped working (no space left); going on without it, metrics.jsonl has every row"
    ]


def test_an_extra_logger_that_is_not_installed_is_one_line(monkeypatch):
    check_loggers(OutputSettings(report_to=("tensorboard",)))
    monkeypatch.setattr("trainer.tracking.tensorboard_logger.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--report-to tensorboard: it is not installed; pip install -e '\.\[tensor"):
        check_loggers(OutputSettings(report_to=("tensorboard",)))
