"""What a row looks like to the loss: its text with the learnt parts marked, or its tokens one by one."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config.errors import escape_controls
from trainer.data.token_dataset import TokenDataset

MAX_MARKED_CHARACTERS = 400  # of a row in the plan; its middle is left out
OPEN, CLOSE = "⟦", "⟧"
LEARNT_STYLE, PLAIN_STYLE = "\033[1;32m", "\033[0m"


def mark_targets(tokenizer: Any, ids: NDArray[Any], is_target: NDArray[np.bool_]) -> str:
    """The text of a row on one line, `⟦learnt⟧` from the rest; long runs are shortened in their middle."""
    text, start = "", 0
    edges = [*(np.flatnonzero(np.diff(is_target)) + 1).tolist(), len(ids)]
    for end in edges:
        part = escape_controls(tokenizer.decode(ids[start:end].tolist()))
        limit = MAX_MARKED_CHARACTERS // len(edges) + 20
        part = part if len(part) <= limit else f"{part[: limit // 2]} … {part[-limit // 2 :]}"
        text += f"{OPEN}{part}{CLOSE}" if is_target[start] else part
        start = end
    return text


def show_examples(dataset: TokenDataset, tokenizer: Any, number: int, is_coloured: bool) -> Iterator[str]:
    """Lines that show the tokens of the first rows: those that count are coloured, or in brackets without colour."""
    for i in range(min(number, len(dataset))):
        ids, is_target = dataset.row(i), dataset.is_target(i)
        yield f"example {i + 1}: {len(ids)} tokens, {int(is_target.sum())} of them learnt"
        pieces = []
        for token_id, learnt in zip(ids.tolist(), is_target.tolist(), strict=True):
            piece = escape_controls(tokenizer.decode([token_id]))
            if is_coloured:
                pieces.append(f"{LEARNT_STYLE if learnt else ''}{piece}{PLAIN_STYLE if learnt else ''}")
            else:
                pieces.append(f"{OPEN}{piece}{CLOSE}" if learnt else piece)
        yield "|".join(pieces)
