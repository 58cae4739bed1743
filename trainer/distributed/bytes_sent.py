"""What a rank sends in a step. Pure.

The ZeRO paper's count (Rajbhandari et al., arXiv 1910.02054, section 7): gradients that are reduced and weights that
are gathered each pass every rank once, (n - 1) / n of their bytes. Stage 3 gathers once more what a rank lets go
between forward and backward: DeepSpeed keeps a weight whose next use comes within `REUSE_DISTANCE`.
"""

REUSE_DISTANCE = 10**9  # elements; DeepSpeed's stage3_max_reuse_distance


def bytes_sent(
    *,
    stage: int,
    num_trainable: int,
    num_frozen: int,
    world_size: int,
    gradient_accumulation_steps: int = 1,
    num_persistent: int = 0,
) -> float:
    """Bytes that one rank sends in a step, float32: gradients of the trained weights, and weights where divided.

    Stage 0 reduces and spreads the gradients, 1 and 2 reduce them and spread the weights: the same number. Stage 2
    reduces after every micro-batch. Stage 3 gathers all weights, frozen ones too, for each micro-batch: those that are
    further than the reuse distance from the backward twice. `num_persistent` of the trained ones, in tensors so small
    that DeepSpeed keeps them whole (100,000 elements by default), come back once, after the update.
    """
    bytes_per_weight = 4 * (world_size - 1) / world_size
    if stage < 2:
        return bytes_per_weight * 2 * num_trainable
    if stage == 2:
        return bytes_per_weight * num_trainable * (gradient_accumulation_steps + 1)
    num_gathered = num_trainable + num_frozen - num_persistent
    num_gathered += max(0, num_gathered - REUSE_DISTANCE // 2)
    return bytes_per_weight * (gradient_accumulation_steps * (num_trainable + num_gathered) + num_persistent)
