"""A record -> a conversation -> token ids and which of them are targets; each mask is proven or refused.

Where the target tokens stand comes from the template's own `{% generation %}` marks, or from prefixes: the text of the
messages before a turn, with its generation prompt, must begin the whole text, and its ids the ids of the whole, so a
target turn follows exactly the ids that a model is given when it is to write that turn.
"""

import contextlib
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

import numpy as np

from trainer.config.errors import UserError, first_line
from trainer.config.files import parse_json, read_text_file
from trainer.data.readers import Record, RecordError, is_missing, require_valid_unicode
from trainer.data.tokenizer import Row, encode

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "function_call", "bot", "model"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "function"), "tool"),
    **{role: role for role in ROLES},
}


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What a chat template takes: `messages` of role and content, and `tools` that the assistant may call."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    num_context: int = 0  #: messages at the beginning whose assistant turns are context

    def target_turns(self) -> list[int]:
        """The places of the assistant's turns to train on: by OpenAI's form all but those of weight 0."""
        return [
            i
            for i, message in enumerate(self.messages)
            if i >= self.num_context and message["role"] == "assistant" and message.get("weight") != 0
        ]

    def text(self, num_messages: int | None = None, *, with_system: bool = True) -> str:
        """What there is to read of the first so many messages, all of them where it is None."""
        return "\n".join(
            f"{message['content']} {message.get('tool_calls') or ''}"
            for message in self.messages[:num_messages]
            if with_system or message["role"] not in ("system", "developer")
        )


def from_messages(record: Record) -> Conversation:
    """OpenAI's and TRL's `messages`; RecordError names the message that cannot be used."""
    return _make_conversation(record, _read_messages(record, "messages"))


def from_sharegpt(record: Record) -> Conversation:
    """ShareGPT's `conversations` of from and value, or of role and content, with an optional `system`."""
    messages = [] if is_missing(record.get("system")) else [{"role": "system", "content": record["system"]}]
    for number, message in enumerate(_read_list(record, "conversations", "messages"), start=1):
        sender = message.get("from", message.get("role")) if isinstance(message, dict) else message
        if not isinstance(message, dict) or not isinstance(sender, str) or sender not in SHAREGPT_ROLES:
            expected = ", ".join(SHAREGPT_ROLES)
            where = f"message {number} of column 'conversations'"
            raise RecordError(f"{where} is from {shorten(sender)}, expected one from {expected}")
        others = {key: value for key, value in message.items() if key not in ("from", "value")}  # weight, tool_calls
        content = message.get("value", message.get("content"))
        messages.append({**others, "role": SHAREGPT_ROLES[sender], "content": content})
    return _make_conversation(record, _read_messages({"conversations": messages}, "conversations"))


def from_prompt_completion(record: Record) -> Conversation:
    """`prompt` and `completion` that are messages; what the prompt holds is context."""
    prompt, completion = _read_messages(record, "prompt"), _read_messages(record, "completion")
    return _make_conversation(record, prompt + completion, num_context=len(prompt))


def _make_conversation(record: Record, messages: list[dict[str, Any]], num_context: int = 0) -> Conversation:
    tools = [] if is_missing(record.get("tools")) else _read_list(record, "tools", "tools")
    conversation = Conversation(messages=messages, tools=_without_null(tools) or None, num_context=num_context)
    if not conversation.target_turns():
        raise RecordError("no message of role assistant whose weight is not 0: nothing to train on; drop the record")
    return conversation


def _read_list(record: Record, column: str, content: str) -> list[Any]:
    """A list, or one as JSON text, which is all that a cell of a CSV file can hold."""
    value = record.get(column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value, with_nan=True)
        except ValueError as error:
            raise RecordError(f"column {column!r} is not JSON ({error}); expected a list of {content}") from None
    if not isinstance(value, list):
        raise RecordError(f"column {column!r} holds {shorten(value)}, expected a list of {content}, or its JSON")
    return value


