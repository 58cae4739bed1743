"""Steps that are timed, verified and chosen on the device at hand, through the stand-ins for graphs and compilers.

The stand-in device is a CPU whose kernels and plans take their GPU form; the clock of the steps is made up.

Long: verification, choice, and whole runs of both.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.engines import joined_ranks, plan_execution, plan_run
from helpers.launch_ranks import run_on_ranks
from helpers.tiny_inputs import make_tiny_gpt2, tiny_argv
from test_cuda_graphs import FakeCapturedGraph, eager_calls, step_gradients
from transformers import AutoModelForCausalLM, OPTConfig

from trainer.config import cli
from trainer.distributed import cuda_graphs, execution
from trainer.distributed.compiled_steps import CompiledStepRunner
from trainer.distributed.deepspeed_config import build_deepspeed_config, read_deepspeed_file
from trainer.distributed.execution_tuner import PATH_NAMES, ExecutionTuner
from trainer.distributed.process_group import simulated_context
from trainer.distributed.step_check import MAX_DIFFERENCE, Measured
from trainer.distributed.step_execution import StepExecution
from trainer.model import loss as model_loss
from trainer.model.loss import CausalLMLoss, simulate_gpu
from trainer.training import execution_choice

MILLISECONDS = {"eager": 40.0, "graphs": 9.0, "compile": 20.0, "compile+graphs": 8.0}  # of a position, made up


class FakeCompiler:
    """In the place of `torch.compile`: the function itself, or one that fails, or whose weight is stale."""

    def __init__(self, failure: str = ""):
        self.failure, self.num_calls = failure, 0

    def __call__(self, fn: Any, **_: Any) -> Any:
        def compiled(*args: Any, **kwargs: Any) -> Any:
            self.num_calls += 1
            if self.failure == "backward":
                return _FailsInBackward.wrap(fn(*args, **kwargs))
            if self.failure == "forward":
                raise RuntimeError("no compiler here\nmore lines")
            return fn(*args, **kwargs)

        return compiled


class _FailsInBackward(torch.autograd.Function):
    @staticmethod
    def wrap(output: Any) -> Any:
        if hasattr(output, "last_hidden_state"):
            output.last_hidden_state = _FailsInBackward.apply(output.last_hidden_state)
        return output

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError("the compiler of the backward failed")


# --- a compiled shape against the eager one ---


@pytest.fixture
def loss_module(session_dir: Path) -> CausalLMLoss:
    folder = make_tiny_gpt2(session_dir / "tuned", dropout=0.1)
    return CausalLMLoss(AutoModelForCausalLM.from_pretrained(folder), None).train()


def make_compiled_runner(loss_module: CausalLMLoss, precision: str = "fp32") -> CompiledStepRunner:
    params = list(loss_module.parameters())
    return CompiledStepRunner(loss_module, params, *eager_calls(loss_module), shapes={(2, 16)}, precision=precision)


def seeded_step(backward: Any, loss_module: CausalLMLoss, seed: int) -> list[torch.Tensor]:
    """The gradients of a step whose rows and dropout masks are those of the seed; `backward` None: an eager one."""
    torch.manual_seed(seed)
    ids = torch.randint(1, 97, (2, 16))
    return step_gradients(backward or eager_calls(loss_module)[0], loss_module, [ids])


@pytest.mark.parametrize("failure", ["", "forward", "backward", "memory"])
def test_a_compiled_shape_is_verified_once_and_a_compiler_that_fails_anywhere_costs_no_step(
    loss_module, monkeypatch, failure
):
    """With dropout: neither the check nor the failure moves the generator, so every step has the eager masks."""
    compiler = FakeCompiler(failure)
    expected = [seeded_step(None, loss_module, seed) for seed in range(3)]
    monkeypatch.setattr(torch, "compile", compiler)
    runner = make_compiled_runner(loss_module)
    if failure == "memory":  # for the gradients of the eager call that it is held against
        out_of_memory = torch.OutOfMemoryError("CUDA out of memory")
        monkeypatch.setattr(runner, "_measure", lambda *_: (_ for _ in ()).throw(out_of_memory))
    for seed in range(3):
        for actual, gradient in zip(seeded_step(runner.backward, loss_module, seed), expected[seed], strict=True):
            torch.testing.assert_close(actual, gradient, rtol=1e-6, atol=1e-7)
    if failure:
        cause = {
            "forward": "no compiler here",
            "backward": "the compiler of the backward failed",
            "memory": "CUDA out of memory",
        }[failure]
        assert runner.error == f"steps are not compiled: {cause}"
        assert runner.checks == []
    else:
        assert runner.error == ""
        assert runner.checks == ["train 2x16 compiled, checked to 0e+00"]
        assert compiler.num_calls > 4, "it runs the steps"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="compiling for a processor needs a C++ compiler")
@pytest.mark.parametrize("autocast", [None, pytest.param(torch.bfloat16, marks=pytest.mark.sweep)])
def test_the_real_compiler_gives_the_eager_loss_and_gradients(loss_module, monkeypatch, autocast):
    """In pieces of the logits, too; rows of another shape stay eager and compile nothing."""
    from torch._dynamo.utils import counters

    blocks = loss_module.causal.base_model.h
    loss_module.causal.base_model.h = blocks[:1]  # each further one takes the compiler seconds
    loss_module.autocast_dtype = autocast
    monkeypatch.setattr(model_loss, "MAX_LOGITS_BYTES", 7 * 4 * 97)
    runner = make_compiled_runner(loss_module, "bf16" if autocast else "fp32")
    expected = seeded_step(None, loss_module, 0)
    gradients = seeded_step(runner.backward, loss_module, 0)
    assert runner.error == ""
    assert len(runner.checks) == 1
    num_graphs = counters["stats"]["unique_graphs"]
    assert num_graphs > 0
    for actual, gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-4 if autocast is None else 2e-2)
    again = seeded_step(runner.backward, loss_module, 0)
    assert all(map(torch.equal, again, gradients)), "the second call is the first one's"
    loss_module.eval()
    ids = torch.randint(1, 97, (2, 16))
    with loss_module.uncompiled():
        whole = loss_module(ids, ids)[1]
    num_graphs = counters["stats"]["unique_graphs"]
    sums = loss_module(ids, ids)[1]
    assert counters["stats"]["unique_graphs"] > num_graphs, "without dropout it is another graph"
    torch.testing.assert_close(sums, whole, rtol=1e-5 if autocast is None else 2e-2, atol=0)
    num_graphs = counters["stats"]["unique_graphs"]
    ids = torch.randint(1, 97, (1, 16))
    runner.backward(ids, ids, 0.5)
    assert counters["stats"]["unique_graphs"] == num_graphs


def test_a_compiled_shape_that_gives_another_gradient_is_named_with_both_figures_and_not_used(loss_module, monkeypatch):
    weight = dict(loss_module.named_parameters())["causal.transformer.h.1.mlp.c_fc.weight"]

    def stale(fn: Any, **_: Any) -> Any:
        def compiled(*args: Any, **kwargs: Any) -> Any:
            current = weight.data
            weight.data = 1.05 * current  # a constant would vanish behind the layer norm before it
            try:
                return fn(*args, **kwargs)
            finally:
                weight.data = current

        return compiled

    expected = seeded_step(None, loss_module, 1)
    monkeypatch.setattr(torch, "compile", stale)
    runner = make_compiled_runner(loss_module)
    for actual, gradient in zip(seeded_step(runner.backward, loss_module, 1), expected, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-5, atol=1e-6)
    assert runner.error.startswith("steps are not compiled: train 2x16 gives loss ")
    assert "the eager step loss" in runner.error


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_right_ways_to_compute_are_equal_also_where_a_gradient_is_rounding_alone(precision):
    """The key bias of OPT shifts all scores of a query alike: its gradient is 0 but for rounding."""
    config = OPTConfig(
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=97,
        word_embed_proj_dim=32,
        max_position_embeddings=32,
        dropout=0.0,
    )
    torch.manual_seed(0)
    module = CausalLMLoss(AutoModelForCausalLM.from_config(config), torch.bfloat16 if precision == "bf16" else None)
    ids, params = torch.randint(1, 97, (2, 32)), [p for p in module.parameters() if p.requires_grad]
    measured = []
    for attention in ("sdpa", "eager"):
        module.causal.set_attn_implementation(attention)
        loss_sum, row_losses = module(ids, ids)
        measured.append(Measured.of(row_losses, torch.autograd.grad(loss_sum, params)))
    assert measured[0].relative_difference(measured[1]) < MAX_DIFFERENCE[precision]
    negated = replace(measured[0], samples=tuple(tuple(-x for x in row) for row in measured[0].samples))
    assert measured[0].relative_difference(negated) == pytest.approx(1), (
        "gradients of the same size in another direction"
    )


# --- the choice, pure ---


def make_plans(*paths: str) -> list[Any]:
    base = plan_execution("--execution", "eager")
    return [
        replace(
            base,
            cuda_graphs="graphs" in path,
            compiled_shapes=((2, 1024),) if "compile" in path else (),
        )
        for path in paths
    ]


def run_tuner(tuner: ExecutionTuner, lag: int = 0) -> list[str]:
    """Take steps until all are timed, their numbers `lag` steps late; the path of each step."""
    plan, ran = tuner.candidates[0].plan, []
    while not tuner.is_complete:
        plan = tuner.next_plan(len(ran)) or plan
        ran.append(plan.path)
        if len(ran) > lag:
            step = len(ran) - 1 - lag
            tuner.add(step, MILLISECONDS[ran[step]] / 1000)
    return ran


@pytest.mark.parametrize("lag", [0, 1])
def test_each_plan_gets_its_steps_in_turn_and_the_fastest_is_named_with_the_others(lag):
    tuner = ExecutionTuner(make_plans(*execution.PATHS), positions_per_step=1, settle=lambda choice: choice)
    ran = run_tuner(tuner, lag)
    assert list(dict.fromkeys(ran)) == list(execution.PATHS)
    assert [ran.count(path) for path in execution.PATHS[:3]] == [c.num_steps for c in tuner.candidates[:3]]
    plan, message, timings = tuner.decide(lambda own: [own])
    assert plan.path == "compile+graphs"
    assert message == (
        "compiled and recorded steps: 8.0 ms, eager 40.0, recorded steps 9.0, compiled steps 20.0, checked to 0e+00"
    )
    assert [row["ms"] for row in timings] == pytest.approx([40.0, 9.0, 20.0, 8.0])
    assert sum(row["steps"] for row in timings) == len(ran) - lag


def test_the_slowest_ranks_time_counts_and_a_plan_that_failed_on_one_rank_is_not_chosen():
    tuner = ExecutionTuner(make_plans("eager", "graphs"), positions_per_step=1, settle=lambda choice: choice)
    run_tuner(tuner)
    assert tuner.decide(lambda own: [own, [0.01, 0.05]])[0].path == "eager"
    assert tuner.decide(lambda own: [own, [0.01, float("inf")]])[0].path == "eager"
    tuner.note_failure("operation not permitted")
    plan, message, timings = tuner.decide(lambda own: [own])
    assert (plan.path, message) == ("eager", "eager: 40.0 ms, recorded steps failed")
    assert timings[1]["failure"] == "operation not permitted"


def test_a_choice_that_another_run_made_meanwhile_holds(tmp_path):
    file = tmp_path / "execution" / "key.json"
    first, second = ({"path": path, "message": f"{path} first"} for path in ("graphs", "eager"))
    assert execution_choice.settle_choice(file, first) == first
    assert execution_choice.settle_choice(file, second) == first
    assert list(file.parent.iterdir()) == [file]
    file.write_text("{")
    assert execution_choice.settle_choice(file, second) == second, "what cannot be read is written anew"
    tuner = ExecutionTuner(make_plans("eager", "graphs"), positions_per_step=1, settle=lambda _: second)
    run_tuner(tuner)
    assert tuner.decide(lambda own: [own])[:2] == (tuner.candidates[0].plan, "eager first")


@pytest.fixture
def facts(tiny_model: str, data_files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a run that is long enough to be timed."""
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
    settings = cli.parse_args(
        tiny_argv(tiny_model, data_files, "--mode full --objective blocks --max-steps 300")
    ).settings
    batch = settings.train.batch(1)
    file = read_deepspeed_file("zero0")
    return execution_choice.RunFacts(
        settings=settings,
        dist_context=simulated_context(1),
        precision="fp32",
        model_info={"width": 16},
        deepspeed_config=build_deepspeed_config(file, batch=batch, max_grad_norm=1.0, precision="fp32"),
        schedule=SimpleNamespace(batch=batch, total_steps=300),
    )


