"""Tokenizers: found without a network where that is possible, checked, and applied to batches of texts."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.choices import DEMO_MODEL
from trainer.config.errors import UserError, first_line
from trainer.data import hf_hub
from trainer.data.token_dataset import TokenIds

MAX_TEXT_CHARACTERS = 2**18  # characters; a tokenizer needs some hundred bytes of memory for each token of one text
MAX_CALL_CHARACTERS = 2**20  # characters handed to the tokenizer at a time


def model_folder(model: str) -> str:
    """The folder of `demo-base`, and every other name as it is."""
    return str(Path(__file__).resolve().parents[1] / "model" / "demo") if model == DEMO_MODEL else model


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a folder, of a hub id or of `demo-base`; a local copy is taken before the hub is asked.

    UserError where there is none, where it is broken, or where it has no end-of-text token.
    """
    name_or_path = model_folder(model)
    tokenizer = _from_folder(model, Path(name_or_path).expanduser()) if _is_path(name_or_path) else _from_hub(model)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"--model {model}: its tokenizer has no end-of-text token, which ends every text; add an eos_token"
        )
    if _is_empty(tokenizer):
        raise UserError(f"--model {model}: its tokenizer turns text into nothing; save it again with save_pretrained")
    return tokenizer


def _is_empty(tokenizer: Any) -> bool:
    """Whether it turns text into nothing: transformers makes such a one where the files of a tokenizer are missing."""
    return not tokenizer("a", add_special_tokens=False)["input_ids"]


def _is_path(name_or_path: str) -> bool:
    looks_like_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    return looks_like_path or Path(name_or_path).expanduser().exists()


def _from_folder(model: str, folder: Path) -> Any:
    if not folder.is_dir():
        raise UserError(
            f"--model {model}: no such folder; expected a folder with a model and its tokenizer, or a hub id"
        )
    vocab_file = folder / "vocab.json"
    has_bare_vocabulary = (
        vocab_file.is_file() and (folder / "merges.txt").is_file() and not (folder / "tokenizer.json").is_file()
    )
    try:
        if has_bare_vocabulary:
            # GPT-2's two files alone say nothing of their class; given by name to its constructor they are dropped
            from transformers import GPT2TokenizerFast  # type: ignore[attr-defined, unused-ignore]

            tokenizer = GPT2TokenizerFast.from_pretrained(str(folder), local_files_only=True)
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        num_expected = len(json.loads(vocab_file.read_text(encoding="utf-8"))) if has_bare_vocabulary else 0
    except Exception as error:  # broken files raise many kinds, down to those of the Rust library
        raise UserError(
            f"--model {model}: no usable tokenizer in the folder ({first_line(error)}); expected tokenizer.json, or "
            "vocab.json and merges.txt"
        ) from None
    if len(tokenizer) < num_expected:
        raise UserError(
            f"--model {model}: {len(tokenizer)} of the {num_expected} entries of vocab.json were read; mend the folder"
        )
    return tokenizer


def _from_hub(model: str) -> Any:
    from transformers import AutoTokenizer

    with contextlib.suppress(Exception):
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        if not _is_empty(tokenizer):  # it is where the configuration is here already and nothing else
            return tokenizer
    if not hf_hub.is_reachable():
        raise UserError(
            f"--model {model}: no such folder, no local copy, and the hub cannot be reached; pass --model FOLDER, "
            "a folder with the model and its tokenizer"
        )
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"--model {model}: no such folder, and the hub has no tokenizer of that name ({first_line(error)}); "
            "pass --model FOLDER or another hub id"
        ) from None


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of all that decides which ids a text becomes, in hex; the folder's place does not matter."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        serialized = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    else:
        content = json.loads(backend.to_str())
        content.pop("truncation", None), content.pop("padding", None)  # set by whoever used it last; we use neither
        serialized = json.dumps(content, sort_keys=True)
    return hashlib.sha256(f"{serialized} {tokenizer.eos_token_id}".encode()).hexdigest()


def encode(tokenizer: Any, texts: Sequence[str]) -> list[TokenIds]:
    """The ids of each text, without special tokens added.

    A text of more than MAX_TEXT_CHARACTERS characters is cut before blanks between words and encoded in pieces, so that
    memory stays bounded; for byte-level tokenizers such as GPT-2's the ids are the same.
    """
    pieces_by_text = [split_long(text) for text in texts]
    pieces = [piece for parts in pieces_by_text for piece in parts]
    batches = (_encode_batch(tokenizer, batch) for batch in _iter_batches(pieces))
    encoded = (np.asarray(ids, dtype=np.uint32) for batch in batches for ids in batch)
    return [
        np.concatenate([next(encoded) for _ in parts]) if len(parts) > 1 else next(encoded) for parts in pieces_by_text
    ]


def _encode_batch(tokenizer: Any, texts: list[str]) -> Iterable[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        input_ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return input_ids
    # what the call above comes to, without the lists that we do not use: they take a third of its time
    backend.no_truncation(), backend.no_padding()
    return (encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))


def _iter_batches(pieces: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_characters = 0
    for piece in pieces:
        if batch and num_characters + len(piece) > MAX_CALL_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
        batch.append(piece)
        num_characters += len(piece)
    if batch:
        yield batch


def split_long(text: str) -> list[str]:
    """`text` in pieces of about MAX_TEXT_CHARACTERS; each but the first begins with the blank before a word."""
    pieces, start = [], 0
    while len(text) - start > MAX_TEXT_CHARACTERS:
        search_start = start + MAX_TEXT_CHARACTERS
        while (space_index := text.find(" ", search_start)) > 0 and not (
            text[space_index - 1].isalnum() and text[space_index + 1 : space_index + 2].isalnum()
        ):
            search_start = space_index + 1
        if space_index < 0:
            break
        pieces.append(text[start:space_index])
        start = space_index
    return [*pieces, text[start:]]
