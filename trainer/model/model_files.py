"""What a model's folder may hold: data only, of a causal language model, whole. Everything else is refused by name.

No code that comes with a model is ever run, and nobody is asked whether it should be: there is no flag for it.
"""

import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from trainer.config.errors import UserError
from trainer.config.files import open_plain_file, read_json_object
from trainer.config.text import list_some

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MAX_COUNT = 2000  # layers or labels; each is Python objects, so that a damaged number would fill the memory
HALF_TYPES = (torch.bfloat16, torch.float16)
MAX_BF16_TIES = 0.01  # of a base; more is said
FLOATS = ("F64", "F32", "F16", "BF16")  #: as safetensors calls what is trained; integers would be packed weights
#: of files that older transformers wrote: GPT-2's fill value, and masks and fill values of GPT-Neo as published
OBSOLETE_BUFFERS = ("attn.masked_bias", "attention.masked_bias", "attention.bias")
#: what a configuration may name beside the model: other files, packed weights
FOREIGN_KEYS = ("transformers_weights", "configuration_files", "quantization_config")


def check_config_file(folder: Path) -> None:
    """UserError where a folder's config.json is not one of a model that transformers has code for; FileNotFoundError
    where there is none. A model that is no folder may be on the Hub."""
    if not folder.is_dir():
        return
    if not (folder / "config.json").exists():
        raise FileNotFoundError("config.json")
    config = read_json_object(folder / "config.json", "config.json")
    model_type, num_labels = config.get("model_type"), config.get("num_labels", 0)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UserError(
            f"config.json: model_type {model_type!r} is not known to transformers, and code in the folder is never "
            "run; expected one of its causal language models, for instance gpt2 or llama"
        )
    _check_count("num_labels", num_labels, 0)  # transformers makes a name for each


def check_config(config: Any) -> None:
    """UserError where a loaded configuration is not that of a causal language model of weights and files of its own."""
    model_type = config.model_type
    is_causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not getattr(config, "is_encoder_decoder", False)
    is_masked = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if not is_causal or is_masked:
        raise UserError(f"config.json: {model_type} is not a causal language model; expected one, for instance gpt2")
    foreign = [key for key in FOREIGN_KEYS if getattr(config, key, None) is not None]
    if "/" in str(getattr(config, "_attn_implementation", None) or ""):
        foreign.append("attn_implementation")
    if foreign:
        raise UserError(
            f"config.json: {foreign[0]}: leave it out; weights are floats in {WEIGHTS_FILE} or the files of "
            f"{INDEX_FILE} (--quant packs them here), and code of the Hub is never run"
        )
    _check_count("num_hidden_layers", getattr(config.get_text_config(), "num_hidden_layers", 1), 1)


def _check_count(name: str, value: Any, least: int) -> None:
    if type(value) is not int or not least <= value <= MAX_COUNT:
        raise UserError(f"config.json: {name} {value!r:.80}; expected a whole number from {least} to {MAX_COUNT}")


def check_weight_files(folder: Path) -> None:
    """UserError where a file of weights that is there is damaged, or one is named that is not inside the folder. Reads
    the headers only: names, shapes and whether the file is as long as they say."""
    files: list[Any] = [WEIGHTS_FILE] if (folder / WEIGHTS_FILE).exists() else []
    if not files and (folder / INDEX_FILE).exists():
        weight_map = read_json_object(folder / INDEX_FILE, INDEX_FILE).get("weight_map")
        files = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    for file in files:
        path = PurePosixPath(file if isinstance(file, str) else "")
        if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
            raise UserError(f"{INDEX_FILE}: weight_map has {file!r}; expected .safetensors files inside the folder")
    for file in sorted(set(files)):
        if problem := weights_file_problem(folder / file):
            raise UserError(f"{file}: {problem}")


