"""Which columns make which format, and one record in it -> an example: text, token ids or a conversation."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as shorten
from typing import NamedTuple

import numpy as np

from trainer.config.choices import Objective
from trainer.config.errors import UserError
from trainer.config.settings import DataSettings
from trainer.data import acled
from trainer.data.conversations import Conversation, from_messages, from_prompt_completion, from_sharegpt
from trainer.data.values import (
    Record,
    RecordError,
    is_missing,
    list_columns,
    require,
    require_text,
    to_text,
    value_text,
)

MAX_TOKEN_ID = 2**31 - 1
BLOCKS_OR_ROWS: tuple[Objective, ...] = ("blocks", "completion")
#: Stanford Alpaca's own two prompts (tatsu-lab/stanford_alpaca, train.py), with and without an input.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)


@dataclass(kw_only=True)
class Example:
    """One record as text, as ids or as a conversation; a text without a prompt is all completion."""

    prompt: str = ""
    completion: str = ""
    ids: list[int] | None = None
    conversation: Conversation | None = None
    group: str | None = None  #: what stays in one split and is one unit of an interval, None: the record by itself
    where: str = ""  #: its file and place, for a user
    split: str = ""

    def split_key(self) -> str | bytes:
        """What decides its split."""
        return self.group if self.group is not None else self.content(separator="")

    def content(self, separator: str = "\0") -> str | bytes:
        """What makes a record equal to another."""
        if self.ids is not None:
            return np.asarray(self.ids, dtype="<u4").tobytes()
        if self.conversation is not None:
            return json.dumps(self.conversation.messages, sort_keys=True)
        return f"{self.prompt}{separator}{self.completion}"

    def text(self, *, with_system: bool = True) -> str:
        """What there is to read of it; of a conversation without its system messages if asked for."""
        if self.conversation is not None:
            return self.conversation.text(with_system=with_system)
        return f"{self.prompt} {self.completion}"


def content_hash(content: str | bytes) -> int:
    """64 bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(content.encode() if isinstance(content, str) else content).digest()[:8], "big")


class RecordFormat(NamedTuple):
    """How the records of a source become examples; `render` raises RecordError."""

    name: str  #: as --format has it, or "template"
    render: Callable[[Record], Example]
    meaning: str  #: what the plan says of it
    needs: tuple[str, ...] = ()  #: columns by which it is known
    objectives: tuple[Objective, ...] = BLOCKS_OR_ROWS  #: the first is taken where none is asked for
    columns: tuple[str, ...] | None = None  #: the ones that are read, None for all
    is_chat: bool = False


def _pair(prompt: str, completion: str) -> Example:
    return Example(prompt=prompt, completion=completion, group=prompt)


def _chat(read: Callable[[Record], Conversation]) -> Callable[[Record], Example]:
    def render(record: Record) -> Example:
        conversation = read(record)
        before = conversation.messages[: conversation.target_turns()[0]]  # those with the same one share a split
        return Example(conversation=conversation, group=json.dumps(before, sort_keys=True) if before else None)

    return render


def _render_alpaca(record: Record) -> Example:
    instruction, output = require_text(record, "instruction"), require_text(record, "output")
    if is_missing(record.get("input")):
        return _pair(ALPACA_WITHOUT_INPUT.format(instruction), output)
    return _pair(ALPACA_WITH_INPUT.format(instruction, require_text(record, "input")), output)


def _render_pair(record: Record) -> Example:
    if isinstance(record.get("label"), bool):
        raise RecordError("column 'label' says whether the completion is wanted (preferences): keep those, drop it")
    return _pair(require_text(record, "prompt"), require_text(record, "completion"))


def _render_token_ids(record: Record) -> Example:
    ids = require(record, "input_ids")
    if not isinstance(ids, list) or not ids:
        raise RecordError(f"column 'input_ids' holds {shorten(ids)}, expected a list of whole numbers")
    for position, value in enumerate(ids):
        if type(value) is not int or not 0 <= value <= MAX_TOKEN_ID:
            raise RecordError(
                f"column 'input_ids' holds {shorten(value)} at place {position}, expected a whole number from 0"
            )
    return Example(ids=ids)


def _render_text(record: Record) -> Example:
    """A text as it is; an empty one is blank, in a CSV file too, where it cannot be told from null."""
    is_blank = "text" in record and is_missing(record["text"])
    return Example(completion="" if is_blank else require_text(record, "text"))


CHAT = "chat by the model's template, loss on the assistant's turns"
PAIR_COLUMNS = ("prompt", "completion")
ROWS: tuple[Objective, ...] = ("completion",)
ROWS_OR_BLOCKS: tuple[Objective, ...] = ("completion", "blocks")
FORMATS = (
    RecordFormat("input_ids", _render_token_ids, "token ids as they are", ("input_ids",), ("blocks",), ("input_ids",)),
    RecordFormat("messages", _chat(from_messages), CHAT, ("messages",), ROWS, is_chat=True),
    RecordFormat("conversations", _chat(from_sharegpt), f"ShareGPT's {CHAT}", ("conversations",), ROWS, is_chat=True),
    RecordFormat("prompt-completion", _chat(from_prompt_completion), CHAT, PAIR_COLUMNS, ROWS, is_chat=True),
    RecordFormat("prompt-completion", _render_pair, "loss on the completion", PAIR_COLUMNS, ROWS_OR_BLOCKS),
    RecordFormat(
        "alpaca", _render_alpaca, "Alpaca's prompt, loss on the output", ("instruction", "output"), ROWS_OR_BLOCKS
    ),
    RecordFormat("acled", lambda record: _pair(*acled.render(record)), "an ACLED event's fields, then its notes"),
    RecordFormat("text", _render_text, "texts as they are", ("text",), ("blocks",), ("text",)),
)


