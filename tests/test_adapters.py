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
from test_model import LAYERS, LLAMA, NEOX, D, gpt2, settings, tiny_of
from torch import nn
from transformers import AutoModelForCausalLM

from trainer.config.errors import UserError
from trainer.config.schema import LoraSettings, Settings
from trainer.export import verify_worker
from trainer.export.folder import base_of, save_folder
from trainer.model import lora, optimizer, quantization
from trainer.model.build import build, merge_adapters, one_kernel_activations
from trainer.model.lora import targets
from trainer.training.run_plan import _notes, _refuse_stage

LORA = LAYERS * 8 * ((D + 3 * D) + (D + D) + (D + 4 * D) + (4 * D + D))
OUTPUTS = LAYERS * (3 * D + D + 4 * D + D)
BIASES, NORMS = LAYERS * 11 * D + D, LAYERS * 4 * D + 2 * D
WTE = 50_257 * D
IDS = torch.arange(1, 31)[None]


@pytest.fixture(scope="module")
def llama(shelf: Path) -> str:
    """A folder with a random Llama: all its layers are Linear, and its output layer is not tied."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(shelf / "llama")
    return str(shelf / "llama")


def answers(built: Any) -> torch.Tensor:
    with torch.no_grad():
        return built.module.eval()(input_ids=IDS, use_cache=False).logits


# --- counts ---


@pytest.mark.parametrize(
    ("flags", "formula", "expected"),
    [
        ("--adapter dora", LORA + OUTPUTS, 1_262_592),
        ("--adapter rslora", LORA, 1_179_648),
        ("--adapter pissa", LORA, 1_179_648),
        ("--lora-targets attention", LAYERS * 8 * ((D + 3 * D) + (D + D)), 442_368),
        ("--lora-targets mlp", LAYERS * 8 * 2 * (D + 4 * D), 737_280),
        ("--lora-targets all", LORA, 1_179_648),
        ("--lora-targets *.h.0.*", LORA // LAYERS, 98_304),
        ("--lora-targets *.h.1?.attn.c_attn,h.3.mlp.c_fc", 8 * (2 * 4 * D + 5 * D), 79_872),
        ("--train-also wte", LORA + WTE, 39_777_024),
        ("--train-also lm_head", LORA + WTE, 39_777_024),  # tied: the same tensor
        ("--train-also wte,lm_head", LORA + WTE, 39_777_024),
        ("--train-also layernorm", LORA + NORMS, 1_218_048),
        ("--train-also bias", LORA + BIASES, 1_281_792),
        ("--train-also layernorm,bias", LORA + NORMS + BIASES - LAYERS * 2 * D - D, 1_300_992),  # norms' biases once
    ],
)
def test_each_kind_trains_the_number_of_parameters_of_its_formula(flags, formula, expected):
    facts = build(gpt2("lora", *flags.split()), on_meta=True).facts
    assert facts["trainable"] == formula == expected
    assert facts["parameters"] == 124_439_808


def test_the_same_formulas_hold_on_linear_layers(llama):
    d, wide = LLAMA.hidden_size, LLAMA.intermediate_size
    attention, mlp = 4 * (d + d), 3 * (d + wide)
    for more, count in (
        ((), 2 * 8 * (attention + mlp)),
        (("--lora-targets", "attention"), 2 * 8 * attention),
        (("--lora-targets", "mlp"), 2 * 8 * mlp),
        (("--adapter", "dora"), 2 * (8 * (attention + mlp) + 4 * d + 2 * wide + d)),
        (("--adapter", "rslora"), 2 * 8 * (attention + mlp)),
        (("--adapter", "pissa"), 2 * 8 * (attention + mlp)),
        (("--train-also", "wte"), 2 * 8 * (attention + mlp) + 97 * d),
        (("--train-also", "wte,lm_head"), 2 * 8 * (attention + mlp) + 2 * 97 * d),  # not tied: two tensors
        (("--train-also", "layernorm"), 2 * 8 * (attention + mlp) + 5 * d),
    ):
        assert build(settings(llama, "lora", *more), on_meta=True).facts["trainable"] == count, more


# --- targets ---


def test_kinds_and_patterns_become_the_shortest_names_that_mean_just_them():
    causal = tiny_of(LLAMA)
    assert targets(causal, LoraSettings(targets=("attention",))) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert targets(causal, LoraSettings(targets=("mlp",))) == ["down_proj", "gate_proj", "up_proj"]
    assert targets(causal, LoraSettings(targets=("*.layers.1.*.q_proj",))) == ["1.self_attn.q_proj"]
    neox = tiny_of(NEOX)
    assert targets(neox, LoraSettings(targets=("attention",))) == ["dense", "query_key_value"]
    assert targets(neox, LoraSettings(targets=("mlp",))) == ["dense_4h_to_h", "dense_h_to_4h"]


def test_attention_and_the_mlp_share_a_name_on_gpt2_and_are_told_apart(tiny):
    built = build(settings(tiny, "lora", "--lora-targets", "attention"))
    assert built.facts["lora_targets"] == ["attn.c_proj", "c_attn"]
    assert not any(".mlp." in n for n, p in built.module.named_parameters() if p.requires_grad)


def test_a_pattern_that_matches_nothing_is_refused(tiny):
    with pytest.raises(UserError, match=r"--lora-targets \*\.h\.9\.\*: matches no layer; this model has c_attn"):
        build(settings(tiny, "lora", "--lora-targets", "mlp,*.h.9.*"))


def test_training_also_what_the_model_has_not_is_refused(llama):
    with pytest.raises(UserError, match="--train-also bias: this model has none; leave it out"):
        build(settings(llama, "lora", "--train-also", "wte,bias"), on_meta=True)


def test_pissa_wants_no_more_vectors_than_there_are(tiny):
    with pytest.raises(UserError, match=r"--lora-rank 17: pissa on .*attn.c_attn expects 16 or less"):
        build(settings(tiny, "lora", "--adapter", "pissa", "--lora-rank", "17"))


# --- at step 0 ---


@pytest.mark.parametrize("adapter", ["lora", "dora", "rslora", "pissa"])
@pytest.mark.parametrize("of", ["tiny", "llama"])
def test_the_adapted_model_begins_as_the_base(adapter, of, request):
    folder = request.getfixturevalue(of)
    base = answers(build(settings(folder, "full")))
    built = build(settings(folder, "lora", "--adapter", adapter))
    if adapter == "pissa":  # W - B A + B A, within rounding
        torch.testing.assert_close(answers(built), base, rtol=1e-5, atol=1e-5 * float(base.abs().max()))
        assert any(p.any() for n, p in built.module.named_parameters() if ".lora_B." in n)
    else:
        assert torch.equal(answers(built), base)


@pytest.mark.parametrize(
    ("adapter", "kind"), [("lora", "nf4"), ("dora", "nf4"), ("rslora", "fp4"), ("lora", "int8"), ("rslora", "int8")]
)
def test_on_a_packed_base_it_begins_as_that(tiny, adapter, kind):
    built = build(settings(tiny, "lora", "--adapter", adapter, "--quant", kind))
    began = answers(built)
    with built.module.disable_adapter():
        torch.testing.assert_close(began, answers(built), rtol=0, atol=0)
    plain = build(settings(tiny, "full"))
    assert (began - answers(plain)).abs().max() > 0.01, "packing does change the numbers"
    assert built.facts["fingerprint"] == plain.facts["fingerprint"], "of the weights before they are packed"


def test_pissas_start_is_made_again_bitwise(tiny):
    first, again = (build(settings(tiny, "lora", "--adapter", "pissa")) for _ in range(2))
    weights = dict(again.module.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in first.module.named_parameters())


# --- packed ---


def test_packing_is_transformers_own(tiny, tmp_path):
    """Bit for bit: an exported adapter is loaded onto a base that transformers packs."""
    from transformers import BitsAndBytesConfig

    for kind, double in (("nf4", False), ("fp4", True), ("int8", False)):
        flags = ["--quant", kind, *(["--quant-double"] if double else [])]
        built = build(settings(tiny, "lora", *flags))
        theirs = AutoModelForCausalLM.from_pretrained(
            tiny, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=BitsAndBytesConfig(**built.packing)
        )
        ours = {name.replace(".base_layer", ""): p for name, p in built.causal.named_parameters()}
        packed = [name for name, p in theirs.named_parameters() if not p.is_floating_point()]
        assert len(packed) == 8
        for name, parameter in theirs.named_parameters():
            assert torch.equal(parameter, ours[name]), (kind, name)


def test_a_packed_base_is_held_in_fewer_bytes(tiny):
    facts = {k: build(settings(tiny, "lora", *f)).facts for k, f in (("nf4", ["--quant", "nf4"]),
             ("double", ["--quant", "nf4", "--quant-double"]), ("int8", ["--quant", "int8"]))}  # fmt: skip
    packed = 2 * (16 * 48 + 16 * 16 + 2 * 16 * 64)
    rest = 4 * (facts["nf4"]["parameters"] - packed)
    assert facts["nf4"]["frozen_bytes"] == rest + packed // 2 + 4 * packed // 64
    assert facts["int8"]["frozen_bytes"] == rest + packed + 4 * 2 * (48 + 16 + 64 + 16)
    assert facts["double"]["frozen_bytes"] < facts["nf4"]["frozen_bytes"]


@pytest.mark.parametrize("of", ["tiny", "llama"])
@pytest.mark.parametrize(
    "words", ["--quant nf4", "--quant fp4 --quant-double", "--quant int8", "--quant nf4 --train-also wte,layernorm"]
)
def test_its_bytes_are_known_before_it_is_packed(of, words, request):
    """So a plan without weights chooses a ZeRO file, and a micro-batch, by what the base will be."""
    wanted = settings(request.getfixturevalue(of), "lora", *words.split())
    assert build(wanted, on_meta=True).facts["frozen_bytes"] == build(wanted).facts["frozen_bytes"]


def test_an_int8_row_does_not_see_the_rows_beside_it(tiny):
    """So a loss does not depend on the micro-batch; with LLM.int8()'s own threshold it does."""
    built = build(settings(tiny, "lora", "--quant", "int8"))
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


