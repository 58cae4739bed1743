"""Adapters on a causal LM: which layers get one, of which kind, and `--model ADAPTER`. The only door to peft."""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.config import choices
from trainer.config.errors import UserError
from trainer.config.files import read_json_object
from trainer.config.settings import LoraSettings, Settings
from trainer.data.hf_hub import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from trainer.data.tokenizer import find_model
from trainer.model.model_files import HALF_TYPES, reason, weights_file_problem

QUANTIZATION_FILE = "base_quantization.json"  # of the base that an adapter was trained on: which, and packed how
#: peft's types that move their ranks between steps, mix trained adapters, or need the number of a task with each row
UNSUPPORTED_TYPES = ("ADALORA", "XLORA", "POLY")


def resolve_target_modules(causal: PreTrainedModel, settings: LoraSettings) -> list[str]:
    """The layers to adapt, as peft takes them: names, or the ends of names, of Conv1D and Linear layers. Without
    `settings.target_modules`, or with `all` in it: all but the output layer. UserError for a name without a layer."""
    output_layer = causal.get_output_embeddings()
    names = [n for n, m in causal.named_modules() if isinstance(m, (Conv1D, nn.Linear)) and m is not output_layer]
    kinds = sorted({name.rsplit(".", 1)[-1] for name in names})
    targets = list(settings.target_modules or ("all",))
    for target in targets:
        if target != "all" and not any(_ends_with(name, target) for name in names):
            raise UserError(f"--lora-target-modules {target}: matches no layer; this model has {', '.join(kinds)}")
    targets = kinds if "all" in targets else sorted(targets)
    for mixer_name, mixer in causal.named_modules():
        if hasattr(mixer, "conv1d") and hasattr(mixer, "out_proj"):
            # Of a state-space model (Mamba and its kin), whose kernels read the weights past an adapter.
            inside = [name for name in names if name.startswith(f"{mixer_name}.")]
            if adapted := [target for target in targets if any(_ends_with(name, target) for name in inside)]:
                raise UserError(
                    f"--lora-target-modules {adapted[0]}: {type(mixer).__name__} reads its weights past an adapter "
                    f"({causal.config.model_type}); expected --mode full, or layers outside of it"
                )
    return targets


def _ends_with(name: str, suffix: str) -> bool:
    return f".{name}".endswith(f".{suffix}")  # whole parts of the name


def add_adapters(
    causal: PreTrainedModel, settings: LoraSettings, target_modules: list[str], *, with_values: bool = True
) -> Any:
    """The peft model around `causal`, whose own weights are frozen but for those of `modules_to_save`.

    pissa moves the largest singular vectors of each layer's weight from the base into its adapter (arXiv 2404.02948);
    the others begin as the identity. UserError for what the model has no place for. `with_values`: False where the
    base has shapes alone.
    """
    from peft import LoraConfig, TaskType  # imports bitsandbytes: only where it is needed

    is_pissa = settings.adapter == "pissa"
    layers = {n: m for n, m in causal.named_modules() if any(_ends_with(n, target) for target in target_modules)}
    for name, layer in layers.items() if is_pissa else ():
        if settings.rank > (max_rank := min(layer.weight.shape)):
            raise UserError(f"--lora-rank {settings.rank}: pissa on {name} expects {max_rank} or less")
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=settings.alpha,  # peft divides it by r; a float is as good
        lora_dropout=settings.dropout,
        target_modules=target_modules,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),  # its weight is [in, out]
        use_dora=settings.adapter == "dora",
        use_rslora=settings.adapter == "rslora",
        init_lora_weights="pissa" if is_pissa and with_values else True,
    )
    module = _wrap(causal, config)
    output_layer = causal.get_output_embeddings()
    norms = [layer for layer in causal.modules() if "norm" in type(layer).__name__.lower()]
    parameters = {
        "wte": list(causal.get_input_embeddings().parameters()),
        "lm_head": list(output_layer.parameters()) if output_layer is not None else [],
        "bias": [p for n, p in causal.named_parameters() if n.endswith(".bias") and ".lora_" not in n],
        "layernorm": [parameter for layer in norms for parameter in layer.parameters(recurse=False)],
    }
    for group in settings.modules_to_save:
        if not parameters[group]:
            raise UserError(f"--modules-to-save {group}: this model has none; leave it out")
        for parameter in parameters[group]:
            parameter.requires_grad_(True)
    return module


def add_peft_adapters(causal: PreTrainedModel, settings: LoraSettings, source: str) -> tuple[Any, list[str]]:
    """(the peft model around `causal` by `settings.peft_config`, the ends of the names of the layers it adapts).
    UserError, which begins with `source`, for a method that cannot be trained here or that peft refuses for this
    model."""
    from peft import PeftConfig, TaskType
    from peft.tuners.tuners_utils import BaseTunerLayer

    values = json.loads(settings.peft_config or "")
    peft_type, init = values["peft_type"], values.get("init_lora_weights", True)
    if init not in (True, False, "gaussian", "orthogonal"):
        raise UserError(f"{source}: init_lora_weights {init} changes the base; expected true, or --adapter pissa")
    own, has_conv1d = list(causal.parameters()), any(isinstance(layer, Conv1D) for layer in causal.modules())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Unexpected keyword arguments")
            config: Any = PeftConfig.from_peft_type(**values, task_type=TaskType.CAUSAL_LM)
        if hasattr(config, "fan_in_fan_out"):
            config.fan_in_fan_out = has_conv1d
        can_train = peft_type not in UNSUPPORTED_TYPES and not config.is_prompt_learning
        module = _wrap(causal, config) if can_train else causal
    except Exception as error:  # peft's own kinds, of its methods as well
        raise UserError(f"{source}: peft refuses {peft_type} for this model ({reason(error)})") from None
    adapted = sorted({name.rsplit(".", 1)[-1] for name, m in causal.named_modules() if isinstance(m, BaseTunerLayer)})
    kept = {id(parameter) for parameter in module.parameters()}
    trained = [p for p in module.parameters() if p.requires_grad]
    adds_floats = sum(p.numel() for p in trained) and all(p.is_floating_point() for p in trained)
    if not (can_train and adds_floats) or any(id(p) not in kept for p in own):  # or it replaces weights of the base
        raise UserError(f"{source}: {peft_type} is not supported; expected a method that adapts layers, such as VERA")
    return module, adapted


