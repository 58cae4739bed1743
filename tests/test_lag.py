"""Steps that are asked for before the numbers of those before them are read, as on a GPU: nothing else changes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cells import on_cells, read_cell, run_cell, run_cells
from safetensors.torch import load_file
from test_ways import arguments, prepared  # noqa: F401

from trainer.config import cli
from trainer.config.errors import RunFailed
from trainer.data.dataset import load
from trainer.distributed.engine import Engine
from trainer.distributed.process_group import leave_world, start_world
from trainer.model.build import build, load_config
from trainer.run import _engine
from trainer.tracking.records import EvalRecord, EventRecord, StepRecord
from trainer.training import checkpoint
from trainer.training.checkpoint import Checkpoints, Progress
from trainer.training.loop import train
from trainer.training.run_plan import make_plan

Told = list[tuple[str, int]]


def lagging(told: Told) -> None:
    """From here on every engine lags; in `told` stands in which order steps are asked for and read."""
    honest = Engine.ask

    def ask(self: Any, *given: Any, **named: Any) -> Any:
        number = sum(what == "asked" for what, _ in told)
        told.append(("asked", number))
        answer = honest(self, *given, **named)
        return lambda: told.append(("read", number)) or answer()

    Engine.ask = ask  # type: ignore[method-assign]
    Engine.lags = property(lambda self: self.way.guarded)  # type: ignore[assignment, method-assign]


def run_lagging(jobs: list[dict[str, Any]]) -> int:
    told: Told = []
    lagging(told)
    world = start_world()
    for job in jobs:
        del told[:]
        run_cell(world, job)
        order = [number for what, number in told if what == "read"]
        assert order == sorted(order), "in their order"
        assert [n for what, n in told if what == "asked"] == order, "each once"
        assert told[:3] == [("asked", 0), ("asked", 1), ("read", 0)], "the second before the first is read"
    leave_world()
    return 0


def words(tiny: str, records: tuple[str, str], *more: str) -> list[str]:
    return [*arguments(tiny, records, "full", "completion"), "--micro-batch", "1", *more]


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_record_and_the_weights_are_those_of_a_run_that_waits(ranks, tiny, records, prepared, tmp_path):  # noqa: F811
    cells = {
        f"{zero}-{every}": words(tiny, records, "--ds-config", zero, "--eval-every", every, "--save-every", "5")
        for zero in ("zero0", "zero1") for every in ("2", "epoch")
    }  # fmt: skip
    for out, target in ((tmp_path / "waits", run_cells), (tmp_path / "lags", run_lagging)):
        out.mkdir()
        jobs = [{"name": name, "flags": flag, "data": str(prepared), "out": str(out)} for name, flag in cells.items()]
        on_cells(ranks, jobs, out / "log", target)
    for name in cells:
        (rows, weights), (others, final) = (read_cell(tmp_path / out, name) for out in ("waits", "lags"))
        clock = ("time", "tokens_per_second")
        assert [{k: v for k, v in row.items() if k not in clock} for row in others] == [
            {k: v for k, v in row.items() if k not in clock} for row in rows
        ]
        assert sum(row["kind"] == "step" for row in rows) == 9
        assert all(np.array_equal(final[key], weights[key]) for key in weights)
        assert all(row["tokens_per_second"] > 0 for row in others if row["kind"] == "step")


def begun(job: dict[str, Any], world: Any) -> tuple[Any, ...]:
    settings, data = cli.read(job["flags"]).settings, load(Path(job["data"]))
    model = build(settings)
    plan = make_plan(settings, world, data, model.facts, load_config(settings.model))
    engine, progress = _engine(plan, model, None)
    saver = Checkpoints(Path(job["out"]) / job["name"], world, keep=99, identity={"base": "test"})
    return engine, data, plan.course, progress, saver


def breaks(jobs: list[dict[str, Any]]) -> int:
    """On a rank: the numbers of the job's step are not finite; the one after it is asked for already."""
    told: Told = []
    lagging(told)
    honest = Engine.accumulate
    world = start_world()
    for job in jobs:
        del told[:]
        bad = job["bad"] - 1

        def accumulate(self: Any, micro: Any, *, step: int, counted: int, bad: int = bad) -> Any:
            made = honest(self, micro, step=step, counted=counted)
            return made * math.nan if step == bad and world.rank == 0 else made

        Engine.accumulate = accumulate  # type: ignore[method-assign]
        engine, data, course, progress, saver = begun(job, world)
        seen = []
        with pytest.raises(RunFailed, match=f"step {job['bad']}: loss nan; the weights are those after step {bad},"):
            seen += list(iter_all(train(engine, data, course, progress, saver, lambda: False), seen))
        steps = [row.step for row in seen if isinstance(row, StepRecord)]
        assert steps == list(range(1, bad + 1))
        assert isinstance(seen[-1], EventRecord)
        assert seen[-1].event == "not_finite"
        if world.rank == 0:
            final = {name: tensor.numpy().copy() for name, tensor in engine.state.whole_weights()}
            np.savez(Path(job["out"]) / f"{job['name']}.npz", **final)
            (Path(job["out"]) / f"{job['name']}.json").write_text(json.dumps({"told": told}))
        else:
            list(engine.state.whole_weights())
    leave_world()
    return 0


