"""Tokenizers: where they are found, what is refused, and that texts become the ids they should."""

import json

import numpy as np
import pytest

from trainer.config.errors import UserError
from trainer.data.tokenizer import PIECES, encode, load_tokenizer, tokenizer_fingerprint

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


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("", {}, "no such folder, and the hub cannot be reached .*; pass --model FOLDER"),
        ("other", {}, r"no usable tokenizer in the folder \(.*; pass --model FOLDER, .*tokenizer\.json"),
        ("tokenizer_config.json", {"eos_token": None}, "no end-of-text token"),
        ("tokenizer_config.json", {"model_max_length": "x"}, "no usable tokenizer in the folder .*not supported"),
        ("tokenizer.json", {"vocab": {"a": 0, "b": 2**32 - 1}}, "its largest token id is 4,294,967,295; expected"),
        ("tokenizer.json", {"vocab": {"a": 0, "b": 1}, "unk_token": "[UNK]"}, "cannot encode a text of the data"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_one_line(model, tmp_path, file, content, problem):
    folder = tmp_path / "model"
    if file == "other":
        folder.mkdir()
    elif file:
        load_tokenizer(model).save_pretrained(folder)
        written = json.loads((folder / file).read_text())
        if file == "tokenizer.json":
            written |= {"model": {"type": "WordLevel", "unk_token": "a", **content}, "decoder": None}
            content = {"pre_tokenizer": {"type": "Whitespace"}, "added_tokens": [], "post_processor": None}
        (folder / file).write_text(json.dumps(written | content))
    with pytest.raises(UserError, match=f"^--model .*{problem}") as error_info:
        encode(load_tokenizer(str(folder)), ["a b other"])
    assert "\n" not in str(error_info.value)


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


def test_encoding_is_the_tokenizers_own_without_special_tokens_padding_or_truncation_in_pieces_too(model):
    loaded = load_tokenizer(model)
    loaded(["On 5"], padding="max_length", truncation=True, max_length=2)  # settings that stay behind in it
    long = TEXT * 12_000
    assert "".join(PIECES.findall(long)) == long
    assert len(PIECES.findall(long)) == 3
    for texts in (["On 5 January", "", " é\n", TEXT * 40], ["x", long, ""], ["\n" * 300_000]):
        encoded = encode(loaded, texts)
        assert [ids.tolist() for ids in encoded] == [loaded(t, add_special_tokens=False)["input_ids"] for t in texts]
        assert all(ids.dtype == np.uint32 for ids in encoded)