def test_a_kept_choice_holds_for_the_device_and_the_ways_that_were_timed(facts, monkeypatch):
    def choose(*previous: dict[str, Any], tokens: int = execution.MIN_COMPILED_TOKENS) -> Any:
        monkeypatch.setattr(execution, "MIN_COMPILED_TOKENS", tokens)
        with simulate_gpu():
            return execution_choice.choose_execution(facts, previous)

    first = choose()
    assert first.timed_paths == ("eager", "graphs")
    execution_choice.settle_choice(first.file, {"path": "graphs", "message": "recorded steps: 9.0 ms"})
    assert (choose().path, choose().timed_paths) == ("graphs", ())
    assert choose(tokens=0).timed_paths == execution.PATHS, "a longer run has compiled steps to time as well"
    monkeypatch.setattr(execution_choice, "device_name", lambda _: "another GPU")
    assert choose().timed_paths == ("eager", "graphs")
    resumed = choose({"path": "graphs", "timed": []})
    assert (resumed.path, resumed.timed_paths) == ("graphs", ()), "what its steps were checked with, there as well"
    assert choose({"path": "eager", "timed": ["eager", "graphs"]}).timed_paths, "stopped before they all were timed"
    assert choose({"path": "compile", "timed": []}).path == "compile"


# --- whole runs ---


