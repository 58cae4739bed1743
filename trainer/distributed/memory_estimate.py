"""Bytes that one rank needs, by formula, before anything runs: pure, no torch.

State: the ZeRO paper (Rajbhandari et al., arXiv 1910.02054, section 3), with weights and gradients in float32, which is
how this program trains (bf16 is autocast; only fp16 holds half weights). Activations: counted as in Korthikanti et al.
(arXiv 2205.05198, section 4) for GPT-2's block with its activation function in one kernel (`trainer.model.build`).
tests/test_memory.py holds both against what autograd keeps and a process grows by.
"""

from dataclasses import dataclass, replace
from typing import Any

MAX_LIVE = 10**9  # elements; DeepSpeed's stage3_max_live_parameters, up to which gathered weights stay gathered
REDUCE_BUCKET = 5 * 10**8  # elements; DeepSpeed's reduce_bucket_size
FROZEN = 2  # times smaller are the pieces of logits before a frozen output layer (`loss.FROZEN`)
QUERIES = 64  # of a block of the attention on processors (`dropout.BLOCK`)
CONTEXT = 600 * 2**20  # bytes; what CUDA's context, NCCL and cuBLAS take of a GPU beside the tensors


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Weights by what training does to them; tied ones are counted once."""

    frozen: int
    trainable: int
    packed_bytes: int | None = None  #: of the frozen ones as a quantised base holds them; None: they are not packed

    @classmethod
    def of(cls, facts: dict[str, Any]) -> "Counts":
        """From the `model` block of run.json, where `parameters` are those of the base, without adapters."""
        trainable, parameters = facts["trainable"], facts["parameters"]
        adapters = bool(facts["lora_targets"])
        return cls(
            frozen=parameters if adapters else parameters - trainable, trainable=trainable,
            packed_bytes=facts.get("frozen_bytes"),
        )  # fmt: skip

    def weight_bytes(self, size: int) -> int:
        """Of all weights, with `size` bytes for each that is not packed."""
        return (size * self.frozen if self.packed_bytes is None else self.packed_bytes) + size * self.trainable


@dataclass(frozen=True, kw_only=True)
class State:
    """Bytes of what lives from step to step on one rank; `host` is what offload keeps in the host's memory instead."""

    weights: float
    gradients: float
    optimizer: float  #: AdamW's two moments, and the float32 copy that ZeRO 1 to 3 keep of the weights
    host: float = 0.0

    @property
    def total(self) -> float:
        """On the device."""
        return self.weights + self.gradients + self.optimizer


