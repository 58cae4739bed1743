"""Which columns make which format, and the records of a source in it -> examples: text, token ids or a conversation."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from trainer.config.choices import Objective
from trainer.config.errors import UserError
from trainer.config.settings import DataSettings
from trainer.data import acled, conversations, sources
from trainer.data.cache import FileFingerprint
from trainer.data.conversations import Conversation
from trainer.data.sources import Source
from trainer.data.templates import (
    Pair,
    Record,
    RecordError,
    compile_templates,
    is_missing,
    list_columns,
    parse_template,
    require,
    require_text,
    shorten,
    to_text,
    value_text,
)

MAX_TOKEN_ID = 2**31 - 1
#: Stanford Alpaca's own two prompts (tatsu-lab/stanford_alpaca, train.py), with and without an input.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class RecordFormat:
    """How the records of a source become text.

    render: record -> (prompt, completion), a conversation or token ids, raises RecordError; a text without a prompt is
    all completion.
    """

    name: str  #: as --format has it, or "template"
    render: Callable[[Record], Pair | Conversation | list[int]]
    meaning: str  #: what the plan says of it
    needs: tuple[str, ...] = ()  #: columns by which it is known
    objectives: tuple[Objective, ...] = ("blocks", "completion")  #: the first is taken where none is asked for
    columns: tuple[str, ...] | None = None  #: the ones that are read, None for all
    is_keyed_by_prompt: bool = True  #: whether the prompt tells records apart: the validation split goes by it


def _render_acled(record: Record) -> Pair:
    names = acled.column_names(tuple(record))
    event = {name: to_text(record[column], column) for name, column in names.items() if not is_missing(record[column])}
    notes = event.pop(acled.NOTES, "")
    if not notes.strip():
        raise RecordError(f"column {names.get(acled.NOTES, acled.NOTES)!r} is null or empty: fill it or drop the row")
    return acled.format_prompt(event), acled.format_completion(notes)


def _render_alpaca(record: Record) -> Pair:
    instruction, output = require_text(record, "instruction"), require_text(record, "output")
    if is_missing(record.get("input")):
        return ALPACA_WITHOUT_INPUT.replace("{instruction}", instruction), output
    before, after = ALPACA_WITH_INPUT.replace("{instruction}", instruction, 1).rsplit("{input}", 1)
    return before + require_text(record, "input") + after, output


def _render_prompt_completion(record: Record) -> Pair | Conversation:
    if isinstance(record.get("label"), bool):
        raise RecordError("column 'label' says whether the completion is wanted (preferences): keep those, drop it")
    if isinstance(record.get("completion"), list):
        return conversations.from_prompt_completion(record)
    return require_text(record, "prompt"), require_text(record, "completion")


def _render_text(record: Record) -> Pair:
    """A text as it is; an empty one is blank, in a CSV file too, where it cannot be told from null."""
    return "", "" if "text" in record and is_missing(record["text"]) else require_text(record, "text")


def parse_token_ids(record: Record) -> list[int]:
    """The `input_ids` of a record; RecordError where they are not a list of whole numbers from 0."""
    ids = require(record, "input_ids")
    if not isinstance(ids, list):
        raise RecordError(f"column 'input_ids' holds a {type(ids).__name__}, expected a list of whole numbers")
    if not ids:
        raise RecordError("column 'input_ids' is empty: drop the row")
    for position, value in enumerate(ids):
        if type(value) is not int or not 0 <= value <= MAX_TOKEN_ID:
            raise RecordError(
                f"column 'input_ids' holds {shorten(value)} at place {position}, expected a whole number from 0"
            )
    return ids


CHAT_MEANING = "chat by the model's template, loss on the assistant's turns"
FORMATS = (
    RecordFormat(
        "input_ids",
        parse_token_ids,
        "token ids as they are",
        ("input_ids",),
        ("blocks",),
        columns=("input_ids",),
        is_keyed_by_prompt=False,
    ),
    RecordFormat("messages", conversations.from_messages, CHAT_MEANING, ("messages",), ("completion",)),
    RecordFormat(
        "conversations", conversations.from_sharegpt, f"ShareGPT's {CHAT_MEANING}", ("conversations",), ("completion",)
    ),
    RecordFormat(
        "prompt-completion",
        _render_prompt_completion,
        "loss on the completion",
        ("prompt", "completion"),
        ("completion", "blocks"),
    ),
    RecordFormat(
        "alpaca",
        _render_alpaca,
        "Alpaca's prompt, loss on the output",
        ("instruction", "output"),
        ("completion", "blocks"),
    ),
    RecordFormat("acled", _render_acled, "an ACLED event's fields, then its notes"),
    RecordFormat(
        "text", _render_text, "texts as they are", ("text",), ("blocks",), columns=("text",), is_keyed_by_prompt=False
    ),
)


def choose_format(columns: Sequence[str], settings: DataSettings, where: str) -> RecordFormat:
    """The format of a table with these columns; UserError, naming `where`, when there is none or it does not fit."""
    if settings.completion is not None:
        used_columns, render = compile_templates(columns, settings.prompt or "", settings.completion, where)
        is_keyed_by_prompt = any(is_column for is_column, _ in parse_template(settings.prompt or "", "--prompt"))
        meaning = "--prompt and --completion"
        return RecordFormat("template", render, meaning, columns=used_columns, is_keyed_by_prompt=is_keyed_by_prompt)
    candidates = [
        f
        for f in FORMATS
        if settings.format in (None, f.name)
        and (acled.is_acled(columns) if f.name == "acled" else set(f.needs) <= set(columns))
    ]
    accepted = [f for f in candidates if settings.objective in (None, *f.objectives)]
    if accepted:
        return accepted[0]
    if settings.format is not None and not candidates:
        needs = next(f.needs for f in FORMATS if f.name == settings.format) or ("notes", "an event's columns")
        raise UserError(
            f"--format {settings.format}: {where} has no column {' and '.join(needs)} "
            f"(columns: {list_columns(columns)})"
        )
    templates = f"pass --prompt and --completion with columns in braces (columns: {list_columns(columns)})"
    if candidates:
        raise UserError(
            f"{where}: --objective {settings.objective} needs another format than {candidates[0].name}: {templates}, "
            f"or --objective {candidates[0].objectives[0]}"
        )
    if settings.objective == "completion":
        raise UserError(f"{where}: --objective completion needs a completion: {templates}")
    if {"chosen", "rejected"} <= set(columns):
        raise UserError(
            f"{where}: preferences (columns chosen, rejected), which are for DPO; this program trains on one answer "
            "per prompt: expected records of prompt and completion, or messages, made of the chosen ones"
        )
    raise UserError(
        f"{where}: no column `text`, `messages`, `conversations`, `prompt` and `completion`, `instruction` and "
        f"`output` or `input_ids`, and not an ACLED export: {templates}"
    )


class Example(NamedTuple):
    """One record as text, as ids where it came as ids, or as a conversation."""

    where: str  #: its file and place, for a user
    prompt: str
    completion: str
    ids: list[int] | None = None
    conversation: Conversation | None = None
    group: str | None = None  #: what stays in one split and is one unit of an interval
    unknown_date: str | None = None  #: an ACLED date in none of its spellings

    def content(self, separator: str = "\0") -> str | bytes:
        """What makes a record equal to another."""
        if self.ids is not None:
            return np.asarray(self.ids, dtype="<u4").tobytes()
        if self.conversation is not None:
            return json.dumps(self.conversation.messages, sort_keys=True)
        return f"{self.prompt}{separator}{self.completion}"


@dataclass(kw_only=True)
class DataInput:
    """One source with the format of its records, and what the first reading of it counted."""

    source: Source
    record_format: RecordFormat
    split_by: str | None
    fractions: tuple[float, float]  #: of validation and test that are split off
    fingerprints: tuple[FileFingerprint, ...] = ()
    num_records: int = 0
    num_blank: int = 0
    num_conversations: int = 0
    num_unseparated: int = 0  #: records in which nothing stands between prompt and completion
    max_token_id: int = 0
    num_unknown_dates: int = 0
    first_unknown_date: str = ""
    split_sizes: Counter[str] = field(default_factory=Counter)

    def examples(self) -> Iterator[Example | None]:
        """Its records, None for a blank one; UserError names file, row and column."""
        columns = self.record_format.columns
        if self.split_by is not None and columns is not None:
            columns = tuple(dict.fromkeys((*columns, self.split_by)))
        for file, place, record in sources.records(self.source, columns):
            where = self.source.locate(file, place)
            try:
                example = self._make_example(where, record)
                if self.split_by is not None and example is not None:
                    example = example._replace(group=value_text(record, self.split_by, "--split-by"))
            except (RecordError, RecursionError) as error:
                problem = error if isinstance(error, RecordError) else "nested too deeply; expected flat records"
                raise UserError(f"{self.source.flag} {where}: {problem}") from None
            yield example

    def _make_example(self, where: str, record: Record) -> Example | None:
        rendered = self.record_format.render(record)
        if isinstance(rendered, list):
            return Example(where, "", "", ids=rendered)
        if isinstance(rendered, Conversation):
            return Example(where, "", "", conversation=rendered, group=rendered.first_prompt())
        prompt, completion = rendered
        if not completion.strip():
            return None
        group = prompt if self.record_format.is_keyed_by_prompt else None
        unknown_date = acled.find_unknown_date(record) if self.record_format.name == "acled" else None
        return Example(where, prompt, completion, group=group, unknown_date=unknown_date)

    def split_of(self, example: Example) -> str:
        """The split of an example of the training source goes by its content alone, whatever stands beside it."""
        if self.source.split != "train":
            return self.source.split
        return split_of(example.group if example.group is not None else example.content(separator=""), *self.fractions)

    def count(self, example: Example, split: str) -> None:
        """Add one example; UserError where text and conversations are mixed."""
        self.num_records += 1
        self.split_sizes[split] += 1
        self.num_conversations += example.conversation is not None
        if self.num_conversations not in (0, self.num_records):
            raise UserError(
                f"{self.source.flag} {example.where}: text and messages in one column; expected one of them"
            )
        if example.ids is not None:
            self.max_token_id = max(self.max_token_id, *example.ids)
        elif example.prompt and not (example.prompt[-1].isspace() or example.completion[:1].isspace()):
            self.num_unseparated += 1
        if example.unknown_date is not None:
            self.num_unknown_dates += 1
            self.first_unknown_date = self.first_unknown_date or f"{example.where}: {example.unknown_date}"

    def notices(self) -> list[str]:
        """One line for everything in it that a user should know of."""
        lines, spec = list(self.source.notices), self.source.spec
        if self.num_blank:
            lines.append(f"{spec}: {self.num_blank} blank records are left out")
        if self.num_unseparated:
            lines.append(
                f"{spec}: in {self.num_unseparated} of {self.num_records} records nothing separates prompt and "
                "completion; begin the completion with a blank, or end the prompt with a line break"
            )
        if self.num_unknown_dates:
            lines.append(
                f"{spec}: {self.num_unknown_dates} dates stand as they were written (first: {self.first_unknown_date})"
            )
        if self.record_format.name == "input_ids" and "labels" in sources.columns(self.source):
            lines.append(f"{spec}: the column `labels` is not used, every token counts")
        return lines


def content_hash(content: str | bytes) -> int:
    """64 bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(content.encode() if isinstance(content, str) else content).digest()[:8], "big")


def split_of(key: str | bytes, val_fraction: float, test_fraction: float = 0.0) -> str:
    """Which split a record belongs to: validation is the lower end of the hashes and the test the upper one, so
    neither moves where the other grows."""
    share = content_hash(key) / 2**64
    return "val" if share < val_fraction else "test" if share >= 1 - test_fraction else "train"
