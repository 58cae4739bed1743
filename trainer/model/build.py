"""The base model and what is trained of it: the only room that asks which mode a run has."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.initialization import no_init_weights

from trainer.config.choices import DEMO_MODEL
from trainer.config.errors import UserError
from trainer.config.settings import ModelSettings, Settings
from trainer.data import hf_hub
from trainer.data.tokenizer import find_model
from trainer.model import attention, lora, model_files, quantization

#: The names under which causal models of transformers keep the dropouts of a block; GPT-2 has the first three.
DROPOUT_FIELDS = (
    *("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "embed_dropout", "resid_dropout"),
    *("hidden_dropout", "dropout", "activation_dropout"),
)


@dataclass(frozen=True, kw_only=True)
class TrainableModel:
    """What is trained. `module` is what is saved (a peft model with --mode lora), `causal` the LM inside it."""

    module: Any
    causal: PreTrainedModel
    metadata: dict[str, Any]  #: the `model` block of run.json
    initial_adapter: dict[str, Tensor] = field(default_factory=dict)  #: of pissa: the adapters before the first step
    quant_settings: ModelSettings | None = None  #: the settings by which its base was quantised


def build_model(
    settings: Settings,
    *,
    on_meta: bool = False,
    with_fingerprint: bool = True,
    device: torch.device | None = None,
    as_stored: bool = False,
    with_values: bool = True,
) -> TrainableModel:
    """The model of the settings in float32, with only what the mode trains requiring gradients.

    `on_meta`: shapes without memory or weights, for counting; `with_fingerprint`: of the weights before any adapter or
    packing; `device`: where a quantised base is packed and stays; `as_stored`: weights of a file of one type stay in it
    until `to_float32`, mapped into the same memory by all processes of a machine; `with_values`: False for a rank that
    is sent them: memory that nobody writes to, which takes none. UserError where the model or a target is not there.
    """
    settings, source = lora.adopt_adapter(settings), find_model(settings.model.model)
    config, quant, dtype = load_config(settings.model), settings.model.quant, torch.float32
    with_values = with_values and not on_meta
    if settings.model.init == "pretrained" and (Path(source.path).is_dir() or with_values):
        # Names and shapes first, which takes no memory: a wrong size in config.json could fill it.
        _load_pretrained(settings.model, config, dtype, device_map={"": "meta"})
        reads_base = settings.mode == "lora" and settings.lora.kind not in ("lora", "rslora", "dora")
        if (as_stored or quant) and not reads_base:
            dtype = model_files.stored_dtype(hf_hub.find_model_folder(source.path, source.revision))
    with torch.device("meta" if on_meta else "cpu"):
        torch.manual_seed(settings.train.seed)
        if with_values and settings.model.init == "pretrained":
            causal = _load_pretrained(settings.model, config, dtype)
        else:
            with contextlib.nullcontext() if with_values else no_init_weights():
                causal = _init_random(settings.model, config)
            causal.tie_weights()
        # GPT-2's activation, the tanh form of GELU (arXiv 1606.08415), in one kernel: transformers writes it as eight
        # operations, which keep four of a block's widest tensors for backward.
        for name, layer in list(causal.named_modules(remove_duplicate=False)):
            if isinstance(layer, NewGELUActivation):
                causal.set_submodule(name, nn.GELU(approximate="tanh"))
        attention.install(causal)
        metadata: dict[str, Any] = {
            **{"name": settings.model.model, "init": settings.model.init, "class": type(causal).__name__},
            "parameters": sum(p.numel() for p in causal.parameters()),
            "fingerprint": compute_fingerprint(causal) if with_fingerprint and with_values else None,
            "lora_targets": [],
        }
        module: Any = causal
        if settings.mode == "lora":
            target_modules = lora.resolve_target_modules(causal, settings.lora)
            if quant:
                metadata["frozen_bytes"] = quantization.count_quantized_bytes(causal, settings.model)
                if not on_meta:
                    quantization.quantize(causal, settings.model, device or torch.device("cpu"))
                    to_float32(causal)
            torch.manual_seed(settings.train.seed)  # the adapters do not depend on how the base was made
            base_parameters = list(causal.parameters())
            if settings.lora.peft_config:
                name = f"--model {settings.model.model}" if source.adapter else "--peft-config"
                module, target_modules = lora.add_peft_adapters(causal, settings.lora, name)
            else:
                module = lora.add_adapters(causal, settings.lora, target_modules, with_values=with_values)
            metadata["lora_targets"] = target_modules
            if source.adapter:
                metadata["base"] = source.name
                digest = lora.load_adapter(source.adapter, module, with_values=with_values)
                if fingerprint := metadata["fingerprint"]:
                    both = f"{fingerprint} {digest}".encode()
                    metadata["fingerprint"] = hashlib.sha256(both).hexdigest()[:16]
            if quant:  # what is trained of the base is not packed
                metadata["frozen_bytes"] -= 4 * sum(p.numel() for p in base_parameters if p.requires_grad)
        if settings.engine.activation_checkpointing:  # the other kind gives the first block's adapters no gradient
            causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    initial_adapter = {}
    if settings.lora.adapter == "pissa" and with_values:
        # The base lacks what pissa's adapters hold: an adapter for the untouched base must take them off again.
        initial_adapter = {n: p.detach().cpu().clone() for n, p in module.named_parameters() if ".lora_" in n}
    metadata["trainable"] = sum(p.numel() for p in module.parameters() if p.requires_grad)
    metadata["share"] = metadata["trainable"] / metadata["parameters"]
    return TrainableModel(
        module=module,
        causal=causal,
        metadata=metadata,
        initial_adapter=initial_adapter,
        quant_settings=settings.model if quant else None,
    )


def to_float32(module: nn.Module) -> None:
    """Hold the weights in float32, as training needs them; packed ones, which are no floats, stay."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()