def state(
    counts: Counts, *, stage: int, ranks: int, precision: str = "fp32", optimizer_on_host: bool = False,
    weights_on_host: bool = False,
) -> State:  # fmt: skip
    """State per rank: stage 1 divides the optimizer's, 2 the gradients too, 3 the weights too, frozen ones as well."""
    size = 2 if precision == "fp16" else 4
    trained = counts.trainable
    weights = counts.weight_bytes(size) / (ranks if stage == 3 else 1)
    gradients = size * trained / (ranks if stage >= 2 else 1)
    optimizer = (8 * trained) if stage == 0 else 12 * trained / ranks
    host = 0.0
    if optimizer_on_host:  # DeepSpeed keeps the divided gradients beside the optimizer
        host += optimizer + 4 * trained / ranks
        optimizer, gradients = 0.0, (0.0 if stage >= 2 else gradients)
    if weights_on_host:
        host, weights = host + weights, 0.0
    return State(weights=weights, gradients=gradients, optimizer=optimizer, host=host)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the size of a causal LM's activations depends on."""

    layers: int
    hidden: int
    inner: int
    heads: int
    vocabulary: int
    exact: bool  #: whether the formula was made for this model: GPT-2; others come out as if they were one

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """From a Hugging Face configuration, whichever of the usual names it has."""
        hidden = _first(config, "hidden_size", "n_embd", "d_model")
        return cls(
            layers=_first(config, "num_hidden_layers", "n_layer", "num_layers"),
            hidden=hidden,
            inner=_first(config, "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden),
            heads=_first(config, "num_attention_heads", "n_head", "num_heads"),
            vocabulary=config.vocab_size,
            exact=config.model_type == "gpt2",
        )


def _first(config: Any, *names: str, default: int = 1) -> int:
    found = (getattr(config, name, None) for name in names)
    return next((int(value) for value in found if value is not None), default)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one rank feeds in one forward, and how it is computed."""

    rows: int  #: the micro-batch
    width: int  #: tokens of its longest row
    accumulation: int = 1
    precision: str = "fp32"
    gpu: bool = False
    one_processor: bool = False  #: whether the ranks are several of one machine's processor (`engine.shared`)
    dropout: float = 0.0
    adapter_rank: int = 0  #: 0: every weight trains
    adapter_dropout: float = 0.0
    adapted: tuple[str, ...] = ()  #: the layers with adapters
    lowrank: bool = False  #: whether an adapter is one operation with its layer (`trainer.kernels.fused_lora`)
    packed: str | None = None  #: how the blocks' frozen weights are: each is unpacked when needed, none is kept so
    halves: bool = False  #: whether frozen weights are held in bfloat16 (`engine.halves`)
    again: bool = False  #: whether each block keeps its input only and is computed again for its backward
    largest_logits: int = 2**27  #: bytes of float32 logits held at one time (`loss.LARGEST_LOGITS`)


#: GPT-2's four matrix products by their layers' names: inputs and outputs in units of (the hidden, the inner width).
_PRODUCTS = {
    "attn.c_attn": ((1, 0), (3, 0)), "attn.c_proj": ((1, 0), (1, 0)),
    "mlp.c_fc": ((1, 0), (0, 1)), "mlp.c_proj": ((0, 1), (1, 0)),
}  # fmt: skip


def activations(shape: Shape, load: Load) -> float:
    """Bytes that one forward leaves for its backward, without logits.

    Per token and block, in float32: the inputs of the two layer norms (2 h) and of the products whose weight or adapter
    trains (3 h + inner), queries, keys and values (3 h) and the activation function's input (inner). Under autocast all
    but the layer norms' are 2 bytes an element. Attention in one kernel keeps its output, which is the next product's
    input too; on processors, with dropout, its probabilities and masks besides (`trainer.kernels.cpu_attention`).
    """
    half = load.precision != "fp32"
    size = 2 if half else 4
    h, inner, tokens = shape.hidden, shape.inner, load.rows * load.width
    by_blocks = bool(load.dropout) and not load.gpu
    adapted = [name for name in _PRODUCTS if load.adapter_rank and _is_adapted(name, load.adapted)]
    trained = adapted if load.adapter_rank else list(_PRODUCTS)
    block: float = (2 if load.precision == "fp16" else 4) * 2 * h  # layer norms' inputs
    answers = 4 if load.packed in ("nf4", "fp4") else size  # those layers answer in the type of a layer norm
    block += size * 3 * h + answers * inner  # q, k, v; the activation function's input
    block += sum(size * _width(_PRODUCTS[name][0], shape) for name in trained)
    if "attn.c_proj" not in trained or (half and load.adapter_rank and not load.lowrank):  # peft casts a copy
        block += size * h
    block += 16 + (0 if by_blocks else 4 * shape.heads)  # means and deviations; the attention's sums
    if load.dropout:
        block += 2 * h + ((size + 1) * shape.heads * _seen(load.width) if by_blocks else 0)
    casts = 0
    if load.precision == "bf16" and not (load.packed or load.halves):
        copied = [ends for name, ends in _PRODUCTS.items() if not (load.lowrank and name in adapted)]  # once for all
        casts = 2 * shape.layers * sum(_width(inputs, shape) * _width(outputs, shape) for inputs, outputs in copied)
    if load.adapter_rank:
        bias = load.lowrank and not load.gpu  # one more column
        block += len(adapted) * size * (load.adapter_rank + bias)
        wide, out = (sum(_width(_PRODUCTS[name][end], shape) for name in adapted) for end in (0, 1))
        pair = 2 * (wide + out) if load.precision == "bf16" else size * wide * load.lowrank  # A times the scaling
        casts += shape.layers * load.adapter_rank * pair
        if load.adapter_dropout:
            block += (3 * h + inner) + (h if load.adapted else 0) * size
    ends = 2 * size * h  # the last layer norm's input, the output layer's
    if load.again:  # the inputs, and one block whole; autocast keeps copies of trained weights all the same
        entry = (2 if load.precision == "fp16" else 4) * h
        return tokens * (shape.layers * entry + block + ends) + (casts / shape.layers if load.adapter_rank else casts)
    return tokens * (shape.layers * block + ends) + casts


def _products(shape: Shape) -> int:
    """Weights of the blocks' matrix products."""
    return shape.layers * (4 * shape.hidden**2 + 2 * shape.hidden * shape.inner)


def _seen(width: int) -> float:
    """Keys of a token, on average, in an attention that goes by blocks of QUERIES."""
    starts = range(0, width, QUERIES)
    return sum((min(start + QUERIES, width) - start) * min(start + QUERIES, width) for start in starts) / width


def _width(parts: tuple[int, int], shape: Shape) -> int:
    return parts[0] * shape.hidden + parts[1] * shape.inner


def _is_adapted(name: str, adapted: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") or target.endswith(name) for target in adapted)


def logits(shape: Shape, load: Load, *, fused: bool = True) -> float:
    """Bytes at the start of the backward: logits, on a GPU their log-probabilities, the output layer as it is used.

    GPT-2's are made and dropped in pieces of `largest_logits` bytes, smaller before a frozen layer, and gradients take
    their place. Not `fused` (fp16, ZeRO-3), they are three times there: logits, log-probabilities, gradients. Other
    models return theirs whole.
    """
    whole = _whole_logits(shape, load)
    if not shape.exact:
        return 3 * whole
    if not fused:
        return 3 * min(whole, load.largest_logits)
    size = 4 if load.precision == "fp32" else 2
    at_once = min(whole, load.largest_logits / (FROZEN if load.adapter_rank and load.gpu else 1))
    copied = size * shape.vocabulary * shape.hidden if load.gpu or size == 2 else 0
    return at_once * (size + (4 if load.gpu else 0)) / 4 + copied


def _whole_logits(shape: Shape, load: Load) -> float:
    return 4.0 * load.rows * load.width * shape.vocabulary


def working(shape: Shape, load: Load) -> float:
    """Bytes of the passing results of one block's backward: a few tensors of the inner width."""
    return 3 * 4.0 * load.rows * load.width * shape.inner


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes of one rank by what they are for; `gathered` are weights that ZeRO-3 puts together for a pass."""

    state: State
    activations: float
    logits: float
    gathered: float
    passes: float  #: the most that forward and backward hold beside weights and optimizer
    update: float  #: the most that the step holds beside them
    row: float  #: of the table through which a machine's processor ranks sum gradients (`engine.shared`), always there

    @property
    def peak(self) -> float:
        """The largest sum at one time: gradients are not there yet when the activations are at their most."""
        return self.state.weights + self.state.optimizer + self.row + max(self.passes, self.update)


def estimate(
    shape: Shape, counts: Counts, load: Load, *, stage: int, ranks: int, optimizer_on_host: bool = False,
    weights_on_host: bool = False,
) -> Estimate:  # fmt: skip
    """The memory of one rank while it trains, without what the program itself takes (see CONTEXT for a GPU)."""
    held = state(
        counts, stage=stage, ranks=ranks, precision=load.precision, optimizer_on_host=optimizer_on_host,
        weights_on_host=weights_on_host,
    )  # fmt: skip
    if load.halves:  # on a GPU in place of the whole ones, which a host keeps; on a processor both are there
        blocks = _products(shape)
        moved = 4 * blocks if load.gpu else 0
        held = replace(held, weights=held.weights + 2 * blocks - moved, host=held.host + moved)
    size = 2 if load.precision == "fp16" else 4
    fused = stage < 3 and load.precision != "fp16"
    kept, top = activations(shape, load), logits(shape, load, fused=fused)
    gathered = min(counts.weight_bytes(size), size * MAX_LIVE) if stage == 3 else 0.0
    # Of earlier micro-batches, or what the first layers of the backward leave: the embedding's is as large as any.
    gradients = held.gradients if load.accumulation > 1 or stage == 3 else 0.0  # ZeRO-3 keeps its share's buffer
    head = 0.0 if load.adapter_rank else size * shape.vocabulary * shape.hidden
    early = head if fused and shape.exact else 0.0  # made with the loss
    passes = gathered + kept + gradients + max(early + top, head + working(shape, load))
    flat = size * min(counts.trainable, REDUCE_BUCKET)  # gradients are laid end to end for the reduction or the step
    row = 4.0 * counts.trainable if load.one_processor and stage < 2 and load.precision != "fp16" else 0.0
    if row and not stage:  # of a weight all ranks but its owner write a gradient, which the owner reads
        row *= 2 * (ranks - 1) / ranks
        held = replace(held, optimizer=held.optimizer / ranks)
    update = held.gradients + (flat / ranks if stage else 0.0 if row else flat)
    return Estimate(
        state=held, activations=kept, logits=top, gathered=gathered, passes=passes, update=update, row=row,
    )  # fmt: skip
