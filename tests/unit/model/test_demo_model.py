"""The embedded base model: small, loadable, honest about how it was made, and a stranger to the demo data."""

import math
from typing import Any

import pytest
import torch
from helpers.data_helpers import read_records
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.data.formats import format_prompt
from trainer.data.sources import DEMO_FILES
from trainer.data.tokenizer import DEMO_MODEL_FOLDER


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL_FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL_FOLDER)


def test_the_demo_model_is_small_and_gpt2_and_its_card_says_how_it_was_trained(model: Any) -> None:
    assert sum(file.stat().st_size for file in DEMO_MODEL_FOLDER.iterdir()) <= 4_000_000
    assert type(model).__name__ == "GPT2LMHeadModel"
    # 12 d^2 + 13 d a layer, 2 d at the end, and the two embeddings, with width d = 160
    expected = 5 * (12 * 160**2 + 13 * 160) + 2 * 160 + (2048 + 256) * 160
    assert sum(weight.numel() for weight in model.parameters()) == expected
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    config = model.config
    assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == (0.1, 0.1, 0.1)
    assert config.activation_function == "gelu_new"
    card = (DEMO_MODEL_FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(word in card for word in ("--seed", "validation loss", "license: mit", "tokens", "hardware"))


EVERY_KIND = "".join(chr(code) for code in range(1, 0x110000, 37) if not 0xD800 <= code < 0xE000)


def test_the_demo_tokenizer_goes_with_the_model_and_gives_back_any_text(model: Any, tokenizer: Any) -> None:
    assert len(tokenizer) == model.config.vocab_size == 2048
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0
    assert tokenizer.pad_token is None  # as GPT-2's
    assert tokenizer("<|endoftext|>").input_ids == [0]
    for text in ("Hello  world\n\ttab ", "\U0001f600 e\u0301 \x00\x07\x7f \u2028", "", EVERY_KIND):
        assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_the_demo_model_knows_its_pretraining_text_and_has_much_to_learn_on_the_demo_data(
    model: Any, tokenizer: Any
) -> None:
    def mean_loss(texts: list[str]) -> float:
        """Nats per token over whole rows of 256."""
        ids = [token for text in texts for token in [*tokenizer(text).input_ids, 0]][: 16 * 256]
        rows = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)
        with torch.no_grad():
            return float(model(rows, labels=rows).loss)

    own = mean_loss([record["text"] for record in read_records(DEMO_FILES["demo-base"])[:60]])
    events = read_records(DEMO_FILES["acled-demo"])[:60]
    demo = mean_loss([format_prompt(event) + f" {event['notes']}" for event in events])
    guess = math.log(2048)  # what a uniform guess costs
    assert own < 0.4 * guess, "its card says 2.55"
    assert own < demo < guess, "other text, yet not as strange as noise"
