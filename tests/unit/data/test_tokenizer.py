"""Tokenizers: where they are found, what is refused, and that texts become the ids they should."""

import json
import time

import numpy as np
import pytest

from trainer.config.errors import UserError
from trainer.data import tokenizer
from trainer.data.tokenizer import encode, load_tokenizer, split_long, tokenizer_fingerprint

TEXT = "On 5 January 2022,  people met: in\n Town 7 . "


def test_a_folder_of_vocabulary_and_merges_alone_gives_the_whole_tokenizer(model, tmp_path):
    """GPT-2's two files, as they come in packages that carry its vocabulary."""
    whole = load_tokenizer(model)
    content = json.loads(whole.backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(content["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    two_files = load_tokenizer(str(tmp_path))
    assert len(two_files) == len(whole) == 400
    assert two_files(TEXT)["input_ids"] == whole(TEXT)["input_ids"]
    assert two_files.eos_token_id == whole.eos_token_id


def test_a_folder_without_a_usable_tokenizer_is_refused(model, tmp_path):
    whole = load_tokenizer(model)
    whole.eos_token = None
    whole.save_pretrained(tmp_path / "no-end")
    (tmp_path / "empty").mkdir()
    for name, problem in (
        ("no-end", "no end-of-text token"),
        ("empty", r"no usable tokenizer in the folder \(.*; pass --model FOLDER, .*tokenizer\.json"),
        ("none", "no such folder"),
    ):
        with pytest.raises(UserError, match=problem):
            load_tokenizer(str(tmp_path / name))


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        (
            "tokenizer_config.json",
            {"model_max_length": "x"},
            "no usable tokenizer in the folder .*not supported between",
        ),
        ("tokenizer_config.json", {"eos_token": {"a": 1}}, "no usable tokenizer in the folder"),
        ("tokenizer.json", {"vocab": {"a": 0, "b": 10**9}}, "its largest token id is 1,000,000,000; expected under"),
        (
            "tokenizer.json",
            {"vocab": {"a": 0, "b": 2**32 - 1}},
            "its largest token id is 4,294,967,295; expected under",
        ),
        (
            "tokenizer.json",
            {"vocab": {"a": 0, "b": 1}, "unk_token": "[UNK]"},
            "its tokenizer cannot encode a text of the ",
        ),
    ],
)
def test_tokenizer_files_that_cannot_be_used_are_one_line(model, tmp_path, file, change, problem):
    whole = load_tokenizer(model)
    whole.save_pretrained(tmp_path)
    content = json.loads((tmp_path / file).read_text())
    if file == "tokenizer.json":
        word_level = {
            "model": {"type": "WordLevel", "unk_token": "a", **change},
            "pre_tokenizer": {"type": "Whitespace"},
        }
        content |= {**word_level, "added_tokens": [], "decoder": None, "post_processor": None}
    (tmp_path / file).write_text(json.dumps({**content, **({} if "vocab" in change else change)}))
    with pytest.raises(UserError, match=problem) as error_info:
        encode(load_tokenizer(str(tmp_path)), ["a b other"])
    assert str(error_info.value).startswith("--model ")
    assert "\n" not in str(error_info.value)


def test_an_unknown_hub_id_without_a_network_is_one_line_that_names_the_folder_flag():
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"--model nobody-has-this: .*cannot be reached .*; pass --model FOLDER"
    ) as caught:
        load_tokenizer("nobody-has-this")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 30


def test_the_fingerprint_follows_contents_and_not_place_or_use(model, tmp_path):
    first = load_tokenizer(model)
    before = tokenizer_fingerprint(first)
    first(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(first) == before
    first.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert tokenizer_fingerprint(again) == before
    again.add_tokens(["newword"])
    assert tokenizer_fingerprint(again) != before


def test_encoding_is_the_tokenizers_own_without_special_tokens_padding_or_truncation_in_pieces_too(model, monkeypatch):
    monkeypatch.setattr(tokenizer, "MAX_TEXT_CHARACTERS", 50)
    loaded = load_tokenizer(model)
    loaded(["On 5"], padding="max_length", truncation=True, max_length=2)  # settings that stay behind in it
    for texts in (["On 5 January", "", " é\n"], ["met in Town 7", TEXT * 40, "x" * 3000, "met in Town 7"]):
        encoded = encode(loaded, texts)
        assert [ids.tolist() for ids in encoded] == [loaded(t, add_special_tokens=False)["input_ids"] for t in texts]
        assert all(ids.dtype == np.uint32 for ids in encoded)
    assert len(split_long(TEXT * 40)) > 10
    assert "".join(split_long(TEXT * 40)) == TEXT * 40
    assert split_long("x" * 100) == ["x" * 100]  # a text without blanks stays whole
