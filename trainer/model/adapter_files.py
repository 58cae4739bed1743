"""An adapter that is there already, ours or anyone's: as what is trained further, `--model ADAPTER`."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from trainer.config import choices
from trainer.config.errors import UserError
from trainer.config.files import read_json_object
from trainer.config.settings import LoraSettings, Settings
from trainer.data.hf_hub import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from trainer.data.tokenizer import find_model
from trainer.model.model_files import weights_file_problem

QUANTIZATION_FILE = "base_quantization.json"  # of the base that an adapter was trained on: which, and packed how


def adopt_adapter(settings: Settings) -> Settings:
    """The settings with the shape of the adapter that --model names; unchanged where it names a whole model.

    UserError for settings that contradict it.
    """
    name, folder = settings.model.model, find_model(settings.model.model).adapter
    if folder is None:
        return settings
    if settings.mode == "full":
        raise UserError(
            f"--model {name}: holds an adapter, and --mode full trains whole models; expected --mode lora, or the "
            "merged model (of a run here: launch/export.py RUN --merge)"
        )
    if settings.model.init == "random":
        raise UserError(f"--init random: --model {name} is an adapter on the weights of its base; leave it out")
    if "--peft-config" in settings.overridden:
        raise UserError(f"--peft-config: --model {name} is an adapter and has its own; leave it out")
    if problems := settings.shape_flag_problems(f"--model {name}, an adapter"):
        raise UserError(*problems)
    if (folder / QUANTIZATION_FILE).exists() and not settings.lora.peft_config:  # else these are adopted already
        packing = read_json_object(folder / QUANTIZATION_FILE, QUANTIZATION_FILE).get("quantization_config")
        packing = packing if isinstance(packing, dict) else {}
        quant = "int8" if packing.get("load_in_8bit") else packing.get("bnb_4bit_quant_type")
        if quant != settings.model.quant:
            raise UserError(f"--model {name}: was trained on its base in {quant}; expected --quant {quant}")
    config = read_json_object(folder / ADAPTER_CONFIG_FILE, f"--model {name}: {ADAPTER_CONFIG_FILE}")
    lora = dataclasses.replace(
        LoraSettings(plus_ratio=settings.lora.plus_ratio), peft_config=str(folder / ADAPTER_CONFIG_FILE)
    )
    if lora.kind == "lora":
        kind: choices.Adapter = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
        shape = {"rank": config.get("r"), "alpha": config.get("lora_alpha"), "dropout": config.get("lora_dropout")}
        lora = dataclasses.replace(lora, adapter=kind, **{key: value for key, value in shape.items() if value})
    return dataclasses.replace(settings, lora=lora)


def load_adapter(folder: Path, module: Any, *, with_values: bool) -> str:
    """Put an adapter's weights into a peft model of its shape, and let those of the base that stand in its file be
    trained; returns a hash of the file. UserError where they do not fit; pickles are not read.

    `with_values`: False where the model has shapes alone.
    """
    from peft import set_peft_model_state_dict

    path = folder / ADAPTER_WEIGHTS_FILE
    if not path.exists():
        raise UserError(f"{folder}: has no {ADAPTER_WEIGHTS_FILE} (pickles may hold code and are not read)")
    if problem := weights_file_problem(path):
        raise UserError(f"{path}: {problem}")
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
        problem = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path}: does not fit its base: {problem:.200}") from None
    if unknown := [*result.unexpected_keys, *sorted(trained & set(result.missing_keys))]:
        raise UserError(f"{path}: {unknown[0]} does not fit {ADAPTER_CONFIG_FILE}, and {len(unknown) - 1} more")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
