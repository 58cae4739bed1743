"""Loggers that a run can do without: what TensorBoard and the profiler get, and that no failure costs the run."""

from types import SimpleNamespace

import pytest
from helpers.fake_runs import make_metadata, make_records

from trainer.config.errors import UserError
from trainer.config.settings import OutputSettings
from trainer.tracking.optional_loggers import OptionalLogger, ProfileLogger, TensorBoardLogger, check_loggers
from trainer.tracking.wandb_keys import AXES, wandb_row
from trainer.tracking.wandb_logger import should_send_model

METADATA = make_metadata("lora")
RECORDS = make_records(METADATA)  # 90 steps in 3 epochs, 4 evaluations, 3 means, the end


def test_tensorboard_has_every_record_once_also_after_a_resume(tmp_path, caplog):
    """A run that is killed after step 40, with its newest checkpoint at step 30, and then resumed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    caplog.set_level("INFO", "trainer")
    for rows, resume_step in (([r for r in RECORDS if r.step <= 40], -1), ([r for r in RECORDS if r.step > 30], 30)):
        logger = TensorBoardLogger(METADATA, tmp_path, resume_step=resume_step)
        for record in rows:
            logger.log(record)
        logger.close(0)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("trainer")]
    assert "`tensorboard --logdir" in messages[0]
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    actual: dict[tuple[str, int], list[float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            actual.setdefault((name, event.step), []).append(event.value)
    expected = {(name, row.step): value for row in RECORDS for name, value in wandb_row(row).items()}
    assert {key: values[-1] for key, values in actual.items()} == pytest.approx(expected, rel=1e-7)  # in float32
    assert all(len(values) == 1 for (name, _), values in actual.items() if name not in AXES)


@pytest.mark.parametrize(("num_steps", "message"), [(2, "before its step 4"), (3, "before its step 4"), (4, "of 1 st")])
def test_a_run_that_ends_while_it_is_profiled_says_what_there_is(num_steps, message, tmp_path, caplog):
    caplog.set_level("INFO", "trainer")
    profile_logger = ProfileLogger(tmp_path, 5)
    for record in RECORDS[: 1 + num_steps]:  # an evaluation, then steps
        profile_logger.log(record)
    profile_logger.close(0)
    assert message in caplog.text
    assert (tmp_path / "profile").exists() == (num_steps > 3)


@pytest.mark.parametrize("failing_call", ["start", "log", "close"])
def test_the_first_failure_of_an_optional_logger_is_one_line_and_ends_it(failing_call, caplog):
    calls, codes = [], []

    def call(name):
        calls.append(name)
        if name == failing_call:
            raise ConnectionResetError("the service is\ngone")

    def start():
        call("start")
        return SimpleNamespace(
            log=lambda record: call("log"), close=lambda exit_code: call("close") or codes.append(exit_code)
        )

    logger = OptionalLogger("W&B", start)
    for record in RECORDS[:2]:
        logger.log(record)
    logger.close(0)
    logger.close(0)
    assert (
        calls
        == {"start": ["start"], "log": ["start", "log", "close"], "close": ["start", "log", "log", "close"]}[
            failing_call
        ]
    )
    assert codes == [1] * (failing_call == "log"), "as a run that failed"
    assert caplog.messages == ["W&B failed (the service is); going on without it, metrics.jsonl has every row"]


def test_an_extra_logger_that_is_not_installed_is_one_line(monkeypatch):
    check_loggers(OutputSettings(report_to=("tensorboard", "wandb")))
    monkeypatch.setattr("trainer.tracking.optional_loggers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--report-to tensorboard: it is not installed; pip install -e '\.\[tensor"):
        check_loggers(OutputSettings(report_to=("tensorboard",)))


def test_the_model_is_sent_to_wandb_where_the_trainers_own_variable_says_so(monkeypatch):
    for value, is_sent in (("", False), ("false", False), ("end", True)):
        monkeypatch.setenv("WANDB_LOG_MODEL", value)
        assert should_send_model() is is_sent
    monkeypatch.setenv("WANDB_LOG_MODEL", "checkpoint")
    with pytest.raises(
        UserError, match=r"WANDB_LOG_MODEL checkpoint: expected end \(the exported model is sent\) or f"
    ):
        check_loggers(OutputSettings())
