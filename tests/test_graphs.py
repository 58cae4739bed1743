"""Steps recorded as graphs: which are, what they leave in the gradients, and what happens where recording fails.

Without a GPU a recording is stood in for by one that runs the recorded work at each replay, into the same addresses.
The last tests need a GPU and hold replays against eager steps there.
"""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import make_tiny
from ranks import on_ranks
from transformers import AutoModelForCausalLM

from trainer.distributed import cuda_graphs
from trainer.distributed.cuda_graphs import Graphs
from trainer.kernels.linear_cross_entropy import TokenLoss

WIDTH = 16


class Replayed:
    """What `Recorded` is on a GPU: inputs and outputs stay where they are, the work is done at each replay."""

    made: ClassVar[list["Replayed"]] = []
    broken = False

    def __init__(self, work: Any, like: torch.Tensor, pool: Any):
        if Replayed.broken:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        self.work, self.pool, self.replays = work, "pool", 0
        self.ids, self.labels, self.share = torch.zeros_like(like), torch.zeros_like(like), torch.ones(())
        with pytest.MonkeyPatch.context() as patch:  # a recording runs the Python once, and changes nothing yet
            patch.setattr(torch, "_foreach_add_", lambda *_: None)
            patch.setattr(torch, "_foreach_copy_", lambda *_: None)
            work(self.ids, self.labels, self.share)
        Replayed.made.append(self)

    def replay(self, ids: torch.Tensor, labels: torch.Tensor, share: float) -> torch.Tensor:
        self.ids.copy_(ids)
        self.labels.copy_(labels)
        self.share.fill_(share)
        self.replays += 1
        return self.work(self.ids, self.labels, self.share)


@pytest.fixture
def module(tiny: str, monkeypatch: pytest.MonkeyPatch) -> TokenLoss:
    monkeypatch.setattr(cuda_graphs, "Recorded", Replayed)
    monkeypatch.setattr(Replayed, "made", [])
    monkeypatch.setattr(Replayed, "broken", False)
    return TokenLoss(AutoModelForCausalLM.from_pretrained(tiny), None)


def micro(rows: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(1, 97, (rows, WIDTH)))


