"""JSON that somebody else may have written or damaged: read whole, or refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError


def parse_json(text: str | bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text; ValueError with a one-line reason for anything that is not JSON.

    json itself also raises RecursionError for deep nesting; integers beyond the interpreter's limit of digits and
    bytes that are not UTF-8 are ValueErrors already. NaN and Infinity, which json takes, are not JSON.
    """
    try:
        if object_pairs_hook is None and isinstance(text, str):
            return _DECODER.decode(text)
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except ValueError as error:
        raise ValueError(str(error).partition("; use sys.")[0]) from None


def read_json_object(path: Path, name: str = "") -> dict[str, Any]:
    """The object that a regular file holds; UserError, which begins with `name` or the path, where it holds none."""
    name = name or str(path)
    try:
        if not path.is_file():  # a named pipe would be waited for
            raise UserError(f"{name}: {'not a regular file' if path.exists() else 'no such file'}; expected JSON")
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{name}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{name}: holds {_describe(value)}; expected a JSON object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # json.loads makes one for every text


def _describe(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
