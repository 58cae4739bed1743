"""The block size that the lengths of the records ask for, where none is given."""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from trainer.config.choices import Objective
from trainer.data.chat import ChatTemplate, MaskError
from trainer.data.examples import DataInput, Example, iter_examples
from trainer.data.tokenizer import encode

NUM_SAMPLED_RECORDS = 4096  # the first ones
BLOCK_SIZES = (128, 256, 512, 1024, 2048)  #: longer rows want a decision, and the memory
MAX_JOINED = 1024  # tokens of a block of joined texts
MIN_BLOCKS = 100  # that joined texts should fill
BATCH_RECORDS = 256


def choose_block_size(
    data_input: DataInput, objective: Objective, tokenizer: Any, chat_template: str | None, max_positions: int | None
) -> int:
    """For rows of their own the least of BLOCK_SIZES that holds every sampled record; for joined texts MAX_JOINED,
    or less where the texts would fill fewer than MIN_BLOCKS of them. Never more than the model's positions."""
    sampled = DataInput(data_input.source, data_input.record_format, data_input.file_fingerprints)
    examples = (example for example in iter_examples(sampled, None) if example is not None)
    chat = ChatTemplate(tokenizer, chat_template) if chat_template is not None else None
    lengths = list(islice(_lengths(examples, tokenizer, chat), NUM_SAMPLED_RECORDS))
    return block_size_for(lengths, objective, max_positions)


def block_size_for(lengths: Sequence[int], objective: Objective, max_positions: int | None) -> int:
    """The same by the lengths of the sampled records, tokens; as many as NUM_SAMPLED_RECORDS stand for more."""
    if objective == "completion":
        longest = max(lengths, default=0)
        size = next((size for size in BLOCK_SIZES if size >= longest), BLOCK_SIZES[-1])
    else:
        num_tokens = sum(lengths) if len(lengths) < NUM_SAMPLED_RECORDS else math.inf
        sizes = [size for size in BLOCK_SIZES if size <= MAX_JOINED and num_tokens >= MIN_BLOCKS * size]
        size = max(sizes, default=BLOCK_SIZES[0])
    return min(size, max_positions or size)


def _lengths(examples: Iterator[Example], tokenizer: Any, chat: ChatTemplate | None) -> Iterator[int]:
    """Tokens of each record, with the end of its text; conversations that cannot be learnt from are left out."""
    while batch := list(islice(examples, BATCH_RECORDS)):
        texts = [example for example in batch if example.ids is None and example.conversation is None]
        prompts = encode(tokenizer, [example.prompt for example in texts])
        completions = encode(tokenizer, [example.completion for example in texts])
        yield from (len(prompt) + len(text) + 1 for prompt, text in zip(prompts, completions, strict=True))
        for example in batch:
            if example.ids is not None:
                yield len(example.ids)
            elif example.conversation is not None and chat is not None:
                try:
                    yield len(chat.encode(example.conversation).ids)
                except MaskError:
                    continue
