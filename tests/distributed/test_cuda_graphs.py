"""Steps recorded as graphs: which are, what they leave in the gradients, and what happens where recording fails.
Without a GPU a recording is stood in for by one that runs the recorded work at each replay, into the same addresses.
The last tests need a GPU and hold replays against eager steps there."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers.engines import joined_ranks
from helpers.gpu_visibility import GPU_MARKS, TWO_GPU_MARKS, has_gpu
from helpers.matrix import launch_jobs, make_job, read_job_result, run_job
from helpers.tiny_inputs import make_tiny_gpt2, tiny_argv
from transformers import AutoModelForCausalLM

from trainer.distributed import execution
from trainer.distributed.execution import MAX_DIFFERENCE, NUM_WARMUP_CALLS, CUDAGraphRunner, relative_difference
from trainer.distributed.process_group import simulated_context
from trainer.distributed.stepper import PlainStepper
from trainer.model import torch_internals
from trainer.model.loss import CausalLMLoss

CAPTURING = "operation not permitted when stream is capturing"
EAGER = "steps are not recorded as CUDA graphs: "


class FakeCapturedGraph:
    """What `CapturedGraph` is on a GPU: inputs and outputs stay where they are, the work is done at each replay."""

    instances: ClassVar[list["FakeCapturedGraph"]] = []

    def __init__(self, fn: Any, example_ids: torch.Tensor, pool: Any):
        self.fn, self.num_replays = fn, 0
        self.ids, self.labels = torch.zeros_like(example_ids), torch.zeros_like(example_ids)
        self.loss_weight = torch.ones(())
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
def make_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CUDAGraphRunner]:
    """A function: a runner of a tiny GPT-2 in training."""
    monkeypatch.setattr(execution, "CapturedGraph", FakeCapturedGraph)
    monkeypatch.setattr(FakeCapturedGraph, "instances", [])

    def make(dropout: float = 0.0) -> CUDAGraphRunner:
        causal = AutoModelForCausalLM.from_pretrained(make_tiny_gpt2(tmp_path / "model", dropout=dropout))
        loss_module = CausalLMLoss(causal, None).train()
        params, context = list(loss_module.parameters()), simulated_context(1)
        stepper = PlainStepper(context, torch.optim.SGD(params), loss_module, params, 1.0, skips_on_device=False)
        return CUDAGraphRunner(stepper, precision="fp32", checks=[])

    return make


def make_micro_batch(rows: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(1, 97, (rows, 16)))


def check_steps(runner: CUDAGraphRunner, steps: Iterable[list[int]]) -> None:
    """Each step, of micro-batches of so many rows, has the gradients of eager calls with the same dropout masks."""
    for number, shape in enumerate(steps):
        gradients: list[list[torch.Tensor]] = []
        for backward in (runner.stepper.backward, runner.backward):
            for parameter in runner.trainable_params:
                parameter.grad = None
            torch.manual_seed(number)
            for n, rows in enumerate(shape):
                ids = make_micro_batch(rows, 100 * number + n)
                backward(ids, ids, 0.5)
            gradients.append([p.grad.clone() for p in runner.trainable_params if p.grad is not None])
        for expected, actual in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def raise_when(text: str, *, kind: type[Exception] = RuntimeError, echo: str = "") -> Callable[..., Any]:
    """A function that draws as a forward would, and raises; `echo`: what ends after it raises, too."""

    def fail(*_: Any) -> Any:
        torch.rand(5)
        try:
            raise kind(text)
        finally:
            if echo:
                raise RuntimeError(echo)

    return fail


@pytest.mark.parametrize("ragged", [[2, 2], [2, 1, 2], [1, 2, 2]])
def test_a_shape_is_captured_after_its_warmup_and_every_step_has_its_own_gradients(make_runner, ragged):
    """Those of a ragged step between captured ones, and of the next, as well."""
    runner = make_runner()
    check_steps(runner, [[2, 2]] * (NUM_WARMUP_CALLS + 2) + [ragged] + [[2, 2]] * 2)
    first, more = FakeCapturedGraph.instances
    if ragged == [2, 2]:
        assert (first.num_replays, more.num_replays) == (5, 5), "the second micro-batch adds to the first"
    assert runner.capture_error == ""


def test_padding_that_counts_nothing_is_recorded_too(make_runner):
    """That of a rank which has no rows in the last step of an epoch: all its gradients are zero."""
    runner, ids = make_runner(), make_micro_batch(1, 0)
    for _ in range(NUM_WARMUP_CALLS + 1):
        for parameter in runner.trainable_params:
            parameter.grad = None
        runner.backward(ids, torch.full_like(ids, -100), 0.5)
    assert runner.checks == ["overwrite 1x16 recorded, checked to 0e+00"]


def test_a_small_gradient_of_one_weight_is_compared_beside_the_large_ones():
    losses = torch.ones(1)
    for share, compared in ((1e-3, True), (1e-5, False)):  # below `MIN_COMPARED_SHARE` it may be nothing but rounding
        eager = [torch.ones(4), torch.full((4,), share)]
        difference = relative_difference(losses, eager, losses, [eager[0], -eager[1]])
        assert (difference > MAX_DIFFERENCE["bf16"]) == compared


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
def test_a_recording_with_a_stale_weight_is_found_at_its_first_replay_and_not_used(make_runner, monkeypatch, kind):
    """Also of a micro-batch that adds to a recorded one: its replay has then written over what the eager call left."""
    runner = make_runner()
    StaleGraph.weight = dict(runner.stepper.loss_module.named_parameters())["causal.transformer.h.1.mlp.c_fc.weight"]
    StaleGraph.number = int(kind == "accumulate")
    monkeypatch.setattr(execution, "CapturedGraph", StaleGraph)
    check_steps(runner, [[2, 2]] * (NUM_WARMUP_CALLS + 3))
    assert FakeCapturedGraph.instances[StaleGraph.number].num_replays == 1
    assert f"the recording of {kind} 2x16 and the eager step are " in runner.capture_error
    assert len(runner.checks) == StaleGraph.number


def test_a_recording_is_verified_with_the_dropout_masks_of_the_eager_call(make_runner):
    runner = make_runner(dropout=0.1)
    check_steps(runner, [[2]] * (NUM_WARMUP_CALLS + 3))
    assert (runner.capture_error, len(runner.checks)) == ("", 1)


def test_a_capture_that_fails_leaves_the_masks_of_all_later_steps_and_says_the_cause(make_runner, monkeypatch):
    fail = raise_when(CAPTURING, echo="operation failed due to a previous error during capture")
    runner = make_runner(dropout=0.1)
    monkeypatch.setattr(execution, "CapturedGraph", fail)
    check_steps(runner, [[2]] * (NUM_WARMUP_CALLS + 1))
    following = torch.rand(3)
    check_steps(runner, [[2]] * (NUM_WARMUP_CALLS + 1))
    assert torch.equal(torch.rand(3), following), "the generator stands where an eager step leaves it"
    assert runner.capture_error == EAGER + CAPTURING, "the cause, not its echo"


def test_after_a_failed_capture_what_was_recorded_before_is_not_replayed(make_runner, monkeypatch):
    """Its generator's state is no longer the one that is seeded: dropout would draw other masks, or raise."""
    runner = make_runner()
    check_steps(runner, [[2, 2]] * (NUM_WARMUP_CALLS + 1))
    replays = [graph.num_replays for graph in FakeCapturedGraph.instances]
    monkeypatch.setattr(execution, "CapturedGraph", raise_when(f"{CAPTURING}\nmore lines"))
    monkeypatch.setattr(execution, "NUM_WARMUP_CALLS", 0)
    check_steps(runner, [[1, 2]] * 2)  # the first one's recording fails
    assert runner.capture_error == EAGER + CAPTURING
    assert [graph.num_replays for graph in FakeCapturedGraph.instances] == replays


