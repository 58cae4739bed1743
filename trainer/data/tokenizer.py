"""Tokenizers: found without a network where that is possible, checked, and applied to batches of texts."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config.errors import UserError
from trainer.config.schema import DEMO_MODEL
from trainer.data import hf_hub

LONG_TEXT = 2**18  # characters; a tokenizer needs some hundred bytes of memory for each token of one text
ONE_CALL = 2**20  # characters handed to the tokenizer at a time


Ids = NDArray[np.uint32]


def model_folder(model: str) -> str:
    """The folder of `demo-base`, and every other name as it is."""
    return str(Path(__file__).resolve().parents[1] / "model" / "demo") if model == DEMO_MODEL else model


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a folder, of a hub id or of `demo-base`; a local copy is taken before the hub is asked.

    UserError where there is none, where it is broken, or where it has no end-of-text token.
    """
    place = model_folder(model)
    tokenizer = _from_folder(model, Path(place).expanduser()) if _is_path(place) else _from_hub(model)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"--model {model}: its tokenizer has no end-of-text token, which ends every text; add an eos_token"
        )
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise UserError(f"--model {model}: its tokenizer turns text into nothing; save it again with save_pretrained")
    return tokenizer


def _is_path(place: str) -> bool:
    return Path(place).expanduser().exists() or place.startswith((".", "/", "~")) or place.count("/") > 1


def _from_folder(model: str, folder: Path) -> Any:
    if not folder.is_dir():
        raise UserError(
            f"--model {model}: no such folder; expected a folder with a model and its tokenizer, or a hub id"
        )
    vocabulary = folder / "vocab.json"
    bare = vocabulary.is_file() and (folder / "merges.txt").is_file() and not (folder / "tokenizer.json").is_file()
    try:
        if bare:
            # GPT-2's two files alone say nothing of their class; given by name to its constructor they are dropped
            from transformers import GPT2TokenizerFast  # type: ignore[attr-defined, unused-ignore]

            tokenizer = GPT2TokenizerFast.from_pretrained(str(folder), local_files_only=True)
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        expected = len(json.loads(vocabulary.read_text(encoding="utf-8"))) if bare else 0
    except Exception as problem:  # broken files raise many kinds, down to those of the Rust library
        raise UserError(
            f"--model {model}: no usable tokenizer in the folder ({_first_line(problem)}); expected tokenizer.json, or "
            "vocab.json and merges.txt"
        ) from None
    if len(tokenizer) < expected:
        raise UserError(
            f"--model {model}: {len(tokenizer)} of the {expected} entries of vocab.json were read; mend the folder"
        )
    return tokenizer


def _from_hub(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True)
    except Exception:  # not here: ask the hub, if it answers
        if not hf_hub.reachable():
            raise UserError(
                f"--model {model}: no such folder, no local copy, and the hub cannot be reached; pass --model FOLDER, "
                "a folder with the model and its tokenizer"
            ) from None
    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as problem:
        raise UserError(
            f"--model {model}: no such folder, and the hub has no tokenizer of that name ({_first_line(problem)}); "
            "pass --model FOLDER or another hub id"
        ) from None


def _first_line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0][:160].rstrip(". :") if lines else type(problem).__name__


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of all that decides which ids a text becomes, in hex; the folder's place does not matter."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        told = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    else:
        content = json.loads(backend.to_str())
        content.pop("truncation", None), content.pop("padding", None)  # set by whoever used it last; we use neither
        told = json.dumps(content, sort_keys=True)
    return hashlib.sha256(f"{told} {tokenizer.eos_token_id}".encode()).hexdigest()


def encode(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    """The ids of each text, without special tokens added.

    A text of more than LONG_TEXT characters is cut before blanks between words and encoded in pieces, so that
    memory stays bounded; for byte-level tokenizers such as GPT-2's the ids are the same.
    """
    cut = [split_long(text) for text in texts]
    pieces = [piece for parts in cut for piece in parts]
    encoded: list[Ids] = []
    for few in _calls(pieces):
        encoded += [np.asarray(ids, dtype=np.uint32) for ids in _ids(tokenizer, few)]
    following = iter(encoded)
    return [np.concatenate([next(following) for _ in parts]) if len(parts) > 1 else next(following) for parts in cut]


def _ids(tokenizer: Any, texts: list[str]) -> Iterable[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found
    # what the call above comes to, without the lists that we do not use: they take a third of its time
    backend.no_truncation(), backend.no_padding()
    return (one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False))


def _calls(pieces: Sequence[str]) -> Iterator[list[str]]:
    few: list[str] = []
    size = 0
    for piece in pieces:
        if few and size + len(piece) > ONE_CALL:
            yield few
            few, size = [], 0
        few.append(piece)
        size += len(piece)
    if few:
        yield few


def split_long(text: str) -> list[str]:
    """`text` in pieces of about LONG_TEXT characters; each but the first begins with the single blank before a word."""
    pieces, start = [], 0
    while len(text) - start > LONG_TEXT:
        cut = start + LONG_TEXT
        while (at := text.find(" ", cut)) > 0 and not (text[at - 1].isalnum() and text[at + 1 : at + 2].isalnum()):
            cut = at + 1
        if at < 0:
            break
        pieces.append(text[start:at])
        start = at
    return [*pieces, text[start:]]
