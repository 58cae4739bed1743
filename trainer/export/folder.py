"""Weights and tokenizer as a folder of Hugging Face's form, which gets its name only when it is whole; and on the Hub,
whose token is huggingface_hub's business: nothing here reads, prints or writes it."""

import contextlib
import copy
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trainer.config.choices import DEMO_MODEL, ExportDtype
from trainer.config.errors import TrainingError, UserError, escape_controls, first_line
from trainer.config.files import new_folder, split_weights
from trainer.config.text import list_some
from trainer.data import hf_hub
from trainer.data.chat import end_token_ids
from trainer.data.tokenizer import find_model, load_tokenizer
from trainer.export.verify import STORED_DTYPES
from trainer.model import lora, quantization
from trainer.model.build import TrainableModel

MODEL_CARD_FILE = "README.md"
#: The names of all files that an export can write; those of tokenizers have many endings.
EXPORTED_NAMES = re.compile(
    r"README\.md|((adapter|generation|tokenizer)_)?config\.json|base_quantization\.json|chat_template\.jinja|"
    r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|(tokenizer|added_tokens|special_tokens_map)\.json|"
    r"vocab\.(json|txt)|merges\.txt|[\w.-]+\.(model|spm|bpe|codes|vocab)"
)


class BaseModel(NamedTuple):
    """What an adapter is an adapter of: `path`, a hub id or the folder of the untouched weights here; `name`, how the
    exported folder calls it; `revision`, its commit on the hub, where known."""

    path: str
    name: str
    revision: str | None


def refuse_lost_files(folder: Path) -> None:
    """UserError where what an export would replace is not a folder of an export alone."""
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
        raise UserError(f"{folder}: is not a folder, which an export would replace; move it")
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    if foreign := [path.name for path in paths if not EXPORTED_NAMES.fullmatch(path.name) or not path.is_file()]:
        raise UserError(f"{folder}: holds {list_some(foreign, 3)}, which no export writes and would be lost; move it")


@contextlib.contextmanager
def whole_folder(destination: Path) -> Iterator[Path]:
    """A new folder beside `destination`, which takes its place at the end. TrainingError where it cannot be written; an
    earlier folder of that name then stays."""
    for leftover in destination.parent.glob(f".{destination.name}.*.tmp"):  # of an export that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    previous_folder = destination.with_name(f".{destination.name}.old.tmp")
    try:
        with new_folder(destination, previous=previous_folder) as folder:
            yield folder
            refuse_lost_files(destination)
            for path in folder.iterdir():
                shutil.copymode(folder / MODEL_CARD_FILE, path)  # safetensors makes its files for their owner only
        shutil.rmtree(previous_folder, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{destination} not written: {getattr(error, 'strerror', None) or error}") from error


def save_plain_model(folder: Path, module: Any, state_dict: Mapping[str, Tensor], dtype: ExportDtype) -> None:
    """Write a folder that AutoModelForCausalLM loads; tied weights are stored once."""
    torch_dtype = STORED_DTYPES[dtype][0]
    weights = {name: tensor.to(getattr(torch, torch_dtype)) for name, tensor in state_dict.items()}
    module.save_pretrained(folder, state_dict=weights)
    # transformers notes the dtype of the module, which is not always that of the weights
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"dtype": torch_dtype}
    if config["model_type"] == "gpt2":  # llama.cpp's converter reads it
        config.setdefault("n_ctx", config["n_positions"])
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_adapter(
    folder: Path, model: TrainableModel, state_dict: Mapping[str, Tensor], base: BaseModel, dtype: ExportDtype
) -> None:
    """Write an adapter that plain peft loads onto the untouched base, and beside a packed base how it was packed.
    `state_dict`: the trained weights, by the names of `model.module`, those of the base itself too. pissa's become an
    ordinary adapter of twice the rank: B A - B0 A0 is [B, -B0] [A; A0]."""
    torch_dtype = getattr(torch, STORED_DTYPES[dtype][0])
    weights = {n: w.to(torch_dtype) for n, w in lora.adapter_state_dict(model.module, state_dict).items()}
    config = copy.deepcopy(model.module.peft_config["default"])
    config.base_model_name_or_path, config.revision = base.name, base.revision
    config.inference_mode = True
    if model.initial_adapter:  # the file holds the whole adapter: nothing is to be made from the base
        config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
    for name, initial in model.initial_adapter.items():
        name, is_a = name.replace(".default.", "."), ".lora_A." in name
        parts = (weights[name].cpu(), initial.to(torch_dtype) if is_a else -initial.to(torch_dtype))
        weights[name] = torch.cat(parts, dim=0 if is_a else 1)
    config.save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if model.quant_settings is not None:
        quantization_info = {
            "base": base.name,
            "fingerprint": model.metadata["fingerprint"],
            "quantization_config": quantization.bitsandbytes_config_kwargs(model.quant_settings, model.module),
        }
        (folder / lora.QUANTIZATION_FILE).write_text(json.dumps(quantization_info, indent=2) + "\n", encoding="utf-8")


