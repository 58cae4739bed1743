"""Which examples stand in which step, and one rank's share of them: pure functions of seed, epoch and step.

Nothing here knows how many ranks there are until a step is cut up, so the examples of a step are the same for
every number of ranks, micro-batch and accumulation.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainer.config.schema import Batch
from trainer.data.token_dataset import Int64, Rows

IGNORED = -100  # the label that Hugging Face models and torch's cross-entropy leave out
WINDOW = 64  # global batches among which rows of like length are brought together


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one rank feeds in one forward.

    input_ids, labels: int64 [rows, width]; labels are not shifted, IGNORED where a token does not count.
    tokens: tokens in it that are not padding. index: place of its first row in the run, counted in examples;
    the same for the same examples, so that random numbers can be seeded by it.
    """

    input_ids: Int64
    labels: Int64
    tokens: int
    index: int


def _shuffled(n: int, *key: int) -> Int64:
    """A permutation of 0..n-1 that depends on n and `key` only, int64 [n].

    Sorting a raw bit stream, because numpy promises the same stream for ever, but not the same
    `Generator.permutation`.
    """
    stream = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(np.asarray(stream, dtype=np.uint64), kind="stable").astype(np.int64)


def epoch_order(rows: Rows, *, seed: int, epoch: int, global_batch: int, shuffle: bool, by_length: bool) -> Int64:
    """The order of the examples in epoch number `epoch` (from 0), int64 [n]; each stands in it once.

    by_length (rows of different lengths): within windows of 64 global batches rows are sorted by length, so that
    a batch holds little padding, and whole batches are shuffled; a ragged batch stays last. Without shuffle: the
    order of the data.
    """
    n = len(rows)
    if not shuffle:
        return np.arange(n, dtype=np.int64)
    order = _shuffled(n, seed, epoch)
    if not by_length:
        return order
    whole = n - n % global_batch
    lengths = rows.lengths()
    batches = []
    for start in range(0, whole, WINDOW * global_batch):
        window = order[start : min(start + WINDOW * global_batch, whole)]
        window = window[np.argsort(lengths[window], kind="stable")]
        batches.append(window.reshape(-1, global_batch))
    if not batches:
        return order
    full = np.concatenate(batches)
    return np.concatenate([full[_shuffled(len(full), seed, epoch, 1)].ravel(), order[whole:]])


def pad(rows: Rows, chosen: Int64, pad_id: int, index: int) -> MicroBatch:
    """The `chosen` rows, padded on the right to the longest of them.

    Padding is masked by position, never by its id: GPT-2's padding is its end-of-text token, which counts where
    it ends a text. Without any row: one row of padding that counts nothing, so that every rank does a forward.
    """
    if not len(chosen):
        blank = np.full((1, 2), pad_id, dtype=np.int64)
        return MicroBatch(input_ids=blank, labels=np.full_like(blank, IGNORED), tokens=0, index=index)
    texts = [rows.row(int(i)) for i in chosen]
    width = max(len(text) for text in texts)
    input_ids = np.full((len(texts), width), pad_id, dtype=np.int64)
    labels = np.full((len(texts), width), IGNORED, dtype=np.int64)
    for line, (text, first) in enumerate(zip(texts, rows.first[chosen], strict=True)):
        input_ids[line, : len(text)] = text
        labels[line, first : len(text)] = text[first:]
    return MicroBatch(input_ids=input_ids, labels=labels, tokens=sum(map(len, texts)), index=index)


def step_batches(
    rows: Rows, order: Int64, step_in_epoch: int, batch: Batch, rank: int, pad_id: int, *, before: int = 0
) -> list[MicroBatch]:
    """The micro-batches of `rank` in a step, always `batch.accumulation` of them.

    Micro-batch j of rank r holds rows [(j * ranks + r) * micro : + micro] of the global batch. In the ragged last
    step of an epoch they hold fewer rows, or a masked one. `before`: examples of the run before this epoch,
    added to every `index`.
    """
    start = step_in_epoch * batch.global_batch
    mine = order[start : start + batch.global_batch]
    places = [(j * batch.ranks + rank) * batch.micro for j in range(batch.accumulation)]
    return [pad(rows, mine[at : at + batch.micro], pad_id, before + start + at) for at in places]


def step_counts(rows: Rows, order: Int64, step_in_epoch: int, global_batch: int) -> tuple[int, int, int]:
    """(examples, tokens, counted tokens) of a global batch; every rank gets the same without asking the others."""
    chosen = order[step_in_epoch * global_batch : (step_in_epoch + 1) * global_batch]
    lengths = rows.offsets[chosen + 1] - rows.offsets[chosen]
    return len(chosen), int(lengths.sum()), int((lengths - rows.first[chosen]).sum())


def eval_batches(rows: Rows, eval_batch: int, rank: int, ranks: int, pad_id: int) -> Iterator[MicroBatch]:
    """The share of `rank` in one pass over all rows; every rank gets the same number of micro-batches.

    Longest rows first: little padding, and a batch that does not fit in memory fails at once. Every row stands in
    exactly one of them over all ranks; what is missing at the end is a masked row.
    """
    order = np.argsort(-rows.lengths(), kind="stable").astype(np.int64)
    passes = -(-len(order) // (eval_batch * ranks))
    for turn in range(passes):
        at = (turn * ranks + rank) * eval_batch
        yield pad(rows, order[at : at + eval_batch], pad_id, at)
