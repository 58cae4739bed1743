"""Which examples stand in which step, and one rank's share of them: pure functions of seed, epoch and step. The
examples of a step are the same for every number of ranks, micro-batch and accumulation: only then it is cut up."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from trainer.config.batch_config import BatchConfig
from trainer.data.dataset import Int64, TokenDataset

IGNORE_INDEX = -100  # the label that Hugging Face models and torch's cross-entropy leave out
PAD_ID = 0  # any id will do: padded positions are neither counted nor attended to
SORT_WINDOW_BATCHES = 64  # number of global batches among which rows of like length are brought together


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one rank feeds in one forward."""

    input_ids: Int64  #: [rows, width]
    labels: Int64  #: [rows, width], not shifted; IGNORE_INDEX where a token does not count
    tokens: int  #: without padding
    index: int  #: place of its first row in the epoch, in examples: with the step a seed of dropout on any ranks
    position_ids: Int64 | None = None  #: [rows, width], from 0 in each of several examples of a row; None: one a row


@dataclass(frozen=True, kw_only=True, eq=False)
class GlobalBatch:
    """The examples of one optimizer step, and this rank's share of them."""

    step: int  #: steps before it in the run
    epoch: int  #: from 0
    example_ids: list[int]  #: rows of the data set, of the whole global batch
    micro_batches: list[MicroBatch]  #: this rank's
    num_tokens: int  #: of the whole global batch, without padding
    num_target_tokens: int  #: tokens among them that count in the loss


def _permutation(n: int, *key: int) -> Int64:
    """A permutation of 0..n-1 that depends on n and `key` only, int64 [n]; from a raw bit stream, which numpy promises
    for ever, as it does not `Generator.permutation`."""
    stream = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(np.asarray(stream, dtype=np.uint64), kind="stable").astype(np.int64)


def epoch_order(dataset: TokenDataset, *, seed: int, epoch: int, global_batch: int, group_by_length: bool) -> Int64:
    """The order of the examples in epoch number `epoch` (from 0), int64 [n]; each stands in it once, but in a mixture.
    group_by_length: within windows of 64 global batches rows are sorted by length, which leaves little padding, and
    whole batches are shuffled; a ragged batch stays last."""
    n = len(dataset)
    order = _permutation(n, seed, epoch)
    if dataset.mixture:
        order = _draw_mixture(dataset.mixture, seed=seed, epoch=epoch)[order]
    if not group_by_length:
        return order
    full_length = n - n % global_batch
    windows = np.arange(full_length) // (SORT_WINDOW_BATCHES * global_batch)
    by_length = order[np.lexsort((dataset.lengths()[order[:full_length]], windows))]  # stable, window by window
    batches = by_length.reshape(-1, global_batch)
    return np.concatenate([batches[_permutation(len(batches), seed, epoch, 1)].ravel(), order[full_length:]])


def _draw_mixture(mixture: Sequence[tuple[int, float]], *, seed: int, epoch: int) -> Int64:
    """The rows of an epoch of a mixture, int64 [n]: as many as all parts have, of each part its share. A part goes on
    where it stopped an epoch before, in a new order at each pass over it."""
    sizes = [size for size, _ in mixture]
    bounds = np.rint(np.cumsum([0.0, *(share for _, share in mixture)]) * sum(sizes)).astype(np.int64)
    rows = []
    for number, size in enumerate(sizes):
        quota = int(bounds[number + 1] - bounds[number])
        first_pass, last_pass = epoch * quota // size, ((epoch + 1) * quota - 1) // size
        passes = [_permutation(size, seed, number, i, 2) for i in range(first_pass, last_pass + 1)]
        start = epoch * quota - first_pass * size
        rows.append(np.concatenate([*passes, np.empty(0, dtype=np.int64)])[start : start + quota] + sum(sizes[:number]))
    return np.concatenate(rows)


def collate(dataset: TokenDataset, indices: Int64, index: int, packed_width: int | None = None) -> MicroBatch:
    """The examples at `indices`, one a row, padded on the right; without any a row of padding that counts nothing.
    packed_width: several share a row of at most so many tokens, each with positions from 0, which keep them apart in
    the attention. Padding is masked by position, not by id: GPT-2's is its end-of-text token, which may count."""
    if not len(indices):
        padding = np.full((1, 2), PAD_ID, dtype=np.int64)
        return MicroBatch(input_ids=padding, labels=np.full_like(padding, IGNORE_INDEX), tokens=0, index=index)
    lengths = dataset.offsets[indices + 1] - dataset.offsets[indices]
    rows = pack_rows(lengths, packed_width) if packed_width else [[place] for place in range(len(indices))]
    width = max(int(lengths[row].sum()) for row in rows)
    input_ids = np.full((len(rows), width), PAD_ID, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORE_INDEX, dtype=np.int64)
    position_ids = np.zeros((len(rows), width), dtype=np.int64)
    for row, places in enumerate(rows):
        start = 0
        for place in places:
            ids, end = dataset.row(int(indices[place])), start + int(lengths[place])
            input_ids[row, start:end] = ids
            # never the first token, which the example before it would predict
            labels[row, start:end] = np.where(dataset.is_target(int(indices[place])), ids, IGNORE_INDEX)
            position_ids[row, start:end] = np.arange(end - start)
            start = end
        position_ids[row, start:] = np.arange(width - start)  # padding attends to itself only
    return MicroBatch(
        input_ids=input_ids,
        labels=labels,
        tokens=int(lengths.sum()),
        index=index,
        position_ids=position_ids if packed_width else None,
    )


