"""The rows that were prepared: counts, lengths, what was left out, what stands on both sides, what is masked."""

import hashlib
from collections.abc import Iterator

import numpy as np

from trainer.config.schema import Settings
from trainer.data.dataset import Prepared
from trainer.data.token_dataset import Rows
from trainer.tools.doctor.check_result import ERROR, WARNING, Check, fine, judged

FEW_EXAMPLES = 30  # of validation; fewer, and the loss of one run says little of another's
FEW_TOKENS = 5_000
LEFT_OUT = 0.01  # share of the records
SHARED = 0.01  # share of the validation records that also stand in the training data
COUNTED = 0.1  # share of the tokens that a completion run learns from
UNSEEN = 0.01  # share of the validation tokens whose id the training data never show
MOST = 5 * 10**7  # tokens of a side that are looked at: enough to tell, and seconds


def check(settings: Settings, data: Prepared) -> Iterator[Check]:
    """Everything that can be said of the rows."""
    yield from counts(data)
    yield lengths(settings, data)
    yield from left_out(settings, data)
    yield from duplicates(settings, data)
    yield from masked(settings, data)
    yield from coverage(data)
    for notice in data.facts.get("notices", []):
        yield fine("note", notice)


def counts(data: Prepared) -> Iterator[Check]:
    """Examples and tokens of both sides; few validation examples make a loss that chance moves."""
    train, val = data.facts["train"], data.facts["val"]
    yield fine("training", f"{train['records']:,} records, {train['examples']:,} examples, {train['tokens']:,} tokens")
    yield judged(
        val["examples"] < FEW_EXAMPLES or val["counted_tokens"] < FEW_TOKENS, WARNING, "validation",
        f"{val['records']:,} records, {val['examples']:,} examples, {val['counted_tokens']:,} counted tokens",
        f"raise --val-fraction or give --val-data: under {FEW_EXAMPLES} examples or {FEW_TOKENS:,} tokens luck decides",
    )  # fmt: skip


def lengths(settings: Settings, data: Prepared) -> Check:
    """The spread of the rows' lengths."""
    sizes = data.train.lengths()
    if settings.data.objective == "blocks":
        return fine("lengths", f"every block has {settings.data.block_size} tokens")
    low, middle, high, top = (int(value) for value in np.quantile(sizes, [0, 0.5, 0.95, 1], method="nearest"))
    return fine("lengths", f"shortest {low}, median {middle}, 95% within {high}, longest {top} tokens")


def left_out(settings: Settings, data: Prepared) -> Iterator[Check]:
    """Records that are too long for a row (completion), or the tail that fills no block."""
    for side in ("train", "val"):
        facts = data.facts[side]
        if settings.data.objective == "blocks":
            continue  # only the last piece of a block, which the notices tell
        missing = facts["records"] - facts["examples"]
        if missing:
            share = missing / facts["records"]
            yield judged(
                share > LEFT_OUT, WARNING, "too long", f"{side}: {missing:,} of {facts['records']:,} records "
                f"({share:.1%}) are longer than {settings.data.block_size} tokens and left out", "raise --block-size",
            )  # fmt: skip


def duplicates(settings: Settings, data: Prepared) -> Iterator[Check]:
    """Texts that stand on both sides, and texts that the training data repeat; compared by their token ids."""
    end = None if settings.data.objective == "completion" or data.facts["tokenizer"] is None else data.pad_id
    if end is None and settings.data.objective == "blocks":
        yield fine("duplicates", "not looked for: token ids do not say where a text ends")
        return
    train, val = _texts(data.train, end), _texts(data.val, end)
    if not train or not val:
        return
    known = set(train)
    shared = sum(one in known for one in val)
    yield judged(
        shared > SHARED * len(val), WARNING, "duplicates",
        f"{shared:,} of {len(val):,} validation texts also stand in the training data",
        "drop them from one side: the validation loss partly measures what was learnt by heart",
    )  # fmt: skip
    repeated = len(train) - len(known)
    yield judged(
        repeated > 0.1 * len(train), WARNING, "repeats", f"{repeated:,} of {len(train):,} training texts are repeats",
        "drop them, unless their weight is meant",
    )  # fmt: skip


def _texts(rows: Rows, end: int | None) -> list[bytes]:
    """A digest of every whole text: a row, or what stands between two ends in the blocks."""
    if end is None:
        most = int(np.searchsorted(rows.offsets, MOST))
        return [_digest(rows.row(i)) for i in range(min(len(rows), most))]
    ids = rows.ids[: min(len(rows.ids), MOST)]
    ends = np.flatnonzero(ids == end)
    return [_digest(ids[a + 1 : b + 1]) for a, b in zip([-1, *ends[:-1]], ends, strict=True)]


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(np.asarray(ids, dtype="<u4").tobytes(), digest_size=12).digest()


def masked(settings: Settings, data: Prepared) -> Iterator[Check]:
    """The share of tokens that count in the loss, and rows in which none does."""
    tokens, counted = int(data.train.lengths().sum()), data.train.counted()
    share = int(counted.sum()) / tokens
    yield judged(
        share < COUNTED, WARNING, "masked", f"{1 - share:.1%} of the training tokens are not counted in the loss",
        "shorten the prompt, or train on whole texts with --objective blocks",
    )  # fmt: skip
    empty = int((counted <= 0).sum())
    if empty:
        yield Check(
            level=ERROR, what="masked", found=f"{empty:,} training rows have no token that counts",
            remedy="drop records with an empty completion",
        )  # fmt: skip


def coverage(data: Prepared) -> Iterator[Check]:
    """How much of the vocabulary the training data show, and how much of the validation tokens they never do."""
    vocabulary = data.facts["vocabulary"]
    seen = np.zeros(vocabulary, dtype=bool)
    ids = data.train.ids[:MOST]
    seen[np.asarray(ids, dtype=np.int64)] = True
    val = np.asarray(data.val.ids[:MOST], dtype=np.int64)
    unseen = float((~seen[val]).mean()) if len(val) else 0.0
    yield fine("coverage", f"{int(seen.sum()):,} of {vocabulary:,} token ids occur in the training data")
    yield judged(
        unseen > UNSEEN, WARNING, "coverage", f"{unseen:.2%} of the validation tokens never occur in training",
        "more training data, or a split that holds the same kinds of text on both sides",
    )  # fmt: skip
