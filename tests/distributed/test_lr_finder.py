"""`--find-lr`: the sweep is a run's own steps, leaves no trace in the state, and says where the rate belongs."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from helpers.engines import joined_ranks, prepare_data, start_engine
from helpers.launch_ranks import train
from helpers.matrix import launch_jobs
from helpers.tiny_inputs import tiny_argv

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.tools.finders.files import FINDER_FILES
from trainer.tools.finders.lr_curve import geometric_lrs, has_diverged, smooth, suggest_lr
from trainer.tools.finders.lr_finder import sweep
from trainer.training.run_folder import is_unused

STEPS = 100


# --- the curve, pure ---


def test_the_learning_rates_of_a_sweep_are_spaced_evenly_in_their_logarithm():
    lrs = geometric_lrs(1e-6, 1.0, 7)
    assert lrs == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_lr_curve_smoothing_is_fastais_formula():
    """avg_n = beta avg + (1 - beta) loss, divided by 1 - beta^n: of a constant it is the constant from the start."""
    assert smooth([3.0] * 5, beta=0.9) == pytest.approx([3.0] * 5)
    assert smooth([1.0, 2.0], beta=0.5) == pytest.approx([1.0, (0.5 * 0.5 + 0.5 * 2.0) / 0.75])


def make_sweep(best_lr: float, *, noise: float = 0.02, seed: int = 0) -> tuple[list[float], list[float]]:
    """A made-up sweep over 1e-7..1: flat at 4, falling to 2 at `best_lr`, then rising steeply."""
    rng, losses = random.Random(seed), []
    lrs = geometric_lrs(1e-7, 1.0, STEPS)
    for lr in lrs:
        decades = math.log10(lr / best_lr)
        level = 4.0 - 2.0 * math.exp(-(decades**2)) if decades < 0 else 2.0 + 3.0 * decades**2
        losses.append(level + rng.gauss(0, noise))
        if has_diverged(losses, STEPS):
            break
    return lrs[: len(losses)], losses


@pytest.mark.parametrize("best", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.2])
def test_the_lr_suggestion_is_about_a_tenth_of_the_best_rate(best, noise):
    for seed in range(5):
        verdict = suggest_lr(*make_sweep(best, noise=noise, seed=seed), STEPS)
        assert verdict.lr == pytest.approx(best / 10, rel=3.0), "the smoothed curve lags by half a decade"
        assert best / 30 < verdict.lr < best, "and never is the rate at the lowest loss itself"
        assert verdict.warning == ""


def test_an_lr_sweep_that_diverges_ends_early():
    lrs, _ = make_sweep(1e-4)
    assert lrs[-1] < 1e-2


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
    verdict = suggest_lr(geometric_lrs(1e-7, 1.0, STEPS)[: len(losses)], losses, STEPS)
    assert message in verdict.warning
    assert (verdict.lr is None) == (message != "does not rise again")


def test_a_sweep_whose_loss_settles_below_its_start_suggests_a_rate():
    """As the demo's does: from 7 down to 4.5 at half the range, then up to 6 and no further."""
    for seed in range(5):
        dice = random.Random(seed)
        levels = [7.0] * 30 + [7.0 - 0.125 * n for n in range(20)] + [6.0] * 50
        losses = [level + dice.gauss(0, 0.1) for level in levels]
        assert not has_diverged(losses, STEPS)
        lrs = geometric_lrs(1e-6, 10.0, STEPS)
        verdict = suggest_lr(lrs, losses, STEPS)
        assert verdict.warning == "", seed
        assert lrs[40] / 10 < verdict.lr < lrs[60] / 10


def test_noise_alone_is_no_divergence_and_no_fall_of_an_lr_sweep():
    for seed in range(20):
        dice = random.Random(seed)
        losses = [4.0 + dice.gauss(0, 0.5) for _ in range(STEPS)]
        assert not any(has_diverged(losses[:n], STEPS) for n in range(1, STEPS + 1)), seed
        assert suggest_lr(geometric_lrs(1e-7, 1.0, STEPS), losses, STEPS).lr is None, seed


# --- the flag ---


def test_the_lr_range_is_parsed_and_its_default_depends_on_the_mode():
    lr_range = cli.parse_args(["--mode", "full", "--find-lr", "1e-5:1e-1:50"]).find_lr
    assert (lr_range.start, lr_range.end, lr_range.steps) == (1e-5, 1e-1, 50)
    full, lora = (cli.parse_args(["--mode", mode, "--find-lr"]).find_lr for mode in ("full", "lora"))
    assert (lora.start, lora.end) == pytest.approx((10 * full.start, 10 * full.end))
    assert cli.parse_args(["--mode", "full"]).find_lr is None


