"""Bytes that one rank needs before anything runs: pure, no torch.

State: the ZeRO paper (Rajbhandari et al., arXiv 1910.02054, section 3), with weights and gradients in float32, which is
how this program trains (bf16 is autocast; only fp16 holds half weights). What forward and backward hold is counted
(`trainer.distributed.memory_count`), and added here.
"""

from dataclasses import dataclass, replace
from typing import Any

MAX_LIVE_PARAMETERS = 10**9  # elements; DeepSpeed's stage3_max_live_parameters, up to which weights stay gathered
REDUCE_BUCKET_SIZE = 5 * 10**8  # elements; DeepSpeed's reduce_bucket_size
CUDA_CONTEXT_BYTES = 600 * 2**20  # what CUDA's context, NCCL and cuBLAS take of a GPU beside the tensors


@dataclass(frozen=True, kw_only=True)
class ParamCounts:
    """Weights by what training does to them; tied ones are counted once."""

    frozen: int
    trainable: int
    quantized_bytes: int | None = None  #: of the frozen ones in a quantised base; None: they are not packed

    @classmethod
    def from_model_info(cls, model_info: dict[str, Any]) -> "ParamCounts":
        """From run.json's block `model_info`, where `parameters` are those of the base, without adapters."""
        trainable, parameters = model_info["trainable"], model_info["parameters"]
        has_adapters = bool(model_info["lora_targets"])
        return cls(
            frozen=parameters if has_adapters else parameters - trainable,
            trainable=trainable,
            quantized_bytes=model_info.get("frozen_bytes"),
        )

    def weight_bytes(self, bytes_per_weight: int) -> int:
        """Of all weights, with `bytes_per_weight` for each that is not packed."""
        frozen_bytes = bytes_per_weight * self.frozen if self.quantized_bytes is None else self.quantized_bytes
        return frozen_bytes + bytes_per_weight * self.trainable


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """Bytes of what lives from step to step on one rank; `host` is what offload keeps in the host's memory instead."""

    weights: float
    gradients: float
    optimizer: float  #: AdamW's two moments, and the float32 copy that ZeRO 1 to 3 keep of the weights
    host: float = 0.0

    @property
    def total(self) -> float:
        """On the device."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """What a ZeRO file spreads over how many ranks, and moves to the host."""

    stage: int
    world_size: int
    offloads_optimizer: bool = False
    offloads_params: bool = False


def estimate_model_states(counts: ParamCounts, sharding: Sharding, *, precision: str = "fp32") -> ModelStates:
    """State per rank: stage 1 shards the optimizer's, 2 the gradients too, 3 the weights too, frozen ones as well.

    Frozen weights count in float32, also where bf16 halves most of them (`choose_deepspeed_file`, `estimate_memory`).
    """
    bytes_per_weight = 2 if precision == "fp16" else 4
    num_trainable, stage, world_size = counts.trainable, sharding.stage, sharding.world_size
    weights = counts.weight_bytes(bytes_per_weight) / (world_size if stage == 3 else 1)
    gradients = bytes_per_weight * num_trainable / (world_size if stage >= 2 else 1)
    optimizer = (8 * num_trainable) if stage == 0 else 12 * num_trainable / world_size
    host = 0.0
    if sharding.offloads_optimizer:  # DeepSpeed keeps the sharded gradients beside the optimizer
        host += optimizer + 4 * num_trainable / world_size
        optimizer, gradients = 0.0, (0.0 if stage >= 2 else gradients)
    if sharding.offloads_params:
        host, weights = host + weights, 0.0
    return ModelStates(weights=weights, gradients=gradients, optimizer=optimizer, host=host)


@dataclass(frozen=True, kw_only=True)
class PassMemory:
    """Bytes of one forward and backward beside weights and optimizer state."""

    saved: float  #: what the forward leaves for its backward
    peak: float  #: the most at one time, without gradients that have arrived at their weight
    peak_with_gradients: float  #: the same with them
    cast_weights: int = 0  #: frozen weights that are held in bfloat16


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one rank by what they are for."""

    model_states: ModelStates
    activations: float  #: what a forward leaves for its backward
    gathered: float  #: weights that ZeRO-3 puts together for a pass
    forward_backward: float  #: the most that forward and backward hold beside weights and optimizer state
    optimizer_step: float  #: the most that the step holds beside them

    @property
    def passing(self) -> float:
        """What comes and goes within a forward and backward: logits, products, gradients on their way."""
        return max(0.0, self.forward_backward - self.activations - self.gathered)

    @property
    def peak(self) -> float:
        """The largest sum at one time: gradients are not there yet when the activations are at their most."""
        states = self.model_states
        return states.weights + states.optimizer + max(self.forward_backward, self.optimizer_step)


def estimate_memory(
    counts: ParamCounts, passes: PassMemory, sharding: Sharding, *, precision: str, is_gpu: bool, accumulates: bool
) -> MemoryEstimate:
    """The memory of one rank while it trains, without what the program takes (of a GPU: CUDA_CONTEXT_BYTES)."""
    states = estimate_model_states(counts, sharding, precision=precision)
    if passes.cast_weights:  # a GPU holds them in place of the float32 ones, which the host keeps; a CPU holds both
        moved_bytes = 4 * passes.cast_weights if is_gpu else 0
        weights = states.weights + 2 * passes.cast_weights - moved_bytes
        states = replace(states, weights=weights, host=states.host + moved_bytes)
    stage, world_size = sharding.stage, sharding.world_size
    bytes_per_weight = 2 if precision == "fp16" else 4
    gathered_bytes = 0.0
    if stage == 3:
        gathered_bytes = min(counts.weight_bytes(bytes_per_weight), bytes_per_weight * MAX_LIVE_PARAMETERS)
    if stage == 1 or (world_size == 1 and stage < 3):  # every gradient stays where the backward left it
        pass_bytes = passes.peak_with_gradients
    elif stage == 0:  # each moves to its place in a flat buffer that is always there
        pass_bytes = passes.peak + states.gradients
    else:  # this rank's share of them: of earlier micro-batches, and the buffer that ZeRO-3 keeps
        pass_bytes = passes.peak + (states.gradients if accumulates or stage == 3 else 0.0)
    # For the flat weights of ZeRO, gradients are laid end to end, up to a bucket: under stage 1 all of them beside the
    # gradients, when they are reduced; then, and under stages 2 and 3, a rank's share.
    flat_bytes = bytes_per_weight * float(min(counts.trainable, REDUCE_BUCKET_SIZE))
    step_bytes = states.gradients
    if stage:
        step_bytes += flat_bytes / (1 if stage == 1 else world_size)
    return MemoryEstimate(
        model_states=states,
        activations=passes.saved,
        gathered=gathered_bytes,
        forward_backward=gathered_bytes + pass_bytes,
        optimizer_step=step_bytes,
    )
