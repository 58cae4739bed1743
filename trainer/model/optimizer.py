"""AdamW in its four forms, and what their state is called in a checkpoint. A door to bitsandbytes.

One formula (Loshchilov and Hutter, arXiv 1711.05101), four ways to hold and compute it. The 8-bit ones keep the two
moments as 8-bit codes with one float32 scale for each block of 256 (Dettmers et al., arXiv 2110.02861).
"""

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.errors import UserError
from trainer.config.schema import EIGHT_BIT, TrainSettings

SMALLEST = 4096  # elements; bitsandbytes keeps the moments of smaller tensors in 32 bits
KINDS = ("exp_avg", "exp_avg_sq")  #: the two moments, as torch and the checkpoints call them
_CODES = {"exp_avg": ("state1", "absmax1"), "exp_avg_sq": ("state2", "absmax2")}  # as bitsandbytes calls them


def make(
    groups: list[dict[str, Any]], settings: TrainSettings, *, whole: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The optimizer over parameter groups; `whole`: weights whose moments stay in 32 bits under the 8-bit forms."""
    common: dict[str, Any] = {
        "lr": settings.lr, "betas": (settings.beta1, settings.beta2), "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
    }  # fmt: skip
    if settings.optim not in EIGHT_BIT:
        return torch.optim.AdamW(groups, **common, fused=settings.optim == "adamw_fused")
    import bitsandbytes as bnb  # takes seconds: only where it is needed

    kind = bnb.optim.PagedAdamW8bit if settings.optim == "paged_adamw8bit" else bnb.optim.AdamW8bit
    optimizer = kind(groups, **common)
    in_32_bits = {id(parameter) for parameter in whole}
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if id(parameter) in in_32_bits:
                zeros = [optimizer.get_state_buffer(parameter, dtype=torch.float32) for _ in KINDS]
                optimizer.state[parameter] = {"step": 0, "state1": zeros[0], "state2": zeros[1]}
            else:
                optimizer.init_state(group, parameter, number, place)
    return optimizer


def refuse_early(settings: TrainSettings, *, stage: int | None, on_cpu: bool) -> None:
    """UserError where an 8-bit form cannot work: `stage` of ZeRO, None where it is not chosen yet."""
    if settings.optim not in EIGHT_BIT:
        return
    if stage:
        raise UserError(
            f"--optim {settings.optim}: not under ZeRO {stage}, which joins all tensors and cuts them by rank, so the "
            "8-bit blocks and every number would depend on how many ranks there are; expected --ds-config zero0"
        )
    if on_cpu and tuple(int(part) for part in version("bitsandbytes").split(".")[:2]) < (0, 50):
        raise UserError(
            f"--optim {settings.optim}: bitsandbytes {version('bitsandbytes')} has it for GPUs only; "
            "install 0.50 or later, or expected adamw or adamw_fused"
        )


def kept_in_32_bits(named: Iterable[tuple[str, nn.Parameter]], embeddings: Iterable[nn.Parameter]) -> dict[str, int]:
    """Of the trained weights those whose moments an 8-bit form keeps in 32 bits, where nothing is saved."""
    whole = {id(parameter) for parameter in embeddings}
    trained = [p for _, p in named if p.requires_grad]
    kept = [p for p in trained if id(p) in whole or p.numel() < SMALLEST]
    return {
        "tensors": len(trained), "kept_tensors": len(kept), "kept_parameters": sum(p.numel() for p in kept),
        "parameters": sum(p.numel() for p in trained),
    }  # fmt: skip


def state_of(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one weight's state, by the names of a checkpoint: the moments, and the scales of 8-bit ones."""
    for kind in KINDS:
        if kind in state:
            yield kind, state[kind]
            continue
        codes, scales = _CODES[kind]
        yield kind, state[codes]
        if scales in state:
            yield f"{kind}.absmax", state[scales]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors on this rank; what several weights share (the 8-bit codes' values) counts once."""
    tensors = {t.data_ptr(): t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)}
    return sum(t.numel() * t.element_size() for t in tensors.values())
