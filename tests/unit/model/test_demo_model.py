"""The embedded base model: small, loadable, honest about how it was made, and a stranger to the demo data."""

import math
from typing import Any

import pytest
import torch
from helpers.data_helpers import read_records
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.data.acled import format_prompt
from trainer.data.sources import DEMO_FILES
from trainer.data.tokenizer import DEMO_MODEL_FOLDER


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL_FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL_FOLDER)


def demo_texts(n: int = 400) -> list[str]:
    events = read_records(DEMO_FILES["acled-demo"])[:n]
    return [format_prompt(event) + f" {event['notes']}" for event in events]


def mean_loss(model: Any, ids: list[int], block: int = 256) -> float:
    """Nats per token over whole blocks of `ids`."""
    rows = torch.tensor(ids[: len(ids) // block * block]).view(-1, block)
    with torch.no_grad():
        return float(model(rows, labels=rows).loss)


def test_the_demo_model_is_small_enough_for_the_repository() -> None:
    sizes = {file.name: file.stat().st_size for file in DEMO_MODEL_FOLDER.iterdir() if file.is_file()}
    assert sum(sizes.values()) <= 4_000_000, sizes


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


def test_the_demo_model_knows_its_pretraining_text_and_has_much_to_learn_on_the_demo_data(
    model: Any, tokenizer: Any
) -> None:
    unseen = [record["text"] for record in read_records(DEMO_FILES["demo-base"])[:60]]
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