def _read_messages(record: Record, column: str) -> list[dict[str, Any]]:
    if is_missing(record.get(column)) or not (messages := _read_list(record, column, "messages")):
        raise RecordError(f"column {column!r} is missing or empty, expected a list of messages")
    checked = []
    for number, message in enumerate(messages, start=1):
        where = f"message {number} of column {column!r}"
        if not isinstance(message, dict):
            raise RecordError(f"{where} is {shorten(message)}, expected an object with role and content")
        content, calls = message.get("content"), message.get("tool_calls")
        if isinstance(content, list):
            texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
            if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
                content = "".join(map(str, texts))
        for key, is_right, expected in (
            ("role", message.get("role") in ROLES, ", ".join(ROLES)),
            ("content", content is None or isinstance(content, str), "text, or parts of type text"),
            ("tool_calls", not calls or isinstance(calls, list), "a list"),
            ("weight", message.get("weight") in (None, 0, 1), "0 (context) or 1"),
        ):
            if not is_right:
                raise RecordError(f"{where} has {shorten(message.get(key))} as {key}, expected {expected}")
        if is_missing(content) and not (message["role"] == "assistant" and calls):
            raise RecordError(f"{where} ({message['role']}) has no content; fill it or drop the record")
        checked.append({**_without_null(message), "content": require_valid_unicode(str(content or ""), column)})
    return checked


def _without_null(value: Any) -> Any:
    """Without the keys that are null: Arrow fills what one record of a column has into all of them."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
MAX_SECONDS = 10  # for one conversation by its template, which takes well under a millisecond
Span = tuple[int, int]  # from and to, in characters


class MaskError(RecordError):
    """Why it cannot be proven which tokens of a record are targets, or that none are."""


def load_template(tokenizer: Any, template_file: str | None, model: str) -> str:
    """The template of --chat-template, or the tokenizer's own; UserError where there is none."""
    if template_file is not None:
        return read_text_file(Path(template_file), f"--chat-template {template_file}", "a Jinja file")
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise UserError(f"--model {model}: its tokenizer has no chat template; pass --chat-template FILE") from None


