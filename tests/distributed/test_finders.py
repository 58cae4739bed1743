"""`--find-lr` and `--find-batch`: real steps that no run goes on from, and what is suggested after them."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.engines import joined_ranks, plan_run, start_engine
from helpers.launch_ranks import run_on_ranks, run_train_script, train
from helpers.matrix import launch_by_ranks, make_job
from helpers.tiny_inputs import tiny_argv

from trainer.config import cli
from trainer.config.errors import TrainingError, UserError
from trainer.distributed.process_group import DistContext
from trainer.tools import find_batch
from trainer.tools.find_batch import candidate_sizes, fastest, next_size
from trainer.tools.find_lr import has_diverged, smooth, suggest_lr, sweep
from trainer.tools.trial_engine import FINDER_FILES
from trainer.training.run_folder import is_unused

STEPS = 100
LRS = np.geomspace(1e-7, 1.0, STEPS).tolist()
FIND_LR_FLAGS = "--global-batch 6 --micro-batch 1 --lr 1e-2 --max-steps 7 --eval-every 3"


def make_argv(model: str, data_files: tuple[str, str], flags: str) -> list[str]:
    text = f"--objective completion --block-size 32 --save-every never --wandb disabled {flags}"
    return tiny_argv(model, data_files, text)


# --- the curve of the learning rate ---


def test_the_smoothing_of_the_curve_is_fastais_formula():
    """avg_n = beta avg + (1 - beta) loss, divided by 1 - beta^n: of a constant it is the constant from the start."""
    assert smooth([3.0] * 5, STEPS) == pytest.approx([3.0] * 5)
    assert smooth([1.0, 2.0], 20) == pytest.approx([1.0, (0.5 * 0.5 + 0.5 * 2.0) / 0.75])


@pytest.mark.parametrize("best", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("seed", range(5))
def test_the_lr_suggestion_is_about_a_tenth_of_the_best_rate(best, noise, seed):
    """A made-up sweep: flat at 4, falling to 2 at the best rate, then rising steeply until it diverges."""
    rng, losses = random.Random(seed), []
    while not (losses and has_diverged(losses, STEPS)):
        decades = math.log10(LRS[len(losses)] / best)
        level = 4.0 - 2.0 * math.exp(-(decades**2)) if decades < 0 else 2.0 + 3.0 * decades**2
        losses.append(level + rng.gauss(0, noise))
    suggestion = suggest_lr(LRS, losses, STEPS)
    assert suggestion.lr == pytest.approx(best / 10, rel=3.0), "the smoothed curve lags by half a decade"
    assert best / 30 < suggestion.lr < best, "and never is the rate at the lowest loss itself"
    assert suggestion.warning == ""
    assert LRS[len(losses) - 1] < 100 * best, "it ends where it diverges"


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([4.0 - 0.01 * n for n in range(STEPS)], "does not rise again"),
        ([4.0 - 0.02 * min(n, 90) + 0.02 * max(0, n - 90) for n in range(STEPS)], "does not rise again"),
        ([4.0 + 0.01 * (-1) ** n for n in range(STEPS)], "neither falls nor rises"),
        ([4.0 + 0.2 * max(0, n - 12) for n in range(30)], "begin lower"),
        ([4.0, math.nan], "diverges from the start"),
        ([4.0 + 3.0 * n for n in range(12)], "begin lower"),
    ],
)
def test_an_lr_range_that_is_too_small_is_named(losses, message):
    suggestion = suggest_lr(LRS, losses, STEPS)
    assert message in suggestion.warning
    assert (suggestion.lr is None) == (message != "does not rise again")


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_is_no_divergence_and_no_fall_and_a_loss_that_settles_below_its_start_is_a_fall(seed):
    """The second as the demo's does: from 7 down to 4.5 at half the range, then up to 6 and no further."""
    dice = random.Random(seed)
    losses = [4.0 + dice.gauss(0, 0.5) for _ in range(STEPS)]
    assert not any(has_diverged(losses[:n], STEPS) for n in range(1, STEPS + 1))
    assert suggest_lr(LRS, losses, STEPS).lr is None
    levels = [7.0] * 30 + [7.0 - 0.125 * n for n in range(20)] + [6.0] * 50
    losses = [level + dice.gauss(0, 0.1) for level in levels]
    assert not has_diverged(losses, STEPS)
    suggestion = suggest_lr(LRS, losses, STEPS)
    assert suggestion.warning == ""
    assert LRS[40] / 10 < suggestion.lr < LRS[60] / 10


