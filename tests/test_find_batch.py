"""`--find-batch`: real steps of growing micro-batches for one global batch; out of memory on one rank ends no other."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TEMPLATES
from ranks import on_ranks, train

from trainer.config import cli
from trainer.config.errors import RunFailed
from trainer.data.dataset import load, prepare
from trainer.distributed.process_group import leave_world, start_world
from trainer.model.build import build, load_config
from trainer.tools.finders import batch_finder, batch_size_worker
from trainer.tools.finders.batch_sizes import Tried, candidates, fastest, ladder, next_sizes
from trainer.training.run_plan import make_plan

# --- what to try, pure ---


@pytest.mark.parametrize(
    ("global_batch", "ranks", "expected"), [(8, 1, [1, 2, 4, 8]), (12, 2, [1, 2, 3, 6]), (7, 1, [1, 7]), (4, 4, [1])]
)
def test_every_size_keeps_the_global_batch(global_batch, ranks, expected):
    assert candidates(global_batch, ranks) == expected


def test_the_ladder_doubles_and_ends_at_the_largest():
    assert ladder([1, 2, 3, 4, 6, 8, 12, 24]) == [1, 2, 4, 8, 24]
    assert ladder([1, 7]) == [1, 7]


@pytest.mark.parametrize("most", range(13))
def test_the_search_finds_the_largest_that_fits(most):
    """Whatever fits, in a few groups of processes, each of which ends at its first failure."""
    sizes, known, groups = candidates(360, 1), {}, 0
    while todo := next_sizes(sizes, known):
        groups += 1
        for size in todo:
            known[size] = size <= most
            if not known[size]:
                break
    largest = max((size for size in sizes if size <= most), default=None)
    assert max((size for size, fits in known.items() if fits), default=None) == largest
    assert groups <= 4


def tried(micro: int, speed: float) -> Tried:
    return Tried(micro=micro, accumulation=1, fits=True, seconds=1.0, tokens_per_second=speed)


def test_the_fastest_is_taken_not_the_largest():
    assert fastest([tried(1, 100), tried(2, 180), tried(4, 150)]).micro == 2
    assert fastest([tried(1, 100), tried(2, 180), tried(4, 184)]).micro == 2, "as fast, with less memory"
    assert fastest([tried(1, 100), tried(2, 180), tried(4, 200)]).micro == 4
    assert fastest([Tried(micro=1, accumulation=1, fits=False)]) is None


@pytest.mark.parametrize(
    ("largest", "said"),
    [
        (150, "--micro-batch 2: 180 tokens/s, +20% against 4, the largest that fits"),
        (181, "--micro-batch 2: 180 tokens/s, in less memory and as fast as 4, the largest that fits"),
        (200, "--micro-batch 4: 200 tokens/s"),
    ],
)
def test_the_suggestion_says_what_it_is_better_at(largest, said):
    sizes = [tried(1, 100), tried(2, 180), tried(4, largest)]
    told = batch_finder.lines(SimpleNamespace(dropout=0.0), sizes, fastest(sizes), "")
    assert [line for line in told if line.startswith("suggestion")] == [f"suggestion     {said}"]


@pytest.mark.parametrize(
    ("problem", "is_one"),
    [
        (MemoryError(), True), (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), True), (RuntimeError("Connection closed by peer"), False),
    ],
)  # fmt: skip
def test_running_out_of_memory_is_told_from_other_errors(problem, is_one):
    assert batch_size_worker.out_of_memory(problem) == is_one


# --- on real ranks ---


def arguments(tiny: str, records: tuple[str, str], *more: str) -> list[str]:
    words = f"--mode full --model {tiny} --data {records[0]} --val-data {records[1]} --objective completion"
    words += " --block-size 32 --global-batch 8 --wandb disabled"
    return [*words.split(), *TEMPLATES, *more]


def plan_of(words: list[str], world: Any) -> tuple[Any, Any]:
    settings = cli.read(words).settings
    data = load(prepare(settings.data, model=settings.model.model, global_batch=8).folder)
    model = build(settings, on_meta=True)
    return make_plan(settings, world, data, model.facts, load_config(settings.model)), data


def processes(words: list[str], out: str, scripts: list[str]) -> int:
    """`try_sizes` with, in place of the real trial, a Python line for each rank; what came out goes to out-rank."""
    world = start_world()
    try:
        plan, data = plan_of(words, world)
        batch_finder.COMMAND = (sys.executable, "-S", "-c", _FAKE + scripts[world.rank])  # type: ignore[assignment]
        batch_finder.GRACE = 0.5
        try:
            result: Any = [vars(one) for one in batch_finder.try_sizes(plan, data.folder, [1, 2, 4])]
        except RunFailed as problem:
            result = str(problem)
        Path(f"{out}-{world.rank}").write_text(json.dumps(result))
    finally:
        world.board.close()
        leave_world()
    return 0


_FAKE = """
import json, os, sys, time
job = json.loads(open(sys.argv[1]).read())
def told(micro):
    with open(job["answer"] + "-" + os.environ["RANK"], "a") as file:
        file.write(json.dumps({"micro": micro, "seconds": 0.5, "tokens": 100, "peak": 7}) + chr(10))