def iter_all(stream: Any, seen: list[Any]) -> Any:
    """Everything that comes, kept even where the stream then raises."""
    for record in stream:
        seen.append(record)
    return ()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_is_not_finite_is_found_late_and_has_moved_nothing(ranks, tiny, records, prepared, tmp_path):  # noqa: F811
    """Neither has the one that was asked for after it: weights and the checkpoint are those before the bad one."""
    flag = ("--eval-every", "never", "--save-every", "never")
    jobs = [
        {"name": f"{zero}-{bad}", "bad": bad, "data": str(prepared), "out": str(tmp_path),
         "flags": words(tiny, records, "--ds-config", zero, *flag)}
        for zero in ("zero0", "zero1") for bad in (2, 4)
    ]  # fmt: skip
    on_cells(ranks, jobs, tmp_path / "log", breaks)
    every = [
        {"name": zero, "data": str(prepared), "out": str(tmp_path),
         "flags": words(tiny, records, "--ds-config", zero, "--eval-every", "never", "--save-every", "1")}
        for zero in ("zero0", "zero1")
    ]  # fmt: skip
    on_cells(ranks, every, tmp_path / "log")
    for job in jobs:
        before, zero = job["bad"] - 1, job["name"].partition("-")[0]
        told = json.loads((tmp_path / f"{job['name']}.json").read_text())["told"]
        asked = max(number for what, number in told if what == "asked")
        assert asked == job["bad"], "one more, counted from zero"
        good = load_file(
            checkpoint.choose(tmp_path / f"{zero}-checkpoints", f"step-{before}").folder / checkpoint.STATE
        )
        found = load_file(checkpoint.choose(tmp_path / job["name"], "latest").folder / checkpoint.STATE)
        assert good.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in good.items())


def stops(jobs: list[dict[str, Any]]) -> int:
    """On a rank: a signal comes while the fourth step is asked for."""
    told: Told = []
    lagging(told)
    world = start_world()
    for job in jobs:
        del told[:]
        engine, data, course, progress, saver = begun(job, world)
        stream = train(engine, data, course, progress, saver, lambda: sum(what == "asked" for what, _ in told) >= 4)
        rows = []
        while True:
            try:
                rows.append(next(stream))
            except StopIteration as end:
                last: Progress = end.value
                break
        steps = [row.step for row in rows if isinstance(row, StepRecord)]
        assert steps == list(range(1, last.step + 1))
        assert len(steps) == sum(what == "asked" for what, _ in told), "what was asked for is told of"
        assert rows[-1].event == "interrupted"
        assert not [row for row in rows if isinstance(row, EvalRecord) and row.step]
        assert checkpoint.choose(saver.folder, "latest").step == last.step < 9
    leave_world()
    return 0


def test_a_stop_waits_for_what_was_asked_for_and_saves_that(tiny, records, prepared, tmp_path):  # noqa: F811
    flag = words(tiny, records, "--eval-every", "never", "--save-every", "never")
    on_cells(2, [{"name": "one", "flags": flag, "data": str(prepared), "out": str(tmp_path)}], tmp_path / "log", stops)
