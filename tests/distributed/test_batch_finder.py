"""`--find-batch`: real steps of growing micro-batches for one global batch; out of memory on one rank ends no other."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.engines import joined_ranks, plan_run, prepare_data
from helpers.launch_ranks import run_on_ranks, run_train_script, train
from helpers.tiny_inputs import tiny_argv

from trainer.config.batch_config import BatchConfig
from trainer.config.errors import TrainingError
from trainer.distributed.engine import Engine
from trainer.model.loss import simulate_gpu
from trainer.tools.finders import batch_finder, batch_size_worker
from trainer.tools.finders.batch_finder import TrialResult, candidate_sizes, fastest, ladder, next_sizes

# --- what to try, pure ---


@pytest.mark.parametrize(
    ("global_batch", "ranks", "expected"), [(8, 1, [1, 2, 4, 8]), (12, 2, [1, 2, 3, 6]), (7, 1, [1, 7]), (4, 4, [1])]
)
def test_every_micro_batch_size_keeps_the_global_batch(global_batch, ranks, expected):
    assert candidate_sizes(global_batch, ranks) == expected


def test_the_batch_sizes_to_try_double_and_end_at_the_largest():
    assert ladder([1, 2, 3, 4, 6, 8, 12, 24]) == [1, 2, 4, 8, 24]
    assert ladder([1, 7]) == [1, 7]


@pytest.mark.parametrize("most", range(13))
def test_the_batch_search_finds_the_largest_size_that_fits(most):
    """Whatever fits, in a few groups of processes, each of which ends at its first failure."""
    sizes, known, groups = candidate_sizes(360, 1), {}, 0
    while todo := next_sizes(sizes, known):
        groups += 1
        for size in todo:
            known[size] = size <= most
            if not known[size]:
                break
    largest = max((size for size in sizes if size <= most), default=None)
    assert max((size for size, fits in known.items() if fits), default=None) == largest
    assert groups <= 4


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
    lines = batch_finder.format_lines(SimpleNamespace(dropout=0.0), trials, fastest(trials), "")
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
    assert batch_size_worker.is_out_of_memory(problem) == is_one


# --- on real ranks ---


def make_argv(tiny_model: str, data_files: tuple[str, str], *extra_flags: str) -> list[str]:
    text = "--mode full --objective completion --block-size 32 --global-batch 8 --wandb disabled"
    return tiny_argv(tiny_model, data_files, text, *extra_flags)


def try_fake_sizes(argv: list[str], out: str, scripts: list[str]) -> int:
    """`try_sizes` with, in place of the real trial, a Python line for each rank; what came out goes to out-rank."""
    with joined_ranks() as dist_context:
        planned = plan_run(argv, dist_context, on_meta=True)
        batch_finder.WORKER_COMMAND = ("-S", "-c", FAKE_TRIAL_CODE + scripts[dist_context.rank])  # type: ignore[assignment]
        batch_finder.GRACE_SECONDS = 0.5
        try:
            result: Any = [
                vars(trial) for trial in batch_finder.run_trials(planned.plan, planned.data.folder, [1, 2, 4])
            ]
        except TrainingError as error:
            result = str(error)
        Path(f"{out}-{dist_context.rank}").write_text(json.dumps(result))
        dist_context.watchdog.close()
    return 0


FAKE_TRIAL_CODE = """
import json, os, sys, time
job = json.loads(open(sys.argv[1]).read())
def report_trial():
    with open(job["answer"], "a") as file:
        file.write(json.dumps({"seconds": 0.5, "tokens": 100, "peak_memory_bytes": 7}) + chr(10))
