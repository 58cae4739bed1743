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

from trainer.config.errors import TrainingError
from trainer.data.tokenizer import load_tokenizer
from trainer.export.verify import ReferenceOutputs, VerificationResult, verify_folder
from trainer.model import lora
from trainer.model.build import TrainableModel, resolve_model_path

MODEL_CARD_FILE = "README.md"
QUANTIZATION_FILE = "base_quantization.json"  # of the base that an adapter was trained on: which, and packed how


@dataclass(frozen=True, kw_only=True)
class BaseModelRef:
    """What an adapter is an adapter of."""

    name_or_path: str  #: hub id or folder of the untouched weights
    initial_adapters: Mapping[str, Tensor] = field(default_factory=dict)  #: what pissa took out of them, as adapters
    quantization_config: Mapping[str, Any] | None = (
        None  #: arguments of transformers' BitsAndBytesConfig, None for float32
    )
    fingerprint: str | None = None  #: of the untouched weights (`trainer.model.build.compute_fingerprint`)


def collect_state_dict(named_tensors: Iterable[tuple[str, Tensor]], *, should_keep: bool) -> dict[str, Tensor]:
    """{name: tensor} of a stream that every rank must read to its end; only the rank that keeps them holds a copy."""
    state_dict = {}
    for name, tensor in named_tensors:
        if should_keep:
            state_dict[name] = tensor
    return state_dict


def export_folder(
    destination: Path, module: Any, state_dict: Mapping[str, Tensor], *, base_model: BaseModelRef | None,
    tokenizer: str | None,
    reference_outputs: ReferenceOutputs, render_card: Callable[[VerificationResult], str],
) -> VerificationResult:  # fmt: skip
    """Write the folder, load it again in a fresh process, write what came out into its card, and give it its name.

    A folder that fails its check is kept, and its card says so. TrainingError where it cannot be
    written; an earlier folder of the same name then stays.

    Parameters: what the folder is made of; they have no life together before.
    """
    with _temporary_folder(destination) as folder:
        save_folder(folder, module, state_dict, base_model=base_model, tokenizer=tokenizer)
        verification = verify_folder(folder, reference_outputs)
        (folder / MODEL_CARD_FILE).write_text(render_card(verification), encoding="utf-8")
        for path in folder.iterdir():
            shutil.copymode(folder / MODEL_CARD_FILE, path)  # safetensors makes its files for their owner only
    return verification


def save_folder(
    folder: Path,
    module: Any,
    state_dict: Mapping[str, Tensor],
    *,
    base_model: BaseModelRef | None,
    tokenizer: str | None,
) -> None:
    """Write weights (in the names of `module`, float32) and tokenizer into an existing folder.

    Without `base_model`: a folder that AutoModelForCausalLM loads, tied weights stored once; with it: an adapter
    that peft loads onto it, and beside a packed base a file that says how it was packed. `tokenizer`: the model it
    comes from, None for data of token ids.
    """
    if base_model is not None:
        name_or_path = (
            str(Path(base_model.name_or_path).resolve())
            if Path(base_model.name_or_path).is_dir()
            else base_model.name_or_path
        )
        lora.save_adapter(folder, module, state_dict, base_model.initial_adapters, name_or_path)
        if base_model.quantization_config:
            quantization_info = {
                "base": name_or_path,
                "fingerprint": base_model.fingerprint,
                "quantization_config": base_model.quantization_config,
            }
            (folder / QUANTIZATION_FILE).write_text(json.dumps(quantization_info, indent=2) + "\n", encoding="utf-8")
    else:
        module.save_pretrained(folder, state_dict=dict(state_dict))
        _set_config_dtype_float32(folder / "config.json")
    if tokenizer is not None:
        load_tokenizer(tokenizer).save_pretrained(folder)


def base_model_ref(model: TrainableModel, run_folder: Path) -> BaseModelRef | None:
    """What an adapter stands on: the hub id or folder, or the random weights that the run kept; else None."""
    if not model.is_adapter:
        return None
    base_folder = run_folder / "base"
    name_or_path = str(base_folder) if base_folder.is_dir() else resolve_model_path(model.metadata["name"])
    return BaseModelRef(
        name_or_path=name_or_path,
        initial_adapters=model.initial_adapter,
        quantization_config=model.quantization_config,
        fingerprint=model.metadata["fingerprint"],
    )


def _set_config_dtype_float32(path: Path) -> None:
    """Transformers notes the dtype of the module, which is half of that of the weights when it trained in fp16."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("dtype") != "float32":
        path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _temporary_folder(destination: Path) -> Iterator[Path]:
    """A new folder beside `destination`, which takes its place at the end and is thrown away on any error."""
    temporary = destination.parent / f".{destination.name}.{os.getpid()}.tmp"
    try:
        for leftover in destination.parent.glob(f".{destination.name}.*.tmp"):  # of an export that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        previous_folder = destination.parent / f".{destination.name}.old.tmp"
        if destination.exists():
            destination.rename(previous_folder)
        temporary.rename(destination)
        shutil.rmtree(previous_folder, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{destination} not written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
