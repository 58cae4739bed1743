"""Tokenizers: where they are found, what is refused, and that texts become the ids they should."""

import json
import time

import numpy as np
import pytest
from helpers import data_helpers as samples

from trainer.config.errors import UserError
from trainer.data import tokenizer
from trainer.data.tokenizer import encode, load_tokenizer, split_long, tokenizer_fingerprint


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return samples.make_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def vocab_and_merges_dir(tokenizer_dir, tmp_path_factory):
    """GPT-2's two files alone, as they come in packages that carry its vocabulary."""
    out_dir = tmp_path_factory.mktemp("bare")
    model = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]
    (out_dir / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (out_dir / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    return out_dir


def test_a_folder_of_vocabulary_and_merges_gives_the_whole_tokenizer(tokenizer_dir, vocab_and_merges_dir):
    whole, two_files = load_tokenizer(str(tokenizer_dir)), load_tokenizer(str(vocab_and_merges_dir))
    assert len(two_files) == len(whole) == 400
    text = "On 5 January 2022, people met in Town 7."
    assert two_files(text)["input_ids"] == whole(text)["input_ids"]
    assert two_files.eos_token_id == whole.eos_token_id


def test_a_folder_without_a_usable_tokenizer_is_refused(tokenizer_dir, tmp_path):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_dir / "tokenizer.json"))
    bare.save_pretrained(tmp_path / "no-end")
    (tmp_path / "empty").mkdir()
    for name, problem in (
        ("no-end", "no end-of-text token"),
        ("empty", r"no usable tokenizer in the folder \(.*; pass --model FOLDER, .*tokenizer\.json"),
        ("none", "no such folder"),
    ):
        with pytest.raises(UserError, match=problem):
            load_tokenizer(str(tmp_path / name))


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_an_unknown_hub_id_without_a_network_is_one_line_that_names_the_folder_flag(monkeypatch, variable):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv(variable, "1")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"--model nobody-has-this: .*cannot be reached; pass --model FOLDER") as caught:
        load_tokenizer("nobody-has-this")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 30


def test_the_embedded_model_is_a_folder_of_the_package():
    assert tokenizer.resolve_model_path("demo-base").endswith("trainer/model/demo")
    assert tokenizer.resolve_model_path("gpt2") == "gpt2"


def test_the_fingerprint_follows_contents_and_not_place_or_use(tokenizer_dir, tmp_path):
    first = load_tokenizer(str(tokenizer_dir))
    before = tokenizer_fingerprint(first)
    first(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(first) == before
    first.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert tokenizer_fingerprint(again) == before
    again.add_tokens(["newword"])
    assert tokenizer_fingerprint(again) != before


def test_encoding_is_the_tokenizers_own_without_special_tokens_padding_or_truncation(tokenizer_dir):
    tokenizer = load_tokenizer(str(tokenizer_dir))
    texts = ["On 5 January", "", " é\n", "x" * 3000]
    tokenizer(texts[:1], padding="max_length", truncation=True, max_length=2)  # settings that stay behind in it
    encoded = encode(tokenizer, texts)
    assert [ids.tolist() for ids in encoded] == [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts
    ]
    assert all(ids.dtype == np.uint32 for ids in encoded)


def test_a_long_text_encoded_in_pieces_gives_the_same_ids(tokenizer_dir, monkeypatch):
    monkeypatch.setattr(tokenizer, "MAX_TEXT_CHARACTERS", 50)
    loaded = load_tokenizer(str(tokenizer_dir))
    text = "On 5 January 2022,  people met: in\n Town 7 . " * 40
    assert len(split_long(text)) > 10
    assert "".join(split_long(text)) == text
    short = "met in Town 7"
    encoded = encode(loaded, [short, text, short])
    assert encoded[1].tolist() == loaded(text)["input_ids"]
    assert encoded[0].tolist() == encoded[2].tolist() == loaded(short)["input_ids"]
    assert split_long("x" * 100) == ["x" * 100]  # a text without blanks stays whole
