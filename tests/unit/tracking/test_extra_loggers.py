"""Second sinks: the rows that W&B gets, under the same names, read back from TensorBoard's and Trackio's own stores."""

import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_runs import make_metadata, make_records

from trainer.config.errors import UserError
from trainer.config.runtime_schema import OutputSettings
from trainer.tracking.extra_loggers import FailSafeLogger, check_loggers, start_extra_loggers
from trainer.tracking.records import EventRecord, Record
from trainer.tracking.wandb_keys import AXES, wandb_row

METADATA = make_metadata("lora")
RECORDS = make_records(METADATA)  # 90 steps in 3 epochs, 4 evaluations, 3 means, the end
EXPECTED_VALUES = {
    (name, row.step): value
    for row in RECORDS
    if not isinstance(row, EventRecord)
    for name, value in wandb_row(row).items()
}


def log_records(loggers: list[FailSafeLogger], records: list[Record]) -> None:
    for record in records:
        for logger in loggers:
            logger.log(record)
    for logger in loggers:
        logger.close(0)


def log_in_two_parts(name: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run that is killed after step 40, with its newest checkpoint at step 30, and then resumed."""
    caplog.set_level("INFO", "trainer")
    for rows, resume_step in (([r for r in RECORDS if r.step <= 40], -1), ([r for r in RECORDS if r.step > 30], 30)):
        log_records(start_extra_loggers([name], METADATA, folder, resume_step=resume_step), rows)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("trainer")]
    assert f"`{name} " in messages[0]
    assert len(messages) == 2, "nothing went wrong"


def assert_logged_once(actual: dict[tuple[str, int], list[float]], expected: Any = EXPECTED_VALUES) -> None:
    """`actual`: all values that a store has of a name at a step."""
    assert {key: values[-1] for key, values in actual.items() if key in EXPECTED_VALUES} == expected
    assert all(len(values) == 1 for (name, _), values in actual.items() if name not in AXES)


def test_tensorboard_has_every_record_once_also_after_a_resume(tmp_path, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_in_two_parts("tensorboard", tmp_path, caplog)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    actual: dict[tuple[str, int], list[float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            actual.setdefault((name, event.step), []).append(event.value)
    assert set(actual) == set(EXPECTED_VALUES)
    assert_logged_once(actual, pytest.approx(EXPECTED_VALUES, rel=1e-7))  # in float32


def test_trackio_has_every_record_once_also_after_a_resume(tmp_path, monkeypatch, caplog):
    for module in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)  # it reads its folder when it is imported
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    log_in_two_parts("trackio", tmp_path / "run", caplog)
    (store,) = tmp_path.glob("*.db")
    with sqlite3.connect(store) as connection:
        result = connection.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
    actual: dict[tuple[str, int], list[Any]] = {}
    for step, text in result:
        for name, value in json.loads(text).items():
            actual.setdefault((name, step), []).append(value)
    assert_logged_once(actual)


def test_an_extra_logger_that_fails_is_reported_once_and_dropped(caplog):
    calls: list[int] = []

    class Broken:
        def log(self, record: Record) -> None:
            calls.append(record.step)
            raise OSError("no space left")

        def close(self, exit_code: int) -> None:
            raise AssertionError("it was left out")

    log_records([FailSafeLogger("tensorboard", Broken)], RECORDS)
    assert len(calls) == 1
    assert caplog.messages == [
        "tensorboard stopped working (no space left); going on without it, metrics.jsonl has every row"
    ]


def test_an_extra_logger_that_is_not_installed_is_one_line(monkeypatch):
    check_loggers(OutputSettings(report_to=("tensorboard", "trackio")))
    monkeypatch.setattr("trainer.tracking.extra_loggers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--report-to trackio: it is not installed; pip install -e '\.\[trackio\]'"):
        check_loggers(OutputSettings(report_to=("trackio",)))