@pytest.mark.parametrize("lr_range", ["1", "1:0.1", "0:1", "a:b", "1e-5:1:3", "1:2:3:4", "1e-5:inf"])
def test_a_wrong_lr_range_is_one_line(lr_range):
    with pytest.raises(UserError, match="--find-lr"):
        cli.parse_args(["--mode", "full", "--find-lr", lr_range])


@pytest.mark.parametrize("other", ["--find-batch", "--dry-run", "--resume"])
def test_find_lr_with_another_program_flag_is_refused(other):
    with pytest.raises(UserError, match="one at a time"):
        cli.parse_args(["--mode", "full", "--find-lr", other])


# --- on real ranks ---

CELLS = [(2, "zero0", "lora"), (2, "zero3", "full")]
SWEEP_CELLS = [
    (1, "zero0", "full"),
    (1, "zero2", "lora"),
    (2, "zero1", "full"),
    (2, "zero2_offload", "lora"),
    (2, "zero3", "lora"),
    (2, "zero3_offload", "lora"),
]


def make_argv(tiny_model: str, data_files: tuple[str, str], mode: str) -> list[str]:
    text = f"--mode {mode} --objective completion --block-size 32 --global-batch 6 --micro-batch 1 --lr 1e-2"
    return tiny_argv(tiny_model, data_files, f"{text} --max-steps 7 --save-every never --eval-every 3")


def run_sweeps(jobs: list[dict[str, Any]]) -> int:
    """On a rank: the losses of a sweep to rates at which no number is left of the model."""
    with joined_ranks() as dist_context:
        for job in jobs:
            run = start_engine(job, dist_context)
            losses = sweep(run.engine, run.data, run.plan.schedule, [*geometric_lrs(1e-3, 1e5, 20), *[1e30] * 4])
            all_losses = {json.dumps(rank_losses) for rank_losses in dist_context.all_gather_object(losses)}
            assert len(all_losses) == 1, "every rank sees the loss of the global batch"
            if dist_context.rank == 0:
                (Path(job["out"]) / f"{job['name']}.json").write_text(json.dumps(losses))
    return 0


@pytest.mark.parametrize("cells", [CELLS, pytest.param(SWEEP_CELLS, marks=pytest.mark.sweep)], ids=["some", "more"])
def test_a_sweep_ends_where_the_loss_diverges_alike_on_all_ranks_and_stages(cells, tiny_model, data_files, tmp_path):
    data = str(prepare_data(make_argv(tiny_model, data_files, "full")))
    for ranks in sorted({cell[0] for cell in cells}):
        jobs = [
            {
                "name": f"{r}-{zero}-{mode}",
                "data": data,
                "out": str(tmp_path),
                "flags": [*make_argv(tiny_model, data_files, mode), "--ds-config", zero],
            }
            for r, zero, mode in cells
            if r == ranks
        ]
        launch_jobs(ranks, jobs, tmp_path / f"{ranks}.log", run_sweeps)
    first_losses: dict[str, list[float]] = {}
    for r, zero, mode in cells:
        losses = json.loads((tmp_path / f"{r}-{zero}-{mode}.json").read_text())
        assert len(losses) < 24, f"{zero}: it ends where the loss diverges"
        expected = pytest.approx(first_losses.setdefault(mode, losses[:6]), rel=1e-4)
        assert losses[:6] == expected, f"{zero}: ranks and stages change nothing"


def test_find_lr_writes_a_suggestion_and_a_picture_and_trains_nothing(tiny_model, data_files, tmp_path):
    out = tmp_path / "run"
    output = train([*make_argv(tiny_model, data_files, "full"), "--find-lr", "1e-5:10:40"], out=out, world_size=2)
    content = json.loads((out / "find-lr.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["find-lr.json", "find-lr.png"]
    assert (out / "find-lr.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"--lr {content['suggestion']:g} for --mode full" in output
    assert 1e-5 < content["suggestion"] < 10
    assert content["steps"] == 40
    assert output.count("suggestion") == 1, "one rank speaks"
    assert is_unused(out, FINDER_FILES), "a run may begin in the folder that the test left"
