"""`--find-batch`: real steps of growing micro-batches for one global batch; out of memory on one rank ends no other."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.engines import joined_ranks, plan_run
from helpers.launch_ranks import run_on_ranks, run_train_script, train
from helpers.tiny_inputs import tiny_argv

from trainer.config.errors import TrainingError, UserError
from trainer.distributed.process_group import DistContext
from trainer.tools.finders import batch_finder, batch_worker
from trainer.tools.finders.batch_finder import TrialResult, candidate_sizes, fastest, next_size

# --- what to try, pure ---


@pytest.mark.parametrize(
    ("global_batch", "ranks", "expected"), [(8, 1, [1, 2, 4, 8]), (12, 2, [1, 2, 3, 6]), (7, 1, [1, 7]), (4, 4, [1])]
)
def test_every_micro_batch_size_keeps_the_global_batch(global_batch, ranks, expected):
    assert candidate_sizes(global_batch, ranks) == expected


def test_the_batch_sizes_to_try_double_and_end_at_the_largest():
    for sizes, expected in (([1, 2, 3, 4, 6, 8, 12, 24], [1, 2, 4, 8, 24]), ([1, 7], [1, 7])):
        tried: list[int] = []
        while (size := next_size(sizes, dict.fromkeys(tried, True))) is not None:
            tried.append(size)
        assert tried == expected


@pytest.mark.parametrize("most", range(13))
def test_the_batch_search_finds_the_largest_size_that_fits(most):
    sizes, known = candidate_sizes(360, 1), {}
    while (size := next_size(sizes, known)) is not None:
        known[size] = size <= most
    largest = max((size for size in sizes if size <= most), default=None)
    assert max((size for size, fits in known.items() if fits), default=None) == largest
    assert len(known) <= 9, f"of {len(sizes)} sizes"


def make_trial(micro_batch_size: int, tokens_per_second: float) -> TrialResult:
    return TrialResult(
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=1,
        fits=True,
        step_seconds=1.0,
        tokens_per_second=tokens_per_second,
    )


@pytest.mark.parametrize(
    ("largest", "suggestion", "comparison"),
    [
        (150, "--micro-batch 2: 180 tokens/s", ", +20% against 4, the largest that fits"),
        (181, "--micro-batch 2: 180 tokens/s", ", in less memory and as fast as 4, the largest that fits"),
        (184, "--micro-batch 2: 180 tokens/s", ", in less memory and as fast as 4, the largest that fits"),
        (200, "--micro-batch 4: 200 tokens/s", ""),
    ],
)
def test_the_batch_search_suggests_the_fastest_size_not_the_largest(largest, suggestion, comparison):
    trials = [make_trial(1, 100), make_trial(2, 180), make_trial(4, largest)]
    lines = batch_finder.format_lines(trials, fastest(trials), "", has_dropout=False)
    assert [line for line in lines if line.startswith("suggestion")] == [f"suggestion     {suggestion}{comparison}"]


def test_the_batch_search_suggests_nothing_where_nothing_fits():
    assert fastest([TrialResult(micro_batch_size=1, gradient_accumulation_steps=1, fits=False)]) is None


@pytest.mark.parametrize(
    ("problem", "is_one"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("Connection closed by peer"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(problem, is_one):
    assert batch_worker.is_out_of_memory(problem) == is_one


# --- on real ranks ---


def make_argv(tiny_model: str, data_files: tuple[str, str], *extra_flags: str) -> list[str]:
    text = "--mode full --objective completion --block-size 32 --global-batch 8 --wandb disabled"
    return tiny_argv(tiny_model, data_files, text, *extra_flags)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ("os._exit(77)", "out of memory on rank 1"),
        ("os.kill(os.getpid(), 9)", "killed by the system on rank 1"),
        ("print('boom: no such thing', flush=True); os._exit(1)", None),
    ],
)
def test_a_batch_trial_whose_rank_ends_ends_all(tiny_model, data_files, monkeypatch, ends, message):
    """The other rank waits, as in a collective with the one that is gone."""
    argv = make_argv(tiny_model, data_files)
    with joined_ranks() as dist_context:
        plan = plan_run(argv, replace(dist_context, world_size=2, hosts=dist_context.hosts * 2), on_meta=True).plan
    code = f"import os, time\ntime.sleep(600) if os.environ['RANK'] == '0' else time.sleep(0.5)\n{ends}"
    monkeypatch.setattr(batch_finder, "WORKER_COMMAND", ("-S", "-c", code))
    if message is None:
        with pytest.raises(TrainingError, match="micro-batch 4 failed on rank 1: boom: no such thing"):
            batch_finder.run_trial(plan, Path("data"), 4)
        return
    trial = batch_finder.run_trial(plan, Path("data"), 4)
    assert (trial.fits, trial.gradient_accumulation_steps) == (False, 1)
    assert message in trial.failure_reason


def test_find_batch_is_refused_over_several_hosts(tiny_model, data_files):
    with joined_ranks() as dist_context:
        planned = plan_run(make_argv(tiny_model, data_files), dist_context, on_meta=True)
    plan = replace(planned.plan, dist_context=replace(dist_context, world_size=16, hosts=("a",) * 8 + ("b",) * 8))
    with pytest.raises(UserError, match=r"--find-batch: 16 ranks on several hosts; expected one host: try its 8 ranks"):
        batch_finder.find_micro_batch_size(plan, planned.data)


def test_find_batch_tries_every_size_and_writes_its_numbers(tiny_model, data_files, tmp_path, fast_python):
    out = tmp_path / "run"
    argv = [*make_argv(tiny_model, data_files), "--find-batch", "--ds-config", "zero2"]
    output = train(argv, out=out, world_size=2, env={"TEST_PYTHON": fast_python})
    content = json.loads((out / "find-batch.json").read_text())
    sizes = [(trial["micro_batch_size"], trial["gradient_accumulation_steps"]) for trial in content["tried"]]
    assert sizes == [(1, 4), (2, 2), (4, 1)]
    assert all(trial["fits"] and trial["tokens_per_second"] > 0 for trial in content["tried"])
    best = max(content["tried"], key=lambda trial: trial["tokens_per_second"])["tokens_per_second"]
    chosen = next(trial for trial in content["tried"] if trial["micro_batch_size"] == content["suggestion"])
    assert chosen["tokens_per_second"] >= 0.97 * best
    assert f"--micro-batch {content['suggestion']}" in output
    assert "80% of the free memory" in output, "the budget on a processor is said"
    assert sorted(path.name for path in out.iterdir()) == ["find-batch.json"], "nothing was trained"


def test_find_batch_skips_sizes_that_the_estimate_puts_over_the_budget(tiny_model, data_files, monkeypatch):
    with joined_ranks() as dist_context:
        plan = plan_run(make_argv(tiny_model, data_files), dist_context, on_meta=True).plan
    monkeypatch.setattr(DistContext, "free_host_bytes", lambda self: 2**40)
    assert batch_finder.sizes_within_budget(plan, [1, 2, 4, 8], 32)[0] == [1, 2, 4, 8]
    monkeypatch.setattr(batch_finder, "required_bytes", lambda estimate, *_: (estimate.activations, 0.0))
    two, four = (plan.estimate_memory(plan.deepspeed_file, 32, size).activations for size in (2, 4))
    limit = (two + four) / 2 / batch_finder.MEMORY_BUDGET_SHARE
    monkeypatch.setattr(DistContext, "free_host_bytes", lambda self: limit)
    sizes, notice = batch_finder.sizes_within_budget(plan, [1, 2, 4, 8], 32)
    assert sizes == [1, 2]
    assert "not tried: 4 and above" in notice
    gpu = replace(plan, dist_context=replace(plan.dist_context, device=torch.device("cuda", 0)))
    assert batch_finder.sizes_within_budget(gpu, [1, 2, 4, 8], 32) == ([1, 2, 4, 8], ""), "a GPU says itself what fits"


OOM_TRIAL_CODE = """
import sys
sys.path.insert(0, {tests!r})
from trainer.distributed.engine import Engine
from trainer.tools.finders import batch_worker
kept = Engine.forward_backward
def forward_backward(self, micro, **rest):
    if self.dist_context.rank == 1 and len(micro.input_ids) >= 4:
        raise RuntimeError("CUDA out of memory (made up by the test)")
    return kept(self, micro, **rest)
Engine.forward_backward = forward_backward
sys.exit(batch_worker.main(sys.argv[1]))
"""


def train_with_oom(argv: list[str]) -> int:
    batch_finder.WORKER_COMMAND = ("-c", OOM_TRIAL_CODE.format(tests=str(Path(__file__).parents[1])))  # type: ignore[assignment]
    return run_train_script(argv)


@pytest.mark.sweep  # two real groups of processes: their imports take half a minute on one core
@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_find_batch_survives_a_rank_that_runs_out_of_memory(tiny_model, data_files, tmp_path, zero):
    out = tmp_path / "run"
    argv = [*make_argv(tiny_model, data_files), "--find-batch", "--ds-config", zero, "--output-dir", str(out)]
    log = tmp_path / "log"
    assert run_on_ranks(2, train_with_oom, argv, log=log) == 0, log.read_text()
    content = json.loads((out / "find-batch.json").read_text())
    sizes = [(trial["micro_batch_size"], trial["fits"]) for trial in content["tried"]]
    assert sizes == [(1, True), (2, True), (4, False)]
    assert "out of memory on rank 1" in content["tried"][-1]["failure_reason"]
    assert content["suggestion"] in (1, 2)
