"""`--find-batch`: real steps that no run goes on from, and what is suggested after them."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.engines import plan_run
from helpers.launch_ranks import make_process
from helpers.tiny_inputs import tiny_argv

from trainer.config.errors import TrainingError, UserError
from trainer.distributed.engine import Engine
from trainer.distributed.process_group import DistContext, simulated_context
from trainer.tools import find_batch
from trainer.tools.trial_engine import run_job


@pytest.fixture
def planned(tiny_model: str, data_files: tuple[str, str], tmp_path: Path) -> Any:
    """On two ranks of one host."""
    make_process(target=print, args=())  # starts the server from which this process forks all others
    text = f"--mode full --global-batch 24 --objective completion --block-size 32 --output-dir {tmp_path}/run"
    return plan_run(tiny_argv(tiny_model, data_files, text), simulated_context(2), on_meta=True)


def find(planned: Any, capsys: Any) -> list[str]:
    """What was printed after the heading."""
    capsys.readouterr()
    assert find_batch.find_micro_batch_size(planned.plan, planned.data) == 0
    return capsys.readouterr().out.splitlines()[1:]


def tried_trial(speed: float | None) -> dict[str, Any]:
    return {"tokens_per_second": speed, "peak_memory_bytes": 2**30} if speed else {"problem": "out of memory"}


@pytest.mark.parametrize(
    ("speeds", "suggestion"),
    [
        ({1: 100, 2: 180, 4: 150, 12: 160}, 2),
        ({1: 100, 2: 180, 4: 181, 12: 184}, 2),  # as fast, in less memory
        ({1: 100, 2: 180, 4: 200, 12: None}, 4),
        ({1: 100, 2: 180, 4: 200, 12: "may need more than is free"}, 4),
    ],
)
def test_sizes_that_keep_the_global_batch_are_tried_upwards_and_the_fastest_is_suggested(
    planned, tmp_path, capsys, monkeypatch, speeds, suggestion
):
    monkeypatch.setattr(find_batch, "run_trial", lambda _, __, size: tried_trial(speeds[size]))
    free_gib = 2.5 if isinstance(speeds[12], str) else 3.5  # each size up to 4 takes one
    monkeypatch.setattr(DistContext, "free_host_bytes", lambda _: free_gib * 2**30)
    *tried, last = find(planned, capsys)
    assert [int(line.split()[0]) for line in tried] == list(speeds)
    assert last == f"suggestion     --micro-batch {suggestion}: {speeds[suggestion]} tokens/s; nothing was trained"
    assert not list(tmp_path.iterdir())


def test_no_size_that_fits_and_several_hosts_are_errors(planned, capsys, monkeypatch):
    monkeypatch.setattr(find_batch, "run_trial", lambda *_: tried_trial(None))
    with pytest.raises(TrainingError, match="not even the smallest micro-batch fits"):
        find(planned, capsys)
    hosts = ("h1",) * 8 + ("h2",) * 8
    plan = replace(planned.plan, dist_context=replace(planned.plan.dist_context, world_size=16, hosts=hosts))
    with pytest.raises(UserError, match=r"--find-batch: 16 ranks on several hosts; expected one host, with"):
        find_batch.find_micro_batch_size(plan, planned.data)


def measure_without_memory(job: dict[str, Any], context: DistContext) -> Any:
    forward_backward = Engine.forward_backward

    def fail_on_rank_1(self, micro, **rest):
        if self.dist_context.rank == 1 and len(micro.input_ids) >= 4:
            raise RuntimeError("CUDA out of memory (made up by the test)")
        return forward_backward(self, micro, **rest)

    Engine.forward_backward = fail_on_rank_1  # type: ignore[method-assign]
    return find_batch.measure_size(job, context)


@pytest.mark.parametrize("zero", ["zero2", *(pytest.param(z, marks=pytest.mark.sweep) for z in ("zero0", "zero3"))])
def test_find_batch_takes_real_steps_and_survives_a_rank_without_memory(zero, planned, capsys, monkeypatch):
    monkeypatch.setattr(find_batch, "run_job", lambda _, *rest, **more: run_job(measure_without_memory, *rest, **more))
    engine = replace(planned.settings.engine, ds_config=zero)
    plan = replace(planned.plan, settings=replace(planned.plan.settings, engine=engine))
    one, two, four, suggestion = find(replace(planned, plan=plan), capsys)
    assert all(re.fullmatch(r" +[12] +[1-9][\d,]*  0\.\d+ GiB", line) for line in (one, two)), (one, two)
    assert four == "          4  does not fit: out of memory on rank 1"
    assert suggestion.startswith("suggestion     --micro-batch ")
