"""Weights and tokenizer as a folder of Hugging Face's form, named only when it was checked."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from trainer.data import load_tokenizer
from trainer.errors import RunFailed
from trainer.export.check import Check, Expected, check_folder
from trainer.model import Model, location

CARD = "README.md"


def gathered(weights: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """{name: tensor} of a stream that every rank must read to its end; only the rank that keeps them holds a copy."""
    kept = {}
    for name, tensor in weights:
        if keep:
            kept[name] = tensor
    return kept


def export(
    final: Path, module: Any, weights: Mapping[str, Tensor], *, base: str | None, tokenizer: str | None,
    expected: Expected, card: Callable[[Check], str],
) -> Check:  # fmt: skip
    """Write the folder, load it again in a fresh process, write what came out into its card, and give it its name.

    A folder that fails its check is kept, and its card says so: `Check.problems`. RunFailed where it cannot be
    written; an earlier folder of the same name then stays.
    """
    with _unfinished(final) as folder:
        save_folder(folder, module, weights, base=base, tokenizer=tokenizer)
        check = check_folder(folder, expected)
        (folder / CARD).write_text(card(check))
        for path in folder.iterdir():
            shutil.copymode(folder / CARD, path)  # safetensors makes its files for their owner only
    return check


def save_folder(
    folder: Path, module: Any, weights: Mapping[str, Tensor], *, base: str | None, tokenizer: str | None
) -> None:
    """Write weights (in the names of `module`, float32) and tokenizer into an existing folder.

    Without `base`: a folder that AutoModelForCausalLM loads, tied weights stored once; with it (a hub id or folder):
    an adapter that peft loads onto it. `tokenizer`: the model it comes from, None for data of token ids.
    """
    if base is not None:
        for config in module.peft_config.values():
            config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
        # Embeddings are never adapted; `auto` would ask the hub whether the vocabulary has grown.
        module.save_pretrained(folder, state_dict=dict(weights), save_embedding_layers=False)
    else:
        module.save_pretrained(folder, state_dict=dict(weights))
        _say_float32(folder / "config.json")
    if tokenizer is not None:
        load_tokenizer(tokenizer).save_pretrained(folder)


def base_of(model: Model, run_folder: Path) -> str | None:
    """Where an adapter finds its base: the hub id or folder, or the random weights that the run kept; else None."""
    if not model.is_adapter:
        return None
    kept = run_folder / "base"
    return str(kept) if kept.is_dir() else location(model.facts["name"])


def _say_float32(path: Path) -> None:
    """Transformers notes the dtype of the module, which is half of that of the weights when it trained in fp16."""
    config = json.loads(path.read_text())
    if config.get("dtype") != "float32":
        path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")


@contextlib.contextmanager
def _unfinished(final: Path) -> Iterator[Path]:
    """A new folder beside `final`, which takes its place at the end and is thrown away on any error."""
    temporary = final.parent / f".{final.name}.{os.getpid()}.tmp"
    try:
        for left in final.parent.glob(f".{final.name}.*.tmp"):  # of an export that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        older = final.parent / f".{final.name}.old.tmp"
        if final.exists():
            final.rename(older)
        temporary.rename(final)
        shutil.rmtree(older, ignore_errors=True)
    except (OSError, SafetensorError) as problem:
        raise RunFailed(f"{final} not written: {getattr(problem, 'strerror', None) or problem}") from problem
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
