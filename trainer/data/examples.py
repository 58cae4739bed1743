"""The records of a source as examples: text, token ids or a conversation, with their place and their split."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.config.errors import UserError
from trainer.data import readers
from trainer.data.acled import column_names, format_date
from trainer.data.conversations import Conversation
from trainer.data.formats import RecordFormat
from trainer.data.row_info import content_hash
from trainer.data.sources import Source
from trainer.data.templates import Record, RecordError, is_missing, to_text, value_text
from trainer.data.token_dataset import SPLITS
from trainer.data.validate_files import FileFingerprint, find_change


class Example(NamedTuple):
    """One record as text, as ids where it came as ids, or as a conversation; file and place say where it stands."""

    file: Path | None
    place: str
    prompt: str
    completion: str
    ids: list[int] | None = None
    conversation: Conversation | None = None
    group: str | None = None  #: what stays in one split and is one unit of an interval


@dataclass
class DataInput:
    """One source with the format of its records, and what the first reading of it counted."""

    source: Source
    record_format: RecordFormat
    file_fingerprints: tuple[FileFingerprint, ...] = ()
    num_records: int = 0
    num_blank: int = 0
    num_conversations: int = 0
    num_unseparated: int = 0  #: records in which nothing stands between prompt and completion
    max_token_id: int = 0
    num_unknown_dates: int = 0
    first_unknown_date: str = ""
    is_counted: bool = False  # the second reading counts nothing again
    split_sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))

    def locate(self, example: Example) -> str:
        """Where an example stands, for a user."""
        return self.source.locate(example.file, example.place)

    def count(self, example: Example, split: str) -> None:
        """Add one example to what the first reading counts; UserError where text and conversations are mixed."""
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
        if self.record_format.name == "input_ids" and "labels" in readers.columns(self.source):
            lines.append(f"{spec}: the column `labels` is not used, every token counts")
        return lines


def iter_examples(data_input: DataInput, split_by: str | None) -> Iterator[Example | None]:
    """The records of a source, None for a blank one; UserError names file, row and column.

    `split_by`: the column that says which records stay in one split, the prompt where it is None.
    """
    source, record_format = data_input.source, data_input.record_format
    columns = record_format.columns
    if split_by is not None and columns is not None:
        columns = tuple(dict.fromkeys((*columns, split_by)))
    try:
        for file, place, record in readers.records(source, columns):
            try:
                example = _to_example(file, place, record, record_format)
                if split_by is not None and example is not None:
                    example = example._replace(group=value_text(record, split_by, "--split-by"))
            except RecordError as error:
                raise UserError(f"{source.flag} {source.locate(file, place)}: {error}") from None
            except RecursionError:
                raise UserError(
                    f"{source.flag} {source.locate(file, place)}: nested too deeply; expected flat records"
                ) from None
            if record_format.name == "acled" and not data_input.is_counted:
                _count_unknown_date(data_input, file, place, record)
            yield example
    except UserError as error:
        # a file that changed is the cause
        raise (find_change(source, data_input.file_fingerprints) or error) from None


def _to_example(file: Path | None, place: str, record: Record, record_format: RecordFormat) -> Example | None:
    rendered = record_format.render(record)
    if isinstance(rendered, list):
        return Example(file, place, "", "", ids=rendered)
    if isinstance(rendered, Conversation):
        return Example(file, place, "", "", conversation=rendered, group=rendered.first_prompt())
    prompt, completion = rendered
    group = prompt if record_format.is_keyed_by_prompt else None
    return Example(file, place, prompt, completion, group=group) if completion.strip() else None


def _count_unknown_date(data_input: DataInput, file: Path | None, place: str, record: Record) -> None:
    """Count a date of an ACLED export that is in none of its spellings."""
    column = column_names(tuple(record)).get("event_date", "")
    value = record.get(column)
    if not is_missing(value) and format_date(to_text(value, column).strip()) is None:
        data_input.num_unknown_dates += 1
        where = f"{data_input.source.locate(file, place)}: {value}"
        data_input.first_unknown_date = data_input.first_unknown_date or where


def split_of(key: str | bytes, val_fraction: float, test_fraction: float = 0.0) -> str:
    """Which split a record belongs to: by its own content alone, whatever stands beside it.

    Validation is the lower end of the hashes and the test the upper one, so neither moves where the other grows.
    """
    share = content_hash(key) / 2**64
    return "val" if share < val_fraction else "test" if share >= 1 - test_fraction else "train"


def content_of(example: Example, separator: str = "\0") -> str | bytes:
    """What makes a record equal to another."""
    if example.ids is not None:
        return np.asarray(example.ids, dtype="<u4").tobytes()
    if example.conversation is not None:
        return json.dumps(example.conversation.messages, sort_keys=True)
    return f"{example.prompt}{separator}{example.completion}"
