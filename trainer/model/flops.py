"""Floating-point operations of a training step, as torch counts them on a model without memory.

Matrix products only, two operations for each multiply-add: of the forward and of every gradient that is computed, and
what activation checkpointing computes again. Attention is counted without a saving by its causal mask.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from trainer.config.settings import Settings
from trainer.model.build import build_model

COUNTED_LENGTHS = (4, 12, 8)  # tokens; a row of n takes a n + b n^2 + c: weights, attention, and what is done once
PLAIN_METHODS = ("lora", "rslora", "pissa")  # that do nothing once a forward, as DoRA's norms are


def count_step_flops(settings: Settings, *, lengths: NDArray[np.int64], global_batch: int) -> int | None:
    """Operations of an average optimizer step over all ranks, for rows of these lengths (int64 [n], tokens).

    Padding is left out, and so is what a row of packed examples computes across them. None for a model that cannot
    compute without data.
    """
    with torch.random.fork_rng(devices=[]):
        causal = build_model(settings, on_meta=True).causal.train()
    causal.set_attn_implementation("eager")  # torch does not count every fused attention
    if causal._can_set_experts_implementation():
        causal.set_experts_implementation("batched_mm")  # the form whose shapes do not depend on data
    is_plain = settings.mode == "full" or settings.lora.kind in PLAIN_METHODS
    counted, counts = COUNTED_LENGTHS[: 2 if is_plain else 3], []
    for length in counted:
        ids = torch.zeros(1, length, dtype=torch.long, device="meta")
        try:
            with FlopCounterMode(display=False) as counter:
                causal(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
        except Exception:  # as many kinds as there are architectures
            return None
        counts.append(counter.get_total_flops())
    powers = [[length, length**2, 1][: len(counted)] for length in counted]
    linear, quadratic = np.linalg.solve(powers, counts)[:2]
    return round(global_batch * float(np.mean(linear * lengths + quadratic * lengths.astype(np.float64) ** 2)))