def test_the_lr_range_is_parsed_and_its_default_depends_on_the_mode():
    lr_range = cli.parse_args(["--mode", "full", "--find-lr", "1e-5:1e-1:50"]).find_lr
    assert (lr_range.start, lr_range.end, lr_range.steps) == (1e-5, 1e-1, 50)
    full, lora = (cli.parse_args(["--mode", mode, "--find-lr"]).find_lr for mode in ("full", "lora"))
    assert (lora.start, lora.end) == pytest.approx((10 * full.start, 10 * full.end))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *((lr_range, "--find-lr") for lr_range in ("1", "1:0.1", "0:1", "a:b", "1e-5:1:3", "1:2:3:4", "1e-5:inf")),
        *((other, "one at a time") for other in ("--find-batch", "--dry-run", "--resume")),
    ],
)
def test_a_wrong_lr_range_and_a_second_program_flag_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        cli.parse_args(["--mode", "full", "--find-lr", flags])


# --- the sweep on real ranks ---


def run_sweeps(jobs: list[dict[str, Any]]) -> int:
    """On a rank: the losses of a sweep to rates at which no number is left of the model."""
    with joined_ranks() as dist_context:
        for job in jobs:
            run = start_engine(job, dist_context)
            losses = sweep(run.engine, run.data, run.plan.schedule, [*np.geomspace(1e-3, 1e5, 20), *[1e30] * 4])
            all_losses = {json.dumps(rank_losses) for rank_losses in dist_context.all_gather_object(losses)}
            assert len(all_losses) == 1, "every rank sees the loss of the global batch"
            if dist_context.rank == 0:
                (Path(job["out"]) / f"{job['name']}.json").write_text(json.dumps(losses))
    return 0


MORE_CELLS = [
    *((1, "zero0", "full"), (1, "zero2", "lora"), (2, "zero1", "full")),
    *((2, f"{zero}", "lora") for zero in ("zero2_offload", "zero3", "zero3_offload")),
]


@pytest.mark.parametrize(
    "cells",
    [[(2, "zero0", "lora"), (2, "zero3", "full")], pytest.param(MORE_CELLS, marks=pytest.mark.sweep)],
    ids=["some", "more"],
)
def test_a_sweep_ends_where_the_loss_diverges_alike_on_all_ranks_and_stages(cells, tiny_model, data_files, tmp_path):
    jobs = []
    for ranks, zero, mode in cells:
        argv = make_argv(tiny_model, data_files, f"--mode {mode} {FIND_LR_FLAGS} --ds-config {zero}")
        jobs.append(make_job(tmp_path, f"{ranks}-{zero}-{mode}", argv, ranks=ranks))
    launch_by_ranks(jobs, run_sweeps)
    first_losses: dict[str, list[float]] = {}
    for (_, _, mode), job in zip(cells, jobs, strict=True):
        losses = json.loads((tmp_path / f"{job['name']}.json").read_text())
        assert len(losses) < 24, job["name"]
        assert losses[:6] == pytest.approx(first_losses.setdefault(mode, losses[:6]), rel=1e-4), job["name"]


