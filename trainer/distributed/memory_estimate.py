"""Bytes that one rank needs, by formula, before anything runs: pure, no torch.

State: the ZeRO paper (Rajbhandari et al., arXiv 1910.02054, section 3), with weights and gradients in float32, which is
how this program trains (bf16 is autocast; only fp16 holds half weights). Activations: counted as in Korthikanti et al.
(arXiv 2205.05198, section 4) for GPT-2's block with its activation function in one kernel (`trainer.model.build`).
tests/unit/distributed/test_memory_estimate.py holds both against what autograd keeps and a process grows by.
"""

from dataclasses import dataclass, replace
from typing import Any

MAX_LIVE_PARAMETERS = (
    10**9
)  # elements; DeepSpeed's stage3_max_live_parameters, up to which gathered weights stay gathered
REDUCE_BUCKET_SIZE = 5 * 10**8  # elements; DeepSpeed's reduce_bucket_size
FROZEN_HEAD_DIVISOR = 2  # times smaller are the pieces of logits before a frozen output layer (`loss.FROZEN`)
ATTENTION_BLOCK_SIZE = 64  # of a block of the attention on processors (`dropout.BLOCK`)
CUDA_CONTEXT_BYTES = 600 * 2**20  # bytes; what CUDA's context, NCCL and cuBLAS take of a GPU beside the tensors


@dataclass(frozen=True, kw_only=True)
class ParamCounts:
    """Weights by what training does to them; tied ones are counted once."""

    frozen: int
    trainable: int
    quantized_bytes: int | None = None  #: of the frozen ones as a quantised base holds them; None: they are not packed

    @classmethod
    def from_model_info(cls, model_info: dict[str, Any]) -> "ParamCounts":
        """From the `model` block of run.json, where `parameters` are those of the base, without adapters."""
        trainable, parameters = model_info["trainable"], model_info["parameters"]
        has_adapters = bool(model_info["lora_targets"])
        return cls(
            frozen=parameters if has_adapters else parameters - trainable, trainable=trainable,
            quantized_bytes=model_info.get("frozen_bytes"),
        )  # fmt: skip

    def weight_bytes(self, bytes_per_weight: int) -> int:
        """Of all weights, with `size` bytes for each that is not packed."""
        return (
            bytes_per_weight * self.frozen if self.quantized_bytes is None else self.quantized_bytes
        ) + bytes_per_weight * self.trainable


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


def estimate_model_states(
    counts: ParamCounts, *, stage: int, world_size: int, precision: str = "fp32", offload_optimizer: bool = False,
    offload_params: bool = False,
) -> ModelStates:  # fmt: skip
    """State per rank: stage 1 divides the optimizer's, 2 the gradients too, 3 the weights too, frozen ones as well."""
    bytes_per_weight = 2 if precision == "fp16" else 4
    num_trainable = counts.trainable
    weights = counts.weight_bytes(bytes_per_weight) / (world_size if stage == 3 else 1)
    gradients = bytes_per_weight * num_trainable / (world_size if stage >= 2 else 1)
    optimizer = (8 * num_trainable) if stage == 0 else 12 * num_trainable / world_size
    host = 0.0
    if offload_optimizer:  # DeepSpeed keeps the divided gradients beside the optimizer
        host += optimizer + 4 * num_trainable / world_size
        optimizer, gradients = 0.0, (0.0 if stage >= 2 else gradients)
    if offload_params:
        host, weights = host + weights, 0.0
    return ModelStates(weights=weights, gradients=gradients, optimizer=optimizer, host=host)


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """What the size of a causal LM's activations depends on."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    vocab_size: int
    is_gpt2: bool  #: whether the formula was made for this model: GPT-2; others come out as if they were one

    @classmethod
    def from_config(cls, config: Any) -> "ModelDims":
        """From a Hugging Face configuration, whichever of the usual names it has."""
        hidden_size = _first_attribute(config, "hidden_size", "n_embd", "d_model")
        return cls(
            num_layers=_first_attribute(config, "num_hidden_layers", "n_layer", "num_layers"),
            hidden_size=hidden_size,
            intermediate_size=_first_attribute(
                config, "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden_size
            ),
            num_heads=_first_attribute(config, "num_attention_heads", "n_head", "num_heads"),
            vocab_size=config.vocab_size,
            is_gpt2=config.model_type == "gpt2",
        )


def _first_attribute(config: Any, *names: str, default: int = 1) -> int:
    values = (getattr(config, name, None) for name in names)
    return next((int(value) for value in values if value is not None), default)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one rank feeds in one forward, and how it is computed."""

    micro_batch_size: int  #: the micro-batch
    sequence_length: int  #: tokens of its longest row
    gradient_accumulation_steps: int = 1
    precision: str = "fp32"
    is_gpu: bool = False
    is_single_node_cpu: bool = False  #: whether the ranks are several of one machine's processor (`engine.shared`)
    dropout: float = 0.0
    lora_rank: int = 0  #: 0: every weight trains
    lora_dropout: float = 0.0
    lora_target_modules: tuple[str, ...] = ()  #: the layers with adapters
    uses_fused_lora: bool = False  #: whether an adapter is one operation with its layer (`trainer.kernels.fused_lora`)
    quant: str | None = None  #: how the blocks' frozen weights are: each is unpacked when needed, none is kept so
    has_bf16_frozen_weights: bool = (
        False  #: whether frozen weights are held in bfloat16 (`trainer.distributed.frozen_bf16`)
    )
    activation_checkpointing: bool = (
        False  #: whether each block keeps its input only and is computed again for its backward
    )
    max_logits_bytes: int = 2**27  #: bytes of float32 logits held at one time (`linear_cross_entropy.MAX_LOGITS_BYTES`)


