"""Model folders that are damaged, of another kind, or made to attack: refused in one line, nothing of it is run."""

import ast
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
from transformers import AutoModelForCausalLM, XLNetConfig

import trainer
from trainer.config.errors import UserError
from trainer.model.build import _from_pretrained_kwargs, build_model
from trainer.model.model_files import measure_bf16_ties
from trainer.training.run_plan import collect_notes

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def pristine_folder(session_dir: Path) -> Path:
    return Path(make_tiny_gpt2(session_dir / "pristine", dropout=0.0))


@pytest.fixture
def folder(pristine_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_folder, tmp_path / "model"))


@pytest.mark.parametrize(
    ("convert", "share"),
    [
        (lambda weights: weights, 0.0),
        (lambda weights: weights.bfloat16(), 0.0),
        (lambda weights: weights.half(), 0.125),
        (lambda weights: torch.where(torch.rand(weights.shape) < 0.08, to_tie(weights), weights), 0.08),
    ],
)
def test_a_base_whose_weights_lie_on_ties_of_bf16_is_noticed_and_said_in_the_plan(folder, convert, share):
    torch.manual_seed(1)
    save_file({name: convert(torch.randn_like(w)) for name, w in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    measured = measure_bf16_ties(folder)
    assert measured == pytest.approx(share, abs=0.01)
    notes = collect_notes(parse_settings(str(folder)), {"bf16_ties": measured})
    start = f"warning: {measured:.1%} of the base's weights lie halfway between two bf16 numbers"
    assert [note.startswith(start) for note in notes] == [True] * (share > 0)


def to_tie(weights: torch.Tensor) -> torch.Tensor:
    return (weights.view(torch.int32) & ~0xFFFF | 0x8000).view(torch.float32)


def build(folder: Path, *, on_meta: bool = False) -> Any:
    return build_model(parse_settings(str(folder), "--mode full"), on_meta=on_meta).causal


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def assert_refused(folder: Path, message: str, *, also_dry_run: bool = True) -> None:
    """The folder is refused in one line, by a run and by a dry run, which loads no weights."""
    for on_meta in (True, False) if also_dry_run else (False,):
        with pytest.raises(UserError, match=rf"^--model {folder}: .*$") as caught:
            build(folder, on_meta=on_meta)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


# --- code ---


class Canary:
    """What a pickle runs when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def canary(folder: Path, tmp_path: Path) -> Path:
    """The folder which code that the model's folder names makes where it is run."""
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change_config(folder, auto_map=auto_map)
    line = f"import os; os.mkdir({str(tmp_path / 'canary')!r})\nclass Config: pass\nclass Model: pass\n"
    (folder / "evil.py").write_text(line)
    return tmp_path / "canary"


def test_code_in_a_model_folder_is_never_run_and_never_asked_about(folder, canary, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))
    assert type(build(folder)).__module__.startswith("transformers.models.gpt2"), "a known type needs no code"
    change_config(folder, model_type="evil")
    message = "model_type 'evil' is not known to transformers, and code in the folder is never run"
    assert_refused(folder, message, also_dry_run=False)
    assert capsys.readouterr().out == ""
    assert not canary.exists()


def test_pickled_weights_are_refused_unread(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    torch.save(Canary(tmp_path / "canary"), folder / "pytorch_model.bin")
    assert_refused(folder, "has no model.safetensors; pass --model FOLDER with config.json and safetensors (pickles")
    assert not (tmp_path / "canary").exists()


def test_every_call_that_reads_a_model_refuses_its_code():
    """Left out, transformers asks on the terminal where a folder's type is not known to it."""
    calls = [
        (path, node)
        for path in Path(trainer.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config")
        and ast.unparse(node.func.value).startswith("Auto")
    ]
    assert len(calls) > 3
    for path, call in calls:
        refuses = ("trust_remote_code=False", "**_from_pretrained_kwargs(settings.model)")
        assert any(ast.unparse(keyword) in refuses for keyword in call.keywords), f"{path}:{call.lineno}"
    assert _from_pretrained_kwargs("some/model")["trust_remote_code"] is False


# --- other kinds of models ---


def test_a_model_that_sees_later_tokens_is_refused_whatever_it_calls_itself(tmp_path):
    config = XLNetConfig(vocab_size=97, d_model=16, n_layer=1, n_head=2, d_inner=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    assert_refused(tmp_path / "model", "XLNetLMHeadModel sees the tokens it is to predict", also_dry_run=False)


# --- weights ---


def replace_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def replace_weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    return lambda folder: save_file(
        {name: change(weight) for name, weight in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS
    )


def make_pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


NOT_WHOLE = "model.safetensors: not a whole safetensors file"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change_config(f, n_layer=3), "config.json: transformer.h.2.attn.c_attn.bias is missing, "),
        (lambda f: change_config(f, n_layer=1), "config.json: transformer.h.1.attn.c_attn.weight has no place, "),
        (lambda f: change_config(f, n_embd=32), "transformer.h.0.attn.c_attn.bias has shape [48] and not [96]"),
        (lambda f: (f / "config.json").unlink(), "has no config.json; pass --model FOLDER"),
        (lambda f: (f / WEIGHTS).rename(f / "tf_model.h5"), "has no model.safetensors; pass --model FOLDER"),
        (make_pipe, "model.safetensors: not a plain file"),
        (replace_weights(lambda w: w.int()), "of type I32; expected floats"),
        (replace_bytes(lambda _: struct.pack("<Q", 2**60)), NOT_WHOLE),
        (replace_bytes(lambda whole: whole[:-1]), NOT_WHOLE),
    ],
)
def test_weights_that_are_damaged_or_do_not_fit_the_configuration_are_refused_by_name(folder, damage, message):
    damage(folder)
    assert_refused(folder, message)


def test_weights_that_are_no_numbers_are_refused(folder):
    replace_weights(lambda w: w.mul_(float("nan")))(folder)
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


NAMES = ("../outside/model.safetensors", "/etc/hostname", "x.bin", 1)


@pytest.mark.parametrize(
    "content",
    [*(json.dumps({"weight_map": {"transformer.wte.weight": name}}) for name in NAMES), "", "{}", "[" * 100_000],
)
def test_an_index_that_is_damaged_or_names_a_file_outside_its_folder_is_refused(folder, content):
    shutil.copytree(folder, folder.parent / "outside")
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(content)
    assert_refused(folder, INDEX)


# --- configuration ---


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("vocab_size", -5), ("vocab_size", 10**12), ("n_layer", 10**9), ("n_head", 0), ("n_head", 3)],
        *[("n_embd", "sixteen"), ("n_inner", 2**32), ("dtype", "x"), ("num_labels", 10**9), ("n_positions", 64)],
        *[("activation_function", "exec"), ("model_type", ["gpt2"]), ("quantization_config", {"quant_method": "x"})],
        *[("transformers_weights", "other.safetensors"), ("attn_implementation", "someone/attention-kernel")],
    ],
)
def test_a_configuration_that_no_model_has_is_refused_in_one_line(folder, key, value):
    change_config(folder, **{key: value})
    shutil.copy(folder / WEIGHTS, folder / "other.safetensors")
    names_other_files = key in ("attn_implementation", "transformers_weights", "quantization_config")
    assert_refused(folder, f"config.json: {key}: leave it out" if names_other_files else "", also_dry_run=False)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"[" * 200_000])
def test_a_configuration_that_is_not_json_is_refused_in_one_line(folder, content):
    (folder / "config.json").write_bytes(content)
    assert_refused(folder, ": config.json: ", also_dry_run=False)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
CONFIG_KEYS = (
    *("vocab_size", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "layer_norm_epsilon"),
    *("model_type", "architectures", "tie_word_embeddings", "initializer_range", "attn_pdrop", "torch_dtype"),
    *("auto_map", "attn_implementation", "is_decoder", "is_encoder_decoder", "scale_attn_weights", "pad_token_id"),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(values=st.dictionaries(st.sampled_from(CONFIG_KEYS), JSON_VALUES, min_size=1, max_size=2))
def test_no_value_in_a_configuration_ends_in_a_traceback(pristine_folder, tmp_path_factory, values):
    folder = Path(shutil.copytree(pristine_folder, tmp_path_factory.mktemp("config") / "model"))
    change_config(folder, **values)
    with contextlib.suppress(UserError):  # which is one line by itself
        build(folder)
    shutil.rmtree(folder)
