"""Weights and tokenizer as a folder of Hugging Face's form, named only when it was checked."""

import contextlib
import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from trainer.config.choices import DEMO_MODEL, ExportDtype
from trainer.config.errors import TrainingError, escape_controls
from trainer.data.chat import end_token_ids
from trainer.data.tokenizer import load_tokenizer
from trainer.export.verify import STORED_DTYPES, ReferenceOutputs, VerificationResult, verify_folder
from trainer.model import lora
from trainer.model.build import TrainableModel, resolve_model_path

MODEL_CARD_FILE = "README.md"
QUANTIZATION_FILE = "base_quantization.json"  # of the base that an adapter was trained on: which, and packed how


@dataclass(frozen=True, kw_only=True)
class BaseModelRef:
    """What an adapter is an adapter of."""

    path: str  #: hub id or folder from which the untouched weights are loaded here
    name: str  #: how the exported folder calls it: a hub id, else a name without the place of the folder
    revision: str | None  #: commit of the hub, where known
    model: TrainableModel  #: the adapter on it, which knows how it was packed and what pissa took out of it


@dataclass(frozen=True, kw_only=True)
class FolderContent:
    """What an exported folder is made of.

    Without `base_model`: a folder that AutoModelForCausalLM loads, tied weights stored once; with it: an adapter that
    peft loads onto it, and beside a packed base a file that says how it was packed.
    """

    module: Any  #: whose names the weights have
    state_dict: Mapping[str, Tensor]
    base_model: BaseModelRef | None
    tokenizer: Any = None  #: with the chat template of the training; None for data of token ids
    dtype: ExportDtype = "fp32"  #: in which the weights are stored


def collect_state_dict(named_tensors: Iterable[tuple[str, Tensor]], *, should_keep: bool) -> dict[str, Tensor]:
    """{name: tensor} of a stream that every rank must read to its end; only the rank that keeps them holds a copy."""
    return {name: tensor for name, tensor in named_tensors if should_keep}


def export_folder(
    destination: Path,
    content: FolderContent,
    reference_outputs: ReferenceOutputs,
    render_card: Callable[[VerificationResult], str],
) -> VerificationResult:
    """Write the folder, load it again in a fresh process, write what came out into its card, and give it its name.

    A folder that fails its check is kept, and its card says so: `VerificationResult.problems`. TrainingError where it
    cannot be written; an earlier folder of the same name then stays.
    """
    with _temporary_folder(destination) as folder:
        save_folder(folder, content)
        base = content.base_model
        verification = verify_folder(folder, reference_outputs, base_path=base.path if base else None)
        (folder / MODEL_CARD_FILE).write_text(render_card(verification), encoding="utf-8")
        for path in folder.iterdir():
            shutil.copymode(folder / MODEL_CARD_FILE, path)  # safetensors makes its files for their owner only
    return verification


def save_folder(folder: Path, content: FolderContent) -> None:
    """Write weights, tokenizer and generation config into an existing folder; no path of this machine among them."""
    base_model, torch_dtype = content.base_model, STORED_DTYPES[content.dtype][0]
    state_dict = {name: tensor.to(getattr(torch, torch_dtype)) for name, tensor in content.state_dict.items()}
    if base_model is None:
        content.module.save_pretrained(folder, state_dict=state_dict)
        _complete_config(folder / "config.json", torch_dtype)
    else:
        lora.save_adapter(
            folder,
            content.module,
            state_dict,
            base_model.model.initial_adapter,
            base_name=base_model.name,
            base_revision=base_model.revision,
        )
        if quantization_config := base_model.model.quantization_config:
            quantization_info = {
                "base": base_model.name,
                "fingerprint": base_model.model.metadata["fingerprint"],
                "quantization_config": quantization_config,
            }
            (folder / QUANTIZATION_FILE).write_text(json.dumps(quantization_info, indent=2) + "\n", encoding="utf-8")
    if content.tokenizer is not None:
        content.tokenizer.save_pretrained(folder)
        _save_generation_config(folder, content)


def _save_generation_config(folder: Path, content: FolderContent) -> None:
    """The base's own, with the tokens at which this training ends a text or a turn."""
    tokenizer = content.tokenizer
    config = copy.deepcopy(content.module.generation_config)
    ids = end_token_ids(tokenizer, tokenizer.chat_template)
    config.eos_token_id = ids[0] if len(ids) == 1 else list(ids)
    config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config.save_pretrained(folder)


def training_tokenizer(model: str, data_info: Mapping[str, Any]) -> Any:
    """The tokenizer as the run used it: with the chat template of its conversations, else without any; None for data
    of token ids."""
    if data_info["tokenizer"] is None:
        return None
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = data_info.get("chat_template")
    return tokenizer


def base_model_ref(model: TrainableModel, run_folder: Path) -> BaseModelRef | None:
    """What an adapter stands on: the hub id or folder, or the random weights that the run kept; None for a model that
    needs no base."""
    if not model.is_adapter:
        return None
    base_folder = run_folder / "base"
    path = str(base_folder) if base_folder.is_dir() else resolve_model_path(model.metadata["name"])
    name, revision = hub_snapshot(_cached_folder(path)) or (public_name(model.metadata["name"]), None)
    return BaseModelRef(path=path, name=name, revision=revision, model=model)


def _cached_folder(model: str) -> str:
    """The folder of the hub's cache that a hub id is loaded from; every other name as it is."""
    from huggingface_hub import try_to_load_from_cache

    config_file = try_to_load_from_cache(model, "config.json") if is_hub_id(model) else None
    return str(Path(config_file).parent) if isinstance(config_file, str) else model


def hub_snapshot(path: str) -> tuple[str, str] | None:
    """(hub id, commit) of a folder of the hub's own cache, `models--ORG--NAME/snapshots/COMMIT`; None for others."""
    match = re.search(r"(?:^|/)models--([\w.-]+?)/snapshots/([0-9a-f]{40})/*$", path)
    return (match[1].replace("--", "/"), match[2]) if match else None


def is_hub_id(name: str) -> bool:
    """Whether a model's name is one of the Hub's: neither a folder here nor the embedded one."""
    if name == DEMO_MODEL or Path(name).exists():
        return False
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name, re.ASCII) is not None


def public_name(name: str) -> str:
    """A hub id as it is, a path by its last part: where files lay on the machine of the run is nobody's business."""
    return escape_controls(name if is_hub_id(name) else Path(name).name or name)


def _complete_config(path: Path, dtype: str) -> None:
    """Transformers notes the dtype of the module, which is half of that of the weights when it trained in fp16, and
    leaves GPT-2's `n_ctx` out, which llama.cpp's converter reads."""
    config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": dtype}
    if config["model_type"] == "gpt2":
        config.setdefault("n_ctx", config["n_positions"])
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
