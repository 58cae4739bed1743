"""Which columns make which format, and the records of a source in it -> examples: text, token ids or a conversation."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.config.choices import Objective
from trainer.config.errors import UserError
from trainer.config.schema import DataSettings
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


@dataclass(frozen=True, kw_only=True)
class RecordFormat:
    """How the records of a source become text.

    render: record -> (prompt, completion), a conversation or token ids, raises RecordError; a text without a prompt is
    all completion.
    """

    name: str  #: as --format has it, or "template"
    render: Callable[[Record], Pair | Conversation | list[int]]
    needs: tuple[str, ...] = ()  #: columns by which it is known
    columns: tuple[str, ...] | None = None  #: the ones that are read, None for all
    is_keyed_by_prompt: bool = True  #: whether the prompt tells records apart: the validation split goes by it
    objectives: tuple[Objective, ...] = ("blocks", "completion")  #: the first is taken where none is asked for
    meaning: str = ""  #: what the plan says of it


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
    ids = record.get("input_ids")
    if is_missing(ids):
        raise RecordError("column 'input_ids' is null: fill it or drop the row")
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


FORMATS = (
    RecordFormat(
        name="input_ids",
        needs=("input_ids",),
        columns=("input_ids",),
        render=parse_token_ids,
        is_keyed_by_prompt=False,
        objectives=("blocks",),
        meaning="token ids as they are",
    ),
    RecordFormat(
        name="messages",
        needs=("messages",),
        render=conversations.from_messages,
        objectives=("completion",),
        meaning="chat by the model's template, loss on the assistant's turns",
    ),
    RecordFormat(
        name="conversations",
        needs=("conversations",),
        render=conversations.from_sharegpt,
        objectives=("completion",),
        meaning="ShareGPT's chat by the model's template, loss on the assistant's turns",
    ),
    RecordFormat(
        name="prompt-completion",
        needs=("prompt", "completion"),
        render=_render_prompt_completion,
        objectives=("completion", "blocks"),
        meaning="loss on the completion",
    ),
    RecordFormat(
        name="alpaca",
        needs=("instruction", "output"),
        render=_render_alpaca,
        objectives=("completion", "blocks"),
        meaning="Alpaca's prompt, loss on the output",
    ),
    RecordFormat(name="acled", render=_render_acled, meaning="an ACLED event's fields, then its notes"),
    RecordFormat(
        name="text",
        needs=("text",),
        columns=("text",),
        render=_render_text,
        is_keyed_by_prompt=False,
        objectives=("blocks",),
        meaning="texts as they are",
    ),
)


def choose_format(columns: Sequence[str], settings: DataSettings, where: str) -> RecordFormat:
    """The format of a table with these columns; UserError, naming `where`, when there is none or it does not fit."""
    if settings.completion is not None:
        used_columns, render = compile_templates(columns, settings.prompt or "", settings.completion, where)
        is_keyed_by_prompt = any(is_column for is_column, _ in parse_template(settings.prompt or "", "--prompt"))
        return RecordFormat(
            name="template",
            columns=used_columns,
            render=render,
            is_keyed_by_prompt=is_keyed_by_prompt,
            meaning="--prompt and --completion",
        )
    candidates = [f for f in FORMATS if settings.format in (None, f.name) and _fits(f, columns)]
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


def _fits(record_format: RecordFormat, columns: Sequence[str]) -> bool:
    return acled.is_acled(columns) if record_format.name == "acled" else set(record_format.needs) <= set(columns)


class Example(NamedTuple):
    """One record as text, as ids where it came as ids, or as a conversation; file and place say where it stands."""

    file: Path | None
    place: str
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


def iter_examples(source: Source, record_format: RecordFormat, split_by: str | None = None) -> Iterator[Example | None]:
    """The records of a source, None for a blank one; UserError names file, row and column.

    `split_by`: the column that says which records stay in one split, the prompt where it is None.
    """
    columns = record_format.columns
    if split_by is not None and columns is not None:
        columns = tuple(dict.fromkeys((*columns, split_by)))
    for file, place, record in sources.records(source, columns):
        try:
            example = _make_example(file, place, record, record_format)
            if split_by is not None and example is not None:
                example = example._replace(group=value_text(record, split_by, "--split-by"))
        except (RecordError, RecursionError) as error:
            problem = error if isinstance(error, RecordError) else "nested too deeply; expected flat records"
            raise UserError(f"{source.flag} {source.locate(file, place)}: {problem}") from None
        yield example


def _make_example(file: Path | None, place: str, record: Record, record_format: RecordFormat) -> Example | None:
    rendered = record_format.render(record)
    if isinstance(rendered, list):
        return Example(file, place, "", "", ids=rendered)
    if isinstance(rendered, Conversation):
        return Example(file, place, "", "", conversation=rendered, group=rendered.first_prompt())
    prompt, completion = rendered
    if not completion.strip():
        return None
    group = prompt if record_format.is_keyed_by_prompt else None
    unknown_date = acled.find_unknown_date(record) if record_format.name == "acled" else None
    return Example(file, place, prompt, completion, group=group, unknown_date=unknown_date)


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
        """Its records, None for a blank one."""
        return iter_examples(self.source, self.record_format, self.split_by)

    def locate(self, example: Example) -> str:
        """Where an example stands, for a user."""
        return self.source.locate(example.file, example.place)

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
                f"{self.source.flag} {self.locate(example)}: text and messages in one column; expected one of them"
            )
        if example.ids is not None:
            self.max_token_id = max(self.max_token_id, *example.ids)
        elif example.prompt and not (example.prompt[-1].isspace() or example.completion[:1].isspace()):
            self.num_unseparated += 1
        if example.unknown_date is not None:
            self.num_unknown_dates += 1
            self.first_unknown_date = self.first_unknown_date or f"{self.locate(example)}: {example.unknown_date}"

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
