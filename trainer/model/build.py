"""The base model and what is trained of it: the only room that asks which mode a run has."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from trainer.config.errors import UserError
from trainer.config.schema import DEMO_MODEL, EIGHT_BIT, ModelSettings, Settings
from trainer.data import hf_hub
from trainer.model import lora, optimizer, quantization
from trainer.model.demo.files import FOLDER

#: The names under which causal models of transformers keep the dropouts of a block; GPT-2 has the first three.
DROPOUTS = (
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "embed_dropout", "resid_dropout",
    "hidden_dropout", "dropout", "activation_dropout",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained. `module` is what is saved (a peft model with --mode lora), `causal` the LM inside it."""

    module: Any
    causal: PreTrainedModel
    facts: dict[str, Any]  #: the `model` block of run.json
    start: dict[str, Tensor] = field(default_factory=dict)  #: of pissa: the adapters before the first step
    packed: ModelSettings | None = None  #: the settings by which its base was quantised
    b_ratio: float = 1.0  #: LoRA+: rate of the B matrices over that of all else

    def rate_of(self, name: str) -> float:
        """By what the learning rate of a trained weight is multiplied."""
        return self.b_ratio if ".lora_B." in name else 1.0

    @property
    def packing(self) -> dict[str, Any] | None:
        """How transformers packs the base in the same way; None for a base in float32."""
        return quantization.as_transformers_says_it(self.packed, self.module) if self.packed else None

    @property
    def embeddings(self) -> list[nn.Parameter]:
        """The weights of every embedding layer."""
        return [layer.weight for layer in self.causal.modules() if isinstance(layer, nn.Embedding)]

    @property
    def is_adapter(self) -> bool:
        """Whether what is saved is an adapter that needs its base."""
        return self.module is not self.causal

    @property
    def tied(self) -> bool:
        """Whether input and output embeddings are one tensor."""
        output = self.causal.get_output_embeddings()
        return output is not None and output.weight is self.causal.get_input_embeddings().weight

    @property
    def starting_at_zero(self) -> tuple[str, ...]:
        """Names of the trained weights that are zero until the first update: the B of each adapter."""
        return tuple(name for name, p in self.module.named_parameters() if p.requires_grad and ".lora_B." in name)


def build(
    settings: Settings, *, on_meta: bool = False, hashed: bool = True, device: torch.device | None = None
) -> Model:  # fmt: skip
    """The model of the settings in float32, with only what the mode trains requiring gradients.

    `on_meta`: shapes without memory or weights, for counting; `hashed`: with the fingerprint of the weights before
    any adapter or packing; `device`: where a quantised base is packed and stays, each rank's own. UserError where the
    model or a target is not there.
    """
    config = load_config(settings.model)
    with torch.device("meta" if on_meta else "cpu"):
        torch.manual_seed(settings.train.seed)
        random = on_meta or settings.model.init == "random"
        causal = (
            AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            if random
            else _pretrained(settings.model, config)
        )
        one_kernel_activations(causal)
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
            targets = facts["lora_targets"] = lora.targets(causal, settings.lora)
            if settings.model.quant and not on_meta:
                quantization.quantize(causal, settings.model, device or torch.device("cpu"))
            torch.manual_seed(settings.train.seed)  # the adapters do not depend on how the base was made
            module = lora.adapt(causal, settings.lora, targets)
        if settings.engine.checkpoint_activations:  # the other kind gives the first block's adapters no gradient
            causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    facts["trainable"] = sum(p.numel() for p in module.parameters() if p.requires_grad)
    facts["share"] = facts["trainable"] / facts["parameters"]
    model = Model(
        module=module, causal=causal, facts=facts,
        start={} if on_meta else lora.start_of(module, settings.lora),
        packed=settings.model if settings.model.quant else None, b_ratio=settings.lora.plus_ratio,
    )  # fmt: skip
    if settings.train.optim in EIGHT_BIT:
        facts["kept_in_32_bits"] = optimizer.kept_in_32_bits(module.named_parameters(), model.embeddings)
    if settings.model.quant:
        output = causal.get_output_embeddings()
        facts["frozen_bytes"] = (
            quantization.will_hold_bytes(module, output, settings.model) if on_meta else quantization.held_bytes(module)
        )
    return model


def one_kernel_activations(causal: nn.Module) -> None:
    """Compute GPT-2's activation (the tanh form of GELU, Hendrycks and Gimpel, arXiv 1606.08415) in one kernel.

    transformers writes the same formula as eight operations, which read and write the widest tensors of a block over
    and over and keep four of them for backward instead of one. The configuration stays as it is.
    """
    for module in list(causal.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def save_base(settings: Settings, folder: Path) -> None:
    """Write the random base of the settings, for an adapter that would be nothing without it."""
    torch.manual_seed(settings.train.seed)
    AutoModelForCausalLM.from_config(load_config(settings.model), dtype=torch.float32).save_pretrained(folder)


def load_config(settings: ModelSettings) -> Any:
    """The configuration of the model, from its folder or the hub; random `gpt2` needs neither."""
    if settings.model == "gpt2" and settings.init == "random" and not Path("gpt2").exists():
        config: Any = GPT2Config()  # the published shape; the class's defaults are GPT-2's
    else:
        try:
            config = AutoConfig.from_pretrained(**_where(settings.model))
        except (OSError, ValueError, KeyError) as problem:
            raise UserError(_not_found(settings.model, "config.json")) from problem
    return config if settings.dropout is None else _with_dropout(config, settings)


def _with_dropout(config: Any, settings: ModelSettings) -> Any:
    fields = dropouts(config)
    if not fields:
        raise UserError(
            f"--dropout {settings.dropout:g}: {settings.model} ({config.model_type}) has no dropout to set; "
            f"leave it out, or use a model whose config has one of {', '.join(DROPOUTS)}"
        )
    for name in fields:
        setattr(config, name, settings.dropout)
    return config


def dropouts(config: Any) -> dict[str, float]:
    """{field: probability} of the dropouts that a model's config has while it is trained as a language model."""
    return {name: float(getattr(config, name)) for name in DROPOUTS if getattr(config, name, None) is not None}


def location(model: str) -> str:
    """The folder or hub id behind a model's name."""
    return str(FOLDER) if model == DEMO_MODEL else model


def _where(model: str) -> dict[str, Any]:
    """Arguments that find a model; without a network the local copies are all there is, and nothing is waited for."""
    place = location(model)
    return {"pretrained_model_name_or_path": place, "local_files_only": Path(place).is_dir() or not hf_hub.reachable()}


def _pretrained(settings: ModelSettings, config: Any) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(**_where(settings.model), config=config, dtype=torch.float32)
    except (OSError, ValueError) as problem:
        raise UserError(_not_found(settings.model, "weights")) from problem


def _not_found(model: str, what: str) -> str:
    where = "has no " + what if Path(model).is_dir() else f"no such folder, and its {what} cannot be had from the hub"
    remedy = " (or pass --init random)" if what == "weights" else ""
    return f"--model {model}: {where}; pass --model FOLDER with a copy in Hugging Face's form{remedy}"


def positions(config: Any) -> int | None:
    """The longest row the model takes, None where it has no limit."""
    return getattr(config, "n_positions", None) or getattr(config, "max_position_embeddings", None)


def merge_adapters(model: Model) -> Any:
    """The plain causal LM with the adapters folded into its weights; `model` is used up."""
    return lora.merged(model.module)


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