fail_without_memory = raise_when("CUDA out of memory", kind=torch.OutOfMemoryError)


@pytest.mark.parametrize("part", ["_clone_all", "replay"])
def test_a_recording_for_whose_verification_there_is_no_memory_costs_the_recording_alone(
    part, make_runner, monkeypatch
):
    runner = make_runner()
    check_steps(runner, [[2, 2]] * NUM_WARMUP_CALLS)
    monkeypatch.setattr(FakeCapturedGraph if part == "replay" else execution, part, fail_without_memory)
    check_steps(runner, [[2, 2]] * 2)
    assert runner.capture_error == f"{EAGER}CUDA out of memory"


# --- whole runs ------------------------------------------------------------------------------------------------------

BOUNDS = {"fp32": 1e-5, "bf16": 2e-2}  # of losses and gradient norms over fifty steps


def run_recorded_jobs(jobs: list[dict[str, Any]]) -> int:
    """`run_jobs`; asserts that steps are recorded where the job says so, and that nothing falls back."""
    with joined_ranks() as dist_context:
        for job in jobs:
            engine = run_job(dist_context, job).engine
            engine.fall_back(job["steps"])
            assert engine.plan_changes == [], job["name"]
            assert bool(engine.graph_checks) == job["execution"]["cuda_graphs"], job["name"]
    return 0