def train_tuned(argv: list[str], failing: str = "") -> int:
    """A whole run on the stand-in device, whose steps take the time that their path is said to take."""
    from helpers.launch_ranks import run_train_script

    def capture(*args: Any) -> Any:
        if failing == "graphs":
            raise RuntimeError("operation not permitted when stream is capturing")
        return FakeCapturedGraph(*args)

    original_end = StepExecution.end_step
    paths: dict[int, str] = {}
    original_begin = StepExecution.begin_step

    def begin_step(self: Any, step: int) -> None:
        original_begin(self, step)
        paths[step] = self.plan.path

    def end_step(self: Any, step: int, num_positions: int, elapsed_seconds: float) -> None:
        original_end(self, step, num_positions, num_positions * MILLISECONDS[paths[step]] / 1e5)

    StepExecution.begin_step, StepExecution.end_step = begin_step, end_step  # type: ignore[method-assign]
    cuda_graphs.CapturedGraph = capture  # type: ignore[misc, assignment]
    torch.compile = FakeCompiler()  # type: ignore[assignment]
    execution.MIN_TUNED_STEPS, execution.MIN_COMPILED_TOKENS = 40, 0
    with simulate_gpu():
        return run_train_script(argv)


def tuned_argv(tiny_model: str, data_files: tuple[str, str], rows: str, out: Path, *flags: str) -> list[str]:
    text = f"{rows} --block-size 16 --lr 1e-3 --eval-batch 7"
    text += f" --max-steps 44 --eval-every never --save-every 20 --num-samples 0 --output-dir {out}"
    return tiny_argv(tiny_model, data_files, text, *flags)


