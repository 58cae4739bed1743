"""The base model and its adapters: the only room that asks which mode a run has, and the only door to peft."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.base import FOLDER
from trainer.data import hub
from trainer.errors import UserError
from trainer.settings import DEMO_MODEL, LoraSettings, ModelSettings, Settings


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained. `module` is what is saved (a peft model with --mode lora), `causal` the LM inside it."""

    module: Any
    causal: PreTrainedModel
    facts: dict[str, Any]  #: the `model` block of run.json

    @property
    def is_adapter(self) -> bool:
        """Whether what is saved is an adapter that needs its base."""
        return self.module is not self.causal

    @property
    def tied(self) -> bool:
        """Whether input and output embeddings are one tensor."""
        output = self.causal.get_output_embeddings()
        return output is not None and output.weight is self.causal.get_input_embeddings().weight


def build(settings: Settings, *, on_meta: bool = False, hashed: bool = True) -> Model:
    """The model of the settings in float32, with only what the mode trains requiring gradients.

    `on_meta`: shapes without memory or weights, for counting; `hashed`: with the fingerprint of the
    weights. UserError where the model or a target is not there.
    """
    config = load_config(settings.model)
    with torch.device("meta" if on_meta else "cpu"):
        torch.manual_seed(settings.train.seed)
        random = on_meta or settings.model.init == "random"
        causal = (
            AutoModelForCausalLM.from_config(config, dtype=torch.float32) if random else _pretrained(settings.model)
        )
        facts = {
            "name": settings.model.model,
            "init": settings.model.init,
            "class": type(causal).__name__,
            "parameters": sum(p.numel() for p in causal.parameters()),
            "fingerprint": fingerprint(causal) if hashed and not on_meta else None,
            "lora_targets": [],
        }
        module: Any = causal
        if settings.mode == "lora":
            targets = lora_targets(causal, settings.lora)
            facts["lora_targets"] = targets
            torch.manual_seed(settings.train.seed)  # the adapters do not depend on how the base was made
            module = _adapted(causal, settings.lora, targets)
    facts["trainable"] = sum(p.numel() for p in module.parameters() if p.requires_grad)
    facts["share"] = facts["trainable"] / facts["parameters"]
    return Model(module=module, causal=causal, facts=facts)


def save_base(settings: Settings, folder: Path) -> None:
    """Write the random base of the settings, for an adapter that would be nothing without it."""
    torch.manual_seed(settings.train.seed)
    AutoModelForCausalLM.from_config(load_config(settings.model), dtype=torch.float32).save_pretrained(folder)


def load_config(settings: ModelSettings) -> Any:
    """The configuration of the model, from its folder or the hub; random `gpt2` needs neither."""
    if settings.model == "gpt2" and settings.init == "random" and not Path("gpt2").exists():
        return GPT2Config()  # the published shape; the class's defaults are GPT-2's
    try:
        return AutoConfig.from_pretrained(**_where(settings.model))
    except (OSError, ValueError, KeyError) as problem:
        raise UserError(_not_found(settings.model, "config.json")) from problem


def location(model: str) -> str:
    """The folder or hub id behind a model's name."""
    return str(FOLDER) if model == DEMO_MODEL else model


def _where(model: str) -> dict[str, Any]:
    """Arguments that find a model; without a network the local copies are all there is, and nothing is waited for."""
    place = location(model)
    return {"pretrained_model_name_or_path": place, "local_files_only": Path(place).is_dir() or not hub.reachable()}


def _pretrained(settings: ModelSettings) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(**_where(settings.model), dtype=torch.float32)
    except (OSError, ValueError) as problem:
        raise UserError(_not_found(settings.model, "weights")) from problem


def _not_found(model: str, what: str) -> str:
    where = "has no " + what if Path(model).is_dir() else f"no such folder, and its {what} cannot be had from the hub"
    remedy = " (or pass --init random)" if what == "weights" else ""
    return f"--model {model}: {where}; pass --model FOLDER with a copy in Hugging Face's form{remedy}"


def positions(config: Any) -> int | None:
    """The longest row the model takes, None where it has no limit."""
    return getattr(config, "n_positions", None) or getattr(config, "max_position_embeddings", None)


def lora_targets(causal: PreTrainedModel, settings: LoraSettings) -> list[str]:
    """The layers to adapt: those asked for, each of which must match, or every Conv1D and Linear but the output layer.

    Names are those that peft takes: a layer's name or the end of it, `c_attn` or `mlp.c_proj`.
    """
    output = causal.get_output_embeddings()
    layers = {
        name: layer
        for name, layer in causal.named_modules()
        if isinstance(layer, (Conv1D, nn.Linear)) and layer is not output
    }
    endings = sorted({name.rsplit(".", 1)[-1] for name in layers})
    for target in settings.targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise UserError(f"--lora-targets {target}: matches no layer; this model has {', '.join(endings)}")
    return list(settings.targets) or endings


def _adapted(causal: PreTrainedModel, settings: LoraSettings, targets: list[str]) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model  # imports bitsandbytes: only where it is needed

    transposed = any(
        isinstance(layer, Conv1D) and any(name == t or name.endswith(f".{t}") for t in targets)
        for name, layer in causal.named_modules()
    )
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=settings.alpha,  # peft divides it by r; a float is as good
        lora_dropout=settings.dropout,
        target_modules=targets,
        fan_in_fan_out=transposed,  # Conv1D keeps its weight as [in, out]
    )
    return get_peft_model(causal, config)


def merge_adapters(model: Model) -> Any:
    """The plain causal LM with the adapters folded into its weights; `model` is used up. All weights in float32."""
    return model.module.merge_and_unload(safe_merge=True)  # safe: refuses weights that are not finite


def fingerprint(causal: nn.Module) -> str:
    """A hash of every weight as it stands, 16 hex digits: whether two runs start from the same base."""
    digest = hashlib.sha256()
    for name, parameter in sorted(causal.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def adapted_layers(model: Model) -> list[tuple[str, bool]]:
    """(name, whether its weight lies as [in, out]) of every layer with an adapter; [] with --mode full."""
    return [
        (name, isinstance(layer.base_layer, Conv1D))
        for name, layer in model.module.named_modules()
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")
    ]