@pytest.fixture
def make_recorded_job(session_dir: Path, data_files: tuple[str, str], tmp_path: Path) -> Any:
    """A function: a run of a small GPT-2, whose steps are recorded or not."""

    def make(name: str, words: str, *, recorded: bool, dropout: float = 0.0, steps: int = 50, **options: Any) -> Any:
        folder = session_dir / f"recorded-{dropout}"
        model = str(folder) if folder.exists() else make_tiny_gpt2(folder, dropout=dropout, hidden_size=64)
        text = f"--block-size 16 --global-batch 4 --lr 1e-3 --eval-every never --max-steps {steps} --ds-config zero0"
        argv = tiny_argv(model, data_files, f"{text} --save-every {steps // 2 + 1} {words}")
        return make_job(tmp_path, name, argv, steps=steps, execution={"cuda_graphs": recorded}, **options)

    return make


def read_numbers(out: Path, name: str, after: int = 0) -> list[float]:
    """Losses and gradient norms of the steps after one."""
    steps = [row for row in read_job_result(out, name)[0] if row["kind"] == "step" and row["step"] > after]
    return [row[key] for row in steps for key in ("loss", "grad_norm")]


@pytest.mark.parametrize(
    ("ranks", "micro_batches"),
    [pytest.param(1, ("", "--micro-batch 2"), marks=GPU_MARKS), pytest.param(2, ("",), marks=TWO_GPU_MARKS)],
)
def test_fifty_replayed_steps_are_the_eager_ones(ranks, micro_batches, make_recorded_job, tmp_path):
    """With dropout as well: a replay draws the masks of the seed that the generator has. Two ranks: over NCCL, whose
    own thread asks the device how it stands while a step is recorded."""
    cases = {
        f"{mode}-{precision}-{dropout}{micro_batch}": (f"--mode {mode} --precision {precision} {micro_batch}", dropout)
        for mode in ("full", "lora")
        for precision in BOUNDS
        for dropout in (0.0, 0.1)
        for micro_batch in micro_batches
    }
    jobs = [
        make_recorded_job(f"{name}-{recorded}", words, recorded=recorded, dropout=dropout)
        for name, (words, dropout) in cases.items()
        for recorded in (False, True)
    ]
    launch_jobs(ranks, jobs, target=run_recorded_jobs, on_gpu=True)
    for name in cases:
        eager, recorded = (read_numbers(tmp_path, f"{name}-{recorded}") for recorded in (False, True))
        assert recorded == pytest.approx(eager, rel=BOUNDS["bf16" if "bf16" in name else "fp32"]), name


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="needs a CUDA device")
def test_a_resume_with_captured_steps_gives_the_numbers_of_the_uninterrupted_run(make_recorded_job, tmp_path):
    """The steps after it are eager until they are recorded anew."""
    steps, jobs = 20, []
    cases = [(mode, precision) for mode in ("full", "lora") for precision in BOUNDS]
    for mode, precision in cases:
        name, words = f"{mode}-{precision}", f"--mode {mode} --precision {precision}"
        options = {"recorded": True, "dropout": 0.1, "steps": steps}
        jobs.append(make_recorded_job(name, words, **options))
        jobs.append(make_recorded_job(f"{name}-again", words, **options, resume=[name, steps // 2 + 1]))
    launch_jobs(1, jobs, target=run_recorded_jobs, on_gpu=True)
    for mode, precision in cases:
        name = f"{mode}-{precision}"
        whole, again = read_numbers(tmp_path, name, steps // 2 + 1), read_numbers(tmp_path, f"{name}-again")
        assert again == pytest.approx(whole, rel=BOUNDS[precision]), name
