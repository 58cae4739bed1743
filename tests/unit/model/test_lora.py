"""The adapters: which layers, how many parameters by formula, that they begin as the base, and how they leave the run.

Of rank r on a layer [in, out]: r * (in + out); dora adds one magnitude for each output. What GPT-2's blocks hold
beside their weights: biases of c_attn 3d, c_proj d, c_fc 4d, c_proj d and two LayerNorms of 2d.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_build import LAYERS, LLAMA, D, gpt2_settings, parse_settings
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trainer.config.errors import UserError
from trainer.export.folder import find_base, save_adapter
from trainer.export.verify import load_folder
from trainer.model import optimizer, quantization
from trainer.model.build import build_model, fuse_gelu
from trainer.training.run_plan import collect_notes, validate_stage

LORA = LAYERS * 8 * ((D + 3 * D) + (D + D) + (D + 4 * D) + (4 * D + D))
OUTPUTS = LAYERS * (3 * D + D + 4 * D + D)
BIASES, NORMS = LAYERS * 11 * D + D, LAYERS * 4 * D + 2 * D
WTE = 50_257 * D
IDS = torch.arange(1, 31)[None]


@pytest.fixture(scope="module")
def llama(session_dir: Path) -> str:
    """A folder with a random Llama: all its layers are Linear, and its output layer is not tied."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(session_dir / "llama")
    return str(session_dir / "llama")


def compute_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.module.eval()(input_ids=IDS, use_cache=False).logits


# --- counts ---


