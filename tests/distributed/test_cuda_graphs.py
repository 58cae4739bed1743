"""Steps recorded as graphs: which are, what they leave in the gradients, and what happens where recording fails.

Without a GPU a recording is stood in for by one that runs the recorded work at each replay, into the same addresses.
The last tests need a GPU and hold replays against eager steps there.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers.gpu_visibility import GPU_MARKS, TWO_GPU_MARKS
from helpers.launch_ranks import run_on_ranks
from helpers.tiny_inputs import make_tiny_gpt2
from transformers import AutoModelForCausalLM

from trainer.distributed import cuda_graphs
from trainer.distributed.cuda_graphs import CUDAGraphRunner
from trainer.model import torch_internals
from trainer.model.loss import CausalLMLoss

WIDTH = 16


class FakeCapturedGraph:
    """What `CapturedGraph` is on a GPU: inputs and outputs stay where they are, the work is done at each replay."""

    instances: ClassVar[list["FakeCapturedGraph"]] = []
    fails_to_capture = False

    def __init__(self, fn: Any, example_ids: torch.Tensor, pool: Any):
        if FakeCapturedGraph.fails_to_capture:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        self.fn, self.pool, self.num_replays = fn, "pool", 0
        self.ids, self.labels, self.loss_weight = (
            torch.zeros_like(example_ids),
            torch.zeros_like(example_ids),
            torch.ones(()),
        )
        with pytest.MonkeyPatch.context() as patch:  # a recording runs the Python once, and changes nothing yet
            patch.setattr(torch_internals, "foreach_add_", lambda *_: None)
            patch.setattr(torch_internals, "foreach_copy_", lambda *_: None)
            fn(self.ids, self.labels, self.loss_weight)
        FakeCapturedGraph.instances.append(self)

    def replay(self, ids: torch.Tensor, labels: torch.Tensor, loss_weight: float) -> torch.Tensor:
        self.ids.copy_(ids)
        self.labels.copy_(labels)
        self.loss_weight.fill_(loss_weight)
        self.num_replays += 1
        return self.fn(self.ids, self.labels, self.loss_weight)


@pytest.fixture
def loss_module(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> CausalLMLoss:
    monkeypatch.setattr(cuda_graphs, "CapturedGraph", FakeCapturedGraph)
    monkeypatch.setattr(FakeCapturedGraph, "instances", [])
    monkeypatch.setattr(FakeCapturedGraph, "fails_to_capture", False)
    return CausalLMLoss(AutoModelForCausalLM.from_pretrained(tiny_model), None)


def eager_calls(loss_module: CausalLMLoss) -> tuple[Any, Any]:
    """Backward and forward, as a stepper has them."""

    def backward(ids: torch.Tensor, labels: torch.Tensor, loss_weight: float) -> torch.Tensor:
        loss_sum, row_losses = loss_module(ids, labels)
        (loss_sum * loss_weight).backward()
        return row_losses

    return backward, lambda ids, labels: loss_module(ids, labels)[1]


def make_runner(loss_module: CausalLMLoss) -> CUDAGraphRunner:
    params = list(loss_module.parameters())
    return CUDAGraphRunner(loss_module, params, *eager_calls(loss_module), precision="fp32")


def make_micro_batch(rows: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(1, 97, (rows, WIDTH)))


def step_gradients(backward: Any, loss_module: CausalLMLoss, micro_batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients of a step of these micro-batches."""
    for parameter in loss_module.parameters():
        parameter.grad = None
    for ids in micro_batches:
        backward(ids, ids, 0.5)
    return [p.grad.clone() for p in loss_module.parameters() if p.grad is not None]


def eager_gradients(loss_module: CausalLMLoss, micro_batches: list[torch.Tensor]) -> list[torch.Tensor]:
    return step_gradients(eager_calls(loss_module)[0], loss_module, micro_batches)


