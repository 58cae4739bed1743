"""Tokenizers: found without a network where that is possible, checked, and applied to batches of texts."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.config.choices import DEMO_MODEL
from trainer.config.errors import UserError, escape_controls, first_line
from trainer.config.files import read_json_object
from trainer.data import hf_hub
from trainer.data.hf_hub import ADAPTER_CONFIG_FILE, find_adapter_folder

if TYPE_CHECKING:
    from trainer.data.dataset import TokenDataset

TokenIds = NDArray[np.uint32]
DEMO_MODEL_FOLDER = Path(__file__).resolve().parents[1] / "model" / "demo"
MAX_TEXT_CHARACTERS = 2**18  # a tokenizer needs some hundred bytes of memory for each token of one text
#: So many characters, up to the next blank between two words, with which the next piece begins; or what is left.
PIECES = re.compile(rf"(?s).{{{MAX_TEXT_CHARACTERS}}}.*?(?<=[^\W_])(?= [^\W_])|.+")
MAX_VOCABULARY = 2**24  # a table of ids is that long; the largest vocabulary in use has a million
MAX_MARKED_CHARACTERS = 400  # of a row in the plan; its middle is left out


@dataclass(frozen=True, eq=False)
class Row:
    """One record as tokens; `prompt` and `completion` are the texts before and of its last target tokens."""

    ids: TokenIds  #: [length]
    is_target: NDArray[np.bool_]  #: [length]
    prompt: str
    completion: str


class ModelSource(NamedTuple):
    """Where a model's weights come from."""

    path: str  #: folder or hub id of a whole model: of an adapter, its base
    name: str  #: how people call it
    revision: str | None = None  #: commit of the hub that an adapter names
    adapter: Path | None = None  #: the folder of an adapter that stands on it


def find_model(model: str) -> ModelSource:
    """What a model's name stands for; that of an adapter for its base too, which is found as peft does: by the name in
    its adapter_config.json, from the working folder; also from the adapter's own. UserError where it names none."""
    adapter = None if model == DEMO_MODEL else find_adapter_folder(model)
    if adapter is None:
        return ModelSource(str(DEMO_MODEL_FOLDER) if model == DEMO_MODEL else model, model)
    file = f"--model {model}: {ADAPTER_CONFIG_FILE}"
    config = read_json_object(adapter / ADAPTER_CONFIG_FILE, file)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base or not isinstance(revision, str | None):
        raise UserError(f"{file}: base_model_name_or_path is {base!r:.80}; expected a folder or a hub id")
    if base == DEMO_MODEL or Path(base).absolute() == DEMO_MODEL_FOLDER:
        return ModelSource(str(DEMO_MODEL_FOLDER), DEMO_MODEL, None, adapter)
    if not Path(base).exists() and (adapter / base).is_dir():
        base = str(adapter / base)
    return ModelSource(base, base, None if Path(base).is_dir() else revision, adapter)


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a folder, of a hub id (a local copy where it cannot be reached) or of `demo-base`; UserError
    where there is none, where it is broken, or where it has no end-of-text token."""
    from transformers import AutoTokenizer, GPT2TokenizerFast  # type: ignore[attr-defined, unused-ignore]

    source = find_model(model)
    has_own = source.adapter and (source.adapter / "tokenizer_config.json").is_file()  # taken first, as peft does
    folder = Path(str(source.adapter) if has_own else source.path)
    # GPT-2's two files alone say nothing of their class
    is_bare = not (folder / "tokenizer.json").is_file() and (folder / "merges.txt").is_file()
    is_local = folder.is_dir() or not hf_hub.is_reachable()
    try:
        tokenizer = (GPT2TokenizerFast if is_bare else AutoTokenizer).from_pretrained(
            str(folder) if folder.is_dir() else source.path,
            local_files_only=is_local,
            trust_remote_code=False,
            revision=source.revision or "main",
        )
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # made where files of it are missing
            raise ValueError("it turns text into nothing")
        if vocabulary_size(tokenizer) > MAX_VOCABULARY:
            raise ValueError(f"its largest token id is {vocabulary_size(tokenizer) - 1:,}; expected under 2^24")
        if tokenizer.eos_token_id is None:
            raise ValueError("it has no end-of-text token, which ends every text")
        return tokenizer
    except Exception as error:  # broken files raise many kinds, down to those of the Rust library
        problem = "no usable tokenizer in the folder"
        if not folder.is_dir():
            problem = f"no such folder, and {'the hub cannot be reached' if is_local else 'no tokenizer on the hub'}"
        remedy = "pass --model FOLDER, with tokenizer.json or vocab.json and merges.txt, or a hub id"
        raise UserError(f"--model {model}: {problem} ({first_line(error)}); {remedy}") from None


def vocabulary_size(tokenizer: Any) -> int:
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


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
    """The ids of each text, without special tokens added; of long ones in pieces, as memory is to stay bounded. For
    byte-level tokenizers such as GPT-2's the ids are the same."""
    if any(len(text) > MAX_TEXT_CHARACTERS for text in texts):
        pieces_by_text = ([text] if len(text) <= MAX_TEXT_CHARACTERS else PIECES.findall(text) for text in texts)
        return [np.concatenate([_encode(tokenizer, [piece])[0] for piece in pieces]) for pieces in pieces_by_text]
    return _encode(tokenizer, list(texts))