def execution_entries(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "run.json").read_text())["execution"]


def step_losses(out: Path) -> list[float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in records if row["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1)), "no step is lost or done twice"
    return [row["loss"] for row in records if row["kind"] == "step"]


@pytest.mark.parametrize(
    ("rows", "timed"),
    [
        ("--mode full --objective blocks --global-batch 7", execution.PATHS),
        ("--mode lora --objective blocks --global-batch 6", execution.PATHS),  # a ragged step an epoch
        ("--mode full --objective completion --global-batch 6", execution.PATHS[:2]),  # rows of many widths
    ],
)
def test_a_run_times_its_ways_and_goes_on_by_the_fastest_with_the_numbers_of_an_eager_run(
    rows, timed, tiny_model, data_files, tmp_path
):
    """Also: the next run takes the choice from the cache, and a resumed one keeps the path that it ran by."""
    out, eager, log = tmp_path / "run", tmp_path / "eager", tmp_path / "log"
    env = {"TRAINER_CACHE": str(tmp_path / "cache")}
    argv = tuned_argv(tiny_model, data_files, rows, out)
    assert run_on_ranks(1, train_tuned, argv, log=log, env=env) == 0, log.read_text()
    planned, chosen = execution_entries(out)
    assert (planned["path"], planned["timed"]) == ("eager", list(timed))
    assert chosen["path"] == timed[-1]
    num_steps = sum(row["steps"] for row in chosen["timings"])
    assert chosen["step"] in (num_steps, num_steps + 1), "one may be in flight, but not over an epoch's end"
    assert f"{PATH_NAMES[timed[-1]]}: " in log.read_text()
    eager_argv = tuned_argv(tiny_model, data_files, rows, eager, "--execution", "eager")
    assert run_on_ranks(1, train_tuned, eager_argv, log=log, env=env) == 0, log.read_text()
    assert step_losses(out) == pytest.approx(step_losses(eager), rel=1e-5)
    assert len(step_losses(out)) == 44
    next_run = tuned_argv(tiny_model, data_files, rows, tmp_path / "next")
    assert run_on_ranks(1, train_tuned, [*next_run, "--dry-run"], log=log, env=env) == 0, log.read_text()
    assert f"timed before: {PATH_NAMES[timed[-1]]}" in log.read_text()
    resumed = [*argv, "--resume", "step-40"]
    (tmp_path / "cache" / "execution").rename(tmp_path / "gone")
    assert run_on_ranks(1, train_tuned, resumed, log=log, env=env) == 0, log.read_text()
    assert [entry["path"] for entry in execution_entries(out)] == ["eager", timed[-1]]
    assert not (tmp_path / "cache" / "execution").exists(), "nothing was timed again"


def train_with_failing_graphs(argv: list[str]) -> int:
    return train_tuned(argv, failing="graphs")


def test_a_way_that_fails_while_it_is_timed_costs_no_step_and_is_named(tiny_model, data_files, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    argv = tuned_argv(tiny_model, data_files, "--mode full --objective blocks --global-batch 7", out)
    env = {"TRAINER_CACHE": str(tmp_path / "cache")}
    assert run_on_ranks(1, train_with_failing_graphs, argv, log=log, env=env) == 0, log.read_text()
    assert len(step_losses(out)) == 44
    chosen = execution_entries(out)[-1]
    assert chosen["path"] == "compile"
    assert "recorded steps failed" in chosen["reason"]
    failures = {row["path"]: row["failure"] for row in chosen["timings"]}
    assert failures["graphs"] == failures["compile+graphs"]
    assert "stream is capturing" in failures["graphs"]


def plan_on_ranks(argv: list[str], out: str) -> int:
    """On a rank: the plans of the flags, on the stand-in device and on the CPU that it is."""
    with joined_ranks() as dist_context:
        cpu = plan_run(argv, dist_context, on_meta=True).plan
        with simulate_gpu():
            gpu = plan_run(argv, dist_context, on_meta=True).plan
    content = [[plan.execution.path, [timed.path for timed in plan.timed_plans]] for plan in (cpu, gpu)]
    Path(out).write_text(json.dumps(content))
    return 0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", ["eager", ["eager", "graphs"]]),  # too few tokens for a compiler to pay
        ("--max-steps 100", ["graphs", []]),  # too short
        ("--execution graphs", ["graphs", []]),
        ("--execution compile", ["compile+graphs", []]),
        ("--ds-config zero3", ["eager", []]),
    ],
)
def test_what_is_timed_follows_from_the_run(flags, expected, tiny_model, data_files, tmp_path):
    argv = tiny_argv(tiny_model, data_files, "--mode full --objective blocks --block-size 16 --max-steps 300")
    out, log = tmp_path / "plans", tmp_path / "log"
    env = {"TRAINER_CACHE": str(tmp_path / "cache")}
    assert run_on_ranks(1, plan_on_ranks, [*argv, *flags.split()], str(out), log=log, env=env) == 0, log.read_text()
    cpu, gpu = json.loads(out.read_text())
    assert cpu == [("compile" if "compile" in flags else "eager"), []] or "graphs" in flags
    assert gpu == expected
