"""Model folders that are damaged, of another kind, or made to attack: refused in one line, nothing of it is run."""

import contextlib
import io
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_inputs import make_tiny_gpt2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_build import parse_settings
from transformers import AutoModelForCausalLM, GPTNeoConfig, XLNetConfig

from trainer.config.errors import UserError
from trainer.model.build import build_model
from trainer.model.model_files import describe_bf16_ties, measure_bf16_ties

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def pristine_folder(session_dir: Path) -> Path:
    return Path(make_tiny_gpt2(session_dir / "pristine", dropout=0.0))


@pytest.fixture
def folder(pristine_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_folder, tmp_path / "model"))


def build(folder: Path, *, on_meta: bool = False) -> Any:
    return build_model(parse_settings(str(folder), "--mode full"), on_meta=on_meta).causal


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    save_file({name: change(weight) for name, weight in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


def assert_refused(folder: Path, message: str, *, also_dry_run: bool = True) -> None:
    """The folder is refused in one line, by a run and by a dry run, which loads no weights."""
    for on_meta in (True, False) if also_dry_run else (False,):
        with pytest.raises(UserError, match=rf"^--model {folder}: .*$") as caught:
            build(folder, on_meta=on_meta)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_base_whose_weights_lie_on_ties_of_bf16_is_noticed_and_described(folder):
    torch.manual_seed(1)
    change_weights(folder, torch.randn_like)
    assert (measure_bf16_ties(folder), describe_bf16_ties(0.0001)) == (pytest.approx(0, abs=0.01), "")
    change_weights(folder, lambda weight: weight.half())
    assert (share := measure_bf16_ties(folder)) == pytest.approx(0.125, abs=0.01)
    assert describe_bf16_ties(share).startswith(
        f"{share:.1%} of the base's weights lie halfway between two bf16 numbers"
    )


# --- code ---


class Canary:
    """What a pickle runs when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_a_model_folder_is_never_run_and_never_asked_about(folder, tmp_path, monkeypatch, capsys):
    change_config(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    line = f"import os; os.mkdir({str(tmp_path / 'canary')!r})\nclass Config: pass\nclass Model: pass\n"
    (folder / "evil.py").write_text(line)
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))
    assert type(build(folder)).__module__.startswith("transformers.models.gpt2"), "a known type needs no code"
    change_config(folder, model_type="evil")
    message = "model_type 'evil' is not known to transformers, and code in the folder is never run"
    assert_refused(folder, message, also_dry_run=False)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "canary").exists()


def test_pickled_weights_are_refused_unread(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    torch.save(Canary(tmp_path / "canary"), folder / "pytorch_model.bin")
    assert_refused(folder, "has no model.safetensors; pass --model FOLDER with config.json and safetensors (pickles")
    assert not (tmp_path / "canary").exists()


# --- weights ---


def test_a_model_that_sees_later_tokens_is_refused_whatever_it_calls_itself(tmp_path):
    config = XLNetConfig(vocab_size=97, d_model=16, n_layer=1, n_head=2, d_inner=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    assert_refused(tmp_path / "model", "XLNetLMHeadModel sees the tokens it is to predict", also_dry_run=False)


def change_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def make_pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def name_in_index(value: Any) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        shutil.copytree(folder, folder.parent / "outside")
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": {"transformer.wte.weight": value}}))

    return damage


NOT_WHOLE = "model.safetensors: not a whole safetensors file"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change_config(f, n_layer=3), "config.json: transformer.h.2.attn.c_attn.bias is missing, "),
        (lambda f: change_config(f, n_layer=1), "config.json: transformer.h.1.attn.c_attn.weight is no weight of "),
        (lambda f: change_config(f, n_embd=32), "transformer.h.0.attn.c_attn.bias has shape [48] and not [96]"),
        (lambda f: (f / "config.json").unlink(), "has no config.json; pass --model FOLDER"),
        (lambda f: (f / WEIGHTS).rename(f / "tf_model.h5"), "has no model.safetensors; pass --model FOLDER"),
        (make_pipe, "model.safetensors: not a plain file"),
        (lambda f: change_weights(f, lambda w: w.int()), "of type I32; expected floats"),
        (change_bytes(lambda _: struct.pack("<Q", 2**60)), NOT_WHOLE),
        (change_bytes(lambda whole: whole[:-1]), NOT_WHOLE),
        (name_in_index("../outside/model.safetensors"), "weight_map has '../outside/model.safetensors'; expected"),
        (name_in_index("/etc/hostname"), "weight_map has '/etc/hostname'"),
    ],
)
def test_weights_that_are_damaged_or_do_not_fit_the_configuration_are_refused_by_name(folder, damage, message):
    damage(folder)
    assert_refused(folder, message)


def test_weights_that_are_no_numbers_are_refused(folder):
    change_weights(folder, lambda weight: weight.mul_(float("nan")))
    assert_refused(folder, "its logits are not finite", also_dry_run=False)


def test_gpt2_as_published_and_weights_in_several_files_load(folder):
    """GPT-2's names have no prefix, and its file holds the causal masks; so have the older ones their fill value."""
    expected = build(folder).state_dict()
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    change_config(folder, architectures=["GPT2Model"])
    torch.testing.assert_close(build(folder).state_dict(), expected, rtol=0, atol=0)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(build(folder).state_dict(), expected, rtol=0, atol=0)


def test_gpt_neo_as_published_loads(tmp_path):
    """Its file holds the causal masks and their fill values, of which transformers knows nothing any more."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_heads": 2, "num_layers": 1, "max_position_embeddings": 32}
    config = GPTNeoConfig(vocab_size=97, bos_token_id=0, eos_token_id=0, attention_types=[[["global"], 1]], **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    buffers = {"bias": torch.ones(1, 1, 32, 32).tril(), "masked_bias": torch.tensor(-1e9)}
    tensors = {f"transformer.h.0.attn.attention.{name}": tensor for name, tensor in buffers.items()}
    save_file(load_file(tmp_path / WEIGHTS) | tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    build(tmp_path)


# --- configuration ---


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("vocab_size", 10**12), ("n_layer", 10**9), ("n_head", 0), ("n_embd", "sixteen"), ("num_labels", 10**9)],
        *[("activation_function", "exec"), ("model_type", ["gpt2"]), ("quantization_config", {"quant_method": "x"})],
        *[("transformers_weights", "other.safetensors"), ("attn_implementation", "someone/attention-kernel")],
    ],
)
def test_a_configuration_that_no_model_has_is_refused_in_one_line(folder, key, value):
    change_config(folder, **{key: value})
    shutil.copy(folder / WEIGHTS, folder / "other.safetensors")
    names_other_files = key in ("attn_implementation", "transformers_weights", "quantization_config")
    assert_refused(folder, f"config.json: {key}: leave it out" if names_other_files else "", also_dry_run=False)


CONFIG_KEYS = (
    *("vocab_size", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "layer_norm_epsilon"),
    *("model_type", "architectures", "tie_word_embeddings", "initializer_range", "attn_pdrop", "torch_dtype"),
    *("auto_map", "attn_implementation", "is_decoder", "is_encoder_decoder", "scale_attn_weights", "pad_token_id"),
)
SCALARS = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=8)
JSON_VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=8), SCALARS, max_size=3)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(values=st.dictionaries(st.sampled_from(CONFIG_KEYS), JSON_VALUES, min_size=1, max_size=2))
def test_no_value_in_a_configuration_ends_in_a_traceback(pristine_folder, tmp_path_factory, values):
    folder = Path(shutil.copytree(pristine_folder, tmp_path_factory.mktemp("config") / "model"))
    change_config(folder, **values)
    with contextlib.suppress(UserError):  # which is one line by itself
        build(folder)
    shutil.rmtree(folder)
