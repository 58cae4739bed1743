"""`--find-lr`: the sweep is a run's own steps, leaves no trace in the state, and says where the rate belongs."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from cells import on_cells, run_cells
from conftest import TEMPLATES
from ranks import train

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.data.dataset import load, prepare
from trainer.distributed.process_group import leave_world, start_world
from trainer.model.build import build, load_config
from trainer.run import _engine
from trainer.tools.finders.lr_curve import diverged, judge, rates, smooth
from trainer.tools.finders.lr_finder import sweep
from trainer.tracking.records import to_line
from trainer.training import loop
from trainer.training.checkpoint import Checkpoints, Progress
from trainer.training.run_plan import make_plan

STEPS = 100


# --- the curve, pure ---


def test_the_rates_are_spaced_evenly_in_their_logarithm():
    tried = rates(1e-6, 1.0, 7)
    assert tried == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_smoothing_is_fastais_formula():
    """avg_n = beta avg + (1 - beta) loss, divided by 1 - beta^n: of a constant it is the constant from the start."""
    assert smooth([3.0] * 5, beta=0.9) == pytest.approx([3.0] * 5)
    assert smooth([1.0, 2.0], beta=0.5) == pytest.approx([1.0, (0.5 * 0.5 + 0.5 * 2.0) / 0.75])


def curve(best: float, *, low: float = 2.0, noise: float = 0.02, seed: int = 0) -> tuple[list[float], list[float]]:
    """A made-up sweep over 1e-7..1: flat at 4, falling to `low` at `best`, then rising steeply; ended by `diverged`."""
    dice, losses = random.Random(seed), []
    tried = rates(1e-7, 1.0, STEPS)
    for rate in tried:
        away = math.log10(rate / best)
        level = 4.0 - (4.0 - low) * math.exp(-(away**2)) if away < 0 else low + 3.0 * away**2
        losses.append(level + dice.gauss(0, noise))
        if diverged(losses, STEPS):
            break
    return tried[: len(losses)], losses


@pytest.mark.parametrize("best", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.2])
def test_the_suggestion_is_about_a_tenth_of_the_best_rate(best, noise):
    for seed in range(5):
        verdict = judge(*curve(best, noise=noise, seed=seed), STEPS)
        assert verdict.suggestion == pytest.approx(best / 10, rel=3.0), "the smoothed curve lags by half a decade"
        assert best / 30 < verdict.suggestion < best, "and never is the rate at the lowest loss itself"
        assert verdict.warning == ""


def test_a_sweep_that_blows_up_ends_early():
    tried, _ = curve(1e-4)
    assert tried[-1] < 1e-2


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([4.0 - 0.01 * n for n in range(STEPS)], "does not rise again"),
        ([4.0 - 0.02 * min(n, 90) + 0.02 * max(0, n - 90) for n in range(STEPS)], "does not rise again"),
        ([4.0 + 0.01 * (-1) ** n for n in range(STEPS)], "neither falls nor rises"),
        ([4.0 + 0.2 * max(0, n - 12) for n in range(30)], "begin lower"),
        ([4.0, math.nan], "diverges from the start"),
        ([4.0 + 3.0 * n for n in range(12)], "begin lower"),
    ],
)
def test_a_range_that_is_too_small_is_named(losses, said):
    verdict = judge(rates(1e-7, 1.0, STEPS)[: len(losses)], losses, STEPS)
    assert said in verdict.warning
    assert (verdict.suggestion is None) == (said != "does not rise again")


def test_a_loss_that_settles_below_its_start_after_the_lowest_has_shown_enough():
    """As the demo's does: from 7 down to 4.5 at half the range, then up to 6 and no further."""
    for seed in range(5):
        dice = random.Random(seed)
        levels = [7.0] * 30 + [7.0 - 0.125 * n for n in range(20)] + [6.0] * 50
        losses = [level + dice.gauss(0, 0.1) for level in levels]
        assert not diverged(losses, STEPS)
        tried = rates(1e-6, 10.0, STEPS)
        verdict = judge(tried, losses, STEPS)
        assert verdict.warning == "", seed
        assert tried[40] / 10 < verdict.suggestion < tried[60] / 10


def test_noise_alone_is_no_divergence_and_no_fall():
    for seed in range(20):
        dice = random.Random(seed)
        losses = [4.0 + dice.gauss(0, 0.5) for _ in range(STEPS)]
        assert not any(diverged(losses[:n], STEPS) for n in range(1, STEPS + 1)), seed
        assert judge(rates(1e-7, 1.0, STEPS), losses, STEPS).suggestion is None, seed


# --- the flag ---


def test_the_range_is_read_and_its_default_goes_with_the_mode():
    given = cli.read(["--mode", "full", "--find-lr", "1e-5:1e-1:50"]).find_lr
    assert (given.start, given.end, given.steps) == (1e-5, 1e-1, 50)
    full, lora = (cli.read(["--mode", mode, "--find-lr"]).find_lr for mode in ("full", "lora"))
    assert (lora.start, lora.end) == pytest.approx((10 * full.start, 10 * full.end))
    assert cli.read(["--mode", "full"]).find_lr is None


@pytest.mark.parametrize("words", ["1", "1:0.1", "0:1", "a:b", "1e-5:1:3", "1:2:3:4", "1e-5:inf"])
def test_a_wrong_range_is_one_line(words):
    with pytest.raises(UserError, match="--find-lr"):
        cli.read(["--mode", "full", "--find-lr", words])


@pytest.mark.parametrize("other", ["--find-batch", "--dry-run", "--resume"])
def test_one_thing_at_a_time(other):
    with pytest.raises(UserError, match="one at a time"):
        cli.read(["--mode", "full", "--find-lr", other])