class ChatTemplate:
    """One template with the tokenizer that reads what it writes."""

    def __init__(self, tokenizer: Any, template: str):
        self.tokenizer, self.template = tokenizer, template

    def encode(self, conversation: Conversation, max_tokens: int | None = None) -> Row:
        """Ids and mask of a conversation; MaskError where the mask cannot be proven. Turns that begin behind
        `max_tokens`, which nobody trains on, are neither located nor marked."""
        messages, tools, turns = conversation.messages, conversation.tools, conversation.target_turns()
        if _GENERATION_MARK.search(self.template):
            text, marked = self._render(messages, tools, return_assistant_tokens_mask=True)
            all_turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            if len(marked) != len(all_turns):
                raise MaskError(f"the template marks {len(marked)} of {len(all_turns)} assistant turns as generated")
            spans: Iterable[Span] = [
                (a, b) for i, (a, b) in zip(all_turns, marked, strict=True) if i in turns and a < b
            ]
            if not spans:
                raise MaskError("the template marks no character of the assistant's turns as generated")
        else:
            text, _ = self._render(messages, tools)
            spans = (self._locate_turn(text, conversation, i) for i in turns)  # one by one: each renders all before it
        (ids,) = encode(self.tokenizer, [text])
        is_target = np.zeros(len(ids), dtype=bool)
        start = end = 0
        for number, span in enumerate(spans, start=1):
            start, end = span
            before, through = encode(self.tokenizer, [text[:start], text[:end]])
            if max_tokens is not None and len(before) >= max_tokens:
                break
            if not all(np.array_equal(ids[: len(prefix)], prefix) for prefix in (before, through)):
                remedy = "pass a --chat-template that sets turns apart by special tokens"
                raise MaskError(f"assistant turn {number}: a token reaches over its edge, so no mask is sure; {remedy}")
            is_target[len(before) : len(through)] = True
        if max_tokens is not None and not is_target[1:max_tokens].any():
            raise MaskError(f"its assistant turns lie beyond --block-size {max_tokens} ({len(ids)} tokens)")
        return Row(ids=ids, is_target=is_target, prompt=text[:start], completion=text[start:end])

    def prompt_text(self, conversation: Conversation) -> str:
        """What a model is given when it is to write the next turn; MaskError where the template refuses it."""
        return self._render(conversation.messages, conversation.tools, add_generation_prompt=True)[0]

    def _locate_turn(self, text: str, conversation: Conversation, i: int) -> Span:
        """Where turn i stands, from its first character to the end mark that closes it."""
        messages, tools = conversation.messages, conversation.tools
        prefix, _ = self._render(messages[:i], tools, add_generation_prompt=True)
        through, _ = self._render(messages[: i + 1], tools)
        start, content = len(prefix), messages[i]["content"].strip()
        where, remedy = f"message {i + 1}: the chat template writes", "pass a --chat-template with generation marks"
        if not (text.startswith(prefix) and through.startswith(prefix)):
            raise MaskError(f"{where} the messages before it otherwise than a prompt for it; {remedy}")
        end = self._locate_end(text, through, start, content)
        if end is None or end <= start:  # or nothing of it
            raise MaskError(f"{where} it otherwise than as the last one; {remedy}")
        return start, start + len(text[start:end].rstrip()) or end

    def _locate_end(self, text: str, through: str, start: int, content: str) -> int | None:
        """Where a turn that begins at `start` ends, None if unsure; `through`: the text with it as the last turn."""
        if text.startswith(through):
            return len(through)
        for i in range(start, len(through)):  # the template leaves the beginning out: an earlier turn's thinking
            if text.startswith(through[i : i + 64], start) and text.startswith(through[i:], start):
                return start + len(through) - i if content in through[i:] and through[i:].strip() else None
        # the template writes more behind the last turn: what both texts begin with, up to an end mark
        ours, theirs = encode(self.tokenizer, [text[start : len(through)], through[start:]])
        num_common = int(np.cumprod(ours[: len(theirs)] == theirs[: len(ours)]).sum()) if len(ours) else 0
        common = self.tokenizer.decode(ours[:num_common].tolist())
        is_exact = text.startswith(common, start) and through.startswith(common, start)
        marks = [token for token in self.tokenizer.get_added_vocab() if token in common.partition(content)[2]]
        return start + len(common) if is_exact and content in common and marks else None

    def _render(self, messages: list[dict[str, Any]], tools: Any, **options: bool) -> tuple[str, list[Any]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        def stop(*_: Any) -> None:
            raise TimeoutError

        previous = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS, 1)
        try:
            marks: dict[str, Any] = {**options, **self.tokenizer.special_tokens_map}
            texts, spans = render_jinja_template([messages], tools=tools, chat_template=self.template, **marks)
        except (TimeoutError, MemoryError) as error:  # as it would on the next record
            limit = "the memory there is" if isinstance(error, MemoryError) else f"{MAX_SECONDS} s"
            problem = f"the chat template takes more than {limit} for one conversation"
            raise UserError(f"{problem}; pass another --chat-template") from None
        except Exception as error:  # a template raises what it likes, in a sandbox
            raise MaskError(f"the chat template refuses it ({first_line(error)})") from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, *previous[1])  # somebody's own, as a test's time limit
            signal.signal(signal.SIGALRM, previous[0])
        return require_valid_unicode(texts[0], "messages"), spans[0] if spans else []


def end_token_ids(tokenizer: Any, template: str | None) -> tuple[int, ...]:
    """The tokens at which a generated text ends: the end-of-text token, and what ends a turn of the template."""
    ids = [int(tokenizer.eos_token_id)]
    if template is not None:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        with contextlib.suppress(MaskError):  # a template that takes no such conversation: then the first has to do
            row = ChatTemplate(tokenizer, template).encode(Conversation(messages=turn))
            last = int(row.ids[row.is_target][-1])
            if last not in ids and last in tokenizer.get_added_vocab().values():
                ids.append(last)
    return tuple(ids)
