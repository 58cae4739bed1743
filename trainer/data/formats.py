"""Which columns make which format, and one record in it -> an example: text, token ids or a conversation."""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from trainer.config.choices import Objective
from trainer.config.errors import UserError
from trainer.config.settings import DataSettings
from trainer.data.chat import Conversation, from_messages, from_prompt_completion, from_sharegpt
from trainer.data.readers import Record, RecordError, is_missing, list_columns, require, require_text, to_text

BLOCKS_OR_ROWS: tuple[Objective, ...] = ("blocks", "completion")
#: Stanford Alpaca's own two prompts (tatsu-lab/stanford_alpaca, train.py), with and without an input.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)


@dataclass(kw_only=True)
class Example:
    """One record as text or as a conversation; a text without a prompt is all completion."""

    prompt: str = ""
    completion: str = ""
    conversation: Conversation | None = None
    group: str | None = None  #: what stays in one split and is one unit of an interval, None: the record by itself
    where: str = ""  #: its file and place, for a user
    split: str = ""

    def content(self, separator: str = "\0") -> str:
        """What makes a record equal to another."""
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

    name: str  #: as the plan has it
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


def _render_text(record: Record) -> Example:
    """A text as it is; an empty one is blank, in a CSV file too, where it cannot be told from null."""
    is_blank = "text" in record and is_missing(record["text"])
    return Example(completion="" if is_blank else require_text(record, "text"))


CHAT = "chat by the model's template, loss on the assistant's turns"
PAIR_COLUMNS = ("prompt", "completion")
ROWS: tuple[Objective, ...] = ("completion",)
ROWS_OR_BLOCKS: tuple[Objective, ...] = ("completion", "blocks")
FORMATS = (
    RecordFormat("messages", _chat(from_messages), CHAT, ("messages",), ROWS, is_chat=True),
    RecordFormat("conversations", _chat(from_sharegpt), f"ShareGPT's {CHAT}", ("conversations",), ROWS, is_chat=True),
    RecordFormat("prompt-completion", _chat(from_prompt_completion), CHAT, PAIR_COLUMNS, ROWS, is_chat=True),
    RecordFormat("prompt-completion", _render_pair, "loss on the completion", PAIR_COLUMNS, ROWS_OR_BLOCKS),
    RecordFormat(
        "alpaca", _render_alpaca, "Alpaca's prompt, loss on the output", ("instruction", "output"), ROWS_OR_BLOCKS
    ),
    RecordFormat("acled", lambda record: _render_event(record), "an ACLED event's fields, then its notes"),
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
        if (set(known.needs) <= set(columns) if known.needs else is_acled(columns))
        and (known.needs != PAIR_COLUMNS or known.is_chat == isinstance(first["completion"], list))
    ]
    for candidate in candidates:
        if settings.objective in (None, *candidate.objectives):
            return candidate
    remedy = f"pass --prompt and --completion with columns in braces (columns: {list_columns(columns)})"
    if candidates:
        problem = f"--objective {settings.objective} needs another format than {candidates[0].name}"
        raise UserError(f"{where}: {problem}: {remedy}, or --objective {candidates[0].objectives[0]}")
    needs = ", ".join(dict.fromkeys(" and ".join(known.needs) for known in FORMATS if known.needs))
    raise UserError(
        f"{where}: no ACLED export, and no column {needs} (`chosen` and `rejected` are not trained on): {remedy}"
    )


PIECE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")  # of a template: a brace that is meant literally, or a column


def _find_columns(template: str, flag: str) -> list[str]:
    if stray := re.search("[{}]", PIECE.sub(lambda piece: " " * len(piece[0]), template)):
        problem = f"a brace stands alone at character {stray.start() + 1}"
        raise UserError(f"{flag} {template!r}: {problem}; write {{column}}, or double a brace that is meant literally")
    return [piece[1] for piece in PIECE.finditer(template) if piece[1]]


def _fill(template: str, values: Mapping[str, str]) -> str:
    return PIECE.sub(lambda piece: values[piece[1]] if piece[1] else piece[0][0], template)


