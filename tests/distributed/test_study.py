"""A study whose runs are a stand-in for training: found whole after kills, joined, refused, answered."""

import contextlib
import errno
import html
import io
import json
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.fake_runs import write_eval_records
from helpers.process_groups import wait_until
from helpers.study_rules import make_rule as make_study_rule
from helpers.study_rules import write_stub_plan

from trainer.config.errors import UserError
from trainer.report import plots
from trainer.tools import processes
from trainer.tools.processes import make_slots
from trainer.tools.study import rule as rule_module
from trainer.tools.study import search, trials
from trainer.tools.study import study as study_module
from trainer.tools.study.rule import read_rule, write_rule
from trainer.tools.study.study import open_study, run_trials
from trainer.tools.study.trials import read_results, read_trials
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, read_evaluations

ROOT = Path(__file__).parents[2]

#: In place of launch/train.py: a bowl over the rate, a fixed loss for each test record. A rate above 0.3 diverges.
STUB = """
import json, math, os, sys, time
from pathlib import Path
flags = dict(zip(sys.argv[1:], sys.argv[2:]))
from helpers.fake_runs import make_metadata, make_records, write_eval_records
from trainer.tracking.records import to_line
out, lr = Path(flags["--output-dir"]), float(flags.get("--lr", 1e-3))
steps, seed = int(flags["--max-steps"]), int(flags.get("--seed", 42))
def note(word):
    with open(os.environ["STUB_LOG"], "a") as file:
        file.write(f"{word} {out.name}\\n")
is_resumed = (out / "run.json").exists()
note("resumed" if is_resumed else "began")
out.mkdir(parents=True, exist_ok=True)
metadata = make_metadata(
    flags["--mode"], seed=seed, name=out.name, resolved__lr=lr, resolved__steps_per_epoch=steps,
    data__fingerprint=os.environ.get("STUB_DATA", "d1" * 6),
)
(out / "run.json").write_text(json.dumps(metadata))
time.sleep(float(os.environ.get("STUB_SECONDS", "0")))
if lr > 0.3 or seed == int(os.environ.get("STUB_DIVERGES", 0)):
    event = {"kind": "event", "event": "not_finite", "message": "", "step": 3, "time": 1.0, "facts": {}}
    (out / "metrics.jsonl").write_text(json.dumps(event) + "\\n")
    print("error: step 3: loss nan", file=sys.stderr)
    sys.exit(1)
is_lora = flags["--mode"] == "lora"
loss = 2 + 0.3 * (math.log10(lr) - (-3 if is_lora else -4)) ** 2 + 20 / steps + 1e-3 * (seed % 7)
if flags.get("--export") != "none":
    levels = {0: 3.0, steps: 2.05 if is_lora else 2.0}
    losses = {step: [level + 0.01 * math.sin(n * seed + is_lora) for n in range(40)] for step, level in levels.items()}
    write_eval_records(out, losses, targets=[10 + n % 5 for n in range(40)], split="test")
records = make_records(
    metadata, losses={1: loss}, epochs=1, wall_seconds=steps * (0.3 if is_lora else 0.4),
    peak_memory_bytes=3 if is_lora else 4,
)
(out / "metrics.jsonl").write_text("".join(to_line(record) + "\\n" for record in records))
note("ended")
"""


