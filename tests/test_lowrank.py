"""A layer and its adapter as one operation: peft's numbers and gradients, where the formula is this one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from test_ways import arguments, prepared  # noqa: F401
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trainer.config import cli
from trainer.config.schema import LoraSettings
from trainer.kernels import fused_lora
from trainer.model.build import build
from trainer.model.lora import adapt, merged, plain_layers


class Two(nn.Module):
    """A Conv1D, with its weight as [in, out], and a Linear, with and without a bias."""

    def __init__(self, bias: bool):
        super().__init__()
        self.config: Any = {"model_type": "two"}
        self.first = Conv1D(96, 64)
        self.second = nn.Linear(96, 32, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    def prepare_inputs_for_generation(self) -> None:
        raise NotImplementedError


def adapted(*, bias: bool = True, train_bias: bool = False, names: tuple[str, ...] = ("first", "second")) -> nn.Module:
    """Adapters of rank 3 whose B is not nothing, scaled by 5 / 3."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(Two(bias), LoraConfig(r=3, lora_alpha=5, target_modules=list(names)))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if ".lora_" in name or "bias" in name:
            nn.init.normal_(parameter, std=0.1)
        if "bias" in name:
            parameter.requires_grad_(train_bias)
    return model


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and every gradient: of the input, where it has one, and of what trains."""
    model.zero_grad()
    made = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    asked = [x, *trained] if x.requires_grad else trained
    by = torch.randn(made.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(made.dtype)
    return [made, *torch.autograd.grad(made, asked, by)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("train_bias", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_output_and_gradients_are_pefts(bias, train_bias, learns):
    """In float64; two leading dimensions, an input with a gradient and one without."""
    model = adapted(bias=bias, train_bias=train_bias).double()
    x = torch.randn(2, 20, 64, dtype=torch.float64, requires_grad=learns)
    before = results(model, x)
    fused_lora.install(plain_layers(model))
    for one, other in zip(results(model, x), before, strict=True):
        assert one.dtype == other.dtype
        assert one.is_contiguous(), "fused AdamW takes gradients that lie as their weights do"
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_under_autocast_it_is_as_near_to_float64_as_pefts():
    """And types are those of peft: products in bfloat16, gradients of weights in float32."""
    exact, model = adapted().double(), adapted()
    x = torch.randn(2, 20, 64, requires_grad=True)
    wanted = results(exact, x.detach().double().requires_grad_())

    def errors() -> list[float]:
        with torch.autocast("cpu", torch.bfloat16):
            made = results(model, x)
        types.append([one.dtype for one in made])
        return [float((one.double() - other).norm() / other.norm()) for one, other in zip(made, wanted, strict=True)]

    types: list[list[torch.dtype]] = []
    theirs = errors()
    fused_lora.install(plain_layers(model))
    for one, other in zip(errors(), theirs, strict=True):
        assert one < 1.25 * other
    assert types[0] == types[1]


def test_a_gpus_form_gives_the_same_numbers(monkeypatch):
    """The bias added by the layer's own product: the branch that a processor does not take."""
    model, x = adapted().double(), torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    fused_lora.install(plain_layers(model))
    before = results(model, x)
    monkeypatch.setattr(fused_lora, "BIAS_AS_A_COLUMN", "none")
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        after = results(model, x)
    assert (5, 3) in kept
    assert (5, 4) not in kept
    for one, other in zip(after, before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_adapters_that_are_switched_off_or_merged_count_no_second_time(tiny):
    module = build(cli.read(["--mode", "lora", "--model", tiny]).settings).module
    for parameter in (p for name, p in module.named_parameters() if ".lora_B." in name):
        nn.init.normal_(parameter)
    ids, plain = torch.arange(20).view(2, 10), copy.deepcopy(module)
    fused_lora.install(plain_layers(module))
    with torch.no_grad():
        with module.disable_adapter(), plain.disable_adapter():
            assert torch.equal(module(ids).logits, plain(ids).logits)
        wanted = plain(ids).logits
        torch.testing.assert_close(module(ids).logits, wanted, rtol=1e-5, atol=1e-5)
        module.merge_adapter()
        torch.testing.assert_close(module(ids).logits, wanted, rtol=1e-5, atol=1e-5)
        module.unmerge_adapter()
        torch.testing.assert_close(merged(module)(ids).logits, wanted, rtol=1e-5, atol=1e-5)


def fused(module: nn.Module) -> set[str]:
    return {name for name, layer in module.named_modules() if "forward" in vars(layer)}


def test_what_is_more_than_this_formula_stays_pefts(tiny):
    def model(**more: Any) -> nn.Module:
        causal = build(cli.read(["--mode", "full", "--model", tiny]).settings).causal
        module: nn.Module = adapt(causal, LoraSettings(**more), ["c_attn"])
        fused_lora.install(plain_layers(module))
        return module

    assert len(fused(model())) == len(fused(model(adapter="rslora"))) == len(fused(model(adapter="pissa"))) == 2
    assert not fused(model(adapter="dora"))
    assert not fused(model(dropout=0.1))


def check_claims(jobs: list[dict[str, Any]]) -> int:
    """On a rank: an engine fuses what the plan says that it does, and nothing where it says nothing."""
    from trainer.data.dataset import load
    from trainer.distributed.engine import Engine
    from trainer.distributed.process_group import leave_world, start_world
    from trainer.model.build import load_config
    from trainer.training.run_plan import make_plan

    world = start_world()
    for job in jobs:
        settings, data = cli.read(job["flags"]).settings, load(Path(job["data"]))
        model = build(settings)
        plan = make_plan(settings, world, data, model.facts, load_config(settings.model))
        Engine(world, model, plan.deepspeed, settings.train, plan.precision, compiled=plan.shapes)
        told = plan.resolved()["adapters_fused"]
        assert told == job["expected"], job
        assert told == ("fused" in plan._way())
        assert len(fused(model.module)) == 8 * told, job
    leave_world()
    return 0


def test_the_plan_says_what_the_engine_does(tiny, records, prepared, tmp_path):  # noqa: F811
    def job(mode: str, *more: str, expected: bool) -> dict[str, Any]:
        words = [*arguments(tiny, records, mode, "completion"), *more]
        return {"flags": words, "data": str(prepared), "expected": expected}

    jobs = [
        job("lora", expected=True), job("full", expected=False),
        *(job("lora", "--ds-config", f"zero{stage}", expected=stage < 3) for stage in (1, 2, 3)),
        *(job("lora", "--adapter", kind, expected=kind != "dora") for kind in ("rslora", "pissa", "dora")),
        job("lora", "--lora-dropout", "0.1", expected=False), job("lora", "--quant", "nf4", expected=False),
        job("lora", "--precision", "bf16", expected=True), job("lora", "--checkpoint-activations", expected=True),
        job("lora", "--train-also", "bias,wte", expected=True),
    ]  # fmt: skip
    log = tmp_path / "log"
    assert on_ranks(1, check_claims, jobs, log=log) == 0, log.read_text()