def _wrap(causal: PreTrainedModel, config: Any) -> Any:
    """peft's model, its LoRA adapters made in float32 whatever the type of the base, without a copy of that."""
    from peft import get_peft_model

    layers = [layer for layer in causal.modules() if isinstance(layer, (Conv1D, nn.Linear))]
    weights = {layer: layer.weight for layer in layers if layer.weight.dtype in HALF_TYPES}
    for layer, weight in weights.items():  # adapters are made in the type of their layer
        layer.weight = nn.Parameter(torch.zeros(1, device=weight.device).expand(weight.shape), requires_grad=False)
    module: Any = get_peft_model(causal, config)
    for layer, weight in weights.items():
        layer.weight = weight.requires_grad_(False)
    for layer in module.modules():  # dora's magnitudes are the norms of these weights, in float32 one at a time
        for magnitude in getattr(layer, "lora_magnitude_vector", {}).values():
            if (base := layer.get_base_layer()) in weights:
                weight = base.weight.float()
                magnitude.weight.data = torch.linalg.norm(weight.T if isinstance(base, Conv1D) else weight, dim=1)
    return module


def adapter_state_dict(module: Any, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What peft stores of a model, and under their own names the weights of the base that were trained. `trained`: the
    trained weights by their names in `module`."""
    from peft import get_peft_model_state_dict

    stored = get_peft_model_state_dict(module, {**module.state_dict(), **trained}, save_embedding_layers=False)
    return {**{n: t for n, t in trained.items() if ".default" not in n and n not in stored}, **stored}


def adopt_adapter(settings: Settings) -> Settings:
    """The settings with the shape of an adapter that --model names; UserError where other settings contradict it."""
    name, folder = settings.model.model, find_model(settings.model.model).adapter
    if folder is None:
        return settings
    if settings.mode == "full" or settings.model.init == "random" or "--peft-config" in settings.overridden:
        raise UserError(
            f"--model {name}: holds an adapter, with a base and a shape of its own; expected --mode lora without "
            "--init random and --peft-config, or the merged model (of a run here: launch/export.py RUN --merge)"
        )
    if problems := settings.shape_flag_problems(f"--model {name}, an adapter"):
        raise UserError(*problems)
    if (folder / QUANTIZATION_FILE).exists() and not settings.lora.peft_config:  # else these are adopted already
        packing = read_json_object(folder / QUANTIZATION_FILE, QUANTIZATION_FILE).get("quantization_config")
        packing = packing if isinstance(packing, dict) else {}
        quant = "int8" if packing.get("load_in_8bit") else packing.get("bnb_4bit_quant_type")
        if quant != settings.model.quant:
            raise UserError(f"--model {name}: was trained on its base in {quant}; expected --quant {quant}")
    config = read_json_object(folder / ADAPTER_CONFIG_FILE, f"--model {name}: {ADAPTER_CONFIG_FILE}")
    lora = LoraSettings(peft_config=str(folder / ADAPTER_CONFIG_FILE))
    if lora.kind == "lora":
        kind: choices.Adapter = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
        shape = {"rank": config.get("r"), "alpha": config.get("lora_alpha"), "dropout": config.get("lora_dropout")}
        lora = dataclasses.replace(lora, adapter=kind, **{key: value for key, value in shape.items() if value})
    return dataclasses.replace(settings, lora=lora)


def load_adapter(folder: Path, module: Any, *, with_values: bool) -> str:
    """Put an adapter's weights into a peft model of its shape, and let those of the base that stand in its file be
    trained; returns a hash of the file. UserError where they do not fit; pickles are not read. `with_values`: False
    where the model has shapes alone."""
    from peft import set_peft_model_state_dict

    path = folder / ADAPTER_WEIGHTS_FILE
    if problem := weights_file_problem(path):
        raise UserError(f"{path}: {problem} (pickles are not read)")
    weights, parameters = load_file(path), dict(module.named_parameters())
    for name in weights.keys() & parameters.keys():
        parameters[name].data = parameters[name].data.float()
        parameters[name].requires_grad_(True)
    if not with_values:
        return ""
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    try:
        result = set_peft_model_state_dict(module, weights)
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: does not fit its base: {reason(error)}") from None
    if unknown := [*result.unexpected_keys, *sorted(trained & set(result.missing_keys))]:
        raise UserError(f"{path}: {unknown[0]} does not fit {ADAPTER_CONFIG_FILE}, and {len(unknown) - 1} more")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
