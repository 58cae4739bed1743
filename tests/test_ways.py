"""The two ways of a gradient leave the same numbers, and neither lets one that is not finite touch the weights."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cells import on_cells, read_cell, run_cells
from test_invariance import LOSS, NORM, RATE, WEIGHTS, arguments, seen

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.config.schema import DS_NAMES, Batch, why_not_compiled
from trainer.distributed.deepspeed_config import deepspeed_dict, read_zero_file
from trainer.distributed.steppers import goes_direct
from trainer.training.loop import Course
from trainer.training.run_plan import _compiled, _refuse_stage


def config(name: str, **more: Any) -> dict[str, Any]:
    batch = Batch(micro=1, accumulation=1, ranks=1)
    return {**deepspeed_dict(read_zero_file(name), batch=batch, clip=1.0, precision="fp32"), **more}


def test_which_files_need_nothing_of_deepspeeds_hooks():
    direct = {
        size: [name for name in DS_NAMES if goes_direct(config(name), size=size, precision="fp32")] for size in (1, 2)
    }
    assert direct == {1: ["zero0", "zero1", "zero2"], 2: ["zero0", "zero1"]}
    assert not goes_direct(config("zero1"), size=1, precision="fp16"), "the loss scale is DeepSpeed's"
    assert not goes_direct(config("zero1", communication_data_type="bf16"), size=2, precision="fp32")
    assert goes_direct(config("zero0", wall_clock_breakdown=True), size=4, precision="fp32"), "there is no other way"
    more = {"stage": 1, "parameter_alignment": True}
    assert not goes_direct(config("zero1", zero_optimization=more), size=2, precision="fp32"), "a key it does not know"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--objective completion --prompt {a} --completion {b}", "expected --objective blocks"),
        ("--quant nf4", "not with --quant"),
        ("--checkpoint-activations", "not with --checkpoint-activations"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_flags_and_left_out_by_itself(words, said):
    with pytest.raises(UserError, match=f"--compile on: .*{said}"):
        cli.read(["--mode", "lora", *words.split(), "--compile", "on"])
    assert why_not_compiled(cli.read(["--mode", "lora", *words.split()]).settings)


def test_compiling_is_chosen_for_long_runs_of_blocks_on_a_gpu():
    def chosen(*words: str, steps: int, device: str = "cuda", zero: str = "zero0") -> bool:
        settings = cli.read(["--mode", "full", "--preset", "card", *words]).settings
        batch = settings.train.batch(1)
        course = Course(settings=settings, batch=batch, total_steps=steps, steps_per_epoch=steps)
        world: Any = SimpleNamespace(size=1, device=SimpleNamespace(type=device))
        return _compiled(settings, world, course, read_zero_file(zero))

    assert chosen(steps=19_863), "the card's run"
    assert not chosen(steps=2_000)
    assert not chosen(steps=19_863, device="cpu")
    assert not chosen(steps=19_863, zero="zero3")
    assert not chosen("--compile", "off", steps=19_863)
    assert chosen("--compile", "on", steps=1, device="cpu")
    on = cli.read(["--mode", "full", "--compile", "on"]).settings
    with pytest.raises(UserError, match="--compile on: not under ZeRO 3"):
        _refuse_stage(on, read_zero_file("zero3"))


def through_deepspeed(jobs: list[dict[str, Any]]) -> int:
    """`cells.run_cells`, all of it by DeepSpeed's own forward, backward and step."""
    from trainer.distributed import engine

    engine.goes_direct = lambda *_, **__: False  # type: ignore[assignment]
    return run_cells(jobs)


def unguarded(jobs: list[dict[str, Any]]) -> int:
    """`cells.run_cells` with a look at the numbers before every update, as with an optimizer that has no guard."""
    from trainer.distributed.steppers import Direct

    honest = Direct.__init__

    def init(self: Any, *given: Any) -> None:
        honest(self, *given)
        assert self.guarded
        self.guarded = False

    Direct.__init__ = init  # type: ignore[method-assign]
    return run_cells(jobs)


@pytest.fixture(scope="module")
def prepared(tiny: str, records: tuple[str, str], shelf: Path) -> Path:
    from trainer.data.dataset import prepare

    settings = cli.read(arguments(tiny, records, "full", "completion")).settings
    return prepare(settings.data, model=tiny, global_batch=6).folder


