"""The rows that were prepared: counts, lengths, what was left out, what stands on both sides, what is masked."""

import hashlib
from collections.abc import Iterator

import numpy as np

from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset
from trainer.data.token_dataset import TokenDataset
from trainer.tools.doctor.check_result import ERROR, WARNING, CheckResult, make_result, ok_result

MIN_VAL_EXAMPLES = 30  # of validation; fewer, and the loss of one run says little of another's
MIN_VAL_TOKENS = 5_000
MAX_DROPPED_SHARE = 0.01  # share of the records
MAX_SHARED_SHARE = 0.01  # share of the validation records that also stand in the training data
MIN_TARGET_SHARE = 0.1  # share of the tokens that a completion run learns from
MAX_UNSEEN_SHARE = 0.01  # share of the validation tokens whose id the training data never show
MAX_TOKENS_SCANNED = 5 * 10**7  # tokens of a side that are looked at: enough to tell, and seconds


def check_data(settings: Settings, data: PreparedDataset) -> Iterator[CheckResult]:
    """Everything that can be said of the rows."""
    yield from check_counts(data)
    yield check_lengths(settings, data)
    yield from check_dropped_records(settings, data)
    yield from check_duplicates(settings, data)
    yield from check_loss_mask(settings, data)
    yield from check_vocabulary_coverage(data)
    for notice in data.metadata.get("notices", []):
        yield ok_result("note", notice)


def check_counts(data: PreparedDataset) -> Iterator[CheckResult]:
    """Examples and tokens of both sides; few validation examples make a loss that chance moves."""
    train, val = data.metadata["train"], data.metadata["val"]
    yield ok_result(
        "training", f"{train['records']:,} records, {train['examples']:,} examples, {train['tokens']:,} tokens"
    )
    yield make_result(
        val["examples"] < MIN_VAL_EXAMPLES or val["counted_tokens"] < MIN_VAL_TOKENS, WARNING, "validation",
        f"{val['records']:,} records, {val['examples']:,} examples, {val['counted_tokens']:,} counted tokens",
        f"raise --val-fraction or give --val-data: under {MIN_VAL_EXAMPLES} examples or {MIN_VAL_TOKENS:,} tokens "
        "luck decides",
    )  # fmt: skip


def check_lengths(settings: Settings, data: PreparedDataset) -> CheckResult:
    """The spread of the rows' lengths."""
    row_lengths = data.train.lengths()
    if settings.data.objective == "blocks":
        return ok_result("lengths", f"every block has {settings.data.block_size} tokens")
    shortest, median, percentile_95, longest = (
        int(value) for value in np.quantile(row_lengths, [0, 0.5, 0.95, 1], method="nearest")
    )
    return ok_result(
        "lengths", f"shortest {shortest}, median {median}, 95% within {percentile_95}, longest {longest} tokens"
    )


def check_dropped_records(settings: Settings, data: PreparedDataset) -> Iterator[CheckResult]:
    """Records that are too long for a row (completion), or the tail that fills no block."""
    for split in ("train", "val"):
        split_metadata = data.metadata[split]
        if settings.data.objective == "blocks":
            continue  # only the last piece of a block, which the notices tell
        num_dropped = split_metadata["records"] - split_metadata["examples"]
        if num_dropped:
            share = num_dropped / split_metadata["records"]
            yield make_result(
                share > MAX_DROPPED_SHARE, WARNING, "too long", f"{split}: {num_dropped:,} of "
                    f"{split_metadata['records']:,} records "
                f"({share:.1%}) are longer than {settings.data.block_size} tokens and left out", "raise --block-size",
            )  # fmt: skip


def check_duplicates(settings: Settings, data: PreparedDataset) -> Iterator[CheckResult]:
    """Texts that stand on both sides, and texts that the training data repeat; compared by their token ids."""
    eos_token_id = (
        None if settings.data.objective == "completion" or data.metadata["tokenizer"] is None else data.pad_id
    )
    if eos_token_id is None and settings.data.objective == "blocks":
        yield ok_result("duplicates", "not looked for: token ids do not say where a text ends")
        return
    train_digests, val_digests = _text_digests(data.train, eos_token_id), _text_digests(data.val, eos_token_id)
    if not train_digests or not val_digests:
        return
    unique_train_digests = set(train_digests)
    num_shared = sum(digest in unique_train_digests for digest in val_digests)
    yield make_result(
        num_shared > MAX_SHARED_SHARE * len(val_digests), WARNING, "duplicates",
        f"{num_shared:,} of {len(val_digests):,} validation texts also stand in the training data",
        "drop them from one side: the validation loss partly measures what was learnt by heart",
    )  # fmt: skip
    num_repeated = len(train_digests) - len(unique_train_digests)
    yield make_result(
        num_repeated > 0.1 * len(train_digests), WARNING, "repeats", f"{num_repeated:,} of {len(train_digests):,} "
                                                                     "training texts are repeats",
        "drop them, unless their weight is meant",
    )  # fmt: skip


def _text_digests(dataset: TokenDataset, eos_token_id: int | None) -> list[bytes]:
    """A digest of every whole text: a row, or what stands between two ends in the blocks."""
    if eos_token_id is None:
        num_rows = int(np.searchsorted(dataset.offsets, MAX_TOKENS_SCANNED))
        return [_digest(dataset.row(i)) for i in range(min(len(dataset), num_rows))]
    ids = dataset.ids[: min(len(dataset.ids), MAX_TOKENS_SCANNED)]
    eos_positions = np.flatnonzero(ids == eos_token_id)
    return [_digest(ids[a + 1 : b + 1]) for a, b in zip([-1, *eos_positions[:-1]], eos_positions, strict=True)]


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(np.asarray(ids, dtype="<u4").tobytes(), digest_size=12).digest()


def check_loss_mask(settings: Settings, data: PreparedDataset) -> Iterator[CheckResult]:
    """The share of tokens that count in the loss, and rows in which none does."""
    num_tokens, target_counts = int(data.train.lengths().sum()), data.train.num_target_tokens()
    target_share = int(target_counts.sum()) / num_tokens
    yield make_result(
        target_share < MIN_TARGET_SHARE, WARNING, "masked", f"{1 - target_share:.1%} of the training tokens are not "
            "counted in the loss",
        "shorten the prompt, or train on whole texts with --objective blocks",
    )  # fmt: skip
    num_empty = int((target_counts <= 0).sum())
    if num_empty:
        yield CheckResult(
            level=ERROR, name="masked", message=f"{num_empty:,} training rows have no token that counts",
            remedy="drop records with an empty completion",
        )  # fmt: skip


def check_vocabulary_coverage(data: PreparedDataset) -> Iterator[CheckResult]:
    """How much of the vocabulary the training data show, and how much of the validation tokens they never do."""
    vocab_size = data.metadata["vocabulary"]
    is_seen = np.zeros(vocab_size, dtype=bool)
    ids = data.train.ids[:MAX_TOKENS_SCANNED]
    is_seen[np.asarray(ids, dtype=np.int64)] = True
    val_ids = np.asarray(data.val.ids[:MAX_TOKENS_SCANNED], dtype=np.int64)
    unseen_share = float((~is_seen[val_ids]).mean()) if len(val_ids) else 0.0
    yield ok_result("coverage", f"{int(is_seen.sum()):,} of {vocab_size:,} token ids occur in the training data")
    yield make_result(
        unseen_share > MAX_UNSEEN_SHARE, WARNING, "coverage", f"{unseen_share:.2%} of the validation tokens never "
            "occur in training",
        "more training data, or a split that holds the same kinds of text on both sides",
    )  # fmt: skip
