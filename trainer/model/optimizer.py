"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) in its four forms, and what their state is called in a checkpoint. A
door to bitsandbytes, which holds moments as 8-bit codes with a float32 scale for each 256 (arXiv 2110.02861).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.choices import EIGHT_BIT_OPTIMIZERS
from trainer.config.settings import TrainSettings

MOMENTS = ("exp_avg", "exp_avg_sq")  #: the two moments, as torch and the checkpoints call them
_BNB_STATE_KEYS = {"exp_avg": ("state1", "absmax1"), "exp_avg_sq": ("state2", "absmax2")}  # as bitsandbytes calls them


def build_optimizer(
    params: Iterable[nn.Parameter], settings: TrainSettings, *, embeddings: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer of `params`. `embeddings`: weights whose moments stay in 32 bits under the 8-bit forms."""
    betas, eps = (settings.beta1, settings.beta2), settings.epsilon
    adamw_kwargs: Any = {"lr": settings.lr, "betas": betas, "eps": eps, "weight_decay": settings.weight_decay}
    if settings.optim not in EIGHT_BIT_OPTIMIZERS:
        return torch.optim.AdamW(params, **adamw_kwargs, fused=settings.optim == "adamw_fused")
    import bitsandbytes as bnb  # takes seconds: only where it is needed

    optimizer_class = bnb.optim.PagedAdamW8bit if settings.optim == "paged_adamw8bit" else bnb.optim.AdamW8bit
    optimizer = optimizer_class(params, **adamw_kwargs)
    fp32_state_ids = {id(parameter) for parameter in embeddings}
    for group_index, group in enumerate(optimizer.param_groups):
        for param_index, parameter in enumerate(group["params"]):
            if id(parameter) in fp32_state_ids:
                zeros = [optimizer.get_state_buffer(parameter, dtype=torch.float32) for _ in MOMENTS]
                optimizer.state[parameter] = {"step": 0, "state1": zeros[0], "state2": zeros[1]}
            else:
                optimizer.init_state(group, parameter, group_index, param_index)
    return optimizer


def iter_named_state(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one weight's state, by the names of a checkpoint: the moments, and the scales of 8-bit ones."""
    for moment in MOMENTS:
        codes_key, scales_key = _BNB_STATE_KEYS[moment]
        yield moment, state[moment] if moment in state else state[codes_key]
        if scales_key in state:
            yield f"{moment}.absmax", state[scales_key]


def count_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors on this rank; what several weights share (the 8-bit codes' values) counts once."""
    tensors = {t.data_ptr(): t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)}
    return sum(t.numel() * t.element_size() for t in tensors.values())