def weights_file_problem(path: Path) -> str | None:
    """Why a file is not a whole safetensors file of floats, from its header; None where it is one."""
    try:
        open_plain_file(path).close()  # safetensors says of a file that may not be read that it is not there
        with safe_open(path, framework="pt") as file:
            dtypes = {file.get_slice(name).get_dtype() for name in file.keys() if name.endswith(".weight")}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        return getattr(error, "strerror", None) or f"not a whole safetensors file ({reason(error)}); copy it again"
    packed = sorted(dtypes - set(FLOATS))
    return f"holds weights of type {packed[0]}; expected floats" if packed else None


def stored_dtype(folder: Path) -> torch.dtype:
    """The type of every tensor of a model's files; float32, which holds any, where they are of several."""
    dtypes = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            dtypes |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  # not a mapping
    names = {("BF16",): torch.bfloat16, ("F16",): torch.float16}
    return names.get(tuple(dtypes), torch.float32)


def measure_bf16_ties(folder: Path) -> float:
    """The share of a model's weights that lie halfway between two bfloat16 numbers; of each tensor the first million.
    It is 0.00002 of trained float32 weights, 0 of bfloat16, 8 % of some dequantised ones and 12 % of float16."""
    num_ties = num_weights = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                if shape := file.get_slice(name).get_shape():
                    num_rows = max(1, 2**20 // max(1, math.prod(shape[1:])))
                    bits = file.get_slice(name)[:num_rows].float().contiguous().view(torch.int32) & 0xFFFF
                    num_ties, num_weights = num_ties + int((bits == 0x8000).sum()), num_weights + bits.numel()
    return num_ties / max(1, num_weights)


def describe_bf16_ties(share: float) -> str:
    """What so many of them do to a comparison; "" where it is nothing."""
    problem = (
        f"{share:.1%} of the base's weights lie halfway between two bf16 numbers, as dequantised and float16 ones do: "
        "in bf16 the first update of any rate tips them, which lowers full's loss for free and not LoRA's; round the "
        "weights to bf16 first, or use --precision fp32"
    )
    return problem if share > MAX_BF16_TIES else ""


def check_loading_info(loading_info: Mapping[str, Any]) -> None:
    """UserError for weights that were missing, left over or of another shape; transformers' own exceptions aside."""
    mismatched, left_over = sorted(loading_info["mismatched_keys"]), sorted(loading_info["unexpected_keys"])
    problems = [f"{name} has shape {[*stored]} and not {[*wanted]}" for name, stored, wanted in mismatched]
    problems += [f"{name} is missing" for name in sorted(loading_info["missing_keys"])]
    problems += [f"{name} is no weight of this model" for name in left_over if not name.endswith(OBSOLETE_BUFFERS)]
    if problems := [*problems, *map(str, loading_info["error_msgs"])]:
        raise UserError(f"the weights do not fit config.json: {list_some(problems, 3)}; copy the model again")


@torch.no_grad()
def check_causal(causal: PreTrainedModel) -> None:
    """UserError where earlier logits depend on the last token, which the model is to predict, or are no numbers."""
    was_training, is_half = causal.training, causal.dtype in HALF_TYPES
    input_ids = torch.arange(8).remainder(causal.config.get_text_config().vocab_size).repeat(2, 1)
    input_ids[1, -1] = 0
    logits = causal.eval()(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    causal.train(was_training)
    if not logits.isfinite().all() and causal.dtype != torch.float16:  # whose range an activation may well exceed
        raise UserError("its logits are not finite: the weights are damaged; copy the model again")
    if (logits[0] - logits[1]).abs().max() > (1e-2 if is_half else 1e-4) * logits.abs().max():
        raise UserError(f"{type(causal).__name__} sees the tokens it is to predict; expected a causal language model")


def reason(error: BaseException) -> str:
    """The kind of an error of a library and the last line of its text, which says most."""
    text = str(error).strip() or "no reason given"
    return f"{type(error).__name__}: {text.splitlines()[-1].strip()[:200]}"