@pytest.mark.parametrize(
    ("flags", "formula", "expected"),
    [
        ("", LORA, 1_179_648),
        ("--lora-rank 16", 2 * LORA, 2_359_296),
        ("--lora-target-modules c_attn", LAYERS * 8 * (D + 3 * D), 294_912),
        ("--lora-target-modules mlp.c_proj", LAYERS * 8 * (4 * D + D), 368_640),
        ("--lora-target-modules attn.c_proj,c_fc", LAYERS * 8 * (D + D + D + 4 * D), 516_096),
        ("--adapter dora", LORA + OUTPUTS, 1_262_592),
        ("--adapter rslora", LORA, 1_179_648),
        ("--adapter pissa", LORA, 1_179_648),
        ("--lora-target-modules attention", LAYERS * 8 * ((D + 3 * D) + (D + D)), 442_368),
        ("--lora-target-modules mlp", LAYERS * 8 * 2 * (D + 4 * D), 737_280),
        ("--lora-target-modules all", LORA, 1_179_648),
        ("--lora-target-modules *.h.0.*", LORA // LAYERS, 98_304),
        ("--lora-target-modules *.h.1?.attn.c_attn,h.3.mlp.c_fc", 8 * (2 * 4 * D + 5 * D), 79_872),
        ("--modules-to-save wte", LORA + WTE, 39_777_024),
        ("--modules-to-save lm_head", LORA + WTE, 39_777_024),  # tied: the same tensor
        ("--modules-to-save wte,lm_head", LORA + WTE, 39_777_024),
        ("--modules-to-save layernorm", LORA + NORMS, 1_218_048),
        ("--modules-to-save bias", LORA + BIASES, 1_281_792),
        # the norms' biases count once
        ("--modules-to-save layernorm,bias", LORA + NORMS + BIASES - LAYERS * 2 * D - D, 1_300_992),
    ],
)
def test_each_adapter_trains_the_number_of_parameters_of_its_formula(flags, formula, expected):
    facts = build_model(gpt2_settings("lora", *flags.split()), on_meta=True).metadata
    assert facts["trainable"] == formula == expected
    assert facts["parameters"] == 124_439_808, "of the base model, adapters left out"
    assert facts["share"] == expected / 124_439_808


def test_adapter_parameter_formulas_hold_on_linear_layers(llama):
    d, wide = LLAMA.hidden_size, LLAMA.intermediate_size
    attention, mlp = 4 * (d + d), 3 * (d + wide)
    for more, count in (
        ((), 2 * 8 * (attention + mlp)),
        (("--lora-target-modules", "attention"), 2 * 8 * attention),
        (("--lora-target-modules", "mlp"), 2 * 8 * mlp),
        (("--adapter", "dora"), 2 * (8 * (attention + mlp) + 4 * d + 2 * wide + d)),
        (("--adapter", "rslora"), 2 * 8 * (attention + mlp)),
        (("--adapter", "pissa"), 2 * 8 * (attention + mlp)),
        (("--modules-to-save", "wte"), 2 * 8 * (attention + mlp) + 97 * d),
        (("--modules-to-save", "wte,lm_head"), 2 * 8 * (attention + mlp) + 2 * 97 * d),  # not tied: two tensors
        (("--modules-to-save", "layernorm"), 2 * 8 * (attention + mlp) + 5 * d),
    ):
        assert build_model(parse_settings(llama, "lora", *more), on_meta=True).metadata["trainable"] == count, more


# --- at step 0 ---


@pytest.mark.parametrize("adapter", ["lora", "dora", "rslora", "pissa"])
@pytest.mark.parametrize("of", ["tiny_model", "llama"])
def test_an_adapted_model_starts_with_the_outputs_of_its_base(adapter, of, request):
    folder = request.getfixturevalue(of)
    base = compute_logits(build_model(parse_settings(folder, "full")))
    built = build_model(parse_settings(folder, "lora", "--adapter", adapter))
    if adapter == "pissa":  # W - B A + B A, within rounding
        torch.testing.assert_close(compute_logits(built), base, rtol=1e-5, atol=1e-5 * float(base.abs().max()))
        assert any(p.any() for n, p in built.module.named_parameters() if ".lora_B." in n)
    else:
        assert torch.equal(compute_logits(built), base)
    assert bool(built.initial_adapter) == (adapter == "pissa")


@pytest.mark.parametrize(
    ("adapter", "kind"), [("lora", "nf4"), ("dora", "nf4"), ("rslora", "fp4"), ("lora", "int8"), ("rslora", "int8")]
)
def test_an_adapted_model_starts_with_the_outputs_of_its_quantized_base(tiny_model, adapter, kind):
    built = build_model(parse_settings(tiny_model, "lora", "--adapter", adapter, "--quant", kind))
    began = compute_logits(built)
    with built.module.disable_adapter():
        torch.testing.assert_close(began, compute_logits(built), rtol=0, atol=0)
    plain = build_model(parse_settings(tiny_model, "full"))
    assert (began - compute_logits(plain)).abs().max() > 0.01, "packing does change the numbers"
    assert built.metadata["fingerprint"] == plain.metadata["fingerprint"], "of the weights before they are packed"


# --- packed ---


@pytest.mark.parametrize("flags", ["nf4", "fp4 --quant-double", "int8"])
def test_quantization_equals_that_of_transformers(tiny_model, flags):
    """Bit for bit: an exported adapter is loaded onto a base that transformers packs."""
    built = build_model(parse_settings(tiny_model, "lora", "--quant", *flags.split()))
    config = BitsAndBytesConfig(**quantization.bitsandbytes_config_kwargs(built.quant_settings, built.module))
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=config
    )
    ours = {name.replace(".base_layer", ""): p for name, p in built.causal.named_parameters()}
    assert sum(not p.is_floating_point() for p in theirs.parameters()) == 8
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, ours[name]), name


