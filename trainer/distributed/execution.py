"""How steps are computed: one frozen plan, printed and recorded as it is, in whose place a fallback puts another at a
step boundary; and CUDA graphs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trainer.config import choices
from trainer.config.errors import first_line
from trainer.config.settings import Settings
from trainer.distributed.process_group import DistContext
from trainer.distributed.stepper import PlainStepper
from trainer.model import torch_internals
from trainer.model.build import TrainableModel
from trainer.model.loss import uses_gpu_form

# Eager calls of a shape before it is recorded: libraries choose kernels and make their workspaces in them.
NUM_WARMUP_CALLS = 3
MAX_GRAPHS = 4  # shapes that are recorded; rows of many lengths would fill the memory with graphs

# Relative differences between a replay and the eager call of the same rows. Replayed kernels are the same, but some add
# in any order (atomics): float32 rounds sums of some thousand terms to about 1e-6; of bf16 the outputs differ by one of
# 2**-8, and the gradients' elements from those of fp32 by 4e-3 to 7e-3 (seen on a CPU, GPT-2 of 2 to 12 layers).
MAX_DIFFERENCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 5e-3}
# Of the whole gradient; a smaller one may be nothing but rounding, as that of OPT's key bias, which is 0 by its formula
# (1e-8 of the whole in bf16): its norm alone is compared.
MIN_COMPARED_SHARE = 1e-4

Grads = Sequence[Tensor | None]


@dataclass(frozen=True, kw_only=True)
class ExecutionPlan:
    """How forward, backward and update are computed; none of it changes the numbers beyond rounding."""

    precision: str  #: fp32, or the type that autocast gives to products: bf16, fp16
    cuda_graphs: bool  #: forward and backward of shapes that come again are recorded and replayed
    eager_reason: str  #: why they are not; empty where they are
    blockwise_attention: bool  #: dropout, and GPT-2's attention with it, by `trainer.model.attention`
    packed_rows: bool  #: several examples share a row, which transformers' own attention masks from one another
    frozen_dtype: Literal["float32", "bfloat16"]  #: in which the frozen base is held
    chunked_loss: bool  #: logits are made and dropped in pieces; else all at once, by the model itself
    overlaps_reduction: bool  #: gradients are reduced over the ranks while the step's last backward runs
    finite_check: Literal["device", "host"]  #: who leaves out the update of a step that is not finite
    steps_in_flight: Literal[1, 2]  #: 2: a step is launched before the numbers of the one before it are read

    @property
    def path(self) -> str:
        return "graphs" if self.cuda_graphs else "eager"

    def describe(self) -> str:
        parts = [
            "CUDA graphs" if self.cuda_graphs else f"eager ({self.eager_reason})",
            "blockwise attention and dropout" * self.blockwise_attention,
            "packed rows" * self.packed_rows,
            "frozen weights in bfloat16" * (self.frozen_dtype == "bfloat16"),
            "whole logits" * (not self.chunked_loss),
            "gradients reduced during the backward" * self.overlaps_reduction,
            "one step ahead" * (self.steps_in_flight == 2),
        ]
        return ", ".join(filter(None, parts))

    def as_entry(self, step: int, reason: str) -> dict[str, Any]:
        """For run.json: from this step on, steps run by this plan."""
        return {"step": step, "reason": reason, "path": self.path, **asdict(self)}


def find_eager_reason(settings: Settings, *, is_gpu: bool, stage: int) -> str:
    """Why steps cannot be recorded as CUDA graphs; empty where they can, whatever `--execution` says."""
    if not is_gpu:
        return "no GPU"
    if stage:
        return f"ZeRO {stage}"
    if settings.data.packing:
        return "packed rows rarely have the same shape twice"
    return settings.graph_blocker


def holds_frozen_in_bf16(settings: Settings, *, precision: str, stage: int) -> bool:
    """Whether the frozen base is held in bfloat16. ZeRO 3 shards weights of one type."""
    is_multiplied = settings.lora.kind in get_args(choices.Adapter)  # another method may do more with its weights
    return precision == "bf16" and stage < 3 and settings.mode == "lora" and not settings.model.quant and is_multiplied


def make_execution_plan(
    settings: Settings, dist_context: DistContext, *, stage: int, precision: str, model_dropout: float
) -> ExecutionPlan:
    """The plan of a run. `stage`: of ZeRO; `model_dropout`: the largest dropout probability of the base model."""
    is_gpu = uses_gpu_form(dist_context.device)
    eager_reason = find_eager_reason(settings, is_gpu=is_gpu, stage=stage)
    if not eager_reason and settings.engine.execution == "eager":
        eager_reason = "--execution eager"
    dropout = max(model_dropout, settings.lora.dropout if settings.mode == "lora" else 0.0)
    is_guarded = stage == 0 and settings.train.optim == "adamw_fused"  # leaves an update out on the device's word
    return ExecutionPlan(
        precision=precision,
        cuda_graphs=not eager_reason,
        eager_reason=eager_reason,
        blockwise_attention=not (is_gpu or settings.data.packing) and dropout > 0,
        packed_rows=settings.data.packing,
        frozen_dtype="bfloat16" if holds_frozen_in_bf16(settings, precision=precision, stage=stage) else "float32",
        chunked_loss=True,  # until the model's own logits say otherwise
        overlaps_reduction=stage == 0 and dist_context.world_size > 1 and bool(eager_reason),
        finite_check="device" if is_guarded else "host",
        steps_in_flight=2 if is_gpu and is_guarded else 1,
    )


def cast_frozen_weights(model: TrainableModel) -> list[nn.Module]:
    """Round every frozen float32 weight that only goes into products to bfloat16, as autocast would in every forward;
    returns the layers that have them. A run is exported from its checkpoint and the base as it was before training."""
    layers = [layer for layer in find_frozen_layers(model) if layer.weight.dtype == torch.float32]
    for layer in layers:
        layer.weight.data = layer.weight.detach().to(torch.bfloat16)
    return layers


def find_frozen_layers(model: TrainableModel) -> list[nn.Module]:
    """Layers with a frozen weight, without the output layer (maybe a tied one) and those of DoRA (it takes norms)."""
    layers: list[Any] = list(model.module.modules())
    excluded = {layer.base_layer for layer in layers if len(getattr(layer, "lora_magnitude_vector", None) or ())}
    excluded.add(model.causal.get_output_embeddings())
    products = [layer for layer in layers if type(layer) in (Conv1D, nn.Linear) and layer not in excluded]
    return [layer for layer in products if not layer.weight.requires_grad]


# --- CUDA graphs ---


def relative_difference(row_losses: Tensor, grads: Grads, other_losses: Tensor, other_grads: Grads) -> float:
    """The largest of three: of the losses, of a weight's gradient norm over that of all, and of the gradients' elements
    over their size, weight by weight, from their middle, as each side rounds; NaN where one is, infinity where the
    other has not the same gradients. Waits for the device."""
    if [gradient is None for gradient in grads] != [gradient is None for gradient in other_grads]:
        return float("inf")
    losses, others = row_losses.double().sum(), other_losses.double().sum()
    differences = [(losses - others).abs() / losses.abs().clamp(min=1e-30)]
    pairs = [(a, b) for a, b in zip(grads, other_grads, strict=True) if a is not None and b is not None]
    if pairs:
        norms, other_norms, distances = (
            torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors])
            for tensors in ((a for a, _ in pairs), (b for _, b in pairs), (a - b for a, b in pairs))
        )
        norm = torch.linalg.vector_norm(norms).clamp(min=1e-30)
        is_compared = norms >= MIN_COMPARED_SHARE * norm
        element_differences = (distances / norms)[is_compared] / 2  # none of rows that count nothing: all is 0
        mean_square = element_differences.square().sum() / is_compared.sum().clamp(min=1)
        differences += [(norms - other_norms).abs().max() / norm, mean_square.sqrt()]
    return float(torch.stack(differences).max())


class CUDAGraphRunner:
    """Forward and backward of a micro-batch as one CUDA graph: recorded once for each shape, verified, then replayed.

    At small batches a GPU waits for Python; a replay launches all kernels of a step at once. Before a recording is used
    it is replayed on the rows at hand, with the same dropout masks, and compared with the eager call just made.
    `capture_error` is one line where that fails; from then on all is eager.

    `torch.cuda.make_graphed_callables` does not do: its gradients leave the graph through one AccumulateGrad a weight,
    an eager kernel each for the second micro-batch and for the flat buffers that several ranks reduce; and after a
    capture that fails the generator would refuse the next dropout.
    """

    def __init__(self, stepper: PlainStepper, *, precision: str, checks: list[str]):
        """`checks`: gets a line for each recording that was compared with its eager call."""
        self.stepper, self.checks = stepper, checks  # the first does what is not recorded
        self.trainable_params = stepper.trainable_params
        self.max_difference = MAX_DIFFERENCE[precision]
        self.capture_error = ""
        self._call_counts: dict[Any, int] = {}
        self.captured: dict[Any, CapturedGraph] = {}  #: by kind and shape
        self._pool: Any = None
        # All shapes write their gradients to the same addresses: of several ranks to the flat buffer that is reduced,
        # else to those of the first recording.
        self._static_grads: Grads | None = list(stepper.buckets.views.values()) if stepper.buckets else None

    def backward(self, ids: Tensor, labels: Tensor, loss_weight: float) -> Tensor:
        """Each row's sum; the gradients are added to those that the weights have."""
        grads = self._grads()
        kind = "overwrite" if all(gradient is None for gradient in grads) else "accumulate"
        if kind == "accumulate" and not self._owns_grads(grads):
            return self.stepper.backward(ids, labels, loss_weight)  # an eager micro-batch of this step came before
        if graph := self._find(kind, ids):
            self._use_static_grads()
            return graph.replay(ids, labels, loss_weight)
        shape = tuple(ids.shape)
        count = self._call_counts[kind, shape] = self._call_counts.get((kind, shape), 0) + 1
        is_warm = count > NUM_WARMUP_CALLS or (kind == "accumulate" and ("overwrite", shape) in self.captured)
        if is_warm and not self.capture_error and len(self.captured) < MAX_GRAPHS:
            return self._record(kind, ids, labels, loss_weight)
        return self.stepper.backward(ids, labels, loss_weight)

    def _record(self, kind: str, ids: Tensor, labels: Tensor, loss_weight: float) -> Tensor:
        before: Grads = []
        with self._gives_up_on_error():
            before = _clone_all(self._grads())
        generator = _generator(ids.device)
        rng_before = generator.get_state()
        row_losses = self.stepper.backward(ids, labels, loss_weight)
        if self.capture_error:
            return row_losses
        rng_after = generator.get_state()
        eager_grads, overwritten = self._grads(), None
        with self._gives_up_on_error():
            pool = self._pool or (torch.cuda.graph_pool_handle() if ids.is_cuda else None)
            with _restored_on_failure(ids.device, pool):
                graph = CapturedGraph(lambda *inputs: self._forward_backward(kind == "overwrite", *inputs), ids, pool)
            if ids.is_cuda:
                torch.cuda.empty_cache()  # what the eager calls used is of no more use
            assert self._static_grads is not None
            if self._owns_grads(eager_grads):
                overwritten = eager_grads = _clone_all(eager_grads)
            _copy_all(before, self._static_grads)
            generator.set_state(rng_before)
            replayed_losses = graph.replay(ids, labels, loss_weight)
            # Where the step is not finite there is nothing to compare with: the shape is recorded at its next call.
            if all(bool(torch.isfinite(t).all()) for t in (row_losses, *eager_grads) if t is not None):
                difference = relative_difference(row_losses, eager_grads, replayed_losses, self._static_grads)
                label = f"{kind} {'x'.join(map(str, ids.shape))}"
                if not difference <= self.max_difference:  # NaN is never equal
                    raise RuntimeError(
                        f"the recording of {label} and the eager step are {difference:.1e} apart, at most "
                        f"{self.max_difference:.0e} is rounding"
                    )
                self.checks.append(f"{label} recorded, checked to {difference:.0e}")
                self.captured[kind, tuple(ids.shape)], self._pool = graph, pool
        if self._find(kind, ids):
            self._use_static_grads()
        elif overwritten is not None and self._static_grads is not None:  # what the eager call left
            _copy_all(overwritten, self._static_grads)
        generator.set_state(rng_after)
        return row_losses

    def _find(self, kind: str, ids: Tensor) -> "CapturedGraph | None":
        """A recording of this shape; none after a failure, which gave the generator a state that no recording knows."""
        return None if self.capture_error else self.captured.get((kind, tuple(ids.shape)))

    def _forward_backward(self, overwrite: bool, ids: Tensor, labels: Tensor, loss_weight: Tensor) -> Tensor:
        loss_sum, row_losses = self.stepper.loss_module(ids, labels)
        new_grads = torch.autograd.grad(loss_sum * loss_weight, self.trainable_params, allow_unused=True)
        if self._static_grads is None:
            self._static_grads = list(new_grads)
            return row_losses
        pairs = [(a, b) for a, b in zip(self._static_grads, new_grads, strict=True) if a is not None and b is not None]
        combine = torch_internals.foreach_copy_ if overwrite else torch_internals.foreach_add_
        combine([old for old, _ in pairs], [new for _, new in pairs])
        return row_losses

    @contextmanager
    def _gives_up_on_error(self) -> Iterator[None]:
        """All is eager from there on: an operation that waits for the device, or not enough memory."""
        try:
            yield
        except RuntimeError as error:
            cause: BaseException = error
            while cause.__context__ is not None:  # what ends after the operation that failed complains of it, too
                cause = cause.__context__
            self.capture_error = f"steps are not recorded as CUDA graphs: {first_line(cause)}"

    def drop_recordings(self, reason: str) -> None:
        """Give back what they hold, with the gradients; all is eager from there on. `reason`: an error of memory."""
        self.capture_error = f"steps are no longer CUDA graphs, beside which there was no memory: {reason}"
        device = self.trainable_params[0].device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a replay of what is dropped may still be under way
        self.captured.clear()
        self._static_grads = None
        for parameter in self.trainable_params:
            parameter.grad = None
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _grads(self) -> Grads:
        return [parameter.grad for parameter in self.trainable_params]

    def _use_static_grads(self) -> None:
        assert self._static_grads is not None
        for parameter, gradient in zip(self.trainable_params, self._static_grads, strict=True):
            parameter.grad = gradient

    def _owns_grads(self, grads: Grads) -> bool:
        return self._static_grads is not None and all(a is b for a, b in zip(grads, self._static_grads, strict=True))


