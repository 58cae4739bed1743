"""What a step costs on more GPUs than there are at hand: modelled from bytes moved, link speed and overlap. Pure.

Bytes: `trainer.distributed.bytes_sent`. Overlap: under stages 0 and 1 gradients leave in buckets while the step's last
backward makes them (`trainer.distributed.gradients`); what the last bucket holds, a tied embedding among it, is made at
its end and hidden by nothing, nor is the gathering of weights, nor anything that DeepSpeed's own hooks do under stages
2 and 3.
tests/distributed/test_shaped_links.py holds this against steps over links of a known speed.
"""

from dataclasses import dataclass, replace

from trainer.distributed.bytes_sent import bytes_sent
from trainer.tools.bench.tables import table_lines

BACKWARD_SHARE = 2 / 3  # of a step's arithmetic: two products for each one of the forward
GLOO_GATHER = 1.3  # times a link's own time: both ways wait for one another; 1 to 1.6, test_shaped_links.py
GPU_BUCKET_BYTES = 25 * 2**20  # `gradients.MIN_BUCKET_BYTES` of NCCL
#: (GPUs, network, bytes/s of its slowest link); between the GPUs of an H100 node 450e9 each way, as its maker states
#: it. Of nodes of 8 GPUs a ring passes every NIC that it finds.
NETWORKS = (
    (8, "within a node", 450e9),
    (64, "a 400 Gbit/s NIC a GPU", 8 * 50e9),
    (64, "one 400 Gbit/s NIC a node", 50e9),
    (64, "Ethernet, 25 Gbit/s a node", 25e9 / 8),
)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A step of one rank."""

    compute_seconds: float  #: of its arithmetic, all micro-batches
    num_trainable: int  #: weights
    num_frozen: int = 0
    num_persistent: int = 0  #: of the trained: what ZeRO 3 keeps whole
    tied_share: float = 0.0  #: of the trained weights: embeddings whose gradient is whole at the backward's end only
    gradient_accumulation_steps: int = 1

    @property
    def gradient_bytes(self) -> float:
        """In float32."""
        return 4.0 * self.num_trainable

    @property
    def backward_seconds(self) -> float:
        """Of the last micro-batch."""
        return self.compute_seconds * BACKWARD_SHARE / self.gradient_accumulation_steps

    def tail_share(self, bucket_bytes: float) -> float:
        """Of the gradients: what leaves last, the tied embedding or one bucket."""
        return max(self.tied_share, min(1.0, bucket_bytes / self.gradient_bytes))


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Seconds that a step's communication takes, by whether the arithmetic goes on meanwhile."""

    hidden: float
    exposed: float


def communication(
    *, stage: int, workload: Workload, world_size: int, bandwidth: float, bucket_bytes: float = GPU_BUCKET_BYTES
) -> Communication:
    """By a ring whose slowest link has `bandwidth` bytes/s. One queue: a bucket waits for those before it."""
    num_bytes = bytes_sent(
        stage=stage,
        num_trainable=workload.num_trainable,
        num_frozen=workload.num_frozen,
        world_size=world_size,
        gradient_accumulation_steps=workload.gradient_accumulation_steps,
        num_persistent=workload.num_persistent,
    )
    total = num_bytes / bandwidth
    reduction = total if stage == 0 else total / 2 if stage == 1 else 0.0
    tail = workload.tail_share(bucket_bytes)
    exposed = max(0.0, (1 - tail) * reduction - workload.backward_seconds) + tail * reduction
    return Communication(hidden=reduction - exposed, exposed=exposed + total - reduction)


def communication_of_two_processors(
    *, stage: int, workload: Workload, bandwidth: float, bucket_bytes: float
) -> Communication:
    """The same of two ranks over gloo. Under ZeRO 1 each sends the other its half, both ways at once: the half of the
    last weights leaves in the first half of the backward, that of the first weights, tied embeddings too, after it.
    Under ZeRO 2 and 3 DeepSpeed calls gloo's reduce_scatter, which sends as much as an all-reduce: twice as much, and
    its all_gather, which is slower than its link (`GLOO_GATHER`)."""
    if stage != 1:
        costs = communication(
            stage=stage, workload=workload, world_size=2, bandwidth=bandwidth, bucket_bytes=bucket_bytes
        )
        if stage == 0:
            return costs
        reductions = workload.gradient_accumulation_steps * workload.gradient_bytes / 2 / bandwidth
        return replace(costs, exposed=2 * reductions + GLOO_GATHER * (costs.exposed - reductions))
    half, backward = workload.gradient_bytes / 2 / bandwidth, workload.backward_seconds
    tail = min(0.5, workload.tail_share(bucket_bytes))
    window = backward * (0.5 - tail) / (1 - tail)  # in which the first weights' gradients are made, but the tail
    first_weights = max(0.0, (1 - 2 * tail) * half - window) + 2 * tail * half
    exposed = max(first_weights, half - backward)
    return Communication(hidden=half - exposed, exposed=exposed + half)  # and the weights' halves back


def scaling_table(workloads: dict[str, tuple[int, Workload]]) -> str:
    """Markdown: efficiency against GPUs and networks, where each GPU computes on tokens of its own.

    `workloads`: {column: (stage, workload)}.
    """

    def format_cell(stage: int, workload: Workload, world_size: int, bandwidth: float) -> str:
        costs = communication(stage=stage, workload=workload, world_size=world_size, bandwidth=bandwidth)
        efficiency = workload.compute_seconds / (workload.compute_seconds + costs.exposed)
        seconds = costs.hidden + costs.exposed
        return f"{efficiency:.0%} ({1e3 * seconds:,.1f} ms, {costs.hidden / seconds:.0%} hidden)"

    rows = (
        [str(num_gpus), name, *(format_cell(*workload, num_gpus, bandwidth) for workload in workloads.values())]
        for num_gpus, name, bandwidth in NETWORKS
    )
    return "\n".join(table_lines(("GPUs", "network", *workloads), rows, num_left=2)) + "\n"
