"""What a step costs on more GPUs than there are at hand: modelled from bytes moved and link speed. Pure.

Bytes: the ZeRO paper (Rajbhandari et al., arXiv 1910.02054, section 7). Gradients that are reduced and weights that are
gathered each pass every rank once, (n - 1) / n of their bytes; stage 3 gathers the weights twice more in place of once.
The time of a step is that of its arithmetic on one rank plus bytes over the slowest link on the ring: nothing is
counted as hidden behind the arithmetic, so the model errs to the slow side.
"""

from dataclasses import dataclass

NVLINK = 450e9  # bytes/s each way between the GPUs of an H100 node, as its maker states it
NETWORK = 50e9  # bytes/s of one 400 Gbit/s port a GPU between nodes
NODE = 8  # GPUs


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Ranks and the links between them, bytes/s a rank."""

    ranks: int
    node: int = NODE
    inside: float = NVLINK
    between: float = NETWORK

    @property
    def link(self) -> float:
        """Of the ring's slowest part."""
        return self.inside if self.ranks <= self.node else self.between


def bytes_moved(*, stage: int, trained: int, frozen: int, ranks: int, accumulation: int = 1) -> float:
    """Bytes that one rank sends in a step, float32: gradients of the trained weights, and weights where divided.

    Stage 0 reduces and spreads the gradients, 1 and 2 reduce them and spread the weights: the same number. Stage 2
    reduces after every micro-batch. Stage 3 gathers all weights, frozen ones too, for each forward and backward.
    """
    share = 4 * (ranks - 1) / ranks
    if stage < 2:
        return share * 2 * trained
    if stage == 2:
        return share * trained * (accumulation + 1)
    return share * (accumulation * (trained + 2 * (trained + frozen)))


def step_seconds(
    *, compute: float, stage: int, trained: int, frozen: int, cluster: Cluster, accumulation: int = 1
) -> float:
    """Seconds of a step in which each rank computes for `compute` seconds."""
    moved = bytes_moved(
        stage=stage, trained=trained, frozen=frozen, ranks=cluster.ranks, accumulation=accumulation
    )  # fmt: skip
    return compute + moved / cluster.link


def table(*, compute: float, tokens: int, trained: int, frozen: int, ranks: tuple[int, ...] = (1, 8, 64)) -> str:
    """Markdown: cost of a token against ranks, where each rank computes `compute` seconds on `tokens` of its own."""
    lines = [
        "| GPUs | " + " | ".join(f"zero{stage}: bytes, efficiency" for stage in (1, 3)) + " |", "|--:|--:|--:|",
    ]  # fmt: skip
    for n in ranks:
        cells = []
        for stage in (1, 3):
            moved = bytes_moved(stage=stage, trained=trained, frozen=frozen, ranks=n)
            seconds = step_seconds(
                compute=compute, stage=stage, trained=trained, frozen=frozen, cluster=Cluster(ranks=n)
            )  # fmt: skip
            cells.append(f"{moved / 1e9:.2f} GB, {compute / seconds:.0%} ({n * tokens / seconds:,.0f} tokens/s)")
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