def _generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator


def _clone_all(tensors: Grads) -> Grads:
    return [None if tensor is None else tensor.clone() for tensor in tensors]


def _copy_all(sources: Grads, targets: Grads) -> None:
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

    def replay(self, ids: Tensor, labels: Tensor, loss_weight: float) -> Tensor:
        """Run it on these inputs; the output is overwritten by the next replay."""
        self.ids.copy_(ids, non_blocking=True)
        self.labels.copy_(labels, non_blocking=True)
        self.loss_weight.fill_(loss_weight)
        self.graph.replay()
        return self.row_losses


@contextmanager
def _restored_on_failure(device: torch.device, pool: Any) -> Iterator[None]:
    """Generator, current stream and allocator as they were, where a capture fails: it leaves torch's default generator
    "capturing" and the side stream current, so that the next dropout would raise (another state object of the same seed
    and offset is not capturing), and the allocator giving to the pool, whose memory would be held for good."""
    if device.type != "cuda":
        with torch.random.fork_rng(devices=[]):
            yield
        return
    generator, stream = _generator(device), torch.cuda.current_stream(device)
    saved = generator.clone_state()
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(saved)
        with suppress(RuntimeError):  # a capture that came to its end, as one out of memory does, has let go itself
            torch_internals.release_capture_pool(device.index or 0, pool)
        raise
