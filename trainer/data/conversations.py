"""One record -> a conversation: OpenAI's messages, ShareGPT's, prompt and completion as messages; each is checked."""

from dataclasses import dataclass
from reprlib import repr as shorten
from typing import Any

from trainer.config.files import parse_json
from trainer.data.readers import explain_json
from trainer.data.values import Record, RecordError, is_missing, require_valid_unicode

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
            raise RecordError(
                f"message {number} of column 'conversations' is from {shorten(sender)}, expected one from "
                f"{', '.join(SHAREGPT_ROLES)}"
            )
        messages.append({"role": SHAREGPT_ROLES[sender], "content": message.get("value", message.get("content"))})
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
    value, reason = record.get(column), "or its JSON"
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value, with_nan=True)
        except ValueError as error:
            reason = f"or its JSON ({explain_json(error)})"
    if not isinstance(value, list):
        raise RecordError(f"column {column!r} holds {shorten(value)}, expected a list of {content}, {reason}")
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