#: GPT-2's four matrix products by their layers' names: inputs and outputs in units of (the hidden, the inner width).
_GPT2_MATMULS = {
    "attn.c_attn": ((1, 0), (3, 0)), "attn.c_proj": ((1, 0), (1, 0)),
    "mlp.c_fc": ((1, 0), (0, 1)), "mlp.c_proj": ((0, 1), (1, 0)),
}  # fmt: skip


def estimate_activations(dims: ModelDims, workload: Workload) -> float:
    """Bytes that one forward leaves for its backward, without logits.

    Per token and block, in float32: the inputs of the two layer norms (2 h) and of the products whose weight or adapter
    trains (3 h + inner), queries, keys and values (3 h) and the activation function's input (inner). Under autocast all
    but the layer norms' are 2 bytes an element. Attention in one kernel keeps its output, which is the next product's
    input too; on processors, with dropout, its probabilities and masks besides (`trainer.kernels.cpu_attention`).
    """
    is_half_precision = workload.precision != "fp32"
    bytes_per_element = 2 if is_half_precision else 4
    h, intermediate, num_tokens = (
        dims.hidden_size,
        dims.intermediate_size,
        workload.micro_batch_size * workload.sequence_length,
    )
    uses_blockwise_attention = bool(workload.dropout) and not workload.is_gpu
    adapted_layers = [
        name for name in _GPT2_MATMULS if workload.lora_rank and _is_adapted(name, workload.lora_target_modules)
    ]
    trained_layers = adapted_layers if workload.lora_rank else list(_GPT2_MATMULS)
    block_bytes: float = (2 if workload.precision == "fp16" else 4) * 2 * h  # layer norms' inputs
    bytes_per_output = (
        4 if workload.quant in ("nf4", "fp4") else bytes_per_element
    )  # those layers answer in the type of a layer norm
    block_bytes += (
        bytes_per_element * 3 * h + bytes_per_output * intermediate
    )  # q, k, v; the activation function's input
    block_bytes += sum(bytes_per_element * _matmul_width(_GPT2_MATMULS[name][0], dims) for name in trained_layers)
    if "attn.c_proj" not in trained_layers or (
        is_half_precision and workload.lora_rank and not workload.uses_fused_lora
    ):  # peft casts a copy
        block_bytes += bytes_per_element * h
    block_bytes += 16 + (
        0 if uses_blockwise_attention else 4 * dims.num_heads
    )  # means and deviations; the attention's sums
    if workload.dropout:
        block_bytes += 2 * h + (
            (bytes_per_element + 1) * dims.num_heads * _mean_visible_keys(workload.sequence_length)
            if uses_blockwise_attention
            else 0
        )
    cast_bytes = 0
    if workload.precision == "bf16" and not (workload.quant or workload.has_bf16_frozen_weights):
        cast_matmuls = [
            in_out
            for name, in_out in _GPT2_MATMULS.items()
            if not (workload.uses_fused_lora and name in adapted_layers)
        ]  # once for all
        cast_bytes = (
            2
            * dims.num_layers
            * sum(_matmul_width(inputs, dims) * _matmul_width(outputs, dims) for inputs, outputs in cast_matmuls)
        )
    if workload.lora_rank:
        has_bias_column = workload.uses_fused_lora and not workload.is_gpu  # one more column
        block_bytes += len(adapted_layers) * bytes_per_element * (workload.lora_rank + has_bias_column)
        input_width, output_width = (
            sum(_matmul_width(_GPT2_MATMULS[name][end], dims) for name in adapted_layers) for end in (0, 1)
        )
        bytes_per_lora_rank = (
            2 * (input_width + output_width)
            if workload.precision == "bf16"
            else bytes_per_element * input_width * workload.uses_fused_lora
        )  # A times the scaling
        cast_bytes += dims.num_layers * workload.lora_rank * bytes_per_lora_rank
        if workload.lora_dropout:
            block_bytes += (3 * h + intermediate) + (h if workload.lora_target_modules else 0) * bytes_per_element
    final_bytes = 2 * bytes_per_element * h  # the last layer norm's input, the output layer's
    if (
        workload.activation_checkpointing
    ):  # the inputs, and one block whole; autocast keeps copies of trained weights all the same
        block_input_bytes = (2 if workload.precision == "fp16" else 4) * h
        return num_tokens * (dims.num_layers * block_input_bytes + block_bytes + final_bytes) + (
            cast_bytes / dims.num_layers if workload.lora_rank else cast_bytes
        )
    return num_tokens * (dims.num_layers * block_bytes + final_bytes) + cast_bytes


