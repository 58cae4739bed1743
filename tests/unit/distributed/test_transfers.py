"""What goes to a device and between ranks: padded rows, numbers that are read when they are there, and gradients."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from trainer.data.sampler import IGNORE_INDEX, MicroBatch
from trainer.distributed.engine import copy_to_device, copy_to_host
from trainer.distributed.stepper import GradientBuckets


@pytest.mark.parametrize(("width", "max_width", "expected"), [(20, None, 64), (64, None, 64), (65, 100, 100)])
def test_recorded_rows_are_padded_to_a_multiple_with_labels_that_do_not_count(width, max_width, expected):
    ids = np.ones((2, width), dtype=np.int64)
    micro_batch = MicroBatch(input_ids=ids, labels=ids, tokens=2 * width, index=0)
    device = torch.device("cpu")
    padded, labels = copy_to_device(micro_batch, device, 64, max_width)
    assert padded.shape == labels.shape == (2, expected)
    assert int((labels != IGNORE_INDEX).sum()) == 2 * width
    assert copy_to_device(micro_batch, device)[0].shape == (2, width)


class LateStream:
    """A device that does in order what it was asked for, and only when it is waited for."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], object]] = []

    def run(self, num_pieces: int) -> None:
        while len(self.queue) and num_pieces:
            self.queue.pop(0)()
            num_pieces -= 1


def test_numbers_of_a_step_are_read_without_waiting_for_the_one_that_was_launched_after_it(monkeypatch):
    stream, done = LateStream(), []

    class Numbers:
        is_cuda, shape, dtype = True, (2,), torch.float64

    class Buffer:
        def copy_(self, numbers: Any, non_blocking: bool) -> None:
            assert non_blocking, "else the host waits here"
            stream.queue.append(lambda: done.append("copied"))

        def tolist(self) -> list[float]:
            return [1.0, 2.0] * ("copied" in done)

    class Event:
        def record(self) -> None:
            self.place = len(stream.queue)

        def synchronize(self) -> None:
            stream.run(self.place)

    monkeypatch.setattr(torch, "empty", lambda *_, pin_memory, **__: Buffer() if pin_memory else None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    stream.queue.append(lambda: done.append("step 1"))
    read = copy_to_host(Numbers())  # type: ignore[arg-type]
    stream.queue.append(lambda: done.append("step 2"))
    assert read() == [1.0, 2.0]
    assert done == ["step 1", "copied"]


# --- gradients, by a stand-in for the other rank and its time ---

OTHER_RANKS_GRADIENT = 100.0


class LateReduction:
    """A reduction with a rank whose gradient is the same everywhere: done when it is waited for, and no sooner."""

    def __init__(self, flat: torch.Tensor, async_op: bool = False):
        self.flat, self.is_done = flat, False
        if not async_op:
            self.wait()

    def wait(self) -> None:
        self.flat.add_(0 if self.is_done else OTHER_RANKS_GRADIENT)
        self.is_done = True


@pytest.fixture
def layer_and_buckets(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Linear, GradientBuckets]:
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "all_reduce", LateReduction)
    layer = nn.Linear(3, 2)
    return layer, GradientBuckets(list(layer.parameters()))


def test_a_discarded_steps_reduction_is_over_before_the_next_gradients_take_its_place(layer_and_buckets):
    """Else it would be added to them."""
    layer, buckets = layer_and_buckets
    for is_refused in (True, False):
        buckets.is_overlapping = True
        layer(torch.ones(1, 3)).sum().backward()
        if is_refused:
            buckets.finish_overlap()
            for parameter in layer.parameters():
                parameter.grad = None
    buckets.reduce()
    for parameter in layer.parameters():
        assert torch.equal(parameter.grad, torch.full_like(parameter, 1 + OTHER_RANKS_GRADIENT))
