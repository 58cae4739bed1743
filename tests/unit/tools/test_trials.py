"""A trial is run by one worker at a time, taken up where a dead one left it, and its result is written once."""

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.fake_runs import make_run_folder
from helpers.study_rules import make_candidate, make_rule

from trainer.config.cli import parse_args
from trainer.config.errors import UserError
from trainer.report.judge import Margin
from trainer.report.page import json_text
from trainer.tools.processes import Slot
from trainer.tools.study import trials
from trainer.tools.study.rule import read_rule, write_rule
from trainer.tools.study.search import TrialSpec
from trainer.tools.study.study import open_study
from trainer.tools.study.trials import (
    MAX_FAILURES,
    Trial,
    finish_trial,
    read_results,
    read_trials,
    run_argv,
    run_folder,
    start_trial,
)

RULE, SLOT = make_rule(), Slot(gpus=(), num_threads=1)
SPEC = TrialSpec(phase="search", candidate=make_candidate(), num_steps=16, seed=1)


@pytest.fixture
def exit_codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The runs that were started end with these, the first one first."""
    codes: list[int] = []

    def start(slot: Slot, argv: Any, folder: Path, *, group: str) -> Any:
        (folder / "log").write_text("error: out of memory\n")
        return SimpleNamespace(exitcode=codes.pop(0))

    monkeypatch.setattr(trials, "start_run", start)
    return codes


def run_trial(folder: Path, *, is_stopping: bool = False) -> Trial:
    running = start_trial(folder, RULE, SLOT, [SPEC])
    assert running is not None
    finish_trial(folder, RULE, running, is_stopping=is_stopping)
    return read_trials(folder)[SPEC.name]


def test_a_finished_trial_is_not_run_again_and_a_finished_run_is_taken_for_its_result(tmp_path, exit_codes):
    make_run_folder(run_folder(tmp_path, SPEC), losses={0: 3.0, 3: 1.5})
    assert run_trial(tmp_path).loss == 1.5, "its worker died between the end of the run and the note of it"
    assert read_results(tmp_path) == {SPEC.name: 1.5}
    assert start_trial(tmp_path, RULE, SLOT, [SPEC]) is None
    for content in ("", "[]", "{", '{"loss": "x"}', "[" * 100_000, "9" * 5000):
        (tmp_path / "trials" / SPEC.name / "trial.json").write_text(content)
        assert read_results(tmp_path) == {}
        assert run_trial(tmp_path).loss == 1.5, "a damaged state is made anew of the run folder"


def test_a_trial_that_fails_is_tried_again_and_a_study_that_is_stopped_is_no_failure(tmp_path, exit_codes):
    make_run_folder(run_folder(tmp_path, SPEC), finished=False)
    exit_codes += [-9, 143, -15, 1, 1]
    for is_stopping, num_failures in ((False, 1), (False, 1), (True, 1), (False, 2)):
        trial = run_trial(tmp_path, is_stopping=is_stopping)
        assert (trial.num_failures, trial.is_finished) == (num_failures, False)
    trial = run_trial(tmp_path)
    assert (trial.num_failures, trial.failure) == (MAX_FAILURES, "out of memory")
    assert math.isnan(trial.result), "a failure that says nothing about its settings"
    dead = Trial(rule_sha256=RULE.sha256, num_failures=MAX_FAILURES)  # its workers died
    (tmp_path / "trials" / SPEC.name / "trial.json").write_text(dead.model_dump_json())
    assert run_trial(tmp_path).failure == "failed, or its worker died, 3 times"


def test_a_file_system_without_locks_is_refused(tmp_path, exit_codes, monkeypatch):
    monkeypatch.setattr("trainer.tracking.run_lock._lock", lambda file: False)
    with pytest.raises(UserError, match=r"this file system has no locks; put the study on another one \(--output-dir"):
        start_trial(tmp_path, RULE, SLOT, [SPEC])


def test_a_rule_with_a_path_that_is_not_utf_8_is_read_back_as_it_was(tmp_path):
    rule = make_rule(train_argv=("--data", os.fsdecode(b"events\xff.csv")))
    write_rule(tmp_path, rule, working_dir=os.fsdecode(b"/home/\xfe"))
    assert read_rule(tmp_path) == (rule, os.fsdecode(b"/home/\xfe"))
    assert json_text(rule.model_dump(mode="json")).encode()  # as the page holds it
    for name, value in (("data", "e2"), ("answer_seeds", (101, 102)), ("margin", Margin(kind="nats", value=0.02))):
        assert make_rule(**{name: value}).sha256 != make_rule().sha256, "any change changes its hash"


def test_trials_of_another_rule_are_refused(tmp_path, exit_codes):
    write_rule(tmp_path, RULE, working_dir=os.getcwd())
    exit_codes += [-9]
    run_trial(tmp_path)
    assert open_study(tmp_path) == (tmp_path, RULE)
    (tmp_path / "rule.json").unlink()
    trial_folder = (tmp_path / "trials").rename(tmp_path.with_name(f"{tmp_path.name}-trials"))
    write_rule(tmp_path, make_rule(data="e2"), working_dir=os.getcwd())
    trial_folder.rename(tmp_path / "trials")
    with pytest.raises(UserError, match=f"was run by the rule {RULE.sha256[:12]}, rule.json is .*: it was changed"):
        open_study(tmp_path)


def test_full_is_run_without_the_flags_that_are_about_adapters():
    flags = ["--quant=nf4", "--quant-double", "--adapter=dora", "--modules-to-save=wte", "--lora-alpha=32"]
    full, lora = (parse_args(run_argv(method, flags)).settings for method in ("full", "lora"))
    assert (full.model.quant, full.lora.modules_to_save) == (None, ())
    assert (lora.model.quant_double, lora.lora.adapter, lora.lora.modules_to_save) == (True, "dora", ("wte",))
