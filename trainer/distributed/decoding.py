"""Greedy continuations of prompts by a causal LM."""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

#: Two logits are tied within so many epsilons of the number format, relative to the larger one. Another batch moved the
#: difference of the demo's two largest by up to 6 in float32 and 0.7 in bfloat16.
NEAR_TIE_EPSILONS = {torch.float32: 16.0, torch.bfloat16: 2.0, torch.float16: 2.0}


class Completion(NamedTuple):
    """What a model wrote after a prompt."""

    ids: list[int]  #: without the token at which it stopped
    is_near_tie: bool  #: whether two tokens were as likely up to rounding, so that another batch may choose the other


def decode(
    causal: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    limit: int,
    end_token_ids: Sequence[int],
    *,
    autocast_dtype: torch.dtype | None = None,
    on_token: Callable[[], None] = lambda: None,
) -> list[Completion]:
    """At most `limit` token ids for each prompt, until one of `end_token_ids`; one batch, padded on the left.
    `on_token` is called before each token."""
    device, width, pad_id = causal.device, max(map(len, prompts)), end_token_ids[0]
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ends = list(end_token_ids)
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=limit, eos_token_id=ends, pad_token_id=pad_id
    )

    dtype = autocast_dtype or causal.dtype
    tolerance = NEAR_TIE_EPSILONS[dtype] * torch.finfo(dtype).eps
    ties: list[Tensor] = []  # of each step, bool [prompts]

    def call_on_token(ids: Tensor, scores: Tensor) -> Tensor:
        on_token()
        first, second = scores.topk(2).values.unbind(-1)
        ties.append(first - second <= tolerance * first.abs())
        return scores

    generator: Any = causal
    autocast = torch.autocast(device.type, autocast_dtype) if autocast_dtype else contextlib.nullcontext()
    with autocast:
        # what `config` leaves open would be taken from the base's own: a repetition penalty is not greedy
        own_config, generator.generation_config = generator.generation_config, config
        try:
            sequences = generator.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                logits_processor=[call_on_token],
                generation_config=config,
            )
        finally:
            generator.generation_config = own_config
    completions = []
    for row, tied_steps in zip(sequences.tolist(), torch.stack(ties, dim=1).tolist(), strict=True):
        new_ids = list(itertools.takewhile(lambda token: token not in end_token_ids, row[width:]))
        completions.append(Completion(new_ids, any(tied_steps[: len(new_ids) + 1])))
    return completions
