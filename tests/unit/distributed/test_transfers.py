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


@pytest.mark.parametrize(
    ("width", "options", "expected"), [(20, (64, None), 64), (64, (64, None), 64), (65, (64, 100), 100), (20, (), 20)]
)
def test_recorded_rows_are_padded_to_a_multiple_with_labels_that_do_not_count(width, options, expected):
    ids = np.ones((2, width), dtype=np.int64)
    micro_batch = MicroBatch(input_ids=ids, labels=ids, tokens=2 * width, index=0)
    padded, labels = copy_to_device(micro_batch, torch.device("cpu"), *options)
    assert padded.shape == labels.shape == (2, expected)
    assert int((labels != IGNORE_INDEX).sum()) == 2 * width


def test_numbers_of_a_step_are_read_without_waiting_for_the_one_that_was_launched_after_it(monkeypatch):
    """On a device that does in order what it was asked for, and only when it is waited for."""
    queue: list[Callable[[], object]] = []
    done: list[str] = []

    class Numbers:
        is_cuda, shape, dtype = True, (2,), torch.float64

    class Buffer:
        def copy_(self, numbers: Any, non_blocking: bool) -> None:
            assert non_blocking, "else the host waits here"
            queue.append(lambda: done.append("copied"))

        def tolist(self) -> list[float]:
            return [1.0, 2.0] * ("copied" in done)

    class Event:
        def record(self) -> None:
            self.place = len(queue)

        def synchronize(self) -> None:
            for work in queue[: self.place]:
                work()

    monkeypatch.setattr(torch, "empty", lambda *_, pin_memory, **__: Buffer() if pin_memory else None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    queue.append(lambda: done.append("step 1"))
    read = copy_to_host(Numbers())  # type: ignore[arg-type]
    queue.append(lambda: done.append("step 2"))
    assert read() == [1.0, 2.0]
    assert done == ["step 1", "copied"]


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


def test_a_discarded_steps_reduction_is_over_before_the_next_gradients_take_its_place(monkeypatch):
    """Else it would be added to them."""
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "all_reduce", LateReduction)
    layer = nn.Linear(3, 2)
    buckets = GradientBuckets(list(layer.parameters()))
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
