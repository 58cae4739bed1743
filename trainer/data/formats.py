"""Which columns make which format, and one record of it -> prompt and completion, or a conversation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.config.choices import Objective
from trainer.config.errors import UserError
from trainer.config.schema import DataSettings
from trainer.data import acled, conversations
from trainer.data.conversations import Conversation
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
        is_keyed_by_prompt = any(piece.is_column for piece in parse_template(settings.prompt or "", "--prompt"))
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
        raise UserError(f"{where}: --objective completion needs a text to be learnt: {templates}")
    if {"chosen", "rejected"} <= set(columns):
        raise UserError(
            f"{where}: preferences (columns chosen, rejected), which are for DPO; one answer a prompt is learnt here: "
            "expected records of prompt and completion, or messages, made of the chosen ones"
        )
    raise UserError(
        f"{where}: no column `text`, `messages`, `conversations`, `prompt` and `completion`, `instruction` and "
        f"`output` or `input_ids`, and not an ACLED export: {templates}"
    )


def _fits(record_format: RecordFormat, columns: Sequence[str]) -> bool:
    return acled.is_acled(columns) if record_format.name == "acled" else set(record_format.needs) <= set(columns)
