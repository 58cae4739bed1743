"""A run folder is read whole: what is damaged is named, what it is still good for is said, nothing is deleted."""

import contextlib
import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers.any_inputs import check_inputs, many_inputs
from helpers.engines import STUB_IDENTITY
from helpers.fake_runs import make_metadata
from hypothesis import strategies as st
from safetensors.torch import save_file

from trainer.config.errors import UserError
from trainer.config.settings import Settings
from trainer.tools.doctor.checks import ERROR
from trainer.tools.doctor.run_checks import inspect_run, run_check
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, digest_evaluations, write_evaluation
from trainer.tracking.records import EventRecord, JsonlLogger, StepRecord
from trainer.training import checkpoint
from trainer.training.schedule import TrainState


def write_checkpoint(folder: Path, step: int, logger: JsonlLogger) -> None:
    target = folder / "checkpoints" / f"step-{step:06d}"
    target.mkdir(parents=True)
    save_file({"weight/w": torch.full((4,), float(step))}, target / checkpoint.STATE_FILE)
    content = (target / checkpoint.STATE_FILE).read_bytes()
    metadata = {
        **STUB_IDENTITY,
        "base": make_metadata()["model"]["fingerprint"],
        "fixed": Settings(**make_metadata()["settings"]).fixed_on_resume(),
        "format": checkpoint.FORMAT_VERSION,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "progress": TrainState(step=step, eval_pending=False).as_dict(),
        "records": logger.digest(),
        "evaluations": digest_evaluations(folder / EVAL_RECORDS_FOLDER),
    }
    metadata["self"] = checkpoint._metadata_digest(metadata)
    (target / checkpoint.METADATA_FILE).write_text(json.dumps(metadata))


def add_evaluation(folder: Path, step: int) -> None:
    columns = {
        "id": ["a", "b"],
        "occurrence": 0,
        "group": [None, "g"],
        "targets": [3, 4],
        "bytes": 9,
        "is_seen": False,
    }
    write_evaluation(folder / EVAL_RECORDS_FOLDER, pd.DataFrame(columns), step=step, split="val", nll=[1.0 * step, 2.0])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(make_metadata()))
    logger = JsonlLogger(folder / "metrics.jsonl")
    for step in range(1, 7):
        counts = {"samples": step, "tokens": step}
        logger.log(
            StepRecord(
                **counts, step=step, epoch=step / 6, loss=2.0, lr=1.0, grad_norm=1.0, tokens_per_second=1.0, time=1.0
            )
        )
        if step % 3 == 0:
            add_evaluation(folder, step)
            write_checkpoint(folder, step, logger)
            logger.log(EventRecord(event="checkpoint", step=step, message="", time=1.0))
    logger.close(0)
    (folder / "model").mkdir()
    save_file({"w": torch.zeros(3)}, folder / "model" / "model.safetensors")
    return folder


@pytest.fixture
def run(whole_run, tmp_path) -> Path:
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def errors(folder: Path) -> dict[str, str]:
    return {result.name: result.message for result in inspect_run(folder).checks if result.level == ERROR}


def uses(folder: Path) -> dict[str, str]:
    return {result.name: result.message for result in inspect_run(folder).uses}


def test_a_whole_run_can_be_resumed_exported_and_compared(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert run_check(run) == 0
    output = capsys.readouterr().out
    assert "ok       resume               from step-000006" in output
    assert "warning  end                  not finished: its last row is of step 6" in output
    assert uses(run) == {"resume": "from step-000006", "export": "of step-000006", "compare": "yes"}
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before, "looking changes nothing"


def truncate_state(run: Path) -> None:
    os.truncate(run / "checkpoints/step-000006" / checkpoint.STATE_FILE, 20)


def edit_rate(run: Path) -> None:
    metadata = json.loads((run / "run.json").read_text())
    metadata["settings"]["train"]["lr"] = 9.0
    (run / "run.json").write_text(json.dumps(metadata))


def break_row(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join([*lines[:4], b"half\n", *lines[5:]]))


@pytest.mark.parametrize(
    ("damage", "name", "message", "resume"),
    [
        (truncate_state, "step-000006", "was changed since it was written", "from step-000003"),
        (break_row, "metrics.jsonl", "line 5: ", "metrics.jsonl: line 5"),
        (edit_rate, "settings", "by run.json lr is 9.0 and was", "not possible: by run.json lr is 9.0 and was"),
        (
            lambda run: (run / "model/model.safetensors").write_bytes(struct.pack("<Q", 2**60)),
            "model/model.safetensors",
            "not a whole safetensors file",
            "from step-000006",
        ),
        (
            lambda run: (run / "eval_records/step-000003-val.parquet").write_bytes(b"PAR1"),
            "eval_records/step-000003-val.parquet",
            "not whole records of an evaluation",
            "eval_records: step-000003-val.parquet: not whole records of an evaluation",
        ),
    ],
)
def test_damage_is_named_with_what_is_still_possible(run, damage, name, message, resume):
    damage(run)
    assert message in errors(run)[name]
    assert run_check(run) == 1
    use = uses(run)["resume"]
    assert (use == resume) if resume.startswith("from ") else (resume in use)


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"--check-run .*missing: no such folder"):
        inspect_run(tmp_path / "missing")
    assert uses(tmp_path)["compare"] == "not possible: run.json cannot be read"


DAMAGE = st.tuples(st.integers(0, 10**6), st.integers(0, 40), st.binary(max_size=40))


@many_inputs(50)
def test_no_damage_to_any_file_ends_in_a_traceback_or_loses_a_byte(whole_run, tmp_path, num_inputs, capsys):
    """Also what reads the checkpoints alone."""
    files = sorted(path.relative_to(whole_run) for path in whole_run.rglob("*") if path.is_file())

    def check(damages):
        folder = Path(shutil.copytree(whole_run, tmp_path / "run"))
        for name, (start, length, replacement) in damages.items():
            content = bytearray((folder / name).read_bytes())
            start %= len(content)
            content[start : start + length] = replacement
            (folder / name).write_bytes(content)
        contents = {path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with contextlib.suppress(UserError):
            checkpoint.resolve_checkpoint(folder / "checkpoints", "latest")
        run_check(folder)
        assert contents <= {path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        capsys.readouterr()
        shutil.rmtree(folder)

    check_inputs(num_inputs, check, st.dictionaries(st.sampled_from(files), DAMAGE, min_size=1, max_size=2))