def test_four_bit_layers_keep_one_arithmetic(tiny, monkeypatch):
    """Else on processors with AVX512-BF16 bitsandbytes computes in bf16, without a gradient, after an evaluation."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    built = build(settings(tiny, "lora", "--quant", "nf4"))
    layers = list(quantization._four_bit(built.module))
    assert len(layers) == 8
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


# --- leaving the run ---


def stirred(*more: str, of: str) -> Any:
    """A model whose trained weights all moved."""
    built = build(settings(of, "lora", *more))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in built.module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return built


def saved(built: Any, folder: Path) -> Any:
    """The model of the exported folder, loaded as its user would."""
    folder.mkdir(exist_ok=True)
    weights = {n: p.detach() for n, p in built.module.named_parameters() if p.requires_grad}
    save_folder(folder, built.module, weights, base=base_of(built, folder), tokenizer=None)
    return SimpleNamespace(module=verify_worker.load_folder(folder, "cpu"), causal=None)


@pytest.mark.parametrize("of", ["tiny", "llama"])
@pytest.mark.parametrize("adapter", ["dora", "pissa"])
def test_what_is_trained_beside_the_adapters_leaves_with_them(adapter, of, tmp_path, request):
    folder = request.getfixturevalue(of)
    biases = ",bias" if of == "tiny" else ""  # Llama has none
    built = stirred("--adapter", adapter, "--train-also", f"wte,lm_head,layernorm{biases}", of=folder)
    again = saved(built, tmp_path)
    torch.testing.assert_close(answers(again), answers(built), rtol=1e-5, atol=2e-4)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    embeddings = [name for name in stored if tuple(stored[name].shape) == (97, 16)]
    assert len(embeddings) == (1 if built.tied else 2), "tied weights are stored once"
    causal = again.module.get_base_model()
    assert (causal.get_input_embeddings().weight is causal.get_output_embeddings().weight) == built.tied


@pytest.mark.parametrize(
    "more", [("--adapter", "pissa"), ("--adapter", "rslora"), ("--adapter", "dora", "--train-also", "wte,bias")]
)
def test_merging_folds_them_in(tiny, more):
    built = stirred(*more, of=tiny)
    expected = answers(built)
    merged = merge_adapters(built).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-3)
    assert merged.lm_head.weight is merged.transformer.wte.weight


def test_pissa_leaves_as_an_ordinary_adapter_of_twice_the_rank(tiny, tmp_path):
    saved(stirred("--adapter", "pissa", "--lora-rank", "4", of=tiny), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)
    assert {min(t.shape) for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {8}


def test_the_folder_names_the_packed_base(tiny, tmp_path):
    built = stirred("--quant", "nf4", "--quant-double", of=tiny)
    again = saved(built, tmp_path)
    one_kernel_activations(again.module)  # transformers computes the same formula in eight, which round otherwise
    assert torch.equal(answers(again), answers(built))
    about = json.loads((tmp_path / "base_quantization.json").read_text())
    assert about["base"] == str(Path(tiny).resolve())
    assert about["fingerprint"] == built.facts["fingerprint"]
    assert about["quantization_config"]["bnb_4bit_use_double_quant"] is True
    assert about["quantization_config"]["bnb_4bit_quant_type"] == "nf4"


# --- refused, each in one line with its reason ---


@pytest.mark.parametrize(
    ("mode", "words", "said"),
    [
        ("full", "--quant nf4", "--quant nf4: a quantised weight has no gradient; expected --mode lora"),
        ("full", "--adapter dora", "--adapter dora: is about adapters; expected --mode lora"),
        ("full", "--train-also wte", "--train-also wte: is about adapters"),
        ("full", "--lora-plus-ratio 4", "--lora-plus-ratio 4.0: is about adapters"),
        ("lora", "--quant nf4 --adapter pissa", "--quant nf4: pissa changes the base by less than nf4 rounds"),
        ("lora", "--quant int8 --adapter dora", "--quant int8: dora takes the norms of its layers"),
        ("lora", "--quant int8 --quant-double", "--quant-double: expected with --quant nf4 or fp4"),
        ("lora", "--quant-double", "--quant-double: expected with --quant nf4 or fp4"),
        ("lora", "--quant nf4 --train-also bias", "--train-also bias: bitsandbytes rounds the biases of nf4 layers"),
        ("lora", "--quant fp4 --precision fp16", "--precision fp16: rounds the packed weights of --quant fp4"),
        ("full", "--optim adamw8bit --precision fp16", "--optim adamw8bit: not with --precision fp16"),
        ("lora", "--train-also wpe", "--train-also wpe: expected wte, lm_head, layernorm, bias"),
        ("lora", "--lora-plus-ratio 0", "--lora-plus-ratio 0.0: expected a number above 0"),
    ],
)
def test_what_does_not_go_together_is_refused(mode, words, said):
    with pytest.raises(UserError) as caught:
        gpt2(mode, *words.split())
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "stage", "said"),
    [
        ("--quant int8", 3, "--quant int8: not under ZeRO 3: bitsandbytes keeps a whole copy"),
        ("--quant nf4 --adapter dora", 3, "--quant nf4: dora reads whole packed weights, which ZeRO 3 has divided"),
        ("--optim adamw8bit", 1, "--optim adamw8bit: not under ZeRO 1, which joins all tensors"),
        ("--optim paged_adamw8bit", 3, "--optim paged_adamw8bit: not under ZeRO 3"),
    ],
)
def test_a_stage_that_gives_wrong_numbers_is_refused(words, stage, said):
    zero: Any = SimpleNamespace(stage=stage)
    with pytest.raises(UserError) as caught:
        _refuse_stage(gpt2("lora", *words.split()), zero)
    assert str(caught.value).startswith(said)


def test_the_plan_says_where_an_8_bit_optimizer_saves_nothing():
    wanted = gpt2("lora", "--optim", "adamw8bit", "--lora-rank", "4", "--lora-targets", "c_attn")
    facts = build(wanted, on_meta=True).facts
    assert facts["kept_in_32_bits"] == {  # A [4, 768] has 3,072 elements, B [2304, 4] 9,216
        "tensors": 24, "kept_tensors": 12, "kept_parameters": 12 * 3072, "parameters": 12 * (3072 + 9216),
    }  # fmt: skip
    (note,) = _notes(wanted, facts)
    assert note.startswith("adamw8bit: 12 of 24 trained tensors (25% of the parameters) are embeddings or under 4,096")
    full = build(gpt2("full", "--optim", "adamw8bit"), on_meta=True).facts["kept_in_32_bits"]
    assert full["kept_parameters"] == WTE + 1024 * D + BIASES + NORMS - LAYERS * 2 * D - D


def test_flags_of_adapters_are_said_to_do_nothing_with_every_weight():
    assert _notes(gpt2("full", "--lora-rank", "4"), {}) == ["--lora-rank: of no effect with --mode full"]
    assert _notes(gpt2("lora", "--lora-rank", "4"), {}) == []


@pytest.mark.parametrize("kind", ["adamw8bit", "paged_adamw8bit"])
def test_the_state_of_an_8_bit_optimizer_is_measured(kind):
    """Two bytes a weight, a float32 scale for 256 of each moment, and two tables of 256 codes that all share."""
    packed, embedding, small = (nn.Parameter(torch.ones(n)) for n in (8192, 4096, 4095))
    train = gpt2("full", "--optim", kind).train
    adamw = optimizer.make([{"params": [packed, embedding, small]}], train, whole=[embedding])
    expected = 2 * (8192 + 4 * 8192 // 256) + 8 * (4096 + 4095) + 2 * 4 * 256
    assert optimizer.state_bytes(adamw) == expected
    for weight in (packed, embedding, small):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.state_bytes(adamw) == expected
    assert all(bool((weight < 1).all()) for weight in (packed, embedding, small))


def test_runs_are_named_by_what_they_train():
    def name(*words: str) -> str:
        return settings("gpt2", *words).run_name

    assert name("full") == "full-acled-demo"
    assert name("lora") == "lora-acled-demo"
    assert name("lora", "--adapter", "dora") == "dora-acled-demo"
    assert name("lora", "--quant", "nf4") == "lora-nf4-acled-demo"


def test_settings_of_an_older_run_are_still_read():
    values = gpt2("lora").as_dict()
    newer = {
        "lora": ("adapter", "plus_ratio", "train_also"), "model": ("quant", "quant_double"), "train": ("optim",),
        "engine": ("checkpoint_activations",),
    }  # fmt: skip
    for group, fields in newer.items():
        for field in fields:
            del values[group][field]
    assert Settings.from_dict(json.loads(json.dumps(values))) == gpt2("lora")


@pytest.mark.parametrize(
    "words", ["", "--adapter dora", "--quant nf4", "--quant nf4 --adapter dora", "--quant int8 --train-also wte"]
)
def test_activations_computed_again_change_no_gradient(tiny, words):
    """Also those of the first block's adapters, whose input has none."""
    grads = []
    for more in ((), ("--checkpoint-activations",)):
        built = build(settings(tiny, "lora", *words.split(), *more))
        built.module.train()
        assert built.causal.is_gradient_checkpointing == bool(more)
        built.causal(input_ids=IDS, use_cache=False).logits.float().log_softmax(-1)[0, :, 5].sum().backward()
        grads.append({n: p.grad for n, p in built.module.named_parameters() if p.requires_grad})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert any(np.abs(grads[1][n].numpy()).max() > 0 for n in grads[1] if "h.0." in n and ".lora_B." in n)


def test_start_is_kept_for_pissa_only(tiny):
    assert lora.start_of(build(settings(tiny)).module, LoraSettings()) == {}