def _encode(tokenizer: Any, texts: list[str]) -> list[TokenIds]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    try:
        if backend is None:
            all_ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        else:  # what the call above comes to, without the lists that we do not use: they take a third of its time
            backend.no_truncation(), backend.no_padding()
            all_ids = (encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))
        return [np.asarray(ids, dtype=np.uint32) for ids in all_ids]
    except Exception as error:  # the Rust library raises plain ones, for a word without an id for instance
        problem = f"its tokenizer cannot encode a text of the data ({first_line(error)})"
        raise UserError(f"--model {tokenizer.name_or_path}: {problem}; pass a model that takes any text") from None


def count_target_bytes(tokenizer: Any, dataset: "TokenDataset") -> list[int]:
    """UTF-8 bytes of the targets of each row; the token that ends a text has none."""
    bytes_by_id = _byte_level_lengths(tokenizer)
    counts = []
    for i in range(len(dataset)):
        ids, is_target = dataset.row(i), dataset.is_target(i)
        if bytes_by_id is not None:
            counts.append(int(bytes_by_id[ids[is_target]].sum()))
            continue
        count = 0
        for start in np.flatnonzero(np.diff(np.append(is_target.astype(np.int8), 0))):  # the last before each edge
            prefix = tokenizer.decode(ids[: start + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            count += len(prefix.encode()) * (1 if is_target[start] else -1)
        counts.append(count)
    return counts


def _byte_level_lengths(tokenizer: Any) -> NDArray[np.int64] | None:
    """int64 [vocabulary]: bytes of each token, where tokens are runs of bytes (GPT-2, Llama 3, Qwen); else None."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if type(decoder).__name__ != "ByteLevel":
        return None
    added_tokens, lengths = set(tokenizer.get_added_vocab()), np.zeros(vocabulary_size(tokenizer), dtype=np.int64)
    special_tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    for token, token_id in tokenizer.get_vocab().items():
        if token not in special_tokens:  # each character of a token stands for one byte; added tokens are plain text
            lengths[token_id] = len(token.encode()) if token in added_tokens else len(token)
    return lengths


def mark_targets(tokenizer: Any, ids: NDArray[Any], is_target: NDArray[np.bool_]) -> str:
    """The text of a row on one line, `⟦targets⟧` from the rest; long runs are shortened in their middle."""
    text, start = "", 0
    edges = [*(np.flatnonzero(np.diff(is_target)) + 1).tolist(), len(ids)]
    for end in edges:
        part = escape_controls(tokenizer.decode(ids[start:end].tolist()))
        limit = MAX_MARKED_CHARACTERS // len(edges) + 20
        part = part if len(part) <= limit else f"{part[: limit // 2]} … {part[-limit // 2 :]}"
        text += f"⟦{part}⟧" if is_target[start] else part
        start = end
    return text


def show_examples(dataset: "TokenDataset", tokenizer: Any, number: int) -> Iterator[str]:
    """Lines that show the tokens of the first rows, `⟦targets⟧` in brackets."""
    for i in range(min(number, len(dataset))):
        ids, is_target = dataset.row(i), dataset.is_target(i)
        yield f"example {i + 1}: {len(ids)} tokens, {int(is_target.sum())} of them target tokens"
        pieces = (escape_controls(tokenizer.decode([token_id])) for token_id in ids.tolist())
        yield "|".join(f"⟦{piece}⟧" if counts else piece for piece, counts in zip(pieces, is_target, strict=True))