def pack_rows(lengths: Int64, width: int) -> list[list[int]]:
    """Places of examples, by the rows of at most `width` tokens that hold them: few rows, of about one length."""
    rows = _first_fit(lengths, width)
    narrowest = max(int(lengths.max()), -(-int(lengths.sum()) // len(rows)))
    for narrower in np.linspace(narrowest, width, 8, dtype=np.int64)[:-1].tolist():
        if len(balanced := _first_fit(lengths, narrower)) == len(rows):
            return balanced
    return rows


def _first_fit(lengths: Int64, width: int) -> list[list[int]]:
    rows: list[list[int]] = []
    free: list[int] = []
    for place in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[place])
        row = next((i for i, room in enumerate(free) if room >= length), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(max(width, length))
        rows[row].append(place)
        free[row] -= length
    return rows


def step_batches(
    dataset: TokenDataset, order: Int64, step_in_epoch: int, batch: BatchConfig, rank: int
) -> list[MicroBatch]:
    """The micro-batches of `rank` in a step: j of rank r holds rows [(j * ranks + r) * micro : + micro] of the global
    batch; in the ragged last step of an epoch fewer rows, or a masked one."""
    start = step_in_epoch * batch.global_batch
    batch_indices = order[start : start + batch.global_batch]
    offsets = [(j * batch.world_size + rank) * batch.micro_batch_size for j in range(batch.gradient_accumulation_steps)]
    return [
        collate(dataset, batch_indices[offset : offset + batch.micro_batch_size], start + offset, batch.packed_width)
        for offset in offsets
    ]


def step_counts(dataset: TokenDataset, order: Int64, step_in_epoch: int, global_batch: int) -> tuple[int, int]:
    """(tokens, target tokens) of a global batch; every rank gets the same without asking the others."""
    indices = order[step_in_epoch * global_batch : (step_in_epoch + 1) * global_batch]
    lengths = dataset.offsets[indices + 1] - dataset.offsets[indices]
    return int(lengths.sum()), int(dataset.num_target_tokens[indices].sum())


@dataclass(kw_only=True, eq=False)
class TrainBatches:
    """The global batches of a run, step by step across its epochs."""

    dataset: TokenDataset
    batch_config: BatchConfig
    seed: int
    rank: int
    by_length: bool  #: bring rows of like length together, see `epoch_order`
    _orders: dict[int, Int64] = field(default_factory=dict, init=False)  # {epoch: its order} of the epoch drawn last

    def __call__(self, start_step: int, stop_step: int) -> Iterator[GlobalBatch]:
        """The batches after `start_step` steps, up to and without `stop_step`; each is drawn when it is asked for."""
        dataset, global_batch = self.dataset, self.batch_config.global_batch
        for step in range(start_step, stop_step):
            epoch, step_in_epoch = divmod(step, math.ceil(len(dataset) / global_batch))
            if epoch not in self._orders:
                sizes = {"epoch": epoch, "global_batch": global_batch}
                self._orders = {epoch: epoch_order(dataset, seed=self.seed, group_by_length=self.by_length, **sizes)}
            order = self._orders[epoch]
            num_tokens, num_target_tokens = step_counts(dataset, order, step_in_epoch, global_batch)
            yield GlobalBatch(
                step=step,
                epoch=epoch,
                example_ids=order[step_in_epoch * global_batch :][:global_batch].tolist(),
                micro_batches=step_batches(dataset, order, step_in_epoch, self.batch_config, self.rank),
                num_tokens=num_tokens,
                num_target_tokens=num_target_tokens,
            )


def eval_order(dataset: TokenDataset) -> Int64:
    """The order in which an evaluation takes the rows, int64 [n]: longest first, which leaves little padding, and a
    batch that does not fit in memory fails at once."""
    return np.argsort(-dataset.lengths(), kind="stable").astype(np.int64)


def eval_batches(dataset: TokenDataset, eval_batch: int, rank: int, world_size: int) -> Iterator[MicroBatch]:
    """The share of `rank` in one pass over all rows, which stand at `eval_order(dataset)[index:]`; every rank gets the
    same number of micro-batches, with masked rows at the end."""
    order = eval_order(dataset)
    for start in range(0, len(order), eval_batch * world_size):
        offset = start + rank * eval_batch
        yield collate(dataset, order[offset : offset + eval_batch], offset)
