"""`doctor.py --check-run` and `--resume` agree about every folder: what the one calls possible the other does."""

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.any_inputs import check_inputs, many_inputs
from helpers.launch_ranks import run_on_ranks, run_train_script, train
from helpers.tiny_inputs import tiny_argv
from hypothesis import strategies as st

from trainer.config.errors import UserError
from trainer.tools.doctor.run_checks import inspect_run, run_check
from trainer.training.checkpoint import resolve_checkpoint

NEWEST, ROWS, STATE = "checkpoints/step-000004", "metrics.jsonl", "state.safetensors"


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes(change((run / name).read_bytes()))  # type: ignore[return-value]


def edit(path: str, value: Any) -> Callable[[Path], None]:
    """Another value of run.json, by its dotted path."""

    def change(content: bytes) -> bytes:
        whole = values = json.loads(content)
        *keys, last = path.split(".")
        for key in keys:
            values = values[key]
        values[last] = value
        return json.dumps(whole).encode()

    return rewrite("run.json", change)


def remove(*names: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        for name in names:
            (shutil.rmtree if (run / name).is_dir() else os.remove)(run / name)

    return damage


def put_instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        remove(name)(run)
        make(run / name)

    return damage


@pytest.fixture(scope="module")
def argv(tiny_model: str, data_files: tuple[str, str]) -> list[str]:
    text = "--mode full --block-size 16 --global-batch 6 --max-steps 4 --save-every 2 --eval-every 2 --num-samples 0"
    return tiny_argv(tiny_model, data_files, text, "--wandb", "disabled")


@pytest.fixture(scope="module")
def finished_run(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(argv, out=folder)
    return folder


#: what is done to a finished run of four steps with checkpoints at 2 and 4
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda run: None,
    "tensors changed": rewrite(f"{NEWEST}/{STATE}", lambda content: content[:-1] + b"x"),
    "state cut": rewrite(f"{NEWEST}/state.json", lambda content: content[:-9]),
    "all tensors gone": remove(f"{NEWEST}/{STATE}", f"checkpoints/step-000002/{STATE}"),
    "checkpoints gone": remove("checkpoints"),
    "requeue a folder": lambda run: (run / "requeue").mkdir(),
    "checkpoints and rows gone": remove("checkpoints", ROWS, "eval_records"),
    "rows twice": rewrite(ROWS, lambda content: content + content),
    "rows gone": remove(ROWS),
    "a row broken": rewrite(ROWS, lambda content: content.replace(b'"kind"', b'"kinb"', 1)),
    "rows a pipe": put_instead(ROWS, os.mkfifo),
    "a row edited": rewrite(ROWS, lambda content: content.replace(b'"loss": ', b'"loss": 1', 1)),
    "an evaluation cut": lambda run: os.truncate(next((run / "eval_records").iterdir()), 100),
    "evaluations gone": remove("eval_records"),
    "run.json cut": rewrite("run.json", lambda content: content[:-9]),
    "another rate": edit("settings.train.lr", 0.5),
    "another mode": edit("mode", "lora"),
    "other data": edit("data.fingerprint", "0" * 64),
    "another base": edit("model.fingerprint", "0" * 16),
    "nothing trained": edit("model.trainable", "many"),
    "weights cut": lambda run: os.truncate(run / "model/model.safetensors", 100),
}


def resume_all(folder: str, argv: list[str]) -> int:
    """On a rank, in a fork each: `--resume` of each run of the folder; leaves its output and exit code beside it."""
    for run in sorted(Path(folder).iterdir()):
        if (pid := os.fork()) == 0:
            output = os.open(f"{run}.log", os.O_WRONLY | os.O_CREAT)
            for descriptor in (1, 2):
                os.dup2(output, descriptor)
            sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))
            os._exit(run_train_script([*argv, "--resume", "--output-dir", str(run)]))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        Path(f"{run}.code").write_text(str(code))
    return 0


