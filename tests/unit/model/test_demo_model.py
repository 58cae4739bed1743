"""The embedded base model: small, loadable, honest about how it was made, and a stranger to the demo data."""

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.data.acled import format_completion, format_prompt
from trainer.data.demo import DEMO_RECORDS, Rng, events, invented_world
from trainer.data.demo_base_text import DOCUMENT_TYPES, documents
from trainer.model.build import DEMO_MODEL_FOLDER
from trainer.model.demo import pretrain


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL_FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL_FOLDER)


def demo_texts(n: int = DEMO_RECORDS) -> list[str]:
    text_events = [{name: str(value) for name, value in event.items()} for event in events(n)]
    return [format_prompt(event) + format_completion(event["notes"]) for event in text_events]


def mean_loss(model: Any, ids: list[int], block: int = 256) -> float:
    """Nats per token over whole blocks of `ids`."""
    rows = torch.tensor(ids[: len(ids) // block * block]).view(-1, block)
    with torch.no_grad():
        return float(model(rows, labels=rows).loss)


def test_the_demo_model_is_small_enough_for_the_repository() -> None:
    sizes = {file.name: file.stat().st_size for file in DEMO_MODEL_FOLDER.iterdir() if file.is_file()}
    assert sum(sizes.values()) <= pretrain.MAX_FOLDER_BYTES == 4_000_000, sizes


def test_the_demo_model_has_two_million_tied_weights_and_gpt2s_dropout(model: Any) -> None:
    assert type(model).__name__ == "GPT2LMHeadModel"
    # 12 d^2 + 13 d a layer, 2 d at the end, and the two embeddings, with width d = 160
    expected = 5 * (12 * 160**2 + 13 * 160) + 2 * 160 + (2048 + 256) * 160
    assert sum(weight.numel() for weight in model.parameters()) == expected
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    config = model.config
    assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == (0.1, 0.1, 0.1)
    assert config.activation_function == "gelu_new"
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_the_demo_tokenizer_and_model_agree(model: Any, tokenizer: Any) -> None:
    assert len(tokenizer) == model.config.vocab_size == 2048
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0
    assert tokenizer.pad_token is None  # as GPT-2's
    assert tokenizer("<|endoftext|>").input_ids == [0]


EVERY_KIND = "".join(chr(code) for code in range(1, 0x110000, 37) if not 0xD800 <= code < 0xE000)


@pytest.mark.parametrize(
    "text",
    [
        "Hello  world\n\ttab ",
        "Z\u00fcrich, \u5317\u4eac \u0645\u0631",
        "\U0001f600 e\u0301 \x00\x07\x7f \u2028",
        "",
        pytest.param(EVERY_KIND, id="every kind"),
    ],
)
def test_any_text_comes_back_from_the_demo_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_transformers_reads_the_tokenizer_as_it_was_trained(tokenizer: Any) -> None:
    raw = Tokenizer.from_file(str(DEMO_MODEL_FOLDER / "tokenizer.json"))
    for text in demo_texts(50):
        assert tokenizer(text).input_ids == raw.encode(text).ids


def test_the_demo_pretraining_text_is_reproducible_and_of_every_kind() -> None:
    first = list(itertools.islice(documents(3), 50))
    assert first == list(itertools.islice(documents(3), 50))
    assert first != list(itertools.islice(documents(4), 50))
    for kind, _ in DOCUMENT_TYPES:
        assert len(kind(Rng(1)).split()) > 3


def test_the_demo_pretraining_text_shares_no_line_and_no_name_with_the_demo_data() -> None:
    seen = list(itertools.islice(documents(2_000_001), 20_000))  # the first training shard of seed 1 begins so
    lines = {line.strip() for text in seen for line in text.splitlines()}
    demo = {line.strip() for text in demo_texts() for line in text.splitlines()}
    assert not lines & demo
    words = {word.strip(".,:;()") for text in seen for word in text.split()}
    countries, sources = invented_world()
    places = {place for country in countries for pair in country.places for place in pair}
    names = {country.name for country in countries} | places | {source.split()[0] for source in sources}
    assert not words & names


def test_the_demo_model_knows_its_pretraining_text_and_has_much_to_learn_on_the_demo_data(
    model: Any, tokenizer: Any
) -> None:
    unseen = [document for _, document in zip(range(60), documents(987_654_321), strict=False)]
    guess = math.log(2048)  # what a uniform guess costs
    own, demo = (
        mean_loss(model, [token for text in texts for token in [*tokenizer(text).input_ids, 0]][: 16 * 256])
        for texts in (unseen, demo_texts(60))
    )
    assert own < 0.4 * guess, "its card says 2.55"
    assert own < demo < guess, "other text, yet not as strange as noise"


def test_the_demo_model_card_says_how_the_model_was_trained() -> None:
    card = (DEMO_MODEL_FOLDER / "README.md").read_text(encoding="utf-8")
    command = "python -m trainer.model.demo.pretrain"
    assert all(word in card for word in (command, "--seed", "validation loss", "license: mit", "tokens", "hardware"))


def test_the_pretraining_script_saves_a_folder_that_loads(tmp_path: Path) -> None:
    tokenizer = pretrain.train_tokenizer(seed=1, num_documents=1500)
    job = (tokenizer.to_str(), 7, 20 * pretrain.BLOCK_SIZE)
    train, val = pretrain.make_shard(job), pretrain.make_shard((tokenizer.to_str(), 8, 2 * pretrain.BLOCK_SIZE))
    assert np.array_equal(train, pretrain.make_shard(job))
    model = pretrain.build_model(seed=1)
    options = argparse.Namespace(steps=6, batch=2, lr=3e-3, seed=1)
    before = math.log(pretrain.VOCAB_SIZE)
    result = pretrain.fit(model, train, val, options, "cpu")
    assert result["val"] < before
    pretrain.save(model, tokenizer, tmp_path)
    assert pretrain.model_card(argparse.Namespace(**vars(options), tokens=5120), result, 1, "cpu")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert json.loads((tmp_path / "config.json").read_text())["resid_pdrop"] == 0.1
    for name, weight in model.float().state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert AutoTokenizer.from_pretrained(tmp_path)("On 5 March").input_ids == tokenizer.encode("On 5 March").ids


def test_the_pretraining_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [pretrain.learning_rate(step, 200, 1.0) for step in range(200)]
    assert rates.index(max(rates)) in (9, 10)  # a twentieth of the steps
    assert rates[0] == 0.1
    assert rates[-1] < 1e-3