def eager(module: TokenLoss, micros: list[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients of a step of these micro-batches."""
    for parameter in module.parameters():
        parameter.grad = None
    for ids in micros:
        (module(ids, ids)[0] * 0.5).backward()
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def step(made: Graphs, module: TokenLoss, micros: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same through the graphs, eager where they do not take a micro-batch."""
    for parameter in module.parameters():
        parameter.grad = None
    for ids in micros:
        if made.backward(ids, ids, 0.5) is None:
            (module(ids, ids)[0] * 0.5).backward()
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_shape_is_recorded_after_it_was_warm_and_every_step_has_its_own_gradients(module):
    made = Graphs(module, list(module.parameters()))
    for number in range(cuda_graphs.WARM + 3):
        micros = [micro(2, 10 * number), micro(2, 10 * number + 1)]
        same(step(made, module, micros), eager(module, micros))
    first, more = Replayed.made
    assert first.replays == 3
    assert more.replays == 3, "the second micro-batch of a step adds to the first"
    assert made.told == []


@pytest.mark.parametrize("ragged", [[2, 2, 1], [2, 1, 2], [1, 2, 2], [1, 1]])
def test_a_ragged_step_between_recorded_ones_is_right_and_so_is_the_next(module, ragged):
    made = Graphs(module, list(module.parameters()))
    for number, shape in enumerate([[2, 2]] * (cuda_graphs.WARM + 2) + [ragged] + [[2, 2]] * 2):
        micros = [micro(rows, 100 * number + n) for n, rows in enumerate(shape)]
        same(step(made, module, micros), eager(module, micros))
    assert len(Replayed.made) == 2


def test_only_so_many_shapes_are_recorded(module):
    made = Graphs(module, list(module.parameters()))
    for rows in range(1, cuda_graphs.MOST + 3):
        for number in range(cuda_graphs.WARM + 2):
            micros = [micro(rows, number)]
            same(step(made, module, micros), eager(module, micros))
    assert len(Replayed.made) == cuda_graphs.MOST


def test_evaluations_are_recorded_apart(module):
    made = Graphs(module, list(module.parameters()))
    with torch.no_grad():
        for number in range(cuda_graphs.WARM + 2):
            ids = micro(3, number)
            rows = made.forward(ids, ids)
            assert (rows is None) == (number < cuda_graphs.WARM)
            if rows is not None:
                assert torch.equal(rows, module(ids, ids)[1])


def test_where_recording_fails_it_is_said_once_and_all_goes_on_eagerly(module, monkeypatch):
    monkeypatch.setattr(Replayed, "broken", True)
    made = Graphs(module, list(module.parameters()))
    for number in range(cuda_graphs.WARM + 3):
        micros = [micro(2, number)]
        same(step(made, module, micros), eager(module, micros))
    assert made.told == ["steps are not recorded as CUDA graphs: operation not permitted when stream is capturing"]


# --- on a GPU ---------------------------------------------------------------------------------------------------------

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_gpu(shelf: Any, **job: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """What `take_steps` returns, in a process of its own: one joins its ranks once."""
    folder = make_tiny(shelf / f"gpu-{job.get('dropout', 0.0)}", dropout=job.get("dropout", 0.0), width=64)
    out = shelf / f"{len(list(shelf.glob('*.steps')))}.steps"
    env = {"DS_ACCELERATOR": job.setdefault("device", "cuda")}
    log = out.with_suffix(".log")
    assert on_ranks(1, written, str(folder), str(out), job, log=log, env=env) == 0, log.read_text()[-3000:]
    return torch.load(out)


def written(folder: str, out: str, job: dict[str, Any]) -> None:
    torch.save(take_steps(Path(folder), Path(out), **job), out)


def take_steps(
    folder: Path, out: Path, *, words: str, recorded: bool, device: str, compiled: bool = False, steps: int = 50,
    dropout: float = 0.0, resumed_after: int | None = None,
) -> tuple[list[float], dict[str, torch.Tensor]]:  # fmt: skip
    """(losses and gradient norms, final weights) of so many steps of a small GPT-2, alone.

    `resumed_after`: a step after which another engine goes on from a checkpoint.
    """
    from trainer.config import cli
    from trainer.data.sampler import MicroBatch
    from trainer.distributed.deepspeed_config import deepspeed_dict, read_zero_file
    from trainer.distributed.engine import Engine
    from trainer.distributed.process_group import leave_world, start_world
    from trainer.model.build import build
    from trainer.training import checkpoint
    from trainer.training.checkpoint import Checkpoints, Progress

    settings = cli.read(f"--model {folder} --data unused --global-batch 4 {words}".split()).settings
    precision, zero = settings.engine.precision or "fp32", read_zero_file(settings.engine.ds_config or "zero0")
    world = start_world(device)
    batch = settings.train.batch(1)
    config = deepspeed_dict(zero, batch=batch, clip=1.0, precision=precision)
    shapes = {(batch.micro, WIDTH)} if compiled else set()

    def started(model: Any) -> Engine:
        engine = Engine(world, model, config, settings.train, precision, compiled=shapes)
        if not recorded:
            engine._graphs = None
        return engine

    engine, found = started(build(settings, device=world.device)), []
    for number in range(steps):
        micros = []
        for n in range(batch.accumulation):
            ids = micro(batch.micro, 100 * number + n).numpy()
            micros.append(MicroBatch(input_ids=ids, labels=ids, tokens=ids.size, index=4 * number + n))
        counted = 4 * (WIDTH - 1)
        sums = [engine.accumulate(one, step=number, counted=counted) for one in micros]
        done = engine.step(1e-3, sums)
        found += [done.nll / counted, done.grad_norm]
        if number + 1 == resumed_after:
            kept = out.with_suffix(".checkpoints")
            saver = Checkpoints(kept, world, keep=1, identity={"base": "test"})
            saver.save(engine, Progress(step=resumed_after))
            point, model = checkpoint.choose(kept, "latest"), build(settings, device=world.device)
            checkpoint.load_weights(point, model.module)
            engine = started(model)
            engine.state.load(point.reader(world.device), point.step, point.about.get("loss_scale"))
    assert engine.notices == []
    weights = {name: tensor.clone() for name, tensor in engine.state.whole_weights()}
    leave_world()
    return found, weights


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2"])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 2e-2)])
@pytest.mark.parametrize("more", ["--mode full", "--mode lora", "--mode full --micro-batch 2"])
@pytest.mark.parametrize("mark", [pytest.param(None, marks=gpu)])
def test_fifty_replayed_steps_are_the_eager_ones(shelf, zero, precision, bound, more, mark):
    words = f"{more} --precision {precision} --ds-config {zero}"
    eagerly, _ = on_gpu(shelf, words=words, recorded=False)
    replayed, _ = on_gpu(shelf, words=words, recorded=True)
    assert replayed == pytest.approx(eagerly, rel=bound)


@pytest.mark.parametrize("mark", [pytest.param(None, marks=gpu)])
def test_replayed_dropout_draws_the_eager_masks(shelf, mark):
    words = "--mode full --precision fp32 --ds-config zero0"
    eagerly, _ = on_gpu(shelf, words=words, recorded=False, dropout=0.1)
    replayed, _ = on_gpu(shelf, words=words, recorded=True, dropout=0.1)
    assert replayed == pytest.approx(eagerly, rel=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 2e-2)])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_resume_across_a_recording_goes_on_as_if_nothing_had_been(shelf, mode, precision, bound, device):
    """The steps after it are eager until they are recorded anew; without recording there is not even a last bit."""
    words = f"--mode {mode} --precision {precision} --ds-config zero0"
    there = {"words": words, "recorded": device == "cuda", "dropout": 0.1, "steps": 20, "device": device}
    straight, weights = on_gpu(shelf, **there)
    resumed, found = on_gpu(shelf, **there, resumed_after=11)
    assert resumed == pytest.approx(straight, rel=bound if device == "cuda" else 0)
    if device == "cpu":
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("mark", [pytest.param(None, marks=gpu)])
def test_fifty_compiled_and_replayed_steps_are_the_eager_ones(shelf, mark):
    words = "--mode full --precision fp32 --ds-config zero0"
    eagerly, _ = on_gpu(shelf, words=words, recorded=False)
    compiled, _ = on_gpu(shelf, words=words, recorded=True, compiled=True)
    assert compiled == pytest.approx(eagerly, rel=1e-4)