#: one of each kind; the sweep takes all
SAMPLE = ("nothing", "tensors changed", "all tensors gone", "checkpoints gone", "requeue a folder", "rows twice")
SAMPLE += ("rows a pipe", "a row broken", "an evaluation cut", "run.json cut", "another rate", "other data")
SAMPLE += ("another base", "nothing trained")


@pytest.mark.parametrize(
    "damages", [SAMPLE, pytest.param(tuple(DAMAGES), marks=pytest.mark.sweep)], ids=["some", "all"]
)
def test_check_run_and_resume_agree_about_every_damaged_folder(damages, argv, finished_run, tmp_path):
    folder = tmp_path / "damaged"
    expected = {}
    for name in damages:
        run = Path(shutil.copytree(finished_run, folder / name.replace(" ", "-")))
        DAMAGES[name](run)
        (check,) = (check for check in inspect_run(run) if check.name == "resume")
        expected[run.name] = (check.level == "ok" and "--allow-change" not in check.message, check.message)
    log = tmp_path / "log"
    assert run_on_ranks(1, resume_all, str(folder), argv, log=log) == 0, log.read_text()
    disagreements = []
    for name, (is_possible, message) in expected.items():
        code, output = int((folder / f"{name}.code").read_text()), (folder / f"{name}.log").read_text()
        if is_possible:
            agrees = code == 0 and re.search(rf"resumed {re.escape(message)}\b", output)
        else:
            agrees = code == 2 and len([line for line in output.splitlines() if line.startswith("error: ")]) == 1
        if not agrees:
            disagreements.append(f"{name}: {message!r} against {code}: {output[-300:]!r}")
    assert not disagreements, "\n".join(disagreements)
    assert expected["nothing"] == (True, "from step-000004")
    assert not expected["rows-twice"][0]


def test_damage_is_named_and_looking_changes_nothing(finished_run, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("[!.]*")}
    assert run_check(finished_run) == 0
    output = capsys.readouterr().out
    assert "ok       end                  finished after step 4" in output
    assert "ok       export               of step-000004" in output
    assert "ok       compare              yes" in output
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("[!.]*")} == before
    for damage, name, message in (
        ("tensors changed", "step-000004", "was changed since it was written"),
        ("a row broken", "metrics.jsonl", "line "),
        ("another rate", "settings", "by run.json lr is 0.5 and was"),
        ("an evaluation cut", "eval_records/", "not whole records of an evaluation"),
        ("weights cut", "model/model.safetensors", "not a whole safetensors file"),
    ):
        run = Path(shutil.copytree(finished_run, tmp_path / damage))
        DAMAGES[damage](run)
        assert run_check(run) == 1
        assert re.search(rf"^error +{name}\S* +.*{message}", capsys.readouterr().out, re.M), damage
    with pytest.raises(UserError, match=r"--check-run .*missing: no such folder"):
        run_check(tmp_path / "missing")


BYTES = st.tuples(st.integers(0, 10**6), st.integers(0, 40), st.binary(max_size=40))


@many_inputs(50)
def test_no_damage_to_any_file_ends_in_a_traceback(finished_run, tmp_path, num_inputs, capsys):
    """Also what reads the checkpoints alone."""
    files = sorted(path.relative_to(finished_run) for path in finished_run.rglob("*") if path.is_file())

    def check(damages):
        folder = Path(shutil.copytree(finished_run, tmp_path / "run"))
        for name, (start, length, replacement) in damages.items():
            content = bytearray((folder / name).read_bytes())
            start %= max(1, len(content))
            content[start : start + length] = replacement
            (folder / name).write_bytes(content)
        with contextlib.suppress(UserError):
            resolve_checkpoint(folder / "checkpoints", "latest")
        run_check(folder)
        capsys.readouterr()
        shutil.rmtree(folder)

    check_inputs(num_inputs, check, st.dictionaries(st.sampled_from(files), BYTES, min_size=1, max_size=2))
