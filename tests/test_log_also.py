"""Second sinks: the rows that W&B gets, under the same names, read back from TensorBoard's and Trackio's own stores."""

import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
from run_folders import facts, rows

from trainer.config.errors import UserError
from trainer.tracking.extra_loggers import GuardedSink, check_also, start_also
from trainer.tracking.records import EventRecord, Record
from trainer.tracking.wandb_keys import AXES, wandb_row

RUN = facts("lora")
ROWS = rows(RUN)  # 90 steps in 3 epochs, 4 evaluations, 3 means, the end
WANTED = {
    (name, row.step): value
    for row in ROWS
    if not isinstance(row, EventRecord)
    for name, value in wandb_row(row).items()
}


def write(sinks: list[GuardedSink], some: list[Record]) -> None:
    for row in some:
        for sink in sinks:
            sink.write(row)
    for sink in sinks:
        sink.close(0)


def in_two_parts(name: str, folder: Path, said: list[str]) -> None:
    """A run that is killed after step 40, with its newest checkpoint at step 30, and then resumed."""
    write(start_also([name], RUN, folder, after=-1, say=said.append), [row for row in ROWS if row.step <= 40])
    write(start_also([name], RUN, folder, after=30, say=said.append), [row for row in ROWS if row.step > 30])


def test_tensorboard_has_every_row_once_also_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said: list[str] = []
    in_two_parts("tensorboard", tmp_path, said)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    got: dict[tuple[str, int], list[float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            got.setdefault((name, event.step), []).append(event.value)
    assert {key: values[-1] for key, values in got.items()} == pytest.approx(WANTED, rel=1e-7), "in float32"
    assert all(len(values) == 1 for (name, _), values in got.items() if name not in AXES)
    assert "tensorboard --logdir" in said[0]
    assert len(said) == 2, "nothing went wrong"


def test_trackio_has_every_row_once_also_after_a_resume(tmp_path, monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)  # it reads its folder when it is imported
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    said: list[str] = []
    in_two_parts("trackio", tmp_path / "run", said)
    (store,) = tmp_path.glob("*.db")
    import json

    with sqlite3.connect(store) as connection:
        found = connection.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
    got: dict[tuple[str, int], list[Any]] = {}
    for step, text in found:
        for name, value in json.loads(text).items():
            got.setdefault((name, step), []).append(value)
    assert {key: values[-1] for key, values in got.items() if key in WANTED} == WANTED
    assert all(len(values) == 1 for (name, _), values in got.items() if name not in AXES)
    assert "trackio show" in said[0]
    assert len(said) == 2, said


def test_a_sink_that_fails_is_said_once_and_left_out():
    said: list[str] = []
    calls: list[int] = []

    class Broken:
        def write(self, record: Record) -> None:
            calls.append(record.step)
            raise OSError("no space left")

        def close(self) -> None:
            raise AssertionError("it was left out")

    write([GuardedSink("tensorboard", Broken, said.append)], ROWS)
    assert len(calls) == 1
    assert said == ["tensorboard stopped working (no space left); going on without it, metrics.jsonl has every row"]


def test_a_sink_that_is_not_installed_is_one_line(monkeypatch):
    check_also(["tensorboard", "trackio"])
    monkeypatch.setattr("trainer.tracking.extra_loggers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--also trackio: it is not installed; pip install -e '\.\[trackio\]'"):
        check_also(["trackio"])
