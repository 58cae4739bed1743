"""Forward and backward of a micro-batch as one CUDA graph: recorded once for each shape, replayed at every step.

At the card's batch a GPU waits for Python, which starts some two thousand kernels a step. A replay starts them all at
once: the same kernels on the same addresses, and dropout draws from the seed that the generator has at the replay.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Eager calls of a shape before it is recorded: libraries choose kernels and make their workspaces in them.
NUM_WARMUP_CALLS = 3
MAX_GRAPHS = 4  # shapes that are recorded; rows of many lengths would fill the memory with graphs


class CUDAGraphRunner:
    """Takes the place of `work(ids, labels)` where a shape comes again and again; None where the caller must do it.

    `capture_error` is one line where recording failed; from then on everything is eager.
    """

    def __init__(
        self, loss_fn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], trainable_params: Sequence[nn.Parameter]
    ):
        self.loss_fn = loss_fn
        self.trainable_params = list(trainable_params)
        self.capture_error = ""
        self._call_counts: dict[Any, int] = {}
        self._captured: dict[Any, CapturedGraph] = {}
        self._pool: Any = None
        self._static_grads: list[Tensor | None] | None = None  # all shapes write their gradients to the same addresses

    def backward(self, ids: Tensor, labels: Tensor, loss_weight: float) -> Tensor | None:
        """Each row's sum, with the gradients added to those that the weights have; None: not recorded."""
        grads = [parameter.grad for parameter in self.trainable_params]
        overwrite = all(gradient is None for gradient in grads)
        if not overwrite and not self._owns_grads(grads):
            return None  # an eager micro-batch of this step has begun elsewhere
        graph = self._get_or_capture(
            "overwrite" if overwrite else "accumulate", ids, lambda *inputs: self._forward_backward(overwrite, *inputs)
        )
        if graph is None:
            return None
        if overwrite:
            assert self._static_grads is not None
            for parameter, gradient in zip(self.trainable_params, self._static_grads, strict=True):
                parameter.grad = gradient
        return graph.replay(ids, labels, loss_weight)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor | None:
        """Each row's sum without gradients; None: not recorded."""
        graph = self._get_or_capture("eval", ids, lambda ids, labels, _: self.loss_fn(ids, labels)[1])
        return graph.replay(ids, labels, 1.0) if graph is not None else None

    def _owns_grads(self, grads: Sequence[Tensor | None]) -> bool:
        return self._static_grads is not None and all(a is b for a, b in zip(grads, self._static_grads, strict=True))

    def _forward_backward(self, overwrite: bool, ids: Tensor, labels: Tensor, loss_weight: Tensor) -> Tensor:
        loss_sum, row_losses = self.loss_fn(ids, labels)
        new_grads = torch.autograd.grad(loss_sum * loss_weight, self.trainable_params, allow_unused=True)
        if self._static_grads is None:
            self._static_grads = list(new_grads)
            return row_losses
        pairs = [(old, new) for old, new in zip(self._static_grads, new_grads, strict=True) if old is not None]
        static_grads, source_grads = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        (torch._foreach_copy_ if overwrite else torch._foreach_add_)(static_grads, source_grads)
        return row_losses

    def _get_or_capture(
        self, kind: str, ids: Tensor, fn: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> "CapturedGraph | None":
        """The graph of this kind and shape, recorded now where its kernels are warm; None: run it eagerly."""
        key, shape = (kind, tuple(ids.shape)), tuple(ids.shape)
        if key in self._captured:
            return self._captured[key]
        self._call_counts[key] = self._call_counts.get(key, 0) + 1
        is_warm = self._call_counts[key] > NUM_WARMUP_CALLS or (
            kind == "accumulate" and ("overwrite", shape) in self._captured
        )
        if self.capture_error or not is_warm or len(self._captured) >= MAX_GRAPHS:
            return None
        previous_grads = self._static_grads
        try:
            self._captured[key] = CapturedGraph(fn, ids, self._pool)
        except RuntimeError as error:  # an operation that waits for the device, or not enough memory
            self._static_grads = previous_grads
            self.capture_error = f"steps are not recorded as CUDA graphs: {str(error).partition(chr(10))[0]}"
            return None
        torch.cuda.empty_cache()  # what the eager calls used is of no more use
        self._pool = self._captured[key].pool
        return self._captured[key]


class CapturedGraph:
    """One graph with its own inputs and outputs."""

    def __init__(self, fn: Callable[[Tensor, Tensor, Tensor], Tensor], example_ids: Tensor, pool: Any):
        self.ids, self.labels = torch.zeros_like(example_ids), torch.zeros_like(example_ids)
        self.loss_weight = torch.ones((), device=example_ids.device)
        self.graph = torch.cuda.CUDAGraph()
        # Of this thread: NCCL's own thread may ask the device how it stands meanwhile.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.row_losses = fn(self.ids, self.labels, self.loss_weight)
        self.pool = self.graph.pool()

    def replay(self, ids: Tensor, labels: Tensor, loss_weight: float) -> Tensor:
        """Run it on these inputs; the output is overwritten by the next replay."""
        self.ids.copy_(ids, non_blocking=True)
        self.labels.copy_(labels, non_blocking=True)
        self.loss_weight.fill_(loss_weight)
        self.graph.replay()
        return self.row_losses
