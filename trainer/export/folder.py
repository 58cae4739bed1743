"""Weights and tokenizer as a folder of Hugging Face's form, named only when it was checked."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from trainer.config.errors import RunFailed
from trainer.data.tokenizer import load_tokenizer
from trainer.export.verify import Check, Expected, check_folder
from trainer.model import lora
from trainer.model.build import Model, location

CARD = "README.md"
PACKING = "base_quantization.json"  # of the base that an adapter was trained on: which, and packed how


@dataclass(frozen=True, kw_only=True)
class Base:
    """What an adapter is an adapter of."""

    place: str  #: hub id or folder of the untouched weights
    start: Mapping[str, Tensor] = field(default_factory=dict)  #: what pissa took out of them, as adapters
    packing: Mapping[str, Any] | None = None  #: arguments of transformers' BitsAndBytesConfig, None for float32
    fingerprint: str | None = None  #: of the untouched weights (`trainer.model.fingerprint`)


def gathered(weights: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """{name: tensor} of a stream that every rank must read to its end; only the rank that keeps them holds a copy."""
    kept = {}
    for name, tensor in weights:
        if keep:
            kept[name] = tensor
    return kept


def export(
    final: Path, module: Any, weights: Mapping[str, Tensor], *, base: Base | None, tokenizer: str | None,
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
    folder: Path, module: Any, weights: Mapping[str, Tensor], *, base: Base | None, tokenizer: str | None
) -> None:
    """Write weights (in the names of `module`, float32) and tokenizer into an existing folder.

    Without `base`: a folder that AutoModelForCausalLM loads, tied weights stored once; with it: an adapter that peft
    loads onto it, and beside a packed base a file that says how it was packed. `tokenizer`: the model it comes from,
    None for data of token ids.
    """
    if base is not None:
        place = str(Path(base.place).resolve()) if Path(base.place).is_dir() else base.place
        lora.save(folder, module, weights, base.start, place)
        if base.packing:
            about = {"base": place, "fingerprint": base.fingerprint, "quantization_config": base.packing}
            (folder / PACKING).write_text(json.dumps(about, indent=2) + "\n")
    else:
        module.save_pretrained(folder, state_dict=dict(weights))
        _say_float32(folder / "config.json")
    if tokenizer is not None:
        load_tokenizer(tokenizer).save_pretrained(folder)


def base_of(model: Model, run_folder: Path) -> Base | None:
    """What an adapter stands on: the hub id or folder, or the random weights that the run kept; else None."""
    if not model.is_adapter:
        return None
    kept = run_folder / "base"
    place = str(kept) if kept.is_dir() else location(model.facts["name"])
    return Base(place=place, start=model.start, packing=model.packing, fingerprint=model.facts["fingerprint"])


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
