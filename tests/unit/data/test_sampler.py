"""The order of an epoch and a rank's share of a step: pure functions, the same examples for every number of ranks."""

from dataclasses import replace

import numpy as np
import pytest

from trainer.config.batch_config import BatchConfig
from trainer.data.dataset import TokenDataset
from trainer.data.sampler import (
    IGNORE_INDEX,
    PAD_ID,
    TrainBatches,
    epoch_order,
    eval_batches,
    step_batches,
)

EOS = PAD_ID  # these rows end with the id that pads them, as with GPT-2


def make_dataset(lengths, first=()):
    """Rows of the given lengths with distinct ids (from 10), each ending with EOS; `first` counts from position 1."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(10, 10 + offsets[-1], dtype=np.uint16)
    ids[offsets[1:] - 1] = EOS
    masks = [np.arange(length) >= start for length, start in zip(lengths, first, strict=False)]
    return TokenDataset(ids=ids, offsets=offsets, target_mask=np.concatenate(masks).astype(np.uint8) if first else None)


def make_batch(micro, accumulation, ranks):
    return BatchConfig(micro_batch_size=micro, gradient_accumulation_steps=accumulation, world_size=ranks)


def make_order(dataset, **overrides):
    options = {"seed": 1, "epoch": 0, "global_batch": 4, "group_by_length": False, **overrides}
    return epoch_order(dataset, **options)


def target_rows(micro_batches):
    """The counted tokens of each row that has any."""
    rows = [row for m in micro_batches for row in zip(m.input_ids, m.labels, strict=True)]
    return [ids[labels != IGNORE_INDEX].tolist() for ids, labels in rows if (labels != IGNORE_INDEX).any()]


@pytest.mark.parametrize("by_length", [False, True])
def test_an_epoch_of_a_mixture_has_each_share_and_later_epochs_the_rest(by_length):
    sizes, shares = (30, 20, 50), (0.7, 0.255, 0.045)
    mixture = tuple(zip(sizes, shares, strict=True))
    rows = replace(make_dataset([2 + i % 7 for i in range(100)]), mixture=mixture)
    orders = [make_order(rows, epoch=epoch, group_by_length=by_length) for epoch in range(12)]
    starts, counts = np.cumsum([0, *sizes]), np.zeros(100, dtype=int)
    for order in orders:
        assert np.histogram(order, starts)[0].tolist() == [70, 26, 4], "70, 25.5 and 4.5 of 100, in all 100"
        counts += np.bincount(order, minlength=100)
    for start, size, least in zip(starts, sizes, (28, 15, 0), strict=False):  # 840, 312 and 48 draws
        part = counts[start : start + size]
        assert (part.min(), part.max() - part.min() <= 1) == (least, True), "no row again before all have come"
    assert (orders[0] != make_order(rows, seed=2, group_by_length=by_length)).any()
    options = {"dataset": rows, "seed": 1, "rank": 0, "by_length": by_length}
    through = TrainBatches(batch_config=make_batch(4, 1, 1), **options)(0, 80)
    resumed = TrainBatches(batch_config=make_batch(1, 2, 2), **options)(37, 80)
    assert [b.example_ids for b in through][37:] == [b.example_ids for b in resumed]


def test_the_epoch_order_depends_on_seed_and_epoch_and_nothing_else():
    rows = make_dataset([4] * 50)
    first = make_order(rows)
    np.testing.assert_array_equal(first, make_order(rows))
    assert (first != make_order(rows, epoch=1)).any()
    assert (first != make_order(rows, seed=2)).any()
    # frozen on purpose: another order would change every committed loss curve (numpy keeps raw streams stable)
    assert make_order(make_dataset([4] * 8)).tolist() == [2, 0, 1, 4, 5, 6, 7, 3]
    grouped = make_order(make_dataset([5, 3, 9, 4, 7, 2, 8, 6, 3]), global_batch=2, group_by_length=True)
    assert grouped.tolist() == [6, 2, 8, 0, 7, 4, 5, 1, 3]


@pytest.mark.parametrize(
    ("ranks", "micro", "accumulation"), [(1, 6, 1), (1, 1, 6), (2, 3, 1), (2, 1, 3), (3, 2, 1), (3, 1, 2)]
)
@pytest.mark.parametrize(("n", "by_length"), [(12, True), (13, False), (5, False)])
def test_the_ranks_share_out_every_step_of_every_epoch_exactly(n, by_length, ranks, micro, accumulation):
    rows, batch = make_dataset([3 + i % 4 for i in range(n)]), make_batch(micro, accumulation, ranks)
    options = {"dataset": rows, "batch_config": batch, "seed": 1, "by_length": by_length}
    num_steps = -(-n // 6)
    shares = [list(TrainBatches(**options, rank=rank)(0, 2 * num_steps)) for rank in range(ranks)]
    for epoch in (0, 1):
        order = make_order(rows, epoch=epoch, global_batch=6, group_by_length=by_length)
        seen, ids = [], []
        for step_in_epoch in range(num_steps):
            step = [share[epoch * num_steps + step_in_epoch] for share in shares]
            assert {(b.step, b.epoch) for b in step} == {(epoch * num_steps + step_in_epoch, epoch)}
            assert {len(b.micro_batches) for b in step} == {accumulation}
            in_order = [b.micro_batches[j] for j in range(accumulation) for b in step]
            seen, ids = seen + target_rows(in_order), ids + step[0].example_ids
            counted = sum(int((m.labels != IGNORE_INDEX).sum()) for m in in_order)
            assert {(b.num_tokens, b.num_target_tokens) for b in step} == {(sum(m.tokens for m in in_order), counted)}
        # the global batch is the same list of rows in the same order, however it is cut
        assert seen == [rows.row(i)[1:].tolist() for i in order]
        assert ids == order.tolist()
    resumed = next(TrainBatches(**options, rank=0)(num_steps, 2 * num_steps))  # without what came before it
    assert resumed.example_ids == shares[0][num_steps].example_ids


def test_padding_is_masked_by_position_and_the_end_of_text_token_counts():
    (micro_batch,) = step_batches(make_dataset([5, 3], first=[2, 1]), np.arange(2), 0, make_batch(2, 1, 1), 0)
    assert micro_batch.input_ids.tolist() == [[10, 11, 12, 13, EOS], [15, 16, EOS, EOS, EOS]]
    assert micro_batch.labels.tolist() == [
        [IGNORE_INDEX, IGNORE_INDEX, 12, 13, EOS],
        [IGNORE_INDEX, 16, EOS, IGNORE_INDEX, IGNORE_INDEX],  # the same token counts at position 2 and not behind it
    ]
    assert micro_batch.tokens == 8


def test_a_micro_batch_knows_the_place_of_its_first_row():
    rows, batch = make_dataset([3] * 10), make_batch(1, 2, 2)
    actual = [micro_batch.index for rank in (0, 1) for micro_batch in step_batches(rows, np.arange(10), 1, batch, rank)]
    assert actual == [4, 6, 5, 7]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("eval_batch", [1, 2, 5, 40])
def test_evaluation_sees_every_row_once_and_every_rank_does_as_many_forwards(ranks, eval_batch):
    rows = make_dataset([3 + i % 6 for i in range(11)])
    shares = [list(eval_batches(rows, eval_batch, rank, ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    seen = target_rows(micro_batch for share in shares for micro_batch in share)
    assert sorted(seen) == sorted(rows.row(i)[1:].tolist() for i in range(11))
    assert shares[0][0].input_ids.shape[1] == 8  # the longest row comes first, so that memory runs out at once or never