def choose_format(first: Record, settings: DataSettings, where: str) -> RecordFormat:
    """The format of a source that begins with this record; UserError, which names `where`, where none fits."""
    columns = tuple(first)
    if settings.completion is not None:
        return compile_templates(columns, settings.prompt or "", settings.completion, where)
    candidates = [
        known
        for known in FORMATS
        if settings.format in (None, known.name)
        and (acled.is_acled(columns) if known.name == "acled" else set(known.needs) <= set(columns))
        and (known.needs != PAIR_COLUMNS or known.is_chat == isinstance(first["completion"], list))
    ]
    for candidate in candidates:
        if settings.objective in (None, *candidate.objectives):
            return candidate
    remedy = f"pass --prompt and --completion with columns in braces (columns: {list_columns(columns)})"
    if candidates:
        raise UserError(
            f"{where}: --objective {settings.objective} needs another format than {candidates[0].name}: {remedy}, or "
            f"--objective {candidates[0].objectives[0]}"
        )
    if settings.format is not None:
        needs = next(known.needs for known in FORMATS if known.name == settings.format) or (
            "notes",
            "an event's columns",
        )
        raise UserError(f"--format {settings.format}: {where} has no column {' and '.join(needs)}: {remedy}")
    raise UserError(
        f"{where}: no column `text`, `messages`, `conversations`, `prompt` and `completion`, `instruction` and "
        "`output` or `input_ids`, and not an ACLED export; preferences (`chosen`, `rejected`) are not trained on: "
        f"{remedy}"
    )


# --- templates with columns in braces ---

Piece = tuple[bool, str]  # (whether it is a column of the record, its name or the text that stands as it is)


def parse_template(template: str, flag: str) -> list[Piece]:
    """The parts of a template; `{{` and `}}` are literal braces; UserError for a stray one."""
    pieces = []
    for match in re.finditer(r"\{\{|\}\}|\{([^{}]+)\}|[{}]|[^{}]+", template):
        text = match[0]
        if text in ("{", "}"):
            raise UserError(
                f"{flag} {template!r}: a brace stands alone at character {match.start() + 1}; "
                "write {column}, or double a brace that is meant literally"
            )
        pieces.append((True, match[1]) if match[1] else (False, text[0] if text in ("{{", "}}") else text))
    return pieces


def compile_templates(columns: Sequence[str], prompt: str, completion: str, where: str) -> RecordFormat:
    """The format of --prompt and --completion; UserError for a column that is not there.

    Every column of --completion must be filled. A line of --prompt whose columns are all empty is left out, so that an
    optional part leaves nothing behind; not all of them may be.
    """
    lines = [parse_template(line, "--prompt") for line in prompt.splitlines(keepends=True)]
    completion_pieces = parse_template(completion, "--completion")
    prompt_columns = [text for line in lines for is_column, text in line if is_column]
    completion_columns = [text for is_column, text in completion_pieces if is_column]
    for flag, names in (("--prompt", prompt_columns), ("--completion", completion_columns)):
        if unknown := next((name for name in names if name not in columns), None):
            raise UserError(f"{flag}: {where} has no column {unknown!r}; its columns are {list_columns(columns)}")
    if not completion_columns:
        raise UserError(
            f"--completion {completion!r}: has no {{column}}; "
            + (
                f"did you mean '{{{completion.strip()}}}'?"
                if completion.strip() in columns
                else f"expected one of {list_columns(columns)}"
            )
        )

    def fill(pieces: Sequence[Piece], values: Mapping[str, str]) -> str:
        return "".join(values[text] if is_column else text for is_column, text in pieces)

    def render(record: Record) -> Example:
        values = {name: value_text(record, name, "--completion") for name in completion_columns}
        completion_text = fill(completion_pieces, values)
        if not completion_text.strip():
            raise RecordError("the text of --completion is empty: fill its columns or drop the row")
        values = {name: "" if is_missing(record.get(name)) else to_text(record[name], name) for name in prompt_columns}
        if values and not any(values.values()):
            value_text(record, prompt_columns[0], "--prompt")  # which raises
        used_lines = (
            line
            for line in lines
            if not any(is_column for is_column, _ in line) or any(values[t] for c, t in line if c)
        )
        text = "".join(fill(line, values) for line in used_lines)
        return Example(prompt=text, completion=completion_text, group=text if prompt_columns else None)

    used_columns = tuple(dict.fromkeys(prompt_columns + completion_columns))
    objectives = ROWS_OR_BLOCKS if prompt else BLOCKS_OR_ROWS  # without a prompt there is nothing to leave out
    meaning = "--prompt and --completion" if prompt else "--completion"
    return RecordFormat("template", render, meaning, objectives=objectives, columns=used_columns)
