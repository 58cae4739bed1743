"""Loggers that a run can do without: no failure costs the run."""

from types import SimpleNamespace

import pytest
from helpers.fake_runs import make_metadata, make_records

from trainer.config.errors import UserError
from trainer.config.settings import OutputSettings
from trainer.tracking.wandb_logger import OptionalLogger, check_wandb, should_send_model

RECORDS = make_records(make_metadata("lora"))


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

    logger = OptionalLogger(start)
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
    assert [message.partition(";")[0] for message in caplog.messages] == ["W&B failed (the service is)"]


def test_the_model_is_sent_to_wandb_where_the_trainers_own_variable_says_so(monkeypatch):
    for value, is_sent in (("", False), ("false", False), ("end", True)):
        monkeypatch.setenv("WANDB_LOG_MODEL", value)
        assert should_send_model() is is_sent
    monkeypatch.setenv("WANDB_LOG_MODEL", "checkpoint")
    with pytest.raises(
        UserError, match=r"WANDB_LOG_MODEL checkpoint: expected end \(the exported model is sent\) or f"
    ):
        check_wandb(OutputSettings())
