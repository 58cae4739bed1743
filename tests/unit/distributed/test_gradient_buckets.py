"""Gradients on their way between ranks, by a stand-in for the other rank and its time."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from trainer.distributed.stepper import GradientBuckets

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
    answers: dict[str, Any] = {"get_backend": "gloo"}
    for name, answer in answers.items():
        monkeypatch.setattr(dist, name, lambda answer=answer: answer)
    monkeypatch.setattr(dist, "all_reduce", LateReduction)
    layer = nn.Linear(3, 2)
    return layer, GradientBuckets(list(layer.parameters()))


def test_a_discarded_steps_reduction_is_over_before_the_next_gradients_take_its_place(layer_and_buckets):
    """Else it would be added to them."""
    layer, buckets = layer_and_buckets
    for is_refused in (True, False):
        buckets.overlap()
        layer(torch.ones(1, 3)).sum().backward()
        if is_refused:
            buckets.finish_overlap()
            for parameter in layer.parameters():
                parameter.grad = None
    buckets.reduce()
    for parameter in layer.parameters():
        assert torch.equal(parameter.grad, torch.full_like(parameter, 1 + OTHER_RANKS_GRADIENT))
