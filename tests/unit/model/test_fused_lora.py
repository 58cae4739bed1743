"""A layer and its adapter as one operation: peft's numbers and gradients, where the formula is this one."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trainer.config import cli
from trainer.config.schema import LoraSettings
from trainer.model import fused_lora
from trainer.model.build import build_model
from trainer.model.lora import add_adapters, find_fusable_layers
from trainer.model.loss import simulate_gpu


class TwoLayerModel(nn.Module):
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


def make_adapted(
    *, bias: bool = True, train_bias: bool = False, names: tuple[str, ...] = ("first", "second")
) -> nn.Module:
    """Adapters of rank 3 whose B is not nothing, scaled by 5 / 3."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(TwoLayerModel(bias), LoraConfig(r=3, lora_alpha=5, target_modules=list(names)))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if ".lora_" in name or "bias" in name:
            nn.init.normal_(parameter, std=0.1)
        if "bias" in name:
            parameter.requires_grad_(train_bias)
    return model


def output_and_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and every gradient: of the input, where it has one, and of what trains."""
    model.zero_grad()
    output = model(x)
    trainable_params = [p for p in model.parameters() if p.requires_grad]
    inputs = [x, *trainable_params] if x.requires_grad else trainable_params
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        output.dtype
    )
    return [output, *torch.autograd.grad(output, inputs, grad_output)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("train_bias", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_fused_lora_has_the_output_and_gradients_of_peft(bias, train_bias, learns):
    """In float64; two leading dimensions, an input with a gradient and one without."""
    model = make_adapted(bias=bias, train_bias=train_bias).double()
    x = torch.randn(2, 20, 64, dtype=torch.float64, requires_grad=learns)
    before = output_and_gradients(model, x)
    fused_lora.install(find_fusable_layers(model), model)
    for actual, other in zip(output_and_gradients(model, x), before, strict=True):
        assert actual.dtype == other.dtype
        assert actual.is_contiguous(), "fused AdamW takes gradients that lie as their weights do"
        torch.testing.assert_close(actual, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_gpu", [False, True])
def test_fused_lora_under_autocast_is_as_near_to_float64_as_peft(is_gpu):
    """And types are those of peft: products in bfloat16, gradients of weights in float32. A GPU's form takes all small
    weights from copies that are made once a forward; after an update, anew."""
    exact, model = make_adapted().double(), make_adapted()
    x = torch.randn(2, 20, 64, requires_grad=True)
    expected_grads = output_and_gradients(exact, x.detach().double().requires_grad_())

    def errors() -> list[float]:
        with torch.autocast("cpu", torch.bfloat16), simulate_gpu(is_gpu):
            output = output_and_gradients(model, x)
        types.append([actual.dtype for actual in output])
        return [
            float(((actual.double() - other).norm() / other.norm()).detach())
            for actual, other in zip(output, expected_grads, strict=True)
        ]

    types: list[list[torch.dtype]] = []
    theirs = errors()
    fused_lora.install(find_fusable_layers(model), model)
    for actual, other in zip(errors(), theirs, strict=True):
        assert actual < 1.25 * other
    assert types[0] == types[1]
    for changed in (exact, model):
        with torch.no_grad():
            for parameter in (p for name, p in changed.named_parameters() if ".lora_" in name):
                parameter.mul_(-2)
    expected_grads = output_and_gradients(exact, x.detach().double().requires_grad_())
    for actual, other in zip(errors(), theirs, strict=True):
        assert actual < 2 * other


def test_the_gpu_form_of_fused_lora_casts_all_small_weights_together():
    """Two operations on lists for all layers, where each layer would take five."""
    model = make_adapted()
    fused_lora.install(find_fusable_layers(model), model)
    with torch.autocast("cpu", torch.bfloat16), simulate_gpu(), torch.profiler.profile(acc_events=True) as seen:
        model(torch.randn(2, 20, 64))
    counts = {event.key: event.count for event in seen.key_averages()}
    assert counts["aten::_foreach_mul"] == counts["aten::_foreach_copy_"] == 1


def test_the_gpu_form_of_fused_lora_gives_the_same_numbers():
    """The bias added by the layer's own product: the branch that a processor does not take."""
    model, x = make_adapted().double(), torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    fused_lora.install(find_fusable_layers(model), model)
    before = output_and_gradients(model, x)
    shapes: list[tuple[int, ...]] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t)
    with simulate_gpu(), hooks:
        after = output_and_gradients(model, x)
    assert (5, 3) in shapes
    assert (5, 4) not in shapes
    for actual, other in zip(after, before, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_gpu", [False, True])
def test_a_compiler_takes_adapted_layers_in_one_graph_with_the_same_numbers(is_gpu):
    """In the GPU's form with the casts of all layers that are made before the compiled part."""
    model, x = make_adapted(), torch.randn(2, 20, 64, requires_grad=True)
    fused_lora.install(find_fusable_layers(model), model)
    with torch.autocast("cpu", torch.bfloat16), simulate_gpu(is_gpu):
        expected = output_and_gradients(model, x)
        model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]
        actual = output_and_gradients(model, x)
    for compiled, eager in zip(actual, expected, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


def test_fused_lora_respects_disabled_and_merged_adapters(tiny_model):
    module = build_model(cli.parse_args(["--mode", "lora", "--model", tiny_model]).settings).module
    for parameter in (p for name, p in module.named_parameters() if ".lora_B." in name):
        nn.init.normal_(parameter, std=0.2)  # of 1, the rounding of one processor or another is over the bound
    ids, plain = torch.arange(20).view(2, 10), copy.deepcopy(module)
    fused_lora.install(find_fusable_layers(module), module)
    with torch.no_grad():
        with module.disable_adapter(), plain.disable_adapter():
            assert torch.equal(module(ids).logits, plain(ids).logits)
        expected_output = plain(ids).logits
        torch.testing.assert_close(module(ids).logits, expected_output, rtol=1e-5, atol=1e-5)
        module.merge_adapter()
        torch.testing.assert_close(module(ids).logits, expected_output, rtol=1e-5, atol=1e-5)
        module.unmerge_adapter()
        merged = module.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(merged(ids).logits, expected_output, rtol=1e-5, atol=1e-5)


def fused_layer_names(module: nn.Module) -> set[str]:
    return {name for name, layer in module.named_modules() if "forward" in vars(layer)}


def test_adapters_beyond_plain_lora_are_not_fused(tiny_model):
    def model(**more: Any) -> nn.Module:
        causal = build_model(cli.parse_args(["--mode", "full", "--model", tiny_model]).settings).causal
        module: nn.Module = add_adapters(causal, LoraSettings(**more), ["c_attn"])
        fused_lora.install(find_fusable_layers(module), module)
        return module

    assert (
        len(fused_layer_names(model()))
        == len(fused_layer_names(model(adapter="rslora")))
        == len(fused_layer_names(model(adapter="pissa")))
        == 2
    )
    assert not fused_layer_names(model(adapter="dora"))
    assert not fused_layer_names(model(dropout=0.1))
