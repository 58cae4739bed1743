"""The model card of an exported folder, in the Hub's form."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.config import reference
from trainer.config.schema import DEMO_MODEL
from trainer.export.verify import Check
from trainer.tracking.records import EpochRecord, EvalRecord, EventRecord, Record, perplexity

PACKAGES = ("torch", "transformers", "deepspeed", "peft")


def card_text(
    run: Mapping[str, Any], records: Iterable[Record], check: Check, *, step: int, merged: bool = False,
    change: str = "", measured: Mapping[str, Any] | None = None, chosen: str = "",
) -> str:  # fmt: skip
    """The card's Markdown: what the model is, how the folder was checked, settings, training table, comparison.

    `run`: the content of run.json; `step`: the one after which these weights stood; `merged`: adapters folded in;
    `change`: what merging onto another base than the one trained on did to the loss; `measured`: may hold
    `optimizer_bytes` and `peak_memory_bytes`, of the largest rank; `chosen`: why these weights and not the last.
    """
    everything = list(records)
    rows = [r for r in everything if r.step <= step]
    lines = [
        *_front_matter(run, check, merged), "",
        f"# {run['name']}", "",
        _what(run, step, merged) + (f" {chosen}" if chosen else ""), "",
        f"Exported weights: {check.line()}{change}.{_ties(check, merged)}", "",
        "## Training procedure", "",
        "### Training hyperparameters", "",
        "| setting | value |", "|---|---|",
        *(f"| {name} | {value} |" for name, value in _settings(run, measured or {})), "",
        "### Training results", "",
        "| epoch | step | train loss | validation loss | perplexity |", "|--:|--:|--:|--:|--:|", *_table(rows), "",
        "Losses are nats per counted token; the train loss is the mean over the epoch while the weights moved."
        + _early(everything), "",
        "### Compared with", "",
        f"The card `{reference.NAME}` (validation loss {', '.join(f'{row.val_loss}' for row in reference.CURVE)} after "
        f"its three epochs): not comparable, for these reasons: {_reasons(run)}.", "",
        *_diagnosis(everything),
        "### Framework versions", "",
        *(f"- {name} {run['versions'][name]}" for name in PACKAGES if run["versions"].get(name)), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _front_matter(run: Mapping[str, Any], check: Check, merged: bool) -> list[str]:
    """YAML between dashes, as the Hub reads it; every value is JSON, which YAML contains."""
    adapter = run["mode"] == "lora" and not merged
    head: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if run["model"]["init"] == "pretrained" and is_hub_id(run["model"]["name"]):
        head["base_model"] = run["model"]["name"]
        head["base_model_relation"] = "adapter" if adapter else "finetune"
    head["tags"] = [_family(run["model"]["class"]), run["mode"], "deepspeed", *(["lora-merged"] if merged else [])]
    if check.loss is not None:
        metrics = [("loss", "validation loss", check.loss), ("perplexity", "perplexity", perplexity(check.loss))]
        source = short(run["data"]["source"])
        head["model-index"] = [{"name": run["name"], "results": [{
            "task": {"type": "text-generation"},
            "dataset": {"name": source, "type": source, "split": "validation"},
            "metrics": [{"type": kind, "name": name, "value": value} for kind, name, value in metrics],
        }]}]  # fmt: skip
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---"]


def _family(name: str) -> str:
    """The architecture by the name of its class: gpt2 of GPT2LMHeadModel."""
    return re.sub(r"(LMHeadModel|ForCausalLM)$", "", name).lower()


def is_hub_id(name: str) -> bool:
    """Whether a model's name is one of the Hub's: neither a folder here nor the embedded one."""
    if name == DEMO_MODEL or Path(name).exists():
        return False
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name, re.ASCII) is not None


def short(name: str) -> str:
    """A hub id as it is, a path by its last part: where files lay on the machine of the run is nobody's business."""
    return name if is_hub_id(name) else Path(name).name or name


def _what(run: Mapping[str, Any], step: int, merged: bool) -> str:
    model, lora, total = run["model"], run["settings"]["lora"], run["resolved"]["total_steps"]
    how = "every weight" if run["mode"] == "full" else (
        f"{_KINDS[lora.get('adapter', 'lora')]} adapters, rank {lora['rank']}, alpha {lora['alpha']:g}, "
        f"on {', '.join(model['lora_targets'])}{_also(lora)}"
    )  # fmt: skip
    start = "" if model["init"] == "pretrained" else ", from random weights,"
    return (
        f"`{short(model['name'])}`{start} fine-tuned on `{short(run['data']['source'])}` "
        f"({how}: {model['trainable']:,} of "
        f"{model['parameters']:,} parameters, {100 * model['share']:.2f}%), after step {step:,} of {total:,}."
        + (" The adapters are folded into the weights: this is a plain model." if merged else "")
        + (_where_base(run) if run["mode"] == "lora" and not merged else "")
    )


_KINDS = {"lora": "LoRA", "dora": "DoRA", "rslora": "rank-stabilised LoRA", "pissa": "PiSSA"}


def _also(lora: Mapping[str, Any]) -> str:
    return f", and the base's own {', '.join(lora['train_also'])}" if lora.get("train_also") else ""


