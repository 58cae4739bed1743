"""Adapters and packed bases: that they begin as their base, what they take, and what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_build import make_llama, parse_settings
from torch import nn

from trainer.config.errors import UserError
from trainer.model import optimizer
from trainer.model.build import build_model
from trainer.training.run_plan import validate_stage

IDS = torch.arange(1, 31)[None]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def family(request, tiny_model: str, session_dir: Path) -> str:
    """A folder with a model of Conv1D layers and a tied output, and one of Linear layers whose output is its own."""
    return tiny_model if request.param == "gpt2" else make_llama(session_dir)


def compute_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.module.eval()(input_ids=IDS, use_cache=False).logits


# --- at step 0 ---


@pytest.mark.parametrize("adapter", ["lora", "dora", "rslora", "pissa"])
def test_an_adapted_model_starts_with_the_outputs_of_its_base(adapter, family):
    base = compute_logits(build_model(parse_settings(family, "--mode full")))
    built = build_model(parse_settings(family, f"--adapter {adapter}"))
    is_pissa = adapter == "pissa"  # W - B A + B A, within rounding
    tolerance = 1e-5 if is_pissa else 0
    torch.testing.assert_close(compute_logits(built), base, rtol=tolerance, atol=tolerance * float(base.abs().max()))
    assert any(p.any() for n, p in built.module.named_parameters() if ".lora_B." in n) == is_pissa
    assert bool(built.initial_adapter) == is_pissa


# --- packed ---


@pytest.mark.parametrize("flags", ["nf4 --quant-double", "int8", "nf4 --modules-to-save wte,layernorm"])
def test_the_bytes_of_a_quantized_base_are_known_before_it_is_quantized(family, flags):
    """So a plan without weights chooses a ZeRO file, and a micro-batch, by what the base will be."""
    settings = parse_settings(family, f"--quant {flags}")
    built = build_model(settings)
    tensors: list[torch.Tensor] = []  # that hold the frozen weights, with the scales of packed ones
    for parameter in built.module.parameters():
        if not parameter.requires_grad:
            state = getattr(parameter, "quant_state", None)
            tensors += [parameter] + ([state.absmax] if state else [])
            tensors += [state.state2.absmax] if state and state.nested else []
            tensors += [parameter.SCB] if getattr(parameter, "SCB", None) is not None else []
    expected = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert built.metadata["frozen_bytes"] == expected
    assert build_model(settings, on_meta=True).metadata["frozen_bytes"] == expected


def test_an_int8_row_does_not_depend_on_the_other_rows_of_its_batch(tiny_model):
    """So a loss does not depend on the micro-batch; with LLM.int8()'s own threshold it does."""
    module = build_model(parse_settings(tiny_model, "--quant int8")).module.eval()
    layers: Any = [m for m in module.modules() if type(m).__module__.startswith("bitsandbytes") and hasattr(m, "state")]
    ids = torch.randint(97, (4, 30), generator=torch.Generator().manual_seed(0))
    for threshold, is_same in ((layers[0].state.threshold, True), (2.0, False)):
        for layer in layers:
            layer.state.threshold = threshold
        with torch.no_grad():
            together, *alone = (module(input_ids=part, use_cache=False).logits for part in (ids, *ids.split(1)))
        assert (float((together - torch.cat(alone)).abs().max()) < 1e-4) == is_same


def test_four_bit_layers_compute_in_one_dtype(tiny_model, monkeypatch):
    """Else on processors with AVX512-BF16 bitsandbytes computes in bf16, without a gradient, after an evaluation."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    built = build_model(parse_settings(tiny_model, "--quant nf4"))
    layers = [layer for layer in built.module.modules() if hasattr(layer, "support_avx512bf16_for_cpu")]
    assert len(layers) == 8
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


# --- refused, each in one line with its reason ---


@pytest.mark.parametrize(
    ("flags", "stage", "message"),
    [
        ("--mode full --quant nf4", 0, "--quant nf4: a quantised weight has no gradient; expected --mode lora"),
        ("--quant nf4 --adapter pissa", 0, "--quant nf4: rounds off what --adapter pissa changes"),
        ("--quant nf4 --modules-to-save bias", 0, "--modules-to-save bias: not with --quant nf4"),
        ("--quant int8", 3, "--quant int8: needs whole weights under ZeRO 3"),
        ("--quant nf4 --adapter dora", 3, "--quant nf4 --adapter dora: needs whole weights"),
        ("--optim adamw8bit", 1, "--optim adamw8bit: would depend on the number of ranks under ZeRO 1"),
    ],
)
def test_flags_and_zero_stages_that_exclude_each_other_are_refused(flags, stage, message):
    zero: Any = SimpleNamespace(stage=stage)
    with pytest.raises(UserError) as caught:
        validate_stage(parse_settings("gpt2", flags), zero)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_adapters_that_the_model_has_no_place_for_are_refused(tiny_model, session_dir):
    for model, flags, message in (
        (make_llama(session_dir), "--modules-to-save wte,bias", "--modules-to-save bias: this model has none"),
        (tiny_model, "--adapter pissa --lora-rank 17", "--lora-rank 17: pissa on .*attn.c_attn expects 16 or less"),
    ):
        with pytest.raises(UserError, match=message):
            build_model(parse_settings(model, flags))


# --- optimizers, names and memory ---


def test_the_state_of_an_8_bit_optimizer_is_measured():
    """Two bytes a weight, a float32 scale for 256 of each moment, and two tables of 256 codes that all share."""
    params = {name: nn.Parameter(torch.ones(n)) for name, n in (("packed", 8192), ("embedding", 4096), ("small", 4095))}
    train = parse_settings("gpt2", "--optim adamw8bit").train
    adamw = optimizer.build_optimizer(params.values(), train, embeddings=[params["embedding"]])
    expected = 2 * (8192 + 4 * 8192 // 256) + 8 * (4096 + 4095) + 2 * 4 * 256
    assert optimizer.count_state_bytes(adamw) == expected
    for weight in params.values():
        weight.grad = torch.ones_like(weight)
    adamw.step()
    assert optimizer.count_state_bytes(adamw) == expected
    assert all(bool((weight < 1).all()) for weight in params.values())


def test_activation_checkpointing_changes_no_gradient(tiny_model):
    """Also those of the first block's adapters, whose input has none."""
    grads = []
    for more in ("", " --activation-checkpointing"):
        built = build_model(parse_settings(tiny_model, f"--quant nf4 --adapter dora{more}"))
        built.module.train()
        assert built.causal.is_gradient_checkpointing == bool(more)
        built.causal(input_ids=IDS, use_cache=False).logits.float().log_softmax(-1)[0, :, 5].sum().backward()
        grads.append({n: p.grad for n, p in built.module.named_parameters() if p.requires_grad})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert any(grads[1][n].any() for n in grads[1] if "h.0." in n and ".lora_B." in n)
