"""Rows of many lengths take few widths where steps are recorded; numbers are read when they are there."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from trainer.data.sampler import IGNORE_INDEX, MicroBatch
from trainer.distributed.engine import copy_to_device, copy_to_host


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
