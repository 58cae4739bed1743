"""Adapters on a causal LM: which layers get one, of which kind, and how they leave the run. The only door to peft."""

import copy
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.config.errors import UserError
from trainer.config.schema import LoraSettings

KINDS = ("attention", "mlp", "all")


# --- which layers ---


def targets(causal: PreTrainedModel, settings: LoraSettings) -> list[str]:
    """The layers to adapt as peft takes them: the shortest ends of names that mean these layers and no other.

    Each of `settings.targets` must match: a kind, a layer's name or the end of it (`mlp.c_proj`), or a pattern of
    whole names. Left out: every Conv1D and Linear but the output layer. UserError for one that matches nothing.
    """
    output = causal.get_output_embeddings()
    layers = [n for n, m in causal.named_modules() if isinstance(m, (Conv1D, nn.Linear)) and m is not output]
    chosen: set[str] = set()
    for target in settings.targets or ("all",):
        found = {name for name in layers if _matches(name, target)}
        if not found:
            endings = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers}))
            raise UserError(f"--lora-targets {target}: matches no layer; this model has {endings}")
        chosen |= found
    return sorted({_shortest_end(name, chosen, layers) for name in chosen})


def _matches(name: str, target: str) -> bool:
    if target == "all":
        return True
    if target in KINDS:  # a block's layers are those of its attention and, all others, of its MLP
        attention = any(re.search("attn|attention", part) for part in name.split(".")[:-1])
        return _in_block(name) and attention == (target == "attention")
    if "*" in target or "?" in target:
        return fnmatchcase(name, target)
    return name == target or name.endswith(f".{target}")


def _in_block(name: str) -> bool:
    """Whether a layer is in one of the numbered blocks."""
    return any(part.isdigit() for part in name.split("."))


def _shortest_end(name: str, chosen: set[str], layers: list[str]) -> str:
    parts = name.split(".")
    for start in range(len(parts) - 1, -1, -1):
        end = ".".join(parts[start:])
        if all(other in chosen for other in layers if other == end or other.endswith(f".{end}")):
            return end
    return name


# --- adapting ---


def adapt(causal: PreTrainedModel, settings: LoraSettings, names: list[str]) -> Any:
    """The peft model around `causal`, whose own weights are frozen but for those of `train_also`.

    pissa moves the largest singular vectors of each layer's weight from the base into its adapter
    (Meng et al., arXiv 2404.02948); the others begin as the identity.
    """
    from peft import LoraConfig, TaskType, get_peft_model  # imports bitsandbytes: only where it is needed

    transposed = any(
        isinstance(layer, Conv1D) and any(name == t or name.endswith(f".{t}") for t in names)
        for name, layer in causal.named_modules()
    )
    if settings.adapter == "pissa":
        _check_rank(causal, settings.rank, names)
    on_meta = next(causal.parameters()).device.type == "meta"
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=settings.alpha,  # peft divides it by r; a float is as good
        lora_dropout=settings.dropout,
        target_modules=names,
        fan_in_fan_out=transposed,  # Conv1D keeps its weight as [in, out]
        use_dora=settings.adapter == "dora",
        use_rslora=settings.adapter == "rslora",
        init_lora_weights="pissa" if settings.adapter == "pissa" and not on_meta else True,
    )
    module = get_peft_model(causal, config)
    for parameter in _beside(causal, settings.train_also):
        parameter.requires_grad_(True)
    return module


def _check_rank(causal: PreTrainedModel, rank: int, names: list[str]) -> None:
    """UserError where a layer has fewer singular vectors than pissa is to take."""
    for name, layer in causal.named_modules():
        if any(name == target or name.endswith(f".{target}") for target in names):
            most = min(layer.weight.shape)
            if rank > most:
                raise UserError(f"--lora-rank {rank}: pissa on {name} expects {most} or less, the rank of its weight")


def _beside(causal: PreTrainedModel, kinds: tuple[str, ...]) -> list[nn.Parameter]:
    """The base's own weights that are trained beside the adapters; tied ones are one tensor and count once.

    UserError for a kind of which the model has none.
    """
    chosen: list[nn.Parameter] = []
    for kind in kinds:
        found = list(_of_kind(causal, kind))
        if not found:
            raise UserError(f"--train-also {kind}: this model has none; leave it out")
        chosen += found
    return chosen


def _of_kind(causal: PreTrainedModel, kind: str) -> Iterator[nn.Parameter]:
    if kind == "wte":
        yield from causal.get_input_embeddings().parameters()
    elif kind == "lm_head":
        yield from causal.get_output_embeddings().parameters()
    elif kind == "layernorm":
        for module in causal.modules():
            if "norm" in type(module).__name__.lower():
                yield from module.parameters(recurse=False)
    else:
        yield from (p for name, p in causal.named_parameters() if name.endswith(".bias") and ".lora_" not in name)


def plain_layers(module: Any) -> list[Any]:
    """The adapted layers of a peft model that are a frozen matrix product and a low-rank one, and nothing else."""
    from peft.tuners.lora import Linear

    return [
        layer
        for layer in module.modules()
        if type(layer) is Linear  # also around a Conv1D; packed bases have classes of their own
        and not layer.lora_variant  # dora
        and type(layer.base_layer) in (Conv1D, nn.Linear)
        and not layer.base_layer.weight.requires_grad
        and all(type(drop) is nn.Identity for drop in layer.lora_dropout.values())
    ]


def start_of(module: Any, settings: LoraSettings) -> dict[str, Tensor]:
    """{name: copy on the CPU} of pissa's adapters before the first step; {} for the others, which begin at nothing.

    The base lacks what they hold, so an adapter for the untouched base must take them off again.
    """
    if settings.adapter != "pissa":
        return {}
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in module.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


# --- leaving the run ---


def merged(module: Any) -> Any:
    """The plain causal LM with the adapters folded into its weights; `module` is used up. All weights in float32."""
    return module.merge_and_unload(safe_merge=True)  # safe: refuses weights that are not finite


def save(folder: Path, module: Any, weights: Mapping[str, Tensor], start: Mapping[str, Tensor], base: str) -> None:
    """Write an adapter that plain peft loads onto the untouched base. `weights`: the trained ones, by `module`'s names.

    What was trained of the base itself stands in the same file under its own name, and peft puts it there; tied
    weights are stored once. pissa's become an ordinary adapter of twice the rank: B A - B0 A0 is [B, -B0] [A; A0].
    """
    config = copy.deepcopy(module.peft_config["default"])
    config.base_model_name_or_path = base
    config.inference_mode = True
    kept = dict(weights)
    if start:
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
        for name, before in start.items():
            now = kept[name].cpu()
            kept[name] = torch.cat((now, before)) if ".lora_A." in name else torch.cat((now, -before), dim=1)
    config.init_lora_weights = True  # the file holds the whole adapter: nothing is to be made from the base
    config.save_pretrained(folder)
    tensors = {name.replace(".default.", "."): tensor.contiguous() for name, tensor in kept.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