@pytest.mark.parametrize("other", [through_deepspeed, unguarded])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_way_gives_the_numbers_of_the_direct_one(ranks, other, tiny, records, prepared, tmp_path):
    cells = {
        f"{zero}-{mode}": [
            *arguments(tiny, records, mode, "completion"), "--ds-config", zero, "--micro-batch", "1",
            *(["--lora-plus-ratio", "4"] if mode == "lora" else []),
        ]
        for zero in (("zero0", "zero1") if other is unguarded else ("zero1",)) for mode in ("full", "lora")
    }  # fmt: skip
    for out, target in ((tmp_path / "direct", run_cells), (tmp_path / "other", other)):
        out.mkdir()
        jobs = [{"name": name, "flags": words, "data": str(prepared), "out": str(out)} for name, words in cells.items()]
        on_cells(ranks, jobs, out / "log", target)
    for name in cells:
        rows, weights = read_cell(tmp_path / "direct", name)
        others, final = read_cell(tmp_path / "other", name)
        steps = [(a, b) for a, b in zip(rows, others, strict=True) if a["kind"] == "step"]
        assert len(steps) == 9
        assert max(abs(a["loss"] / b["loss"] - 1) for a, b in steps) <= LOSS, name
        assert max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in steps) <= NORM, name
        assert max(np.abs(seen(key, weights[key]) - seen(key, final[key])).max() for key in final) <= WEIGHTS * RATE * 4


def refuses(jobs: list[dict[str, Any]]) -> int:
    """On a rank: a step whose gradient is not finite on rank 0 raises everywhere and changes nothing."""
    from trainer.data.dataset import load
    from trainer.data.sampler import step_batches, step_counts
    from trainer.distributed.engine import Engine
    from trainer.distributed.process_group import leave_world, start_world
    from trainer.distributed.steppers import NotFinite
    from trainer.model.build import build, load_config
    from trainer.training.run_plan import make_plan

    world = start_world()
    for job in jobs:
        settings, data = cli.read(job["flags"]).settings, load(Path(job["data"]))
        model = build(settings)
        plan = make_plan(settings, world, data, model.facts, load_config(settings.model))
        engine = Engine(world, model, plan.deepspeed, settings.train, plan.precision)
        assert engine.way.guarded
        engine.way.guarded = job["guarded"]
        told = []
        for number in range(4):
            order = np.arange(len(data.train))
            micros = step_batches(data.train, order, number % 3, plan.course.batch, world.rank, 0)
            counted = step_counts(data.train, order, number % 3, 6)[2]
            bad = number == 2
            hook = next(iter(engine.trainable.values())).register_hook(
                lambda gradient, bad=bad: gradient * (math.inf if bad and world.rank == 0 else 1.0)
            )
            before = {name: tensor.clone() for name, tensor in engine.state.full()} if bad else {}
            sums = [engine.accumulate(micro, step=number, counted=counted) for micro in micros]
            hook.remove()
            try:
                engine.step(1e-3, sums)
                told.append("taken")
            except NotFinite as problem:
                engine.drop()
                after = dict(engine.state.full())
                same = all(bool((after[name] == value).all()) for name, value in before.items())
                told.append(f"{str(problem).split()[0]} {same}")
        assert told == ["taken", "taken", "gradient True", "taken"], (job["name"], told)
        if world.rank == 0:
            (Path(job["out"]) / f"{job['name']}.json").write_text(json.dumps(told))
    leave_world()
    return 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_gradient_that_is_not_finite_leaves_weights_and_moments_and_the_next_step_is_taken(
    ranks, tiny, records, prepared, tmp_path
):
    jobs = [
        {
            "name": f"{zero}-{by}", "guarded": by == "device", "data": str(prepared), "out": str(tmp_path),
            "flags": [*arguments(tiny, records, "full", "completion"), "--ds-config", zero],
        }
        for zero in ("zero0", "zero1") for by in ("device", "host")
    ]  # fmt: skip
    on_cells(ranks, jobs, tmp_path / "log", refuses)
    assert len(list(tmp_path.glob("*.json"))) == 4
