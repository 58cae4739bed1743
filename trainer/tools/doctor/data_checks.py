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
MAX_REPEATED_SHARE = 0.1  # of the training texts
MIN_TARGET_SHARE = 0.1  # share of the tokens that a completion run learns from
MAX_UNSEEN_SHARE = 0.01  # share of the validation tokens whose id the training data never show
MAX_TOKENS_SCANNED = 5 * 10**7  # tokens of a side that are looked at: enough to tell, and seconds


def check_data(settings: Settings, data: PreparedDataset) -> Iterator[CheckResult]:
    """Everything that can be said of the rows."""
    yield from check_counts(data)
    yield check_lengths(settings, data)
    yield from check_dropped_records(settings, data)
    yield from check_duplicates(settings, data)
    yield from check_loss_mask(data)
    yield from check_vocabulary_coverage(data)
    for notice in data.metadata.get("notices", []):
        yield ok_result("note", notice)


def check_counts(data: PreparedDataset) -> Iterator[CheckResult]:
    """Examples and tokens of both sides; few validation examples make a loss that chance moves."""
    train, val = data.metadata["train"], data.metadata["val"]
    counts = "{records:,} records, {examples:,} examples, "
    yield ok_result("training", (counts + "{tokens:,} tokens").format(**train))
    yield make_result(
        val["examples"] < MIN_VAL_EXAMPLES or val["counted_tokens"] < MIN_VAL_TOKENS,
        WARNING,
        "validation",
        (counts + "{counted_tokens:,} counted tokens").format(**val),
        f"raise --val-fraction or give --val-data: under {MIN_VAL_EXAMPLES} examples or {MIN_VAL_TOKENS:,} tokens "
        "luck decides",
    )


def check_lengths(settings: Settings, data: PreparedDataset) -> CheckResult:
    """The spread of the rows' lengths."""
    if settings.data.objective == "blocks":
        return ok_result("lengths", f"every block has {settings.data.block_size} tokens")
    quantiles = np.quantile(data.train.lengths(), [0, 0.5, 0.95, 1], method="nearest")
    return ok_result("lengths", "shortest {}, median {}, 95% within {}, longest {} tokens".format(*quantiles))


def check_dropped_records(settings: Settings, data: PreparedDataset) -> Iterator[CheckResult]:
    """Records that are too long for a row; of blocks only the tail that fills none is left out, as the notices say."""
    for split in ("train", "val") if settings.data.objective != "blocks" else ():
        num_records = data.metadata[split]["records"]
        if num_dropped := num_records - data.metadata[split]["examples"]:
            share = num_dropped / num_records
            message = f"{split}: {num_dropped:,} of {num_records:,} records ({share:.1%}) are longer than "
            message += f"{settings.data.block_size} tokens and left out"
            yield make_result(share > MAX_DROPPED_SHARE, WARNING, "too long", message, "raise --block-size")


def check_duplicates(settings: Settings, data: PreparedDataset) -> Iterator[CheckResult]:
    """Texts that stand on both sides, and texts that the training data repeat; compared by their token ids."""
    is_blocks = settings.data.objective == "blocks"
    if is_blocks and data.metadata["tokenizer"] is None:
        yield ok_result("duplicates", "not looked for: token ids do not say where a text ends")
        return
    train_texts, val_texts = (
        _block_texts(dataset, data.pad_id) if is_blocks else _row_texts(dataset) for dataset in (data.train, data.val)
    )
    if not train_texts or not val_texts:
        return
    unique_train_texts = set(train_texts)
    num_shared = sum(text in unique_train_texts for text in val_texts)
    yield make_result(
        num_shared > MAX_SHARED_SHARE * len(val_texts),
        WARNING,
        "duplicates",
        f"{num_shared:,} of {len(val_texts):,} validation texts also stand in the training data",
        "drop them from one side: the validation loss partly measures what was learnt by heart",
    )
    num_repeated = len(train_texts) - len(unique_train_texts)
    message = f"{num_repeated:,} of {len(train_texts):,} training texts are repeats"
    is_bad = num_repeated > MAX_REPEATED_SHARE * len(train_texts)
    yield make_result(is_bad, WARNING, "repeats", message, "drop them, unless their weight is meant")


def _row_texts(dataset: TokenDataset) -> list[bytes]:
    """A digest of every row."""
    num_rows = int(np.searchsorted(dataset.offsets, MAX_TOKENS_SCANNED))
    return [_digest(dataset.row(i)) for i in range(min(len(dataset), num_rows))]


def _block_texts(dataset: TokenDataset, eos_token_id: int) -> list[bytes]:
    """A digest of every whole text: of what stands between two ends."""
    ids = dataset.ids[:MAX_TOKENS_SCANNED]
    eos_positions = np.flatnonzero(ids == eos_token_id)
    return [_digest(ids[a + 1 : b + 1]) for a, b in zip([-1, *eos_positions[:-1]], eos_positions, strict=True)]


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(np.asarray(ids, dtype="<u4").tobytes(), digest_size=12).digest()


def check_loss_mask(data: PreparedDataset) -> Iterator[CheckResult]:
    """The share of tokens that count in the loss, and rows in which none does."""
    target_counts = data.train.num_target_tokens()
    target_share = int(target_counts.sum()) / int(data.train.lengths().sum())
    yield make_result(
        target_share < MIN_TARGET_SHARE,
        WARNING,
        "masked",
        f"{1 - target_share:.1%} of the training tokens are not counted in the loss",
        "shorten the prompt, or train on whole texts with --objective blocks",
    )
    if num_empty := int((target_counts <= 0).sum()):
        message = f"{num_empty:,} training rows have no token that counts"
        yield CheckResult(ERROR, "masked", message, "drop records with an empty completion")


def check_vocabulary_coverage(data: PreparedDataset) -> Iterator[CheckResult]:
    """How much of the vocabulary the training data show, and how much of the validation tokens they never do."""
    is_seen = np.zeros(data.metadata["vocabulary"], dtype=bool)
    is_seen[data.train.ids[:MAX_TOKENS_SCANNED]] = True
    val_ids = data.val.ids[:MAX_TOKENS_SCANNED]
    unseen_share = float((~is_seen[val_ids]).mean()) if len(val_ids) else 0.0
    yield ok_result("coverage", f"{int(is_seen.sum()):,} of {len(is_seen):,} token ids occur in the training data")
    yield make_result(
        unseen_share > MAX_UNSEEN_SHARE,
        WARNING,
        "coverage",
        f"{unseen_share:.2%} of the validation tokens never occur in training",
        "more training data, or a split that holds the same kinds of text on both sides",
    )