def install_stub(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """A folder whose `study` is worked on by the stand-in, on grids of one rate a decade."""
    (folder / "launch").mkdir()
    (folder / "launch" / "train.py").write_text(STUB)
    patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    patch.setenv("STUB_LOG", str(folder / "log"))
    patch.setenv("CUDA_VISIBLE_DEVICES", "")
    patch.chdir(folder)
    patch_study(folder, patch, ["helpers.preload"])  # this process has one server for all
    return folder


def patch_study(folder: Path, patch: pytest.MonkeyPatch, preloaded: list[str]) -> None:
    patch.setattr(processes, "TRAIN_SCRIPT", folder / "launch" / "train.py")
    patch.setattr(processes, "PRELOADED_MODULES", preloaded)
    patch.setattr(study_module, "write_plan", write_stub_plan)
    patch.setattr(search, "RATES_PER_DECADE", 1)
    patch.setattr(rule_module, "NUM_CHOICE_SEEDS", 2)
    patch.setattr(trials, "NUM_ROUNDS", 2)
    patch.setattr(plots, "_render_svg", lambda *_: "<svg></svg>")  # most of the page's time


@pytest.fixture
def stub_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return install_stub(tmp_path, monkeypatch)


run_study = runpy.run_path(str(ROOT / "launch" / "study.py"))["main"]
make_rule = partial(make_study_rule, train_argv=("--data", "acled-demo"))
ARGV = ["--output-dir", "study", "--workers", "2", "--max-steps", "8"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(Where the stand-in has finished a `study`, what that printed); others work on copies."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        folder = install_stub(tmp_path_factory.mktemp("finished"), patch)
        assert run_study(ARGV) == 0
    rule_file = folder / "study" / "rule.json"
    rule_file.write_text(rule_file.read_text().replace(str(folder), "."))  # or copies would be worked on from here
    return folder, output.getvalue()


def read_answer(study: Path) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((study / "answer.json").read_text())
    return answer


def count_log(stub_dir: Path, word: str) -> Counter[str]:
    lines = (stub_dir / "log").read_text().splitlines()
    return Counter(line.split()[1] for line in lines if line.split()[0] == word and "-t" in line)  # not the timed runs


def test_a_study_answers_with_one_sentence_and_goes_on_to_nothing(finished, stub_dir, capsys, monkeypatch):
    folder, output = finished
    assert "\nLoRA (rank 8, lr 0.001) is worse than full (lr 0.0001) by 0.05" in output
    assert "seeds 101, 102 and 103, 8 steps; rates" in output
    assert "\nTime: 0.75x (0.3 s a step against 0.4 s, in alternation)\nMemory: 0.75x" in output
    assert set(count_log(folder, "ended").values()) == {1}
    study = Path(shutil.copytree(folder / "study", "study"))
    page = html.unescape((study / "report.html").read_text())
    assert "LoRA's time of a step: 0.75x full's (0.75 to 0.75 without one round, in" in page
    answer = read_answer(study)
    assert answer["answer"] == "worse"
    assert answer["study"]["rule_sha256"] == json.loads((study / "rule.json").read_text())["sha256"]
    shutil.rmtree(study / "trials")
    (study / "answer.json").unlink()
    assert run_study(ARGV) == 0
    assert read_answer(study)["sentence"] == answer["sentence"]
    assert not (stub_dir / "log").exists(), "nothing is run or timed again, though the record of the trials is lost"
    for run in (study / "runs").glob("answer-lora*/"):  # by record far from full, the same with each seed
        full_run = next(run.parent.glob(f"answer-full*{run.name[-5:]}/"))
        rows = read_evaluations(full_run / EVAL_RECORDS_FOLDER).query("step == 8")
        losses = (rows["nll"] + 3 * np.sin(7 * np.arange(len(rows)))) / rows["targets"]
        write_eval_records(run, {8: list(losses)}, targets=list(rows["targets"]), split="test")
    assert run_study(ARGV) == 3, "a margin that these records can never show"
    assert "with these test blocks no number of seeds resolves less than ±0." in capsys.readouterr().out
    assert run_study([*ARGV, "--margin", "5%"]) == 2
    assert "margin is 2 % of what full gained (by loss) there and " in capsys.readouterr().err
    monkeypatch.setenv("STUB_DATA", "e2" * 6)
    assert run_study(ARGV) == 2
    changed = "rule.json: data is d1d1d1d1d1d1 there and e2e2e2e2e2e2 now"
    assert changed in capsys.readouterr().err
    text = (study / "rule.json").read_text()
    (study / "rule.json").write_text(text.replace('"value": 0.02', '"value": 0.03'))
    assert run_study(["--join", "study"]) == 2
    assert "rule.json: was changed after the study began: its hash is" in capsys.readouterr().err


DRIVER = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_study
from pathlib import Path
test_study.patch_study(Path.cwd(), test_study.pytest.MonkeyPatch(), ["helpers.fake_runs", "helpers.study_rules"])
sys.exit(test_study.run_study(sys.argv[1:]))
"""


def start_study(*argv: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "STUB_SECONDS": "0.1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [1, pytest.param(5, marks=pytest.mark.sweep)])
def test_a_study_killed_at_random_and_joined_by_another_worker_equals_one_left_alone(finished, stub_dir, num_kills):
    rng, argv = random.Random(7), ["--output-dir", "killed", "--max-steps", "8"]
    for _ in range(num_kills):
        process = start_study(*argv)
        wait_until((stub_dir / "killed" / "rule.json").exists)
        time.sleep(rng.uniform(1, 3))
        process.kill()
        process.communicate()
    workers = [start_study(*argv), start_study("--join", "killed")]
    outputs = [process.communicate(timeout=300)[0] for process in workers]
    assert [process.returncode for process in workers] == [0, 0], outputs
    killed, alone = stub_dir / "killed", finished[0] / "study"
    assert read_results(killed) == read_results(alone)
    assert read_answer(killed)["sentence"] == read_answer(alone)["sentence"]
    assert set(count_log(stub_dir, "ended").values()) == {1}, "every trial came to its end once"


def test_a_machine_that_cannot_run_a_trial_or_has_other_data_leaves_no_result(stub_dir, monkeypatch):
    """And no failure of a trial: two are run at a time."""
    folder, rule = stub_dir / "study", make_rule(16, rungs=(16,))
    write_rule(folder, rule, working_dir=".")
    monkeypatch.setenv("STUB_DATA", "e2" * 8)
    for message in ("its data have the fingerprint e2e2e2e2e2e2, those that the", "s1: --data a.csv: no such file"):
        with pytest.raises(UserError, match=message):
            run_trials(folder, rule, make_slots(2, None), threading.Event(), print)
        assert not read_results(folder)
        assert {trial.num_failures for trial in read_trials(folder).values()} == {0}
        assert not list((folder / "runs").glob("*/run.json")), "or it could not be gone on with"
        script = "import sys; print('error: --data a.csv: no such file', file=sys.stderr); sys.exit(2)"
        (stub_dir / "launch" / "train.py").write_text(script)


def test_each_worker_has_its_own_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert [slot.gpus for slot in make_slots(2, 2)] == [("4", "5"), ("6", "7")]
    assert [slot.gpus for slot in make_slots(3, None)] == [("4",), ("5",), ("6",)]
    assert [slot.gpus for slot in make_slots(2, 0)] == [(), ()]
    with pytest.raises(UserError, match="--workers 3 x --gpus-per-trial 2: needs 6 GPUs, there are 4; lower one of"):
        make_slots(3, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [slot.gpus for slot in make_slots(2, None)] == [(), ()]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "1e-3"], "--lr=1e-3: the study sets it for each of its runs; expected --max-lr METHOD=LR, or none"),
        (["--margin", "0.02"], "--margin 0.02: expected a number above 0 and its unit, such as 2%"),
        (["--seeds", "1,2,3"], "--seeds 1: the search has it; the answer needs seeds of its own"),
        (["--seeds", "7,7"], "--seeds 7,7: expected one or more values, each only once"),
        (["--wandb-report", "alone"], "--wandb-report alone: expected ENTITY/PROJECT"),
        (["--join", "nowhere"], "nowhere: no study there"),
        (["--join", "nowhere", "--dry-run"], "--dry-run: not with --join"),
        (["--decide-by", "score:exact"], "--decide-by score:exact: the runs do not have it; add --score exact"),
        (["--decide-by", "score:exact", "--score", "exact", "--margin", "2%"], "--margin 2%: expected a number above"),
        (["--max-lr", "dora=1e-3"], "--max-lr dora=0.001: expected METHOD=LR with one of full, lora and a rate from"),
        (["--warmup-steps", "5"], "--warmup-steps 5: the short runs of a search might end before it"),
    ],
)
def test_a_mistake_in_a_study_is_one_line_and_exit_code_2(stub_dir, capsys, argv, message):
    assert run_study(argv) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {message}")
    assert output.err.count("\n") == 1
    assert not (stub_dir / "study").exists()


def test_a_storage_that_cannot_be_written_any_more_ends_the_study_in_one_line(stub_dir, capsys, monkeypatch):
    def fail(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(study_module, "start_trial", fail)
    assert run_study(["--output-dir", "study", "--max-steps", "8"]) == 2
    line = f"error: {stub_dir / 'study'}: cannot be written (No space left on device); make room, and the same command"
    assert capsys.readouterr().err == f"{line} goes on\n"


#: A file of a finished study, or of its first trials, and what stands in its place.
FILES = (
    *("rule.json", "timing.json", "answer.json", "report.html", "trials", "runs", "timing"),
    *("trials/SEARCH/trial.json", "trials/SEARCH/log", "trials/SEARCH/process", "trials/ANSWER/trial.json"),
    *("runs/SEARCH/run.json", "runs/SEARCH/metrics.jsonl", "runs/ANSWER", "runs/ANSWER/run.json"),
    *("runs/ANSWER/metrics.jsonl", "runs/ANSWER/eval_records"),
)
CONTENTS = (None, "pipe", "folder", "", "[]", "null", "{", "[" * 100_000, '{"rule": {}, "sha256": 3}')


def replace_file(study: Path, name: str, content: str | None) -> None:
    name = name.replace("SEARCH", "search-full-lr0.0001-t8-s1").replace("ANSWER", "answer-full-lr0.0001-t8-s101")
    path = study / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if content == "pipe":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(content)


EDITS = [(name, content) for name in FILES for content in CONTENTS]
DRAWN = random.Random(29).sample(EDITS, 12)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("edits", [DRAWN, pytest.param(EDITS, marks=pytest.mark.sweep)], ids=["drawn", "all"])
def test_no_content_of_a_studys_files_ends_in_a_traceback_a_wait_or_another_answer(finished, stub_dir, capsys, edits):
    """It is answered as before, or refused in one line."""
    whole = finished[0] / "study"
    for n, (name, value) in enumerate(edits):
        study, what = Path(shutil.copytree(whole, f"study-{n}")), f"{name} as {str(value)[:20]}"
        replace_file(study, name, value)
        capsys.readouterr()
        code = run_study(["--join", str(study)])
        error = capsys.readouterr().err
        if code == 0:
            assert read_answer(study)["sentence"] == read_answer(whole)["sentence"], what
        else:
            assert (code in (2, 3), error.count("\n"), error[:7]) == (True, 1, "error: "), f"{what}: {code} {error}"
        shutil.rmtree(study)


def test_an_answer_that_is_refused_has_its_own_exit_code_and_is_one_line(stub_dir, capsys, monkeypatch):
    monkeypatch.setenv("STUB_DIVERGES", "103")
    assert run_study(ARGV) == 3
    error = capsys.readouterr().err
    assert "refused to rank: full at 0.0001 diverged in 1 of 3 seeds; run the study at 1e-05 (" in error
    assert error.count("\n") == 1
    assert not (stub_dir / "study" / "answer.json").exists()


def test_a_folder_that_holds_something_else_is_refused(stub_dir):
    (stub_dir / "study").mkdir()
    (stub_dir / "study" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes.txt and no study; name an empty folder"):
        write_rule(stub_dir / "study", make_rule(), working_dir=".")
    write_rule(stub_dir / "joined", make_rule(), working_dir="/elsewhere")
    with pytest.raises(UserError, match=r"was started in /elsewhere, which cannot be entered here"):
        open_study(stub_dir / "joined")
    (stub_dir / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        write_rule(stub_dir / "file" / "study", make_rule(), working_dir=".")


def test_a_dry_run_prints_trials_steps_and_minutes_and_runs_no_trial(stub_dir, capsys, monkeypatch):
    assert run_study(["--dry-run"]) == 0
    first, full, lora, minutes, power = capsys.readouterr().out.splitlines()
    assert first == "reading the data and loading full, lora"
    assert full.split(":") == ["full", lora.split(":")[1]], "the same budget for both"
    assert lora.startswith("lora: ")
    assert re.fullmatch(r"about \d+ minutes: an estimate from 2 timed steps of each method", minutes)
    assert power.startswith(
        "3 seeds and 40 test records can show about 0.052 nats per token (assumed: differences vary by"
    )
    assert power.endswith("method only); a margin of 0.02 nats needs about 200 records")
    assert not count_log(stub_dir, "began"), "but the timed runs"
    monkeypatch.setenv("STUB_TEST", "19")
    assert run_study([]) == 2
    message = "error: --test-fraction: 19 test records, or groups of them; expected 20 or more"
    assert capsys.readouterr().err.startswith(message)
    assert not (stub_dir / "study").exists()


@pytest.mark.parametrize(
    ("argv", "is_eager"),
    [
        (("--quant", "nf4"), True),
        (("--execution", "auto", "--activation-checkpointing"), False),
        (("--activation-checkpointing",), True),
    ],
)
def test_all_runs_of_a_study_are_executed_alike(stub_dir, argv, is_eager, monkeypatch):
    monkeypatch.setattr(study_module, "run_trials", lambda *_: sys.exit(0))
    with pytest.raises(SystemExit):
        run_study(list(argv))
    assert (read_rule(stub_dir / "study")[0].train_argv[-2:] == ("--execution", "eager")) == is_eager