def save_tokenizer(folder: Path, model: str, chat_template: str | None, generation_config: Any) -> None:
    """Write the tokenizer with the chat template of the training, and the base's generation config with the tokens at
    which this training ends a text or a turn."""
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    config = copy.deepcopy(generation_config)
    ids = end_token_ids(tokenizer, chat_template)
    config.eos_token_id = ids[0] if len(ids) == 1 else list(ids)
    config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config.save_pretrained(folder)


def find_base(model_info: Mapping[str, Any], run_folder: Path, *, names_place: bool = False) -> BaseModel:
    """What an adapter stands on: the hub id or folder of the run's model (`model` of its run.json), or the random
    weights that the run kept; UserError where these are gone. `names_place`: a folder's name is its place, by which
    peft finds it on this machine.
    """
    base_folder, source = run_folder / "base", find_model(model_info["name"])
    if model_info["init"] == "random" and not base_folder.is_dir():
        raise UserError(f"{base_folder}: the random weights that its adapters stand on are gone; restore the folder")
    path = str(base_folder) if base_folder.is_dir() else source.path
    location = str(hf_hub.find_model_folder(path, source.revision)) if is_hub_id(path) else path
    # as the hub's own cache names its folders
    if snapshot := re.search(r"(?:^|/)models--([\w.-]+?)/snapshots/([0-9a-f]{40})/*$", location):
        return BaseModel(path, snapshot[1].replace("--", "/"), snapshot[2])
    return BaseModel(path, str(Path(path).absolute()) if names_place else public_name(source.name), None)


def is_hub_id(name: str) -> bool:
    """Whether a model's name is one of the Hub's: neither a folder here nor the embedded one."""
    is_local = name == DEMO_MODEL or Path(name).exists()
    return not is_local and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name, re.ASCII) is not None


def public_name(name: str) -> str:
    """A hub id as it is, a path by its last part: where files lay is nobody's business; of a mixture each part."""
    if len(parts := split_weights(name)) > 1:
        return " ".join(f"{public_name(part)}={share:g}" for part, share in parts)
    return escape_controls(name if is_hub_id(name) else Path(name).name or name)


def check_push(repo_id: str) -> None:
    """UserError where a push cannot work: the name, the login, the hub."""
    import huggingface_hub

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo_id, re.ASCII) or len(repo_id) > 96:
        raise UserError(f"--push {repo_id}: expected NAMESPACE/NAME of letters, digits and . _ -")
    if huggingface_hub.get_token() is None:  # the hub's own line is longer than one
        raise UserError(f"--push {repo_id}: not logged in; expected HF_TOKEN, or `hf auth login` before")
    try:
        huggingface_hub.HfApi().whoami()
    except Exception as error:  # HF_HUB_OFFLINE, of the hub, of httpx, of the network below it
        reason = first_line(error.__cause__ or error)
        raise UserError(f"--push {repo_id}: the hub does not take the login ({reason})") from None


def push_folder(folder: Path, repo_id: str, *, is_private: bool) -> str:
    """Upload a folder, in one commit, to a repository that is made where there is none (`is_private`: a private one);
    its address. TrainingError where the hub does not take it."""
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        address = str(api.create_repo(repo_id, private=is_private or None, exist_ok=True))
        api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message="Upload of a checked export")
        return address
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        raise TrainingError(f"--push {repo_id}: {reason}; the checked folder is {folder}") from None