"""
WAITS = "told(1); told(2); time.sleep(600)"  # in a collective with one who is gone


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ("told(1); told(2); os._exit(77)", "out of memory on rank 1"),
        ("told(1); told(2); os.kill(os.getpid(), 9)", "killed by the system"),
        ("told(1); told(2); print('boom: no such thing', flush=True); os._exit(1)", None),
    ],
)
def test_one_rank_that_ends_is_seen_by_all_and_none_hangs(tiny, records, tmp_path, ends, said):
    words = arguments(tiny, records)
    prepare(cli.read(words).settings.data, model=tiny, global_batch=8)
    log = tmp_path / "log"
    assert on_ranks(2, processes, words, str(tmp_path / "result"), [WAITS, ends], log=log) == 0, log.read_text()
    results = [json.loads((tmp_path / f"result-{rank}").read_text()) for rank in range(2)]
    assert results[0] == results[1]
    if said is None:
        assert "micro-batch 4 failed on rank 1: boom: no such thing" in results[0]
        return
    assert [(one["micro"], one["accumulation"], one["fits"]) for one in results[0]] == [
        (1, 4, True), (2, 2, True), (4, 1, False)
    ]  # fmt: skip
    assert said in results[0][-1]["why"]
    assert results[0][0]["tokens_per_second"] == 200


def test_the_command_tries_every_size_and_leaves_its_numbers(tiny, records, tmp_path):
    out = tmp_path / "run"
    output = train([*arguments(tiny, records), "--find-batch", "--ds-config", "zero2"], out=out)
    found = json.loads((out / "find-batch.json").read_text())
    assert [(one["micro"], one["accumulation"]) for one in found["tried"]] == [(1, 8), (2, 4), (4, 2), (8, 1)]
    assert all(one["fits"] and one["tokens_per_second"] > 0 for one in found["tried"])
    best = max(found["tried"], key=lambda one: one["tokens_per_second"])["tokens_per_second"]
    chosen = next(one for one in found["tried"] if one["micro"] == found["suggestion"])
    assert chosen["tokens_per_second"] >= 0.97 * best
    assert f"--micro-batch {found['suggestion']}" in output
    assert "80% of the free memory" in output, "the budget on a processor is said"
    assert sorted(path.name for path in out.iterdir()) == ["find-batch.json"], "nothing was trained"


def test_what_the_formula_puts_over_the_budget_is_not_tried(tiny, records, shelf, monkeypatch):
    world = start_world()
    try:
        plan, _ = plan_of(arguments(tiny, records), world)
    finally:
        leave_world()
    monkeypatch.setattr(batch_finder, "free_host", lambda plan: 2**40)
    assert batch_finder.within_budget(plan, [1, 2, 4, 8], 32)[0] == [1, 2, 4, 8]
    monkeypatch.setattr(batch_finder, "needed", lambda plan, made: (made.activations, 0.0))
    two, four = (
        batch_finder.estimate(plan, plan.zero, batch_finder.load_of(plan, 32, micro)).activations for micro in (2, 4)
    )
    monkeypatch.setattr(batch_finder, "free_host", lambda plan: (two + four) / 2 / batch_finder.BUDGET)
    sizes, said = batch_finder.within_budget(plan, [1, 2, 4, 8], 32)
    assert sizes == [1, 2]
    assert "not tried: 4 and above" in said
    gpu = replace(plan, world=replace(plan.world, device=__import__("torch").device("cuda", 0)))
    assert batch_finder.within_budget(gpu, [1, 2, 4, 8], 32) == ([1, 2, 4, 8], ""), "a GPU says itself what fits"


OOM = """
import sys
sys.path.insert(0, {tests!r})
from trainer.engine import Engine
from trainer.find import trial
kept = Engine.accumulate
def accumulate(self, micro, **rest):
    if self.world.rank == 1 and len(micro.input_ids) >= 4:
        raise RuntimeError("CUDA out of memory (made up by the test)")
    return kept(self, micro, **rest)
Engine.accumulate = accumulate
sys.exit(trial.main(sys.argv[1]))
"""


def with_oom(words: list[str]) -> int:
    from ranks import command

    batch_finder.COMMAND = (sys.executable, "-c", OOM.format(tests=str(Path(__file__).parent)))  # type: ignore[assignment]
    return command(words)


@pytest.mark.sweep  # two real groups of processes: their imports take half a minute on one core
@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_real_ranks_of_which_one_runs_out_of_memory(tiny, records, tmp_path, zero):
    out = tmp_path / "run"
    words = [*arguments(tiny, records), "--find-batch", "--ds-config", zero, "--out", str(out)]
    log = tmp_path / "log"
    assert on_ranks(2, with_oom, words, log=log) == 0, log.read_text()
    found = json.loads((out / "find-batch.json").read_text())
    assert [(one["micro"], one["fits"]) for one in found["tried"]] == [(1, True), (2, True), (4, False)]
    assert "out of memory on rank 1" in found["tried"][-1]["why"]
    assert found["suggestion"] in (1, 2)
