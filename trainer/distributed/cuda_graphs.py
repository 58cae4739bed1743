"""Forward and backward of a micro-batch as one CUDA graph: recorded once for each shape, replayed at every step.

At the card's batch a GPU waits for Python, which starts some two thousand kernels a step. A replay starts them all at
once: the same kernels on the same addresses, and dropout draws from the seed that the generator has at the replay.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

WARM = 3  # eager calls of a shape before it is recorded: libraries choose kernels and make their workspaces in them
MOST = 4  # shapes that are recorded; rows of many lengths would fill the memory with graphs


class Graphs:
    """Takes the place of `work(ids, labels)` where a shape comes again and again; None where the caller must do it.

    `told` gets one line where recording failed; from then on everything is eager.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], trained: Sequence[nn.Parameter]):
        self.loss = loss
        self.trained = list(trained)
        self.told: list[str] = []
        self._seen: dict[Any, int] = {}
        self._recorded: dict[Any, Recorded] = {}
        self._pool: Any = None
        self._gradients: list[Tensor | None] | None = None  # all shapes write their gradients to the same addresses

    def backward(self, ids: Tensor, labels: Tensor, share: float) -> Tensor | None:
        """Each row's sum, with the gradients added to those that the weights have; None: not recorded."""
        held = [parameter.grad for parameter in self.trained]
        first = all(gradient is None for gradient in held)
        if not first and not self._ours(held):
            return None  # an eager micro-batch of this step has begun elsewhere
        graph = self._graph("first" if first else "more", ids, lambda *given: self._step(first, *given))
        if graph is None:
            return None
        if first:
            assert self._gradients is not None
            for parameter, gradient in zip(self.trained, self._gradients, strict=True):
                parameter.grad = gradient
        return graph.replay(ids, labels, share)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor | None:
        """Each row's sum without gradients; None: not recorded."""
        graph = self._graph("eval", ids, lambda ids, labels, _: self.loss(ids, labels)[1])
        return graph.replay(ids, labels, 1.0) if graph is not None else None

    def _ours(self, held: Sequence[Tensor | None]) -> bool:
        return self._gradients is not None and all(a is b for a, b in zip(held, self._gradients, strict=True))

    def _step(self, first: bool, ids: Tensor, labels: Tensor, share: Tensor) -> Tensor:
        total, rows = self.loss(ids, labels)
        made = torch.autograd.grad(total * share, self.trained, allow_unused=True)
        if self._gradients is None:
            self._gradients = list(made)
            return rows
        pairs = [(old, new) for old, new in zip(self._gradients, made, strict=True) if old is not None]
        old, new = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        (torch._foreach_copy_ if first else torch._foreach_add_)(old, new)
        return rows

    def _graph(self, kind: str, ids: Tensor, work: Callable[[Tensor, Tensor, Tensor], Tensor]) -> "Recorded | None":
        """The graph of this kind and shape, recorded now where its kernels are warm; None: run it eagerly."""
        key, shape = (kind, tuple(ids.shape)), tuple(ids.shape)
        if key in self._recorded:
            return self._recorded[key]
        self._seen[key] = self._seen.get(key, 0) + 1
        warm = self._seen[key] > WARM or (kind == "more" and ("first", shape) in self._recorded)
        if self.told or not warm or len(self._recorded) >= MOST:
            return None
        before = self._gradients
        try:
            self._recorded[key] = Recorded(work, ids, self._pool)
        except RuntimeError as problem:  # an operation that waits for the device, or not enough memory
            self._gradients = before
            self.told.append(f"steps are not recorded as CUDA graphs: {str(problem).partition(chr(10))[0]}")
            return None
        torch.cuda.empty_cache()  # what the eager calls used is of no more use
        self._pool = self._recorded[key].pool
        return self._recorded[key]


class Recorded:
    """One graph with its own inputs and outputs."""

    def __init__(self, work: Callable[[Tensor, Tensor, Tensor], Tensor], like: Tensor, pool: Any):
        self.ids, self.labels = torch.zeros_like(like), torch.zeros_like(like)
        self.share = torch.ones((), device=like.device)
        self.graph = torch.cuda.CUDAGraph()
        # Of this thread: NCCL's own thread may ask the device how it stands meanwhile.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.rows = work(self.ids, self.labels, self.share)
        self.pool = self.graph.pool()

    def replay(self, ids: Tensor, labels: Tensor, share: float) -> Tensor:
        """Run it on these inputs; the output is overwritten by the next replay."""
        self.ids.copy_(ids, non_blocking=True)
        self.labels.copy_(labels, non_blocking=True)
        self.share.fill_(share)
        self.graph.replay()
        return self.rows
