"""One record -> a conversation: OpenAI's messages, ShareGPT's, prompt and completion as messages; each is checked."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.templates import Record, RecordError, is_missing, require_valid_unicode, shorten

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "function_call": "assistant", "bot": "assistant",
    "model": "assistant", "observation": "tool", "function_response": "tool", "function": "tool",
    **{role: role for role in ROLES},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What a chat template takes: `messages` of role and content, and `tools` that the assistant may call."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    num_context: int = 0  #: messages at the beginning whose assistant turns are not learnt

    def learnt_turns(self) -> list[int]:
        """The places of the assistant's turns that are learnt."""
        return [
            i for i, message in enumerate(self.messages) if i >= self.num_context and message["role"] == "assistant"
        ]

    def first_prompt(self) -> str:
        """What stands before the first learnt turn, as text: conversations with the same one share a split."""
        return json.dumps(self.messages[: self.learnt_turns()[0]], sort_keys=True, ensure_ascii=True)


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
    tools = record.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise RecordError(f"column 'tools' holds {shorten(tools)}, expected a list of tools or its JSON") from None
    if not is_missing(tools) and not isinstance(tools, list):
        raise RecordError(f"column 'tools' holds a {type(tools).__name__}, expected a list of tools")
    conversation = Conversation(messages=messages, tools=_without_null(tools) or None, num_context=num_context)
    if not conversation.learnt_turns():
        raise RecordError("no message of role assistant: nothing is to be learnt; drop the record")
    return conversation


def _require_list(value: Any, column: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        problem = "is missing or empty" if value in (None, "", []) else f"holds {shorten(value)}"
        raise RecordError(f"column {column!r} {problem}, expected a list of messages")
    return value


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
    has_calls = role == "assistant" and bool(message.get("tool_calls"))
    if is_missing(content) and not has_calls:
        raise RecordError(f"{where} ({role}) has no content; fill it or drop the record")
    return {**_without_null(message), "content": require_valid_unicode(content or "", column)}


def _join_parts(parts: Sequence[Any], where: str) -> str:
    """The text of a content that is a list of parts; only text can be learnt from."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RecordError(f"{where} has the part {shorten(part)}, expected parts of type text")
    return "".join(part["text"] for part in parts)


def _without_null(value: Any) -> Any:
    """Without the keys that are null: Arrow fills what one record of a column has into all of them."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value