# --- on real ranks ---

CELLS = [(1, "zero0", "full"), (2, "zero0", "lora"), (2, "zero1", "full"), (2, "zero3", "full")]
MORE = [(1, "zero2", "lora"), (2, "zero2_offload", "lora"), (2, "zero3", "lora"), (2, "zero3_offload", "lora")]


def arguments(tiny: str, records: tuple[str, str], mode: str) -> list[str]:
    words = f"--mode {mode} --model {tiny} --data {records[0]} --val-data {records[1]} --objective completion"
    words += (
        " --block-size 32 --global-batch 6 --micro-batch 1 --lr 1e-2 --max-steps 7 --save-every never --eval-every 3"
    )
    return [*words.split(), *TEMPLATES]


def after_a_sweep(jobs: list[dict[str, Any]]) -> int:
    """`cells.run_cells` with a sweep before each run, to rates at which no number is left of the model."""
    world = start_world()
    try:
        for job in jobs:
            settings = cli.read(job["flags"]).settings
            data, model = load(Path(job["data"])), build(settings)
            plan = make_plan(settings, world, data, model.facts, load_config(settings.model))
            engine, _ = _engine(plan, model, None)
            to_the_start = engine.state.remember()
            sweep(engine, data, plan.course, [1e-3, 1e-3])  # so that there are moments
            before = whole(engine)
            restore = engine.state.remember()
            losses = sweep(engine, data, plan.course, [*rates(1e-3, 1e5, 20), *[1e30] * 4])
            moved = whole(engine)
            restore()
            after = whole(engine)
            to_the_start()
            out, name = Path(job["out"]), job["name"]
            told = {
                "losses": losses, "same": len({json.dumps(one) for one in world.gather(losses)}) == 1,
                "moved": sum(moved[key] != before[key] for key in before) / len(before), "restored": after == before,
            }  # fmt: skip
            saver = Checkpoints(out / f"{name}-checkpoints", world, keep=9, identity={"base": "test"})
            records = list(loop.train(engine, data, plan.course, Progress(), saver, lambda: False))
            if world.rank == 0:
                (out / f"{name}.jsonl").write_text("".join(to_line(record) + "\n" for record in records))
                (out / f"{name}.json").write_text(json.dumps(told))
    finally:
        leave_world()
    return 0


def whole(engine: Any) -> dict[str, bytes]:
    """Every trained weight and moment, whole, as bytes."""
    return {name: tensor.detach().cpu().numpy().tobytes() for name, tensor in engine.state.full()}


def science(path: Path) -> list[dict[str, Any]]:
    clock = ("time", "tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in path.read_text().splitlines()]


def test_the_state_is_restored_bit_for_bit_and_a_run_after_it_is_the_run_without_it(tiny, records, tmp_path):
    leaves_no_trace(CELLS, tiny, records, tmp_path)


@pytest.mark.sweep
def test_so_it_is_under_the_other_files(tiny, records, tmp_path):
    leaves_no_trace(MORE, tiny, records, tmp_path)


def leaves_no_trace(cells: list[tuple[int, str, str]], tiny: str, records: tuple[str, str], tmp_path: Path) -> None:
    settings = cli.read(arguments(tiny, records, "full")).settings
    folder = prepare(settings.data, model=tiny, global_batch=6).folder
    plain, swept = tmp_path / "plain", tmp_path / "swept"
    for out, target in ((plain, run_cells), (swept, after_a_sweep)):
        out.mkdir()
        for ranks in (1, 2):
            jobs = [
                {
                    "name": f"{r}-{zero}-{mode}", "data": str(folder), "out": str(out),
                    "flags": [*arguments(tiny, records, mode), "--ds-config", zero],
                }
                for r, zero, mode in cells if r == ranks
            ]  # fmt: skip
            on_cells(ranks, jobs, tmp_path / f"{out.name}-{ranks}.log", target)
    sweeps: dict[str, list[list[float]]] = {"full": [], "lora": []}
    for r, zero, mode in cells:
        name = f"{r}-{zero}-{mode}"
        told = json.loads((swept / f"{name}.json").read_text())
        assert told["moved"] > 0.9, f"{name}: the sweep does train"
        assert told["restored"], name
        assert told["same"], f"{name}: every rank sees the loss of the global batch"
        assert len(told["losses"]) < 24, f"{name}: it ends where the loss diverges"
        assert science(plain / f"{name}.jsonl") == science(swept / f"{name}.jsonl"), name
        last = [(out / f"{name}-checkpoints" / "step-000007" / "state.safetensors") for out in (plain, swept)]
        assert last[0].read_bytes() == last[1].read_bytes(), f"{name}: weights and moments at the end of the run"
        sweeps[mode].append(told["losses"][:6])
    for mode, losses in sweeps.items():
        assert all(one == pytest.approx(losses[0], rel=1e-4) for one in losses), (
            f"{mode}: ranks and stages change nothing"
        )


def test_the_command_writes_a_suggestion_and_a_picture_and_trains_nothing(tiny, records, tmp_path):
    out = tmp_path / "run"
    output = train([*arguments(tiny, records, "full"), "--find-lr", "1e-5:10:60"], out=out, ranks=2)
    found = json.loads((out / "find-lr.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["find-lr.json", "find-lr.png"]
    assert (out / "find-lr.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"--lr {found['suggestion']:g} for --mode full" in output
    assert 1e-5 < found["suggestion"] < 10
    assert found["steps"] == 60
    assert output.count("suggestion") == 1, "one rank speaks"
    train([*arguments(tiny, records, "full"), "--max-steps", "1", "--wandb", "disabled"], out=out)
    assert (out / "metrics.jsonl").exists(), "a run may begin in the folder that the test left"