def save_base_model(settings: Settings, folder: Path) -> None:
    """Write the random base of the settings, for an adapter that would be nothing without it."""
    torch.manual_seed(settings.train.seed)
    _init_random(settings.model, load_config(settings.model)).save_pretrained(folder)


def load_config(settings: ModelSettings) -> Any:
    """The configuration of the model, from its folder or the hub; random `gpt2` needs neither."""
    if settings.model == "gpt2" and settings.init == "random" and not Path("gpt2").exists():
        config: Any = GPT2Config()  # the published shape; the class's defaults are GPT-2's
    else:
        with _refuse_model(settings.model, "config.json"):
            model_files.check_config_file(Path(find_model(settings.model).path))
            config = AutoConfig.from_pretrained(**_from_pretrained_kwargs(settings.model))
            model_files.check_config(config)
    if settings.dropout is not None:
        if not (names := get_dropout_probabilities(config)):
            model = f"{settings.model} ({config.model_type})"
            raise UserError(f"--dropout {settings.dropout:g}: {model} has no dropout to set")
        for name in names:
            setattr(config, name, settings.dropout)
    return config


def get_dropout_probabilities(config: Any) -> dict[str, float]:
    """{field: probability} of the dropouts that a model's config has while it is trained as a language model."""
    return {name: float(getattr(config, name)) for name in DROPOUT_FIELDS if getattr(config, name, None) is not None}


def _from_pretrained_kwargs(model: str) -> dict[str, Any]:
    """Arguments that find a model; without a network the local copies are all there is, and nothing is waited for."""
    source = find_model(model)
    return {
        "pretrained_model_name_or_path": source.path,
        "revision": source.revision or "main",
        "local_files_only": Path(source.path).is_dir() or not hf_hub.is_reachable(),
        "trust_remote_code": False,  # left out, transformers asks on the terminal
    }


def _init_random(settings: ModelSettings, config: Any) -> PreTrainedModel:
    with _refuse_model(settings.model, "config.json"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def _load_pretrained(settings: ModelSettings, config: Any, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """The model with the stored weights, every one of them and no other; on the meta device only their shapes."""
    with _refuse_model(settings.model, model_files.WEIGHTS_FILE):
        model_files.check_weight_files(Path(find_model(settings.model).path))
        causal, loading_info = AutoModelForCausalLM.from_pretrained(
            **_from_pretrained_kwargs(settings.model),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
        model_files.check_loading_info(loading_info)
        if causal.device.type != "meta":
            model_files.check_causal(causal)
        return causal


@contextlib.contextmanager
def _refuse_model(model: str, file: str) -> Iterator[None]:
    """Any error within, which reads `file`, becomes one line about --model: libraries raise many kinds."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--model {model}: {error}") from None
    except Exception as error:
        source, folder = find_model(model), Path(find_model(model).path)
        problem = f"{file} cannot be used: {model_files.reason(error)}"
        if isinstance(error, OSError) and not (folder / file).exists():
            problem = f"has no {file}"
            if not folder.is_dir():
                unreachable = f"the Hub cannot be reached; run `hf download {source.path}` where it can"
                problem = f"no such folder, and {f'the Hub gives no {file}' if hf_hub.is_reachable() else unreachable}"
            problem += "; pass --model FOLDER with config.json and safetensors (pickles are not read)"
            problem += f", or --model {DEMO_MODEL}, the embedded toy"
        if source.adapter:
            problem = f"its base {source.name}, which its adapter_config.json names: {problem}"
        raise UserError(f"--model {model}: {problem}") from error


def get_max_positions(config: Any) -> int | None:
    """The longest row the model takes, None where it has no limit."""
    return getattr(config, "n_positions", None) or getattr(config, "max_position_embeddings", None)


def compute_fingerprint(causal: nn.Module) -> str:
    """A hash of every weight as it stands, 16 hex digits: whether two runs start from the same base."""
    digest = hashlib.sha256()
    for name, parameter in sorted(causal.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().float().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