def compile_templates(columns: Sequence[str], prompt: str, completion: str, where: str) -> RecordFormat:
    """The format of --prompt and --completion; UserError for a column that is not there. Every column of --completion
    must be filled; a line of --prompt whose columns are all empty is left out, but not all of them may be."""
    lines = [(line, _find_columns(line, "--prompt")) for line in prompt.splitlines(keepends=True)]
    prompt_columns = [column for _, columns_of_line in lines for column in columns_of_line]
    completion_columns = _find_columns(completion, "--completion")
    for flag, names in (("--prompt", prompt_columns), ("--completion", completion_columns)):
        if unknown := next((name for name in names if name not in columns), None):
            raise UserError(f"{flag}: {where} has no column {unknown!r}; its columns are {list_columns(columns)}")
    if not completion_columns:
        expected = f"expected one of {list_columns(columns)}, in braces"
        raise UserError(f"--completion {completion!r}: has no {{column}}; {expected}")

    def render(record: Record) -> Example:
        completion_text = _fill(completion, {name: to_text(require(record, name), name) for name in completion_columns})
        if not completion_text.strip():
            raise RecordError("the text of --completion is empty: fill its columns or drop the row")
        values = {name: "" if is_missing(record.get(name)) else to_text(record[name], name) for name in prompt_columns}
        if values and not any(values.values()):
            require(record, prompt_columns[0])  # which raises
        text = "".join(_fill(line, values) for line, names in lines if not names or any(map(values.get, names)))
        return Example(prompt=text, completion=completion_text, group=text if prompt_columns else None)

    used_columns = tuple(dict.fromkeys(prompt_columns + completion_columns))
    objectives = ROWS_OR_BLOCKS if prompt else BLOCKS_OR_ROWS  # without a prompt there is nothing to leave out
    meaning = "--prompt and --completion" if prompt else "--completion"
    return RecordFormat("template", render, meaning, objectives=objectives, columns=used_columns)


#: The fields of a prompt in their order, and the label each one gets.
ACLED_FIELDS = {
    "event_date": "Date",
    "event_type": "Type",
    "sub_event_type": "Sub-type",
    "actor1": "Actor 1",
    "inter1": "Inter 1",
    "actor2": "Actor 2",
    "inter2": "Inter 2",
    "country": "Country",
    "admin1": "Admin 1",
    "location": "Location",
    "fatalities": "Fatalities",
    "source": "Source",
}
NOTES = "notes"
#: By the code that old exports hold, where newer ones have a text in one of several spellings; 0 is no actor.
INTER_NAMES = (
    *("", "State Forces", "Rebel Groups", "Political Militias", "Identity Militias", "Rioters", "Protesters"),
    *("Civilians", "External/Other Forces"),
)
_INTER_BY_TEXT = {name.casefold().rstrip("s"): name for name in INTER_NAMES} | {
    str(code): name for code, name in enumerate(INTER_NAMES)
}


@functools.lru_cache(maxsize=4096)
def column_names(columns: tuple[str, ...]) -> Mapping[str, str]:
    """{ACLED's name: the name in this export} of the columns we use; of two spellings of one name the first."""
    columns_by_name: dict[str, str] = {}
    for column in columns:
        name = re.sub(r"[\s_]+", "_", column.strip().lower())
        if name in ACLED_FIELDS or name == NOTES:
            columns_by_name.setdefault(name, column)
    return columns_by_name


def is_acled(columns: Iterable[str]) -> bool:
    """Whether a table looks like an export: it has notes, and at least two of the columns that only events have."""
    columns_by_name = column_names(tuple(columns))
    event_columns = ("event_date", "event_type", "sub_event_type", "actor1", "inter1", "fatalities")
    return NOTES in columns_by_name and sum(name in columns_by_name for name in event_columns) >= 2


@functools.lru_cache(maxsize=8192)
def format_date(text: str) -> str | None:
    """`5 January 2022`, as most notes begin, for `2022-01-05`, `05-January-2022` or `5 Jan 2022`; else None."""
    words = re.sub(r"[\s.,-]+", " ", re.sub(r"^(\d{4}-\d{1,2}-\d{1,2})[T ].*", r"\1", text))
    for spelling in ("%Y %m %d", "%d %B %Y", "%d %b %Y"):
        with contextlib.suppress(ValueError):
            date = datetime.strptime(words, spelling)
            return f"{date.day} {date:%B} {date.year}"
    return None


def format_field(name: str, text: str) -> str:
    """The text of a field as the prompt shows it; a date that is not understood stands as it was written."""
    text = " ".join(text.split())
    if name == "event_date":
        return format_date(text) or text
    if name in ("inter1", "inter2", "fatalities"):  # a column with gaps comes out of many programs as floats
        text = re.sub(r"^(\d+)\.0$", r"\1", text)
    return _INTER_BY_TEXT.get(text.casefold().rstrip("s"), text) if name.startswith("inter") else text


def format_prompt(event: Mapping[str, str]) -> str:
    """The structured fields under ACLED's names as labelled lines; empty fields are left out."""
    lines = [(label, format_field(name, event[name])) for name, label in ACLED_FIELDS.items() if event.get(name)]
    return "".join(f"{label}: {text}\n" for label, text in lines if text) + "Notes:"


def _render_event(record: Record) -> Example:
    names = column_names(tuple(record))
    event = {name: to_text(record[column], column) for name, column in names.items() if not is_missing(record[column])}
    notes = event.pop(NOTES, "").strip()
    if not notes:
        raise RecordError(f"column {names.get(NOTES, NOTES)!r} is null or empty: fill it or drop the row")
    return _pair(format_prompt(event), f" {notes}")  # the blank begins a word for GPT-2's tokenizer