def count_frozen_bytes(model: nn.Module) -> int:
    """Bytes of the frozen weights as they are held, with the scales of packed ones."""
    tensors: list[torch.Tensor] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            quant_state = getattr(parameter, "quant_state", None)
            tensors += [parameter] + ([quant_state.absmax] if quant_state else [])
            tensors += [quant_state.state2.absmax] if quant_state and quant_state.nested else []
            tensors += [parameter.SCB] if getattr(parameter, "SCB", None) is not None else []
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("of", ["tiny_model", "llama"])
@pytest.mark.parametrize(
    "argv",
    ["--quant nf4", "--quant fp4 --quant-double", "--quant int8", "--quant nf4 --modules-to-save wte,layernorm"],
)
def test_the_bytes_of_a_quantized_base_are_known_before_it_is_quantized(of, argv, request):
    """So a plan without weights chooses a ZeRO file, and a micro-batch, by what the base will be."""
    settings = parse_settings(request.getfixturevalue(of), "lora", *argv.split())
    built = build_model(settings)
    assert built.metadata["frozen_bytes"] == count_frozen_bytes(built.module)
    assert build_model(settings, on_meta=True).metadata["frozen_bytes"] == built.metadata["frozen_bytes"]


def test_an_int8_row_does_not_depend_on_the_other_rows_of_its_batch(tiny_model):
    """So a loss does not depend on the micro-batch; with LLM.int8()'s own threshold it does."""
    built = build_model(parse_settings(tiny_model, "lora", "--quant", "int8"))
    ids = torch.randint(97, (4, 30), generator=torch.Generator().manual_seed(0))

    def apart() -> float:
        with torch.no_grad():
            together, alone = (
                torch.cat([built.module.eval()(input_ids=part, use_cache=False).logits for part in parts])
                for parts in ((ids,), ids.split(1))
            )
        return float((together - alone).abs().max())

    assert apart() < 1e-4
    for layer in built.module.modules():
        if type(layer).__module__.startswith("bitsandbytes") and hasattr(layer, "state"):
            layer.state.threshold = 2.0
    assert apart() > 1e-3