def _num_block_weights(dims: ModelDims) -> int:
    """Weights of the blocks' matrix products."""
    return dims.num_layers * (4 * dims.hidden_size**2 + 2 * dims.hidden_size * dims.intermediate_size)


def _mean_visible_keys(sequence_length: int) -> float:
    """Keys of a token, on average, in an attention that goes by blocks of ATTENTION_BLOCK_SIZE."""
    starts = range(0, sequence_length, ATTENTION_BLOCK_SIZE)
    return (
        sum(
            (min(start + ATTENTION_BLOCK_SIZE, sequence_length) - start)
            * min(start + ATTENTION_BLOCK_SIZE, sequence_length)
            for start in starts
        )
        / sequence_length
    )


def _matmul_width(coefficients: tuple[int, int], dims: ModelDims) -> int:
    return coefficients[0] * dims.hidden_size + coefficients[1] * dims.intermediate_size


def _is_adapted(name: str, target_modules: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") or target.endswith(name) for target in target_modules)


def estimate_logits(dims: ModelDims, workload: Workload, *, is_fused: bool = True) -> float:
    """Bytes at the start of the backward: logits, on a GPU their log-probabilities, the output layer as it is used.

    GPT-2's are made and dropped in pieces of `max_logits_bytes` bytes, smaller before a frozen layer, and gradients
    take their place. Not `is_fused` (fp16, ZeRO-3), they are three times there: logits, log-probabilities, gradients.
    Other models return theirs whole.
    """
    full_logits_bytes = _full_logits_bytes(dims, workload)
    if not dims.is_gpt2:
        return 3 * full_logits_bytes
    if not is_fused:
        return 3 * min(full_logits_bytes, workload.max_logits_bytes)
    bytes_per_element = 4 if workload.precision == "fp32" else 2
    chunk_bytes = min(
        full_logits_bytes,
        workload.max_logits_bytes / (FROZEN_HEAD_DIVISOR if workload.lora_rank and workload.is_gpu else 1),
    )
    head_copy_bytes = (
        bytes_per_element * dims.vocab_size * dims.hidden_size if workload.is_gpu or bytes_per_element == 2 else 0
    )
    return chunk_bytes * (bytes_per_element + (4 if workload.is_gpu else 0)) / 4 + head_copy_bytes


def _full_logits_bytes(dims: ModelDims, workload: Workload) -> float:
    return 4.0 * workload.micro_batch_size * workload.sequence_length * dims.vocab_size


def estimate_workspace(dims: ModelDims, workload: Workload) -> float:
    """Bytes of the passing results of one block's backward: a few tensors of the inner width."""
    return 3 * 4.0 * workload.micro_batch_size * workload.sequence_length * dims.intermediate_size


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one rank by what they are for; `gathered` are weights that ZeRO-3 puts together for a pass."""

    model_states: ModelStates
    activations: float
    logits: float
    gathered: float
    forward_backward: float  #: the most that forward and backward hold beside weights and optimizer
    optimizer_step: float  #: the most that the step holds beside them
    row: float  #: of the table through which a machine's processor ranks sum gradients (`engine.shared`), always there

    @property
    def peak(self) -> float:
        """The largest sum at one time: gradients are not there yet when the activations are at their most."""
        return (
            self.model_states.weights
            + self.model_states.optimizer
            + self.row
            + max(self.forward_backward, self.optimizer_step)
        )


def estimate_memory(
    dims: ModelDims, counts: ParamCounts, workload: Workload, *, stage: int, world_size: int,
    offload_optimizer: bool = False,
    offload_params: bool = False,
) -> MemoryEstimate:  # fmt: skip
    """The memory of one rank while it trains, without what the program itself takes (see CUDA_CONTEXT_BYTES for a
    GPU)."""
    model_states = estimate_model_states(
        counts, stage=stage, world_size=world_size, precision=workload.precision, offload_optimizer=offload_optimizer,
        offload_params=offload_params,
    )  # fmt: skip
    if (
        workload.has_bf16_frozen_weights
    ):  # on a GPU in place of the whole ones, which a host keeps; on a processor both are there
        num_block_weights = _num_block_weights(dims)
        moved_bytes = 4 * num_block_weights if workload.is_gpu else 0
        model_states = replace(
            model_states,
            weights=model_states.weights + 2 * num_block_weights - moved_bytes,
            host=model_states.host + moved_bytes,
        )
    bytes_per_weight = 2 if workload.precision == "fp16" else 4
    is_fused = stage < 3 and workload.precision != "fp16"
    activation_bytes, logits_bytes = (
        estimate_activations(dims, workload),
        estimate_logits(dims, workload, is_fused=is_fused),
    )
    gathered_bytes = (
        min(counts.weight_bytes(bytes_per_weight), bytes_per_weight * MAX_LIVE_PARAMETERS) if stage == 3 else 0.0
    )
    # Of earlier micro-batches, or what the first layers of the backward leave: the embedding's is as large as any.
    accumulated_grad_bytes = (
        model_states.gradients if workload.gradient_accumulation_steps > 1 or stage == 3 else 0.0
    )  # ZeRO-3 keeps its share's buffer
    head_grad_bytes = 0.0 if workload.lora_rank else bytes_per_weight * dims.vocab_size * dims.hidden_size
    early_grad_bytes = head_grad_bytes if is_fused and dims.is_gpt2 else 0.0  # made with the loss
    forward_backward_bytes = (
        gathered_bytes
        + activation_bytes
        + accumulated_grad_bytes
        + max(early_grad_bytes + logits_bytes, head_grad_bytes + estimate_workspace(dims, workload))
    )
    flat_grad_bytes = bytes_per_weight * min(
        counts.trainable, REDUCE_BUCKET_SIZE
    )  # gradients are laid end to end for the reduction or the step
    row = 4.0 * counts.trainable if workload.is_single_node_cpu and stage < 2 and workload.precision != "fp16" else 0.0
    if row and not stage:  # of a weight all ranks but its owner write a gradient, which the owner reads
        row *= 2 * (world_size - 1) / world_size
        model_states = replace(model_states, optimizer=model_states.optimizer / world_size)
    optimizer_step_bytes = model_states.gradients + (
        flat_grad_bytes / world_size if stage else 0.0 if row else flat_grad_bytes
    )
    return MemoryEstimate(
        model_states=model_states, activations=activation_bytes, logits=logits_bytes, gathered=gathered_bytes,
        forward_backward=forward_backward_bytes, optimizer_step=optimizer_step_bytes, row=row,
    )  # fmt: skip