def graph_gradients(
    graph_runner: CUDAGraphRunner, loss_module: CausalLMLoss, micro_batches: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The same through the graphs, eager where they do not take a micro-batch."""
    return step_gradients(graph_runner.backward, loss_module, micro_batches)


def assert_all_close(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for gradient, expected_gradient in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-7)


def test_a_shape_is_captured_after_its_warmup_and_every_step_has_its_own_gradients(loss_module):
    runner = make_runner(loss_module)
    for number in range(cuda_graphs.NUM_WARMUP_CALLS + 3):
        micros = [make_micro_batch(2, 10 * number), make_micro_batch(2, 10 * number + 1)]
        assert_all_close(graph_gradients(runner, loss_module, micros), eager_gradients(loss_module, micros))
    first, more = FakeCapturedGraph.instances
    assert first.num_replays == 3
    assert more.num_replays == 3, "the second micro-batch of a step adds to the first"
    assert runner.capture_error == ""


@pytest.mark.parametrize("ragged", [[2, 2, 1], [2, 1, 2], [1, 2, 2], [1, 1]])
def test_a_ragged_step_between_captured_ones_and_the_next_have_the_eager_gradients(loss_module, ragged):
    runner = make_runner(loss_module)
    for number, shape in enumerate([[2, 2]] * (cuda_graphs.NUM_WARMUP_CALLS + 2) + [ragged] + [[2, 2]] * 2):
        micros = [make_micro_batch(rows, 100 * number + n) for n, rows in enumerate(shape)]
        assert_all_close(graph_gradients(runner, loss_module, micros), eager_gradients(loss_module, micros))
    assert len(FakeCapturedGraph.instances) == 2


def test_at_most_max_graphs_shapes_are_captured(loss_module, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    runner = make_runner(loss_module)
    for rows in range(1, cuda_graphs.MAX_GRAPHS + 3):
        for number in range(cuda_graphs.NUM_WARMUP_CALLS + 2):
            micros = [make_micro_batch(rows, number)]
            assert_all_close(graph_gradients(runner, loss_module, micros), eager_gradients(loss_module, micros))
    assert len(FakeCapturedGraph.instances) == cuda_graphs.MAX_GRAPHS


def test_evaluations_have_captured_graphs_of_their_own(loss_module):
    runner = make_runner(loss_module)
    with torch.no_grad():
        for seed in range(cuda_graphs.NUM_WARMUP_CALLS + 2):
            ids = make_micro_batch(3, seed)
            assert torch.equal(runner.forward(ids, ids), loss_module(ids, ids)[1])
    (graph,) = FakeCapturedGraph.instances
    assert graph.num_replays == 2, "once to verify it, once in the place of the eager call"
    assert runner.checks == ["eval 3x16 recorded, checked to 0e+00"]


class StaleGraph(FakeCapturedGraph):
    """A recording that reads an old copy of one weight, where it is the one of this number."""

    weight: ClassVar[Any] = None
    number: ClassVar[int] = 0

    def replay(self, ids: torch.Tensor, labels: torch.Tensor, loss_weight: float) -> torch.Tensor:
        current = StaleGraph.weight.data
        if FakeCapturedGraph.instances.index(self) == StaleGraph.number:
            StaleGraph.weight.data = current + 0.02
        try:
            return super().replay(ids, labels, loss_weight)
        finally:
            StaleGraph.weight.data = current


@pytest.mark.parametrize("kind", ["overwrite", "accumulate"])
def test_a_recording_with_a_stale_weight_is_found_at_its_first_replay_and_not_used(loss_module, monkeypatch, kind):
    """Also of a micro-batch that adds to a recorded one: its replay has then written over what the eager call left."""
    StaleGraph.weight = dict(loss_module.named_parameters())["causal.transformer.h.1.mlp.c_fc.weight"]
    StaleGraph.number = int(kind == "accumulate")
    monkeypatch.setattr(cuda_graphs, "CapturedGraph", StaleGraph)
    runner = make_runner(loss_module)
    for seed in range(cuda_graphs.NUM_WARMUP_CALLS + 3):
        micro_batches = [make_micro_batch(2, 2 * seed), make_micro_batch(2, 2 * seed + 1)]
        assert_all_close(
            graph_gradients(runner, loss_module, micro_batches), eager_gradients(loss_module, micro_batches)
        )
    assert FakeCapturedGraph.instances[StaleGraph.number].num_replays == 1
    assert f"the recording of {kind} 2x16 gives loss" in runner.capture_error
    assert "the eager step loss" in runner.capture_error
    assert len(runner.checks) == StaleGraph.number


@pytest.fixture
def dropout_loss_module(loss_module: CausalLMLoss, tmp_path: Path) -> CausalLMLoss:
    folder = make_tiny_gpt2(tmp_path / "dropout", dropout=0.1)
    return CausalLMLoss(AutoModelForCausalLM.from_pretrained(folder), None).train()


def seeded_gradients(runner: Any, loss_module: CausalLMLoss, seed: int) -> list[torch.Tensor]:
    """The gradients of a step whose dropout masks are those of the seed."""
    torch.manual_seed(seed)
    micro_batches = [make_micro_batch(2, seed)]
    if runner is None:
        return eager_gradients(loss_module, micro_batches)
    return graph_gradients(runner, loss_module, micro_batches)


def test_a_recording_is_verified_with_the_dropout_masks_of_the_eager_call(dropout_loss_module):
    runner = make_runner(dropout_loss_module)
    for seed in range(cuda_graphs.NUM_WARMUP_CALLS + 3):
        expected = seeded_gradients(None, dropout_loss_module, seed)
        assert_all_close(seeded_gradients(runner, dropout_loss_module, seed), expected)
    assert runner.capture_error == ""
    assert len(runner.checks) == 1


def test_a_capture_that_fails_inside_dropout_leaves_the_masks_of_all_later_steps_as_they_were(
    dropout_loss_module, monkeypatch
):
    def fail_after_drawing(*_: Any) -> Any:
        torch.rand(5)
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(cuda_graphs, "CapturedGraph", fail_after_drawing)
    runner = make_runner(dropout_loss_module)
    for seed in range(cuda_graphs.NUM_WARMUP_CALLS + 1):
        expected = seeded_gradients(None, dropout_loss_module, seed)
        assert_all_close(seeded_gradients(runner, dropout_loss_module, seed), expected)
    following = torch.rand(3)
    seeded_gradients(None, dropout_loss_module, cuda_graphs.NUM_WARMUP_CALLS)
    assert torch.equal(torch.rand(3), following), "the generator stands where an eager step leaves it"
    assert runner.capture_error.endswith("operation not permitted when stream is capturing"), "the cause, not its echo"


def test_a_failed_capture_is_reported_once_and_steps_go_on_eagerly(loss_module, monkeypatch):
    monkeypatch.setattr(FakeCapturedGraph, "fails_to_capture", True)
    runner = make_runner(loss_module)
    for number in range(cuda_graphs.NUM_WARMUP_CALLS + 3):
        micros = [make_micro_batch(2, number)]
        assert_all_close(graph_gradients(runner, loss_module, micros), eager_gradients(loss_module, micros))
    assert runner.capture_error == (
        "steps are not recorded as CUDA graphs: operation not permitted when stream is capturing"
    )


def test_after_a_failure_what_was_recorded_before_is_not_replayed_within_the_step_either(loss_module, monkeypatch):
    """Its generator's state is no longer the one that is seeded: dropout would draw other masks, or raise."""
    runner = make_runner(loss_module)
    for number in range(cuda_graphs.NUM_WARMUP_CALLS + 1):
        graph_gradients(runner, loss_module, [make_micro_batch(2, number), make_micro_batch(2, number)])
    replays = [graph.num_replays for graph in FakeCapturedGraph.instances]
    monkeypatch.setattr(FakeCapturedGraph, "fails_to_capture", True)
    monkeypatch.setattr(cuda_graphs, "NUM_WARMUP_CALLS", 0)
    shapes = [1, 2]  # the first one's recording fails
    micros = [make_micro_batch(rows, rows) for rows in shapes]
    assert_all_close(graph_gradients(runner, loss_module, micros), eager_gradients(loss_module, micros))
    assert "stream is capturing" in runner.capture_error
    assert [graph.num_replays for graph in FakeCapturedGraph.instances] == replays


@pytest.mark.parametrize("part", ["clone", "of", "replay"])
def test_a_recording_for_whose_verification_there_is_no_memory_costs_the_recording_alone(
    part, loss_module, monkeypatch
):
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    runner = make_runner(loss_module)
    for number in range(cuda_graphs.NUM_WARMUP_CALLS + 2):
        if number == cuda_graphs.NUM_WARMUP_CALLS:
            owner = {"clone": cuda_graphs, "of": cuda_graphs.Measured, "replay": FakeCapturedGraph}[part]
            monkeypatch.setattr(owner, "_clone_all" if part == "clone" else part, fail)
        micros = [make_micro_batch(2, number), make_micro_batch(2, number + 1)]
        assert_all_close(graph_gradients(runner, loss_module, micros), eager_gradients(loss_module, micros))
    assert runner.capture_error == "steps are not recorded as CUDA graphs: CUDA out of memory"


def test_recordings_give_way_where_an_eager_step_has_no_memory_beside_them(dropout_loss_module):
    """A ragged step, after its forward has drawn its masks, or an evaluation."""
    runner = make_runner(dropout_loss_module)
    for seed in range(cuda_graphs.NUM_WARMUP_CALLS + 1):
        seeded_gradients(runner, dropout_loss_module, seed)
    eager_backward = runner.eager_backward

    def fits_alone(*inputs: Any) -> torch.Tensor:
        if runner._captured:
            torch.rand(5)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return eager_backward(*inputs)

    runner.eager_backward = fits_alone
    ids = make_micro_batch(1, 7)
    torch.manual_seed(7)
    expected = eager_gradients(dropout_loss_module, [ids])
    torch.manual_seed(7)
    assert_all_close(graph_gradients(runner, dropout_loss_module, [ids]), expected)
    assert runner.capture_error == "steps are not recorded as CUDA graphs: beside the recordings CUDA out of memory"
    runner.eager_backward = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        graph_gradients(runner, dropout_loss_module, [ids])


# --- on a GPU ---------------------------------------------------------------------------------------------------------

gpu = GPU_MARKS
BOUNDS = {"fp32": 1e-5, "bf16": 2e-2}  # of losses and gradient norms over fifty steps
Steps = tuple[list[float], dict[str, torch.Tensor]]


def take_steps_in_a_process(
    session_dir: Path, jobs: list[dict[str, Any]], *, device: str, ranks: int = 1
) -> list[Steps]:
    """What `take_steps` returns for each job, all in one group of processes: a GPU wants fresh ones."""
    for job in jobs:
        job["folder"] = make_tiny_gpt2(
            session_dir / f"gpu-{job.get('dropout', 0.0)}", dropout=job.get("dropout", 0.0), hidden_size=64
        )
    out = session_dir / f"{len(list(session_dir.glob('*.steps')))}.steps"
    log, on_gpu = out.with_suffix(".log"), device == "cuda"
    exit_code = run_on_ranks(ranks, save_steps, str(out), jobs, device, log=log, on_gpu=on_gpu)
    assert exit_code == 0, log.read_text()[-3000:]
    return torch.load(out)


def save_steps(out: str, jobs: list[dict[str, Any]], device: str) -> None:
    from trainer.distributed.process_group import destroy_process_group, init_distributed

    dist_context = init_distributed(device)
    results = [take_steps(dist_context, Path(f"{out}-{n}"), **job) for n, job in enumerate(jobs)]
    if dist_context.rank == 0:
        torch.save(results, out)
    destroy_process_group()


def take_steps(
    dist_context: Any,
    out: Path,
    *,
    folder: str,
    words: str,
    recorded: bool,
    steps: int = 50,
    dropout: float = 0.0,
    resumed_after: int | None = None,
) -> Steps:
    """(losses and gradient norms, final weights) of so many steps of a small GPT-2.

    `resumed_after`: a step after which another engine goes on from a checkpoint.
    """
    from trainer.config import cli
    from trainer.data.sampler import MicroBatch
    from trainer.distributed.deepspeed_config import build_deepspeed_config, read_deepspeed_file
    from trainer.distributed.engine import Engine
    from trainer.distributed.execution import make_execution_plan
    from trainer.model.build import build_model
    from trainer.training import checkpoint
    from trainer.training.checkpoint import CheckpointManager, load_optimizer, load_weights
    from trainer.training.schedule import TrainState

    settings = cli.parse_args(f"--preset demo --model {folder} --data unused --global-batch 4 {words}".split()).settings
    precision = settings.engine.precision or "fp32"
    zero_file = read_deepspeed_file(settings.engine.ds_config or "zero0")
    batch = settings.train.batch(dist_context.world_size)
    config = build_deepspeed_config(zero_file, batch=batch, max_grad_norm=1.0, precision=precision)
    plan = make_execution_plan(
        settings, dist_context, stage=zero_file.stage, precision=precision, model_dropout=dropout
    )
    plan = replace(plan, cuda_graphs=recorded)

    def make_engine(model: Any) -> Engine:
        return Engine(dist_context, model, config, settings.train, plan)

    engine, losses_and_norms = make_engine(build_model(settings, device=dist_context.device)), []
    num_rows = batch.micro_batch_size
    for step in range(steps):
        micro_batches = []
        for n in range(batch.gradient_accumulation_steps):
            place = num_rows * (n * dist_context.world_size + dist_context.rank)
            ids = make_micro_batch(num_rows, 100 * step + place).numpy()
            micro_batches.append(MicroBatch(input_ids=ids, labels=ids, tokens=ids.size, index=4 * step + place))
        num_target_tokens = 4 * (WIDTH - 1)
        sums = [
            engine.forward_backward(micro_batch, step=step, num_target_tokens=num_target_tokens)
            for micro_batch in micro_batches
        ]
        step_result = engine.launch_update(1e-3, sums)()
        losses_and_norms += [step_result.loss_sum / num_target_tokens, step_result.grad_norm]
        if step + 1 == resumed_after:
            checkpoint_dir = out.with_suffix(".checkpoints")
            manager = CheckpointManager(checkpoint_dir, dist_context, save_total_limit=1, identity={"base": "test"})
            manager.save(engine, TrainState(step=resumed_after))
            saved = checkpoint.resolve_checkpoint(checkpoint_dir, "latest")
            model = build_model(settings, device=dist_context.device)
            load_weights(saved, model.module, dist_context)
            engine = make_engine(model)
            load_optimizer(saved, engine)
    engine.fall_back(steps)
    assert engine.plan_changes == [], "nothing fell back"
    assert bool(engine.graph_checks) == recorded
    return losses_and_norms, {name: tensor.clone() for name, tensor in engine.state.gather_weights()}


def assert_faster_steps_are_the_eager_ones(session_dir: Path, cases: list[dict[str, Any]], *, ranks: int = 1) -> None:
    """Each case eagerly and as it is, on GPUs, within the bound of its precision."""
    jobs = [{**case, **fields} for case in cases for fields in ({"recorded": False}, {})]
    results = take_steps_in_a_process(session_dir, jobs, device="cuda", ranks=ranks)
    for job, (eager, _), (faster, _) in zip(cases, results[::2], results[1::2], strict=True):
        assert faster == pytest.approx(eager, rel=BOUNDS["bf16" if "bf16" in job["words"] else "fp32"]), job


@pytest.mark.parametrize("mark", [pytest.param(None, marks=gpu)])
def test_fifty_replayed_steps_are_the_eager_ones(session_dir, mark):
    """With dropout as well: a replay draws the masks of the seed that the generator has."""
    cases = [
        {"words": f"{mode} --precision {precision} --ds-config zero0", "recorded": True, "dropout": dropout}
        for mode in ("--mode full", "--mode lora", "--mode full --micro-batch 2")
        for precision in BOUNDS
        for dropout in (0.0, 0.1)
    ]
    assert_faster_steps_are_the_eager_ones(session_dir, cases)


@pytest.mark.parametrize("mark", [pytest.param(None, marks=TWO_GPU_MARKS)])
def test_fifty_replayed_steps_of_two_ranks_are_the_eager_ones(session_dir, mark):
    """Over NCCL, whose own thread asks the device how it stands while a step is recorded."""
    cases = [
        {"words": f"--mode {mode} --precision bf16 --ds-config zero0", "recorded": True, "dropout": 0.1}
        for mode in ("full", "lora")
    ]
    assert_faster_steps_are_the_eager_ones(session_dir, cases, ranks=2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_a_resume_with_captured_steps_gives_the_numbers_of_the_uninterrupted_run(session_dir, device):
    """The steps after it are eager until they are recorded anew; without recording there is not even a last bit."""
    cases = [
        {
            "words": f"--mode {mode} --precision {precision} --ds-config zero0",
            "recorded": device == "cuda",
            "dropout": 0.1,
            "steps": 20 if device == "cuda" else 8,
        }
        for mode in ("full", "lora")
        for precision in BOUNDS
    ]
    jobs = [{**case, **fields} for case in cases for fields in ({}, {"resumed_after": case["steps"] // 2 + 1})]
    results = take_steps_in_a_process(session_dir, jobs, device=device)
    for job, (straight, weights), (resumed, actual) in zip(cases, results[::2], results[1::2], strict=True):
        bound = BOUNDS["bf16" if "bf16" in job["words"] else "fp32"]
        assert resumed == pytest.approx(straight, rel=bound if device == "cuda" else 0), job
        if device == "cpu":
            assert all(torch.equal(actual[name], weight) for name, weight in weights.items()), job