def _ties(check: Check, merged: bool) -> str:
    if check.tied is None:
        return ""
    after = " after the adapters were folded in" if merged else ""
    return f" Input and output embeddings are {'one tensor, stored once' if check.tied else 'two tensors'}{after}."


def _where_base(run: Mapping[str, Any]) -> str:
    said, quant = "", run["settings"]["model"].get("quant")
    if run["model"]["init"] == "random":
        said = " Its base is random weights, kept only in the folder `base` of the run; it is nothing without them."
    if quant:
        double = ", its scales in 8 bits" if run["settings"]["model"]["quant_double"] else ""
        said += (
            f" It was trained on the base in {quant}{double} (weights before that: fingerprint "
            f"`{run['model']['fingerprint']}`); `base_quantization.json` holds the arguments of transformers' "
            "`BitsAndBytesConfig` that pack it again. On the float32 base it answers otherwise."
        )
    if run["settings"]["lora"].get("adapter") == "pissa":
        said += " PiSSA's start is taken off again: this is an ordinary LoRA adapter of twice the rank."
    return said


def _settings(run: Mapping[str, Any], measured: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings, resolved, data = run["settings"], run["resolved"], run["data"]
    train = settings["train"]
    betas = f"betas ({train['beta1']}, {train['beta2']})"
    batch = (
        f"{resolved['micro_batch']} micro-batch x {resolved['accumulation']} accumulation x {resolved['ranks']} "
        f"rank{'s' * (resolved['ranks'] > 1)}"
    )
    counts = f"{data['train']['examples']:,} for training, {data['val']['examples']:,} for validation"
    epochs = resolved["total_steps"] / resolved["steps_per_epoch"]
    return [
        ("learning rate", f"{train['lr']:g}, linear to 0, {train['warmup_steps']} warm-up steps"),
        (
            "optimizer",
            f"{_OPTIMS[train.get('optim', 'adamw_fused')]}, {betas}, epsilon {train['epsilon']:g}, "
            f"weight decay {train['weight_decay']:g}",
        ),
        *((name, f"{measured[key]:,} bytes on a rank") for key, name in _MEASURED.items() if key in measured),
        *_adapter_settings(settings),
        ("gradient clipping", f"{train['clip']:g}" if train["clip"] else "off"),
        ("batch", f"{batch} = {resolved['global_batch']} examples a step"),
        ("epochs", f"{epochs:.4g} ({resolved['total_steps']:,} steps, {resolved['steps_per_epoch']:,} an epoch)"),
        ("seed", f"{train['seed']}"),
        ("dropout", f"{resolved['dropout']:g}"),
        ("precision", resolved["precision"]),
        ("ZeRO file", resolved["ds_config"]),
        ("rows", f"{settings['data']['objective']} of at most {settings['data']['block_size']} tokens, {counts}"),
        ("data fingerprint", f"`{data['fingerprint'][:16]}`"),
    ]


_MEASURED = {"optimizer_bytes": "optimizer state", "peak_memory_bytes": "peak memory"}
_OPTIMS = {
    "adamw_fused": "AdamW", "adamw": "AdamW", "adamw8bit": "AdamW with moments in 8 bits",
    "paged_adamw8bit": "paged AdamW with moments in 8 bits",
}  # fmt: skip


def _adapter_settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows that only some runs have."""
    rows = []
    if settings["mode"] == "lora" and settings["lora"].get("plus_ratio", 1) != 1:
        rows.append(("LoRA+", f"B matrices at {settings['lora']['plus_ratio']:g} times the learning rate"))
    if settings["model"].get("quant"):
        rows.append(("base", settings["model"]["quant"] + (", double" if settings["model"]["quant_double"] else "")))
    if settings["engine"].get("checkpoint_activations"):
        rows.append(("activations", "computed again in backward"))
    return rows


def _early(records: list[Record]) -> str:
    stops = [r for r in records if isinstance(r, EventRecord) and r.event == "early_stop"]
    return f" The run {stops[-1].message}." if stops else ""


def _diagnosis(records: list[Record]) -> list[str]:
    """What the run noticed of itself, over its whole length; nothing where all was well."""
    said = [r for r in records if isinstance(r, EventRecord) and r.event == "diagnosis"]
    if not said:
        return []
    return ["### Diagnosis", "", "What the run noticed of itself:", "",
            *(f"- step {event.step:,}: {event.message}" for event in said), ""]  # fmt: skip


def _reasons(run: Mapping[str, Any]) -> str:
    reasons = "; ".join(run["not_comparable_with_card"])
    for name in (run["data"]["source"], run["model"]["name"]):
        reasons = reasons.replace(name, short(name))
    return reasons


def _table(records: list[Record]) -> list[str]:
    """A line for each evaluation, with the train loss where an epoch ended; of one step evaluated twice the later."""
    means = {r.step: f" {r.train_loss:.4f}" for r in records if isinstance(r, EpochRecord)}
    evals = {r.step: r for r in records if isinstance(r, EvalRecord)}
    return [
        f"| {r.epoch:.4g} | {step:,} |{means.get(step, '')} | {r.loss:.4f} | {perplexity(r.loss):.3f} |"
        for step, r in sorted(evals.items())
    ]
