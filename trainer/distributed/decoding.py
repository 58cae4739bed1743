"""Continuations of prompts by a causal LM, greedy or sampled."""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; the same seed draws the same texts from the same model and batch."""

    temperature: float  #: divides the logits
    top_p: float = 1.0  #: the likeliest tokens that together have this probability are drawn from
    seed: int = 0


def decode(
    causal: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_token_ids: Sequence[int],
    *,
    sampling: Sampling | None = None,
    autocast_dtype: torch.dtype | None = None,
    on_token: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """At most `max_new_tokens` token ids for each prompt, without the token of `end_token_ids` at which it stops.

    One batch, padded on the left. Without `sampling` the likeliest token each time. `on_token` is called before each.
    """
    device, width, pad_id = causal.device, max(map(len, prompts)), end_token_ids[0]
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    config = GenerationConfig(
        do_sample=sampling is not None,
        **({"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling else {}),
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(end_token_ids),
        pad_token_id=pad_id,
        use_cache=True,
    )

    def call_on_token(ids: Tensor, scores: Tensor) -> Tensor:
        on_token()
        return scores

    generator: Any = causal
    autocast = torch.autocast(device.type, autocast_dtype) if autocast_dtype else contextlib.nullcontext()
    with autocast, torch.random.fork_rng(enabled=sampling is not None):
        if sampling is not None:
            torch.manual_seed(sampling.seed)
        sequences = generator.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            logits_processor=[call_on_token],
            generation_config=config,
        )
    return [
        list(itertools.takewhile(lambda token: token not in end_token_ids, row[width:])) for row in sequences.tolist()
    ]
