"""What a step costs on more GPUs than there are at hand: modelled from bytes moved and link speed. Pure.

Bytes: the ZeRO paper (Rajbhandari et al., arXiv 1910.02054, section 7). Gradients that are reduced and weights that are
gathered each pass every rank once, (n - 1) / n of their bytes; stage 3 gathers the weights twice more in place of once.
The time of a step is that of its arithmetic on one rank plus bytes over the slowest link on the ring: nothing is
counted as hidden behind the arithmetic, so the model errs to the slow side.
"""

from dataclasses import dataclass

NVLINK_BYTES_PER_SECOND = 450e9  # bytes/s each way between the GPUs of an H100 node, as its maker states it
NETWORK_BYTES_PER_SECOND = 50e9  # bytes/s of one 400 Gbit/s port a GPU between nodes
GPUS_PER_NODE = 8  # GPUs


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Ranks and the links between them, bytes/s a rank."""

    world_size: int
    gpus_per_node: int = GPUS_PER_NODE
    intra_node_bandwidth: float = NVLINK_BYTES_PER_SECOND
    inter_node_bandwidth: float = NETWORK_BYTES_PER_SECOND

    @property
    def bandwidth(self) -> float:
        """Of the ring's slowest part."""
        return self.intra_node_bandwidth if self.world_size <= self.gpus_per_node else self.inter_node_bandwidth


def bytes_moved(
    *, stage: int, num_trainable: int, num_frozen: int, world_size: int, gradient_accumulation_steps: int = 1
) -> float:
    """Bytes that one rank sends in a step, float32: gradients of the trained weights, and weights where divided.

    Stage 0 reduces and spreads the gradients, 1 and 2 reduce them and spread the weights: the same number. Stage 2
    reduces after every micro-batch. Stage 3 gathers all weights, frozen ones too, for each forward and backward.
    """
    bytes_per_weight = 4 * (world_size - 1) / world_size
    if stage < 2:
        return bytes_per_weight * 2 * num_trainable
    if stage == 2:
        return bytes_per_weight * num_trainable * (gradient_accumulation_steps + 1)
    return bytes_per_weight * (gradient_accumulation_steps * (num_trainable + 2 * (num_trainable + num_frozen)))


def step_seconds(
    *,
    compute_seconds: float,
    stage: int,
    num_trainable: int,
    num_frozen: int,
    cluster: Cluster,
    gradient_accumulation_steps: int = 1,
) -> float:
    """Seconds of a step in which each rank computes for `compute_seconds`."""
    num_bytes = bytes_moved(
        stage=stage, num_trainable=num_trainable, num_frozen=num_frozen, world_size=cluster.world_size,
        gradient_accumulation_steps=gradient_accumulation_steps
    )  # fmt: skip
    return compute_seconds + num_bytes / cluster.bandwidth


def scaling_table(
    *,
    compute_seconds: float,
    num_tokens: int,
    num_trainable: int,
    num_frozen: int,
    world_sizes: tuple[int, ...] = (1, 8, 64),
) -> str:
    """Markdown: a token's cost by ranks, where each rank computes `compute_seconds` on `num_tokens` of its own."""
    lines = [
        "| GPUs | " + " | ".join(f"zero{stage}: bytes, efficiency" for stage in (1, 3)) + " |", "|--:|--:|--:|",
    ]  # fmt: skip
    for world_size in world_sizes:
        cells = []
        for stage in (1, 3):
            num_bytes = bytes_moved(
                stage=stage, num_trainable=num_trainable, num_frozen=num_frozen, world_size=world_size
            )
            seconds = step_seconds(
                compute_seconds=compute_seconds, stage=stage, num_trainable=num_trainable, num_frozen=num_frozen,
                cluster=Cluster(world_size=world_size)
            )  # fmt: skip
            cells.append(
                f"{num_bytes / 1e9:.2f} GB, {compute_seconds / seconds:.0%} ({world_size * num_tokens / seconds:,.0f} "
                "tokens/s)"
            )
        lines.append(f"| {world_size} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