def test_four_bit_layers_compute_in_one_dtype(tiny_model, monkeypatch):
    """Else on processors with AVX512-BF16 bitsandbytes computes in bf16, without a gradient, after an evaluation."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    built = build_model(parse_settings(tiny_model, "lora", "--quant", "nf4"))
    layers = list(quantization._iter_4bit_layers(built.module))
    assert len(layers) == 8
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


# --- leaving the run ---


def build_perturbed(*flags: str, model_dir: str) -> Any:
    """A model whose trained weights all moved."""
    model = build_model(parse_settings(model_dir, "lora", *flags))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def export_and_reload(model: Any, folder: Path) -> Any:
    """The model of the exported folder, loaded as its user would."""
    folder.mkdir(exist_ok=True)
    weights = {n: p.detach() for n, p in model.module.named_parameters() if p.requires_grad}
    base_model = find_base(model.metadata["name"], folder)
    save_adapter(folder, model, weights, base_model, "fp32")
    return SimpleNamespace(module=load_folder(folder, base_model.path, torch.device("cpu")), causal=None)


@pytest.mark.parametrize("of", ["tiny_model", "llama"])
@pytest.mark.parametrize("adapter", ["dora", "pissa"])
def test_modules_to_save_are_exported_with_the_adapter(adapter, of, tmp_path, request):
    folder = request.getfixturevalue(of)
    biases = ",bias" if of == "tiny_model" else ""  # Llama has none
    built = build_perturbed(
        "--adapter", adapter, "--modules-to-save", f"wte,lm_head,layernorm{biases}", model_dir=folder
    )
    again = export_and_reload(built, tmp_path)
    torch.testing.assert_close(compute_logits(again), compute_logits(built), rtol=1e-5, atol=2e-4)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    embeddings = [name for name in stored if tuple(stored[name].shape) == (97, 16)]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == (16 if adapter == "pissa" else 8), "pissa's is an ordinary adapter of twice the rank"
    assert config["init_lora_weights"] is True
    assert {min(t.shape) for name, t in stored.items() if ".lora_A." in name or ".lora_B." in name} == {config["r"]}
    assert len(embeddings) == (1 if built.has_tied_embeddings else 2), "tied weights are stored once"
    causal = again.module.get_base_model()
    assert (causal.get_input_embeddings().weight is causal.get_output_embeddings().weight) == built.has_tied_embeddings


@pytest.mark.parametrize(
    ("flags", "rtol", "atol"),
    [
        ("", 1e-5, 1e-4),  # float32, logits of 30
        ("--adapter pissa", 1e-4, 1e-3),
        ("--adapter rslora", 1e-4, 1e-3),
        ("--adapter dora --modules-to-save wte,bias", 1e-4, 1e-3),
    ],
)
def test_merged_adapters_leave_the_logits_unchanged_and_the_embeddings_tied(tiny_model, flags, rtol, atol):
    built = build_perturbed(*flags.split(), model_dir=tiny_model)
    expected = compute_logits(built)
    merged = built.module.merge_and_unload(safe_merge=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=rtol, atol=atol)
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_an_exported_adapter_names_its_quantized_base(tiny_model, tmp_path):
    built = build_perturbed("--quant", "nf4", "--quant-double", model_dir=tiny_model)
    again = export_and_reload(built, tmp_path)
    fuse_gelu(again.module)  # transformers computes the same formula in eight, which round otherwise
    assert torch.equal(compute_logits(again), compute_logits(built))
    quantization = json.loads((tmp_path / "base_quantization.json").read_text())
    assert quantization["base"] == Path(tiny_model).name, "no place of this machine"
    assert quantization["fingerprint"] == built.metadata["fingerprint"]
    assert quantization["quantization_config"]["bnb_4bit_use_double_quant"] is True
    assert quantization["quantization_config"]["bnb_4bit_quant_type"] == "nf4"


# --- refused, each in one line with its reason ---


@pytest.mark.parametrize(
    ("argv", "stage", "message"),
    [
        ("full --quant nf4", 0, "--quant nf4: a quantised weight has no gradient; expected --mode lora"),
        ("full --adapter dora", 0, "--adapter dora: is about adapters; expected --mode lora"),
        ("full --modules-to-save wte", 0, "--modules-to-save wte: is about adapters"),
        ("full --lora-plus-ratio 4", 0, "--lora-plus-ratio 4.0: is about adapters"),
        ("full --optim adamw8bit --precision fp16", 0, "--optim adamw8bit: not with --precision fp16"),
        ("lora --quant nf4 --adapter pissa", 0, "--quant nf4: its rounding is larger than what pissa changes"),
        ("lora --quant int8 --adapter dora", 0, "--quant int8: peft loses its scales where dora takes norms"),
        ("lora --quant int8 --quant-double", 0, "--quant-double: expected with --quant nf4 or fp4"),
        ("lora --quant-double", 0, "--quant-double: expected with --quant nf4 or fp4"),
        ("lora --quant nf4 --modules-to-save bias", 0, "--modules-to-save bias: bitsandbytes rounds the biases of nf4"),
        ("lora --quant fp4 --precision fp16", 0, "--precision fp16: rounds the packed weights of --quant fp4"),
        ("lora --modules-to-save wpe", 0, "--modules-to-save wpe: expected wte, lm_head, layernorm or bias"),
        ("lora --lora-plus-ratio 0", 0, "--lora-plus-ratio 0.0: expected a number above 0"),
        ("lora --quant int8", 3, "--quant int8: not under ZeRO 3: bitsandbytes keeps a whole copy"),
        ("lora --quant nf4 --adapter dora", 3, "--quant nf4: dora reads whole packed weights, which ZeRO 3 has divi"),
        ("lora --optim adamw8bit", 1, "--optim adamw8bit: not under ZeRO 1, which joins all tensors"),
        ("lora --optim paged_adamw8bit", 3, "--optim paged_adamw8bit: not under ZeRO 3"),
    ],
)
def test_flags_and_zero_stages_that_exclude_each_other_are_refused(argv, stage, message):
    zero: Any = SimpleNamespace(stage=stage)
    with pytest.raises(UserError) as caught:
        validate_stage(gpt2_settings(*argv.split()), zero)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("of", "flags", "message"),
    [
        ("llama", "--modules-to-save wte,bias", "--modules-to-save bias: this model has none; leave it out"),
        ("tiny_model", "--adapter pissa --lora-rank 17", r"--lora-rank 17: pissa on .*attn.c_attn expects 16 or less"),
    ],
)
def test_adapters_that_the_model_has_no_place_for_are_refused(of, flags, message, request):
    with pytest.raises(UserError, match=message):
        build_model(parse_settings(request.getfixturevalue(of), "lora", *flags.split()))


def test_the_plan_says_where_an_8_bit_optimizer_saves_nothing():
    settings = gpt2_settings("lora", "--optim", "adamw8bit", "--lora-rank", "4", "--lora-target-modules", "c_attn")
    facts = build_model(settings, on_meta=True).metadata
    assert facts["kept_in_32_bits"] == {  # A [4, 768] has 3,072 elements, B [2304, 4] 9,216
        "tensors": 24,
        "kept_tensors": 12,
        "kept_parameters": 12 * 3072,
        "parameters": 12 * (3072 + 9216),
    }
    (note,) = collect_notes(settings, facts)
    assert note.startswith("adamw8bit: 12 of 24 trained tensors (25% of the parameters) are embeddings or under 4,096")
    full = build_model(gpt2_settings("full", "--optim", "adamw8bit"), on_meta=True).metadata["kept_in_32_bits"]
    assert full["kept_parameters"] == WTE + 1024 * D + BIASES + NORMS - LAYERS * 2 * D - D


def test_flags_of_adapters_are_said_to_do_nothing_with_every_weight():
    notes = collect_notes(gpt2_settings("full", "--lora-rank", "4"), {})
    assert notes == ["--lora-rank: of no effect with --mode full"]
    assert collect_notes(gpt2_settings("lora", "--lora-rank", "4"), {}) == []


@pytest.mark.parametrize("kind", ["adamw8bit", "paged_adamw8bit"])
def test_the_state_of_an_8_bit_optimizer_is_measured(kind):
    """Two bytes a weight, a float32 scale for 256 of each moment, and two tables of 256 codes that all share."""
    packed, embedding, small = (nn.Parameter(torch.ones(n)) for n in (8192, 4096, 4095))
    train = gpt2_settings("full", "--optim", kind).train
    adamw = optimizer.build_optimizer(
        {"packed": packed, "embedding": embedding, "small": small},
        train,
        get_lr_multiplier=lambda name: 1.0,
        embeddings=[embedding],
    )
    expected = 2 * (8192 + 4 * 8192 // 256) + 8 * (4096 + 4095) + 2 * 4 * 256
    assert optimizer.count_state_bytes(adamw) == expected
    for weight in (packed, embedding, small):
        weight.grad = torch.ones_like(weight)
    adamw.step()
    assert optimizer.count_state_bytes(adamw) == expected
    assert all(bool((weight < 1).all()) for weight in (packed, embedding, small))


@pytest.mark.parametrize(
    ("flags", "name"),
    [("full", "full"), ("lora", "lora"), ("lora --adapter dora", "dora"), ("lora --quant nf4", "lora-nf4")],
)
def test_runs_are_named_by_what_they_train(flags, name):
    assert parse_settings("gpt2", *flags.split()).run_name == f"{name}-acled-demo"


@pytest.mark.parametrize(
    "argv", ["", "--adapter dora", "--quant nf4", "--quant nf4 --adapter dora", "--quant int8 --modules-to-save wte"]
)
def test_activation_checkpointing_changes_no_gradient(tiny_model, argv):
    """Also those of the first block's adapters, whose input has none."""
    grads = []
    for more in ((), ("--activation-checkpointing",)):
        built = build_model(parse_settings(tiny_model, "lora", *argv.split(), *more))
        built.module.train()
        assert built.causal.is_gradient_checkpointing == bool(more)
        built.causal(input_ids=IDS, use_cache=False).logits.float().log_softmax(-1)[0, :, 5].sum().backward()
        grads.append({n: p.grad for n, p in built.module.named_parameters() if p.requires_grad})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert any(np.abs(grads[1][n].numpy()).max() > 0 for n in grads[1] if "h.0." in n and ".lora_B." in n)
