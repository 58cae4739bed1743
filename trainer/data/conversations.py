"""One record -> a conversation: OpenAI's messages, ShareGPT's, prompt and completion as messages; each is checked."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config.files import parse_json
from trainer.data.templates import Record, RecordError, is_missing, require_valid_unicode, shorten

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
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

    def first_prompt(self) -> str:
        """What stands before the first of these turns, as text: conversations with the same one share a split."""
        return json.dumps(self.messages[: self.target_turns()[0]], sort_keys=True, ensure_ascii=True)


def from_messages(record: Record) -> Conversation:
    """OpenAI's and TRL's `messages`; RecordError names the message that cannot be used."""
    return _conversation(_check_messages(record.get("messages"), "messages"), record)


def from_sharegpt(record: Record) -> Conversation:
    """ShareGPT's `conversations` of from and value, or of role and content, with an optional `system`."""
    messages = []
    for number, message in enumerate(_require_list(record.get("conversations"), "conversations"), start=1):
        if not isinstance(message, dict):
            raise RecordError(f"message {number} of column 'conversations' is {shorten(message)}, expected an object")
        sender = message.get("from", message.get("role"))
        if not isinstance(sender, str) or sender not in SHAREGPT_ROLES:
            raise RecordError(
                f"message {number} of column 'conversations' is from {shorten(sender)}, expected "
                f"{', '.join(SHAREGPT_ROLES)}"
            )
        content = message.get("value", message.get("content"))
        messages.append({"role": SHAREGPT_ROLES[sender], "content": content})
    if not is_missing(record.get("system")):
        messages.insert(0, {"role": "system", "content": record["system"]})
    return _conversation(_check_messages(messages, "conversations"), record)


def from_prompt_completion(record: Record) -> Conversation:
    """`prompt` and `completion` that are messages; what the prompt holds is context."""
    prompt = _check_messages(record.get("prompt"), "prompt")
    return _conversation(prompt + _check_messages(record["completion"], "completion"), record, num_context=len(prompt))


def _conversation(messages: list[dict[str, Any]], record: Record, num_context: int = 0) -> Conversation:
    tools = [] if is_missing(record.get("tools")) else _read_list(record["tools"], "tools", "tools")
    conversation = Conversation(messages=messages, tools=_without_null(tools) or None, num_context=num_context)
    if not conversation.target_turns():
        raise RecordError("no message of role assistant whose weight is not 0: nothing to train on; drop the record")
    return conversation


def _read_list(value: Any, column: str, content: str) -> list[Any]:
    """A list, or one as JSON text, which is all that a cell of a CSV file can hold."""
    items = value
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            items = parse_json(value)
    if not isinstance(items, list):
        raise RecordError(f"column {column!r} holds {shorten(value)}, expected a list of {content}, or its JSON")
    return items


def _require_list(value: Any, column: str) -> list[Any]:
    items = [] if is_missing(value) else _read_list(value, column, "messages")
    if not items:
        raise RecordError(f"column {column!r} is missing or empty, expected a list of messages")
    return items


def _check_messages(value: Any, column: str) -> list[dict[str, Any]]:
    return [_check_message(message, number, column) for number, message in enumerate(_require_list(value, column), 1)]


def _check_message(message: Any, number: int, column: str) -> dict[str, Any]:
    where = f"message {number} of column {column!r}"
    if not isinstance(message, dict):
        raise RecordError(f"{where} is {shorten(message)}, expected an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise RecordError(f"{where} has role {shorten(role)}, expected {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        content = _join_parts(content, where)
    if content is not None and not isinstance(content, str):
        raise RecordError(f"{where} has {shorten(content)} as content, expected text")
    if not isinstance(message.get("tool_calls") or [], list):
        raise RecordError(f"{where} has {shorten(message['tool_calls'])} as tool_calls, expected a list")
    if message.get("weight") not in (None, 0, 1):
        raise RecordError(f"{where} has weight {shorten(message['weight'])}, expected 0 (context) or 1")
    has_calls = role == "assistant" and bool(message.get("tool_calls"))
    if is_missing(content) and not has_calls:
        raise RecordError(f"{where} ({role}) has no content; fill it or drop the record")
    return {**_without_null(message), "content": require_valid_unicode(content or "", column)}


def _join_parts(parts: Sequence[Any], where: str) -> str:
    """The text of a content that is a list of parts; only text can be trained on."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RecordError(f"{where} has the part {shorten(part)}, expected parts of type text")
    return "".join(part["text"] for part in parts)


def _without_null(value: Any) -> Any:
    """Without the keys that are null: Arrow fills what one record of a column has into all of them."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value
