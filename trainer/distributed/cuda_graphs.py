"""Forward and backward of a micro-batch as one CUDA graph: recorded once for each shape, verified, then replayed.

At small batches a GPU waits for Python, which launches some two thousand kernels a step. A replay launches them all at
once: the same kernels on the same addresses, and dropout draws from the seed that the generator has at the replay.
Before a recording is used it is replayed on the rows at hand and compared with the eager call just made.

`torch.cuda.make_graphed_callables` does not do: its gradients leave the graph through one AccumulateGrad a weight, an
eager kernel each for the second micro-batch and for the flat buffers that several ranks reduce; it records nothing
without gradients, so no evaluation; and after a capture that fails the generator would refuse the next dropout.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model import torch_internals

# Eager calls of a shape before it is recorded: libraries choose kernels and make their workspaces in them.
NUM_WARMUP_CALLS = 3
NOT_RECORDED = "steps are not recorded as CUDA graphs"
MAX_GRAPHS = 4  # shapes that are recorded; rows of many lengths would fill the memory with graphs

# Relative differences between a replay and the eager call of the same rows. Replayed kernels are the same, but some add
# in any order (atomics): float32 rounds sums of some thousand terms to about 1e-6; of bf16 the outputs differ by one of
# 2**-8, and the gradients' elements from those of fp32 by 4e-3 to 7e-3 (seen on a CPU, GPT-2 of 2 to 12 layers).
MAX_DIFFERENCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 5e-3}
NUM_SAMPLES = 64  # elements of each gradient that are compared one by one
# Of the whole gradient; a smaller one may be nothing but rounding, as that of OPT's key bias, which is 0 by its formula
# (1e-8 of the whole in bf16): its norm alone is compared.
MIN_SAMPLED_SHARE = 1e-4

BackwardFn = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Measured:
    """What a call is compared by: its loss, every gradient's norm, and some elements of each over its mean size."""

    loss: float
    grad_norm: float
    grad_norms: tuple[float, ...]
    samples: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def of(cls, row_losses: Tensor, grads: Sequence[Tensor | None]) -> "Measured":
        """Of row losses [rows] and gradients; waits for the device."""
        present = [gradient for gradient in grads if gradient is not None]
        norms = [float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) for gradient in present]
        samples = []
        for gradient, norm in zip(present, norms, strict=True):
            root_mean_square = norm / math.sqrt(gradient.numel()) or 1.0
            elements = gradient.detach().flatten()[:: max(1, gradient.numel() // NUM_SAMPLES)][:NUM_SAMPLES]
            samples.append(tuple((elements.double() / root_mean_square).tolist()))
        return cls(float(row_losses.double().sum()), math.hypot(*norms), tuple(norms), tuple(samples))

    @property
    def is_finite(self) -> bool:
        """Whether there is anything to compare with."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def relative_difference(self, other: "Measured") -> float:
        """The largest of three: of the losses, of a gradient's norm over that of all, and of the sampled elements as
        vectors; NaN where one is, infinity where the other has not the same gradients.

        Of the sampled elements each rounds its own: what counts is how far both are from their middle.
        """
        if list(map(len, self.samples)) != list(map(len, other.samples)):
            return math.inf
        scale = self.grad_norm or 1.0
        is_sampled = [norm >= MIN_SAMPLED_SHARE * scale for norm in self.grad_norms]
        own, others = (list(chain(*compress(measured.samples, is_sampled))) for measured in (self, other))
        pairs = zip(self.grad_norms, other.grad_norms, strict=True)
        differences = [
            abs(self.loss - other.loss) / (abs(self.loss) or 1.0),
            *(abs(a - b) / scale for a, b in pairs),
            math.dist(own, others) / 2 / (math.hypot(*own) or 1.0),
        ]
        return math.nan if any(map(math.isnan, differences)) else max(differences)

    def __str__(self) -> str:
        return f"loss {self.loss:.6g} and gradient norm {self.grad_norm:.6g}"


def root_cause(error: BaseException) -> str:
    """The first line of the operation that failed: what ends after it, as a capture does, complains of it, too."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0] or type(error).__name__


def get_rng_state(device: torch.device) -> Tensor:
    """Where the device's generator stands."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_rng_state(device: torch.device, state: Tensor) -> None:
    """Put the device's generator there."""
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)


@contextmanager
def unchanged_rng(device: torch.device) -> Iterator[None]:
    """Leave the generator as it was found: what is drawn inside is drawn again afterwards."""
    state = get_rng_state(device)
    try:
        yield
    finally:
        set_rng_state(device, state)


class CUDAGraphRunner:
    """Takes the place of an eager forward and backward where a shape comes again and again.

    `capture_error` is one line where a recording failed or was not equal to the eager call; from then on all is eager.
    """

    def __init__(
        self,
        loss_fn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        trainable_params: Sequence[nn.Parameter],
        eager_backward: BackwardFn,
        eager_forward: Callable[[Tensor, Tensor], Tensor],
        *,
        precision: str,
        static_grads: list[Tensor] | None = None,
        checks: list[str] | None = None,
    ):
        """`eager_backward(ids, labels, loss_weight)` and `eager_forward(ids, labels)`: what is done where nothing is
        recorded; the first adds to the gradients.

        `static_grads`: where both leave them, if several ranks reduce them from one flat buffer. `checks`: gets a line
        for each recording that was compared with its eager call.
        """
        self.loss_fn = loss_fn
        self.trainable_params = list(trainable_params)
        self.eager_backward, self.eager_forward = eager_backward, eager_forward
        self.max_difference = MAX_DIFFERENCE[precision]
        self.capture_error = ""
        self.checks = [] if checks is None else checks
        self._call_counts: dict[Any, int] = {}
        self._captured: dict[Any, CapturedGraph] = {}
        self._pool: Any = None
        # All shapes write their gradients to the same addresses; None: those of the first recording.
        self._static_grads: list[Tensor | None] | None = None if static_grads is None else list(static_grads)

    def backward(self, ids: Tensor, labels: Tensor, loss_weight: float) -> Tensor:
        """Each row's sum; the gradients are added to those that the weights have."""
        grads = [parameter.grad for parameter in self.trainable_params]
        overwrite = all(gradient is None for gradient in grads)
        kind = "overwrite" if overwrite else "accumulate"
        if not overwrite and not self._owns_grads(grads):
            return self.eager_backward(ids, labels, loss_weight)  # an eager micro-batch of this step came before
        graph = self._find(kind, ids)
        if graph is not None:
            self._use_static_grads()
            return graph.replay(ids, labels, loss_weight)
        if not self._should_capture(kind, ids):
            return self._call_eagerly(self.eager_backward, ids, labels, loss_weight)
        return self._capture_backward(kind, ids, labels, loss_weight)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Each row's sum without gradients."""
        graph = self._find("eval", ids)
        if graph is not None:
            return graph.replay(ids, labels, 1.0)
        row_losses = self._call_eagerly(self.eager_forward, ids, labels)
        if self._should_capture("eval", ids):
            with self._gives_up_on_error():
                graph = self._capture("eval", ids, lambda ids, labels, _: self.loss_fn(ids, labels)[1])
                replayed = Measured.of(graph.replay(ids, labels, 1.0), [])
                self._keep_if_equal("eval", ids, graph, Measured.of(row_losses, []), replayed)
        return row_losses

    def _find(self, kind: str, ids: Tensor) -> "CapturedGraph | None":
        """A recording of this shape; none after a failure, which gave the generator a state that no recording knows."""
        return None if self.capture_error else self._captured.get((kind, tuple(ids.shape)))

    def _call_eagerly(self, call: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Without the recordings, where there is not enough memory beside what they hold."""
        may_repeat = bool(self._captured) and all(parameter.grad is None for parameter in self.trainable_params)
        rng_before = get_rng_state(inputs[0].device)
        try:
            return call(*inputs)
        except torch.OutOfMemoryError as error:
            if not may_repeat:
                raise
            self.capture_error = f"{NOT_RECORDED}: beside the recordings {root_cause(error)}"
        for parameter in self.trainable_params:
            parameter.grad = None
        self._captured.clear()
        self._static_grads = None
        if inputs[0].is_cuda:
            torch.cuda.synchronize(inputs[0].device)  # a replay of what is dropped may still be under way
            torch.cuda.empty_cache()
        set_rng_state(inputs[0].device, rng_before)
        return call(*inputs)

    def _capture_backward(self, kind: str, ids: Tensor, labels: Tensor, loss_weight: float) -> Tensor:
        """The eager call, and a recording of it that is kept where its replay gives the same."""
        before: list[Tensor | None] = []
        with self._gives_up_on_error():
            before = _clone_all([p.grad for p in self.trainable_params])
        rng_before = get_rng_state(ids.device)
        row_losses = self.eager_backward(ids, labels, loss_weight)
        if self.capture_error:
            return row_losses
        rng_after = get_rng_state(ids.device)
        eager_grads = [p.grad for p in self.trainable_params]
        is_kept, overwritten = False, None
        with self._gives_up_on_error():
            eager = Measured.of(row_losses, eager_grads)
            graph = self._capture(kind, ids, lambda *inputs: self._forward_backward(kind == "overwrite", *inputs))
            assert self._static_grads is not None
            overwritten = _clone_all(eager_grads) if self._owns_grads(eager_grads) else None
            _copy_all(before, self._static_grads)
            set_rng_state(ids.device, rng_before)
            replayed = Measured.of(graph.replay(ids, labels, loss_weight), self._static_grads)
            is_kept = self._keep_if_equal(kind, ids, graph, eager, replayed)
        if is_kept:
            self._use_static_grads()
        elif overwritten is not None and self._static_grads is not None:  # what the eager call left
            _copy_all(overwritten, self._static_grads)
        set_rng_state(ids.device, rng_after)
        return row_losses

    def _keep_if_equal(
        self, kind: str, ids: Tensor, graph: "CapturedGraph", eager: Measured, replayed: Measured
    ) -> bool:
        if not eager.is_finite:
            return False  # nothing to compare with: the step is refused, and the shape recorded at its next call
        difference = eager.relative_difference(replayed)
        label = f"{kind} {'x'.join(map(str, ids.shape))}"
        if not difference <= self.max_difference:  # NaN is never equal
            self.capture_error = (
                f"{NOT_RECORDED}: the recording of {label} gives {replayed}, the eager step {eager}: "
                f"{difference:.1e} apart, at most {self.max_difference:.0e} is rounding"
            )
            return False
        self.checks.append(f"{label} recorded, checked to {difference:.0e}")
        self._captured[kind, tuple(ids.shape)] = graph
        self._pool = graph.pool
        return True

    def _use_static_grads(self) -> None:
        assert self._static_grads is not None
        for parameter, gradient in zip(self.trainable_params, self._static_grads, strict=True):
            parameter.grad = gradient

    def _owns_grads(self, grads: Sequence[Tensor | None]) -> bool:
        return self._static_grads is not None and all(a is b for a, b in zip(grads, self._static_grads, strict=True))

    def _forward_backward(self, overwrite: bool, ids: Tensor, labels: Tensor, loss_weight: Tensor) -> Tensor:
        loss_sum, row_losses = self.loss_fn(ids, labels)
        new_grads = torch.autograd.grad(loss_sum * loss_weight, self.trainable_params, allow_unused=True)
        if self._static_grads is None:
            self._static_grads = list(new_grads)
            return row_losses
        pairs = [
            (old, new)
            for old, new in zip(self._static_grads, new_grads, strict=True)
            if old is not None and new is not None
        ]
        static_grads, source_grads = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        (torch_internals.foreach_copy_ if overwrite else torch_internals.foreach_add_)(static_grads, source_grads)
        return row_losses

    def _should_capture(self, kind: str, ids: Tensor) -> bool:
        """Whether a shape's kernels are warm and there is room for one more recording."""
        shape = tuple(ids.shape)
        count = self._call_counts[kind, shape] = self._call_counts.get((kind, shape), 0) + 1
        is_warm = count > NUM_WARMUP_CALLS or (kind == "accumulate" and ("overwrite", shape) in self._captured)
        return is_warm and not self.capture_error and len(self._captured) < MAX_GRAPHS

    def _capture(self, kind: str, ids: Tensor, fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> "CapturedGraph":
        """A recording; where it fails generator, stream and memory are as they were."""
        previous_grads = self._static_grads
        pool = self._pool or (torch.cuda.graph_pool_handle() if ids.is_cuda else None)
        try:
            with _restored_on_failure(ids.device, pool):
                graph = CapturedGraph(fn, ids, pool)
        except BaseException:
            self._static_grads = previous_grads
            raise
        if ids.is_cuda:
            torch.cuda.empty_cache()  # what the eager calls used is of no more use
        return graph

    @contextmanager
    def _gives_up_on_error(self) -> Iterator[None]:
        """All is eager from there on: an operation that waits for the device, or not enough memory."""
        try:
            yield
        except RuntimeError as error:
            self.capture_error = f"{NOT_RECORDED}: {root_cause(error)}"


def _clone_all(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.clone() for tensor in tensors]


def _copy_all(sources: Sequence[Tensor | None], targets: Sequence[Tensor | None]) -> None:
    for source, target in zip(sources, targets, strict=True):
        if source is not None and target is not None:
            target.copy_(source)


class CapturedGraph:
    """One graph with its own inputs and outputs."""

    def __init__(self, fn: Callable[[Tensor, Tensor, Tensor], Tensor], example_ids: Tensor, pool: Any):
        self.ids, self.labels = torch.zeros_like(example_ids), torch.zeros_like(example_ids)
        self.loss_weight = torch.ones((), device=example_ids.device)
        # The first use of a kernel loads it: not in a capture.
        for add_or_copy in (torch_internals.foreach_add_, torch_internals.foreach_copy_):
            add_or_copy([torch.zeros_like(self.loss_weight)], [self.loss_weight])
        self.graph = torch.cuda.CUDAGraph()
        # Of this thread: NCCL's own thread may ask the device how it stands meanwhile.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.row_losses = fn(self.ids, self.labels, self.loss_weight)
        self.pool = pool

    def replay(self, ids: Tensor, labels: Tensor, loss_weight: float) -> Tensor:
        """Run it on these inputs; the output is overwritten by the next replay."""
        self.ids.copy_(ids, non_blocking=True)
        self.labels.copy_(labels, non_blocking=True)
        self.loss_weight.fill_(loss_weight)
        self.graph.replay()
        return self.row_losses


@contextmanager
def _restored_on_failure(device: torch.device, pool: Any) -> Iterator[None]:
    """Generator, current stream and allocator as they were, where a capture fails.

    An invalidated capture leaves torch's default generator "capturing" and the side stream current: the next dropout
    would raise. Another state object of the same seed and offset is not capturing. It also leaves the allocator giving
    to the pool: what the capture had taken would be held for good, and no cached memory released when it runs out.
    """
    if device.type != "cuda":
        with unchanged_rng(device):
            yield
        return
    index = device.index or 0
    generator, stream = torch.cuda.default_generators[index], torch.cuda.current_stream(device)
    saved = generator.clone_state()
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(saved)
        with suppress(RuntimeError):  # a capture that came to its end, as one out of memory does, has let go itself
            torch_internals.release_capture_pool(index, pool)
        raise
