"""Greedy continuations of prompts by a causal LM."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel


def greedy_decode(
    causal: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_token_id: int,
    *,
    autocast_dtype: torch.dtype | None = None,
    on_token: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """At most `max_new_tokens` token ids for each prompt, without the token `eos_token_id` at which it stops.

    One batch, padded on the left. `on_token` is called before each token.
    """
    device, width = causal.device, max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    ids = [[eos_token_id] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * n + [1] * (width - n) for n in padding]
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id,
        pad_token_id=eos_token_id, use_cache=True,
    )  # fmt: skip

    def observe(ids: Tensor, scores: Tensor) -> Tensor:
        on_token()
        return scores

    generator: Any = causal
    with torch.autocast(device.type, autocast_dtype) if autocast_dtype else contextlib.nullcontext():
        sequences = generator.generate(
            input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device),
            logits_processor=[observe], generation_config=config,
        )  # fmt: skip
    completions = sequences[:, width:].tolist()
    return [row[: row.index(eos_token_id)] if eos_token_id in row else row for row in completions]
