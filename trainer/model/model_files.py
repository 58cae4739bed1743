"""What a model's folder may hold: data only, of a causal language model, whole. Everything else is refused by name.

No code that comes with a model is ever run, and nobody is asked whether it should be: there is no flag for it.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from trainer.config.errors import UserError
from trainer.config.files import open_plain_file, read_json_object
from trainer.config.text import list_some

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
MAX_LAYERS = 2000  # more than any model has: each is a Python object, so a damaged number would fill the memory
MAX_LABELS = 100_000
#: What a model has at least one of, by transformers' names: torch would warn of an empty tensor, or divide by 0.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
#: Buffers that files of older transformers hold and no model has any more.
OBSOLETE_BUFFERS = re.compile(r"(^|\.)(attn|attention)\.(masked_bias|bias)$|rotary_emb\.inv_freq$")
HALF_TYPES = (torch.bfloat16, torch.float16)
MAX_BF16_TIES = 0.01  # of a base; more is said
FLOATS = ("F64", "F32", "F16", "BF16")  #: as safetensors calls what is trained; integers would be packed weights


def check_config_file(folder: Path) -> None:
    """UserError where the folder's config.json is not one of a model that transformers has code for.

    FileNotFoundError where a folder has none; a model that is no folder may still be on the hub.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError("is an adapter; merge it first (of a run here: launch/export.py RUN --merge)")
    if not folder.is_dir():
        return
    if not (folder / "config.json").exists():
        raise FileNotFoundError("config.json")
    if (folder / GENERATION_FILE).exists():
        read_json_object(folder / GENERATION_FILE, GENERATION_FILE)
    config = read_json_object(folder / "config.json", "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        code = ", and code in the folder is never run" if "auto_map" in config else ""
        raise UserError(
            f"config.json: model_type {model_type!r} is not known to transformers{code}; expected one of its causal "
            "language models, for instance gpt2 or llama"
        )
    for key in config:
        computed = getattr(CONFIG_MAPPING[model_type], key, None)
        if isinstance(computed, property) and computed.fset is None:  # which transformers would print all of it for
            raise UserError(f"config.json: {key} is computed by transformers; take it out")
    num_labels = config.get("num_labels", 0)  # transformers makes a name for each
    if type(num_labels) is not int or not 0 <= num_labels <= MAX_LABELS:
        raise UserError(f"config.json: num_labels {num_labels!r:.80}; expected a whole number up to {MAX_LABELS}")


def check_config(config: Any) -> None:
    """UserError where a loaded configuration is not that of a causal language model, or has sizes that cannot be."""
    model_type = config.model_type
    is_causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not getattr(config, "is_encoder_decoder", False)
    is_masked = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if not is_causal or is_masked:
        kind = f"{model_type} without is_decoder" if is_causal else model_type
        raise UserError(f"config.json: {kind} is not a causal language model; expected one, for instance gpt2 or llama")
    for key in ("transformers_weights", "configuration_files"):
        if getattr(config, key, None) is not None:
            raise UserError(f"config.json: {key} names other files; expected {WEIGHTS_FILE} or {INDEX_FILE} alone")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError("config.json: quantization_config: packed weights; expected floats (--quant packs them here)")
    if "/" in str(getattr(config, "_attn_implementation", None) or ""):
        raise UserError("config.json: attn_implementation names code of the hub, which is never run; leave it out")
    text_config = config.get_text_config()
    num_layers = getattr(text_config, "num_hidden_layers", None)
    if num_layers is not None and (type(num_layers) is not int or not 1 <= num_layers <= MAX_LAYERS):
        raise UserError(f"config.json: {num_layers!r} layers; expected a whole number from 1 to {MAX_LAYERS}")
    for key in SIZES:
        size = getattr(text_config, key, None)
        if isinstance(size, int) and size < 1:
            raise UserError(f"config.json: {text_config.attribute_map.get(key, key)} {size}; expected 1 or more")


def check_weight_files(folder: Path) -> None:
    """UserError where a file of weights that is there is damaged, or one is named that is not inside the folder.

    Reads the headers only: names, shapes and whether the file is as long as they say.
    """
    files: set[str] = set()
    if (folder / WEIGHTS_FILE).exists():
        files = {WEIGHTS_FILE}
    elif (folder / INDEX_FILE).exists():
        weight_map = read_json_object(folder / INDEX_FILE, INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{INDEX_FILE}: weight_map must give a file name for each weight")
        files = set(weight_map.values())
        for file in files:
            path = PurePosixPath(file)
            if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
                raise UserError(f"{INDEX_FILE}: names {file!r}; expected .safetensors files inside the folder")
    for file in sorted(files):
        if problem := weights_file_problem(folder / file):
            raise UserError(f"{file}: {problem}")


def weights_file_problem(path: Path) -> str | None:
    """Why a file is not a whole safetensors file of floats, from its header; None where it is one."""
    try:
        open_plain_file(path).close()  # safetensors says of a file that may not be read that it is not there
    except OSError as error:
        return error.strerror
    try:
        with safe_open(path, framework="pt") as file:
            matrices = [name for name in file.keys() if name.endswith(".weight")]  # noqa: SIM118  # not a mapping
            packed = next((name for name in matrices if file.get_slice(name).get_dtype() not in FLOATS), None)
            return (
                f"{packed} is of {file.get_slice(packed).get_dtype()}; expected floats, copy the model again"
                if packed
                else None
            )
    except (SafetensorError, OSError, ValueError) as error:
        return f"not a whole safetensors file ({reason(error)}); copy it again"


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

    It is 0.00002 of trained float32 weights, 0 of bfloat16, 8 % of some dequantised ones and 12 % of float16.
    """
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
    if share <= MAX_BF16_TIES:
        return ""
    return (
        f"{share:.1%} of the base's weights lie halfway between two bf16 numbers, as dequantised and float16 ones do: "
        "in bf16 the first update of any rate tips them, which lowers full's loss for free and not LoRA's; round the "
        "weights to bf16 first, or use --precision fp32"
    )


class ComputeInFloat32(TorchFunctionMode):
    """Within it every operation takes its tensors in half types as float32, of one weight at a time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widen(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(map(widen, value)) if type(value) in (list, tuple) else value
            is_half = isinstance(value, torch.Tensor) and value.dtype in HALF_TYPES
            return value.float() if is_half else value

        return func(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})


def check_loading_info(loading_info: Mapping[str, Any]) -> None:
    """UserError for weights that were missing, left over or of another shape; transformers' own exceptions aside."""
    problems = [
        *(
            f"{name} has shape {list(stored)} and not {list(expected)}"
            for name, stored, expected in sorted(loading_info["mismatched_keys"])
        ),
        *(f"{name} is missing" for name in sorted(loading_info["missing_keys"])),
        *(f"{n} has no place" for n in sorted(loading_info["unexpected_keys"]) if not OBSOLETE_BUFFERS.search(n)),
        *map(str, loading_info["error_msgs"]),
    ]
    if problems:
        raise UserError(f"the weights do not fit config.json: {list_some(problems, 3)}; copy the model again")


@torch.no_grad()
def check_causal(causal: PreTrainedModel) -> None:
    """UserError where earlier logits depend on the last token, which the model is to predict, or are no numbers."""
    was_training = causal.training
    input_ids = torch.arange(8).remainder(causal.config.get_text_config().vocab_size).repeat(2, 1)
    input_ids[1, -1] = 0
    with ComputeInFloat32():
        logits = causal.eval()(input_ids=input_ids, use_cache=False).logits[:, :-1]
    causal.train(was_training)
    if not logits.isfinite().all():
        raise UserError("its logits are not finite: the weights are damaged; copy the model again")
    if (logits[0] - logits[1]).abs().max() > 1e-4 * logits.abs().max():
        raise UserError(f"{type(causal).__name__} sees the tokens it is to predict; expected a causal language model")


def reason(error: BaseException) -> str:
    """The kind of an error of a library and the last line of its text, which says most."""
    text = str(error).strip() or "no reason given"
    return f"{type(error).__name__}: {text.splitlines()[-1].strip()[:200]}"