def test_find_lr_writes_a_suggestion_and_a_picture_and_trains_nothing(tiny_model, data_files, tmp_path):
    out = tmp_path / "run"
    argv = make_argv(tiny_model, data_files, f"--mode full {FIND_LR_FLAGS} --find-lr 1e-5:10:40")
    output = train(argv, out=out, world_size=2)
    content = json.loads((out / "find-lr.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["find-lr.json", "find-lr.png"]
    assert (out / "find-lr.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"--lr {content['suggestion']:g} for --mode full" in output
    assert 1e-5 < content["suggestion"] < 10
    assert content["steps"] == 40
    assert output.count("suggestion") == 1, "one rank speaks"
    assert is_unused(out, FINDER_FILES), "a run may begin in the folder that the test left"


# --- which batch sizes are tried, and which is suggested ---


@pytest.mark.parametrize(
    ("global_batch", "ranks", "sizes", "tried"),
    [
        (12, 2, [1, 2, 3, 6], [1, 2, 6]),
        (7, 1, [1, 7], [1, 7]),
        (4, 4, [1], [1]),
        (24, 1, [1, 2, 3, 4, 6, 8, 12, 24], [1, 2, 4, 8, 24]),
    ],
)
def test_every_micro_batch_size_keeps_the_global_batch_and_those_tried_double(global_batch, ranks, sizes, tried):
    assert candidate_sizes(global_batch, ranks) == sizes
    known: dict[int, bool] = {}
    while (size := next_size(sizes, known)) is not None:
        known[size] = True
    assert list(known) == tried


@pytest.mark.parametrize("most", range(13))
def test_the_batch_search_finds_the_largest_size_that_fits(most):
    sizes, known = candidate_sizes(360, 1), {}
    while (size := next_size(sizes, known)) is not None:
        known[size] = size <= most
    largest = max((size for size in sizes if size <= most), default=None)
    assert max((size for size, fits in known.items() if fits), default=None) == largest
    assert len(known) <= 9, f"of {len(sizes)} sizes"


@pytest.mark.parametrize(
    ("largest", "suggestion"),
    [
        (150, "--micro-batch 2: 180 tokens/s, +20% against 4, the largest that fits"),
        (181, "--micro-batch 2: 180 tokens/s, in less memory and as fast as 4, the largest that fits"),
        (184, "--micro-batch 2: 180 tokens/s, in less memory and as fast as 4, the largest that fits"),
        (200, "--micro-batch 4: 200 tokens/s"),
    ],
)
def test_the_batch_search_suggests_the_fastest_size_not_the_largest(largest, suggestion):
    facts = {"gradient_accumulation_steps": 1, "fits": True, "step_seconds": 1.0, "peak_memory_bytes": 1}
    speeds = {1: 100, 2: 180, 4: largest}
    trials = [{"micro_batch_size": n, "tokens_per_second": speed, **facts} for n, speed in speeds.items()]
    lines = find_batch.format_lines(trials, fastest(trials))
    assert [line for line in lines if line.startswith("suggestion")] == [f"suggestion     {suggestion}"]
    assert fastest([{**trials[0], "fits": False}]) is None, "nothing fits"


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
    assert find_batch.is_out_of_memory(problem) == is_one


# --- batch sizes on real ranks ---


@pytest.fixture
def batch_argv(tiny_model: str, data_files: tuple[str, str]) -> list[str]:
    return make_argv(tiny_model, data_files, "--mode full --global-batch 8")


@pytest.fixture
def planned(batch_argv: list[str]) -> Any:
    with joined_ranks() as dist_context:
        return plan_run(batch_argv, dist_context, on_meta=True)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ("os._exit(77)", "out of memory on rank 1"),
        ("os.kill(os.getpid(), 9)", "killed by the system on rank 1"),
        ("print('boom: no such thing', flush=True); os._exit(1)", None),
    ],
)
def test_a_batch_trial_whose_rank_ends_ends_all(planned, monkeypatch, ends, message):
    """The other rank waits, as in a collective with the one that is gone."""
    context = replace(planned.plan.dist_context, world_size=2, hosts=("h1", "h1"))
    code = f"import os, time\ntime.sleep(600) if os.environ['RANK'] == '0' else time.sleep(0.5)\n{ends}"
    monkeypatch.setattr(find_batch, "WORKER_COMMAND", ("-S", "-c", code))
    plan = replace(planned.plan, dist_context=context)
    if message is None:
        with pytest.raises(TrainingError, match="micro-batch 4 failed on rank 1: boom: no such thing"):
            find_batch.run_trial(plan, Path("data"), 4)
        return
    trial = find_batch.run_trial(plan, Path("data"), 4)
    assert (trial["fits"], trial["gradient_accumulation_steps"], trial["failure_reason"]) == (False, 1, message)


def test_find_batch_is_refused_over_several_hosts(planned):
    hosts = ("h1",) * 8 + ("h2",) * 8
    plan = replace(planned.plan, dist_context=replace(planned.plan.dist_context, world_size=16, hosts=hosts))
    with pytest.raises(UserError, match=r"--find-batch: 16 ranks on several hosts; expected one host: try its 8 ranks"):
        find_batch.find_micro_batch_size(plan, planned.data)


def test_find_batch_skips_sizes_that_the_estimate_puts_over_the_budget(planned, monkeypatch):
    plan, sizes = planned.plan, [1, 2, 4, 8]
    monkeypatch.setattr(DistContext, "free_host_bytes", lambda self: 2**40)
    assert find_batch.sizes_within_budget(plan, sizes, 32)[0] == sizes
    monkeypatch.setattr(find_batch, "required_bytes", lambda estimate, *_: (estimate.activations, 0.0))
    two, four = (plan.estimate_memory(plan.deepspeed_file, 32, size).activations for size in (2, 4))
    limit = (two + four) / 2 / find_batch.MEMORY_BUDGET_SHARE
    monkeypatch.setattr(DistContext, "free_host_bytes", lambda self: limit)
    fitting, notice = find_batch.sizes_within_budget(plan, sizes, 32)
    assert fitting == [1, 2]
    assert "not tried: 4 and above" in notice
    gpu = replace(plan, dist_context=replace(plan.dist_context, device=torch.device("cuda", 0)))
    assert find_batch.sizes_within_budget(gpu, sizes, 32) == (sizes, ""), "a GPU says itself what fits"


OOM_TRIAL_CODE = """
from trainer.distributed.engine import Engine
from trainer.tools import find_batch
from trainer.tools.trial_engine import run_rank
kept = Engine.forward_backward
def forward_backward(self, micro, **rest):
    if self.dist_context.rank == 1 and len(micro.input_ids) >= 4:
        raise RuntimeError("CUDA out of memory (made up by the test)")
    return kept(self, micro, **rest)
Engine.forward_backward = forward_backward
run_rank(find_batch.measure_size)
"""


def train_with_oom(argv: list[str]) -> int:
    find_batch.WORKER_COMMAND = ("-c", OOM_TRIAL_CODE)  # type: ignore[assignment]
    return run_train_script(argv)


@pytest.mark.parametrize(
    ("zero", "rank_fails"),
    [("zero2", False), *(pytest.param(zero, True, marks=pytest.mark.sweep) for zero in ("zero0", "zero2", "zero3"))],
)
def test_find_batch_tries_every_size_and_survives_a_rank_without_memory(
    zero, rank_fails, batch_argv, tmp_path, fast_python
):
    out, log = tmp_path / "run", tmp_path / "log"
    argv = [*batch_argv, "--find-batch", "--ds-config", zero, "--output-dir", str(out)]
    target = train_with_oom if rank_fails else run_train_script
    assert run_on_ranks(2, target, argv, log=log, env={"TEST_PYTHON": fast_python}) == 0, log.read_text()
    content, output = json.loads((out / "find-batch.json").read_text()), log.read_text()
    tried = {trial["micro_batch_size"]: trial for trial in content["tried"]}
    assert [trial["gradient_accumulation_steps"] for trial in tried.values()] == [4, 2, 1]
    assert {size: trial["fits"] for size, trial in tried.items()} == {1: True, 2: True, 4: not rank_fails}
    assert not rank_fails or "out of memory on rank 1" in tried[4]["failure_reason"]
    speeds = {size: trial["tokens_per_second"] for size, trial in tried.items() if trial["fits"]}
    assert 0 < 0.97 * max(speeds.values()) <= speeds[content["suggestion"]]
    assert f"--micro-batch {content['suggestion']}" in output
    assert "80% of the free memory" in output, "the budget on a processor is said"
    assert sorted(path.name for path in out.iterdir()) == ["find-batch.json"], "nothing was trained"