"""
WAITS = "report_trial(); report_trial(); time.sleep(600)"  # in a collective with one who is gone
ENDS = "report_trial(); report_trial(); time.sleep(2); "  # by then the other rank's process has begun, too


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ("os._exit(77)", "out of memory on rank 1"),
        ("os.kill(os.getpid(), 9)", "killed by the system"),
        ("print('boom: no such thing', flush=True); os._exit(1)", None),
    ],
)
def test_a_batch_trial_whose_rank_ends_is_seen_by_all_ranks(tiny_model, data_files, tmp_path, ends, message):
    argv = make_argv(tiny_model, data_files)
    prepare_data(argv)
    log = tmp_path / "log"
    exit_code = run_on_ranks(2, try_fake_sizes, argv, str(tmp_path / "result"), [WAITS, ENDS + ends], log=log)
    assert exit_code == 0, log.read_text()
    results = [json.loads((tmp_path / f"result-{rank}").read_text()) for rank in range(2)]
    assert results[0] == results[1]
    if message is None:
        assert "micro-batch 4 failed on rank 1: boom: no such thing" in results[0]
        return
    sizes = [(trial["micro_batch_size"], trial["gradient_accumulation_steps"], trial["fits"]) for trial in results[0]]
    assert sizes == [(1, 4, True), (2, 2, True), (4, 1, False)]
    assert message in results[0][-1]["failure_reason"]
    assert results[0][0]["tokens_per_second"] == 200


def test_find_batch_tries_every_size_and_writes_its_numbers(tiny_model, data_files, tmp_path, fast_python):
    out = tmp_path / "run"
    argv = [*make_argv(tiny_model, data_files), "--find-batch", "--ds-config", "zero2"]
    output = train(argv, out=out, env={"TEST_PYTHON": fast_python})
    content = json.loads((out / "find-batch.json").read_text())
    sizes = [(trial["micro_batch_size"], trial["gradient_accumulation_steps"]) for trial in content["tried"]]
    assert sizes == [(1, 8), (2, 4), (4, 2), (8, 1)]
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
    monkeypatch.setattr(batch_finder, "free_host_bytes", lambda plan: 2**40)
    assert batch_finder.sizes_within_budget(plan, [1, 2, 4, 8], 32)[0] == [1, 2, 4, 8]
    monkeypatch.setattr(batch_finder, "required_bytes", lambda plan, estimate: (estimate.activations, 0.0))
    two, four = (batch_finder.estimate_plan(plan, plan.deepspeed_file, 32, size).activations for size in (2, 4))
    limit = (two + four) / 2 / batch_finder.MEMORY_BUDGET_SHARE
    monkeypatch.setattr(batch_finder, "free_host_bytes", lambda plan: limit)
    sizes, notice = batch_finder.sizes_within_budget(plan, [1, 2, 4, 8], 32)
    assert sizes == [1, 2]
    assert "not tried: 4 and above" in notice
    gpu = replace(plan, dist_context=replace(plan.dist_context, device=torch.device("cuda", 0)))
    assert batch_finder.sizes_within_budget(gpu, [1, 2, 4, 8], 32) == ([1, 2, 4, 8], ""), "a GPU says itself what fits"


def measure_sizes_with_graphs(argv: list[str], out: str) -> int:
    """On the stand-in device: what was recorded for each size, and how often it was replayed."""
    from test_cuda_graphs import FakeCapturedGraph

    from trainer.distributed import cuda_graphs

    cuda_graphs.CapturedGraph = FakeCapturedGraph  # type: ignore[misc, assignment]
    with joined_ranks() as dist_context, simulate_gpu():
        planned = plan_run(argv, dist_context)
        config, plan = planned.plan.deepspeed_config, planned.plan.execution
        engine = Engine(dist_context, planned.model, config, planned.settings.train, plan)
        replays = []
        for size in (1, 2, 4, 8):
            del FakeCapturedGraph.instances[:]
            engine.reset_graphs()
            batch = BatchConfig.divide(8, size, 1)
            batch_size_worker.measure_step(engine, planned.data.train, batch)
            replays.append([graph.num_replays for graph in FakeCapturedGraph.instances])
    Path(out).write_text(json.dumps(replays))
    return 0


def test_find_batch_times_recorded_steps_of_every_size(tiny_model, data_files, tmp_path):
    """Each is recorded anew: as many graphs as one run may keep are soon used up."""
    out, log = tmp_path / "replays", tmp_path / "log"
    argv = make_argv(tiny_model, data_files)
    assert run_on_ranks(1, measure_sizes_with_graphs, argv, str(out), log=log) == 0, log.read_text()
    first, *_, whole = json.loads(out.read_text())
    for replays in json.loads(out.read_text()):
        assert min(replays) > batch_size_worker.NUM_TIMED_STEPS
    assert (len(first), len(whole)) == (2, 1), "the first micro-batch of a step, and those that add to it"


OOM_TRIAL_CODE = """
import sys
sys.path.insert(0, {tests!r})
from trainer.distributed.engine import Engine
from trainer.tools.finders import batch_size_worker
kept = Engine.forward_backward
def forward_backward(self, micro, **rest):
    if self.dist_context.rank == 1 and len(micro.input_ids) >= 4:
        raise RuntimeError("CUDA out of memory (made up by the test)")
    return kept(self, micro, **rest)
Engine.forward_backward = forward_backward
sys.exit(batch_size_worker.main(sys.argv[1]))
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
