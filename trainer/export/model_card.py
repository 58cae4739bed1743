"""The model card of an exported folder, in the Hub's form."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from trainer.config import reference
from trainer.config.errors import escape_controls
from trainer.export.folder import is_hub_id, public_name
from trainer.export.verify import VerificationResult
from trainer.report.markdown import escape
from trainer.tracking.records import EpochRecord, EvalRecord, EventRecord, Record, perplexity
from trainer.training.lr_schedule import describe_schedule

PACKAGES = ("torch", "transformers", "deepspeed", "peft")


def render_model_card(
    metadata: Mapping[str, Any],
    records: Iterable[Record],
    verification: VerificationResult,
    *,
    step: int,
    is_merged: bool = False,
    loss_change: str = "",
    measurements: Mapping[str, Any] | None = None,
    choice_reason: str = "",
    answer: str = "",
) -> str:
    """The card's Markdown: what the model is, how the folder was checked, settings, training table, comparison.

    `metadata`: the content of run.json; `step`: the one after which these weights stood; `is_merged`: adapters folded
    in; `loss_change`: what the form of the export did to the loss; `measurements`: may hold `optimizer_bytes` and
    `peak_memory_bytes`, of the largest rank (left out: those of the run's end); `choice_reason`: why these weights and
    not the last; `answer`: the sentence of a comparison of LoRA with full.

    Names and texts of the run are data: whatever they hold, none of it is markup of the card.

    Parameters: what the card tells, each from another part of the run. Long: the card from top to bottom.
    """
    all_records = list(records)
    measured = next((event.facts for event in _events(all_records, "finished")[-1:]), {})
    lines = [
        *_front_matter(metadata, verification, is_merged),
        "",
        f"# {_plain(metadata['name'])}",
        "",
        _describe_model(metadata, step, is_merged) + (f" {choice_reason}" if choice_reason else ""),
        "",
        f"Exported weights: {_plain(verification.summary())}{loss_change}."
        + _describe_embedding_tying(verification, is_merged),
        "",
        "## Training procedure",
        "",
        "### Training hyperparameters",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _hyperparameters(metadata, measurements or measured)),
        "",
        "### Training results",
        "",
        "| epoch | step | train loss | validation loss | perplexity |",
        "|--:|--:|--:|--:|--:|",
        *_results_table([r for r in all_records if r.step <= step]),
        "",
        "Losses are nats per counted token; the train loss is the mean over the epoch while the weights moved."
        + _describe_early_stop(all_records),
        "",
        *_reference_section(metadata),
        *(["### LoRA against full fine-tuning", "", _plain(answer), ""] if answer else []),
        *_diagnostics_section(all_records),
        "### Framework versions",
        "",
        *(f"- {name} {_plain(metadata['versions'][name])}" for name in PACKAGES if metadata["versions"].get(name)),
        "",
    ]
    return "\n".join(lines)


def _front_matter(metadata: Mapping[str, Any], verification: VerificationResult, is_merged: bool) -> list[str]:
    """YAML between dashes, as the Hub reads it; every value is JSON, which YAML contains."""
    is_adapter = metadata["mode"] == "lora" and not is_merged
    front_matter: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
    }
    if metadata["model"]["init"] == "pretrained" and is_hub_id(metadata["model"]["name"]):
        front_matter["base_model"] = metadata["model"]["name"]
        front_matter["base_model_relation"] = "adapter" if is_adapter else "finetune"
    architecture = re.sub(r"(LMHeadModel|ForCausalLM)$", "", metadata["model"]["class"]).lower()
    merged_tags = ["lora-merged"] if is_merged else []
    front_matter["tags"] = [architecture, metadata["mode"], "deepspeed", *merged_tags]
    if verification.loss is not None:
        source, loss = public_name(metadata["data"]["source"]), verification.loss
        front_matter["model-index"] = [
            {
                "name": metadata["name"],
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": source, "type": source, "split": "validation"},
                        "metrics": [
                            {"type": "loss", "name": "validation loss", "value": loss},
                            {"type": "perplexity", "name": "perplexity", "value": perplexity(loss)},
                        ],
                    }
                ],
            }
        ]
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in front_matter.items()), "---"]


def _plain(text: str) -> str:
    """Text as Markdown shows it unchanged."""
    return escape(escape_controls(text))


def _code(text: str) -> str:
    """Text as a code span, in a fence longer than any run of backticks in it."""
    text = escape_controls(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def _describe_model(metadata: Mapping[str, Any], step: int, is_merged: bool) -> str:
    model, lora, total_steps = metadata["model"], metadata["settings"]["lora"], metadata["resolved"]["total_steps"]
    modules = lora.get("modules_to_save")
    modules_to_save = f", and the base's own {', '.join(modules)}" if modules else ""
    method = (
        "every weight"
        if metadata["mode"] == "full"
        else (
            f"{_ADAPTER_NAMES[lora.get('adapter', 'lora')]} adapters, rank {lora['rank']}, alpha {lora['alpha']:g}, "
            f"on {_plain(', '.join(model['lora_targets']))}{modules_to_save}"
        )
    )
    initialization = "" if model["init"] == "pretrained" else ", from random weights,"
    return (
        f"{_code(public_name(model['name']))}{initialization} fine-tuned on "
        f"{_code(public_name(metadata['data']['source']))} ({method}: {model['trainable']:,} of "
        f"{model['parameters']:,} parameters, {100 * model['share']:.2f}%), after step {step:,} of {total_steps:,}."
        + (" The adapters are folded into the weights: this is a plain model." if is_merged else "")
        + (_describe_base(metadata) if metadata["mode"] == "lora" and not is_merged else "")
    )


_ADAPTER_NAMES = {"lora": "LoRA", "dora": "DoRA", "rslora": "rank-stabilised LoRA", "pissa": "PiSSA"}


def _describe_embedding_tying(verification: VerificationResult, is_merged: bool) -> str:
    if verification.is_tied is None:
        return ""
    tensors = "one tensor, stored once" if verification.is_tied else "two tensors"
    return f" Input and output embeddings are {tensors}{' after the adapters were folded in' * is_merged}."


def _describe_base(metadata: Mapping[str, Any]) -> str:
    name, quant = metadata["model"]["name"], metadata["settings"]["model"].get("quant")
    is_random = metadata["model"]["init"] == "random"
    base = json.dumps(name) if is_hub_id(name) and not is_random else "BASE"
    text = f" Load it with {_code(f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), ADAPTER)')}"
    text += ", `ADAPTER` being this folder" + (", `BASE` its base's." if base == "BASE" else ".")
    if is_random:
        text += " Its base is random weights, kept only in the folder `base` of the run; it is nothing without them."
    if quant:
        double = ", its scales in 8 bits" if metadata["settings"]["model"]["quant_double"] else ""
        text += (
            f" It was trained on the base in {quant}{double} (weights before that: fingerprint "
            f"{_code(metadata['model']['fingerprint'])}); `base_quantization.json` holds the arguments of "
            "transformers' `BitsAndBytesConfig` that pack it again. On the float32 base it answers otherwise."
        )
    if metadata["settings"]["lora"].get("adapter") == "pissa":
        text += " PiSSA's start is taken off again: this is an ordinary LoRA adapter of twice the rank."
    return text


def _hyperparameters(metadata: Mapping[str, Any], measurements: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings, resolved, data = metadata["settings"], metadata["resolved"], metadata["data"]
    train = settings["train"]
    lr_shape = describe_schedule(train["schedule"], min_lr=train["min_lr"], warmup_steps=resolved["warmup_steps"])
    optimizer = (
        f"{_OPTIMIZER_NAMES[train.get('optim', 'adamw_fused')]}, betas ({train['beta1']}, {train['beta2']}), "
        f"epsilon {train['epsilon']:g}, weight decay {train['weight_decay']:g}"
    )
    batch = (
        f"{resolved['micro_batch']} micro-batch x {resolved['accumulation']} accumulation x {resolved['ranks']} "
        f"rank{'s' * (resolved['ranks'] > 1)}"
    )
    counts = f"{data['train']['examples']:,} for training, {data['val']['examples']:,} for validation"
    epochs = resolved["total_steps"] / resolved["steps_per_epoch"]
    return [
        ("learning rate", f"{train['lr']:g}, {lr_shape}"),
        ("optimizer", optimizer),
        *((name, f"{measurements[key]:,} bytes on a rank") for name, key in _MEASUREMENTS if key in measurements),
        *_optional_hyperparameters(settings),
        ("gradient clipping", f"{train['max_grad_norm']:g}" if train["max_grad_norm"] else "off"),
        ("batch", f"{batch} = {resolved['global_batch']} examples a step"),
        ("epochs", f"{epochs:.4g} ({resolved['total_steps']:,} steps, {resolved['steps_per_epoch']:,} an epoch)"),
        ("seed", f"{train['seed']}"),
        ("dropout", f"{resolved['dropout']:g}"),
        ("precision", resolved["precision"]),
        ("ZeRO file", _plain(resolved["ds_config"])),
        ("rows", f"{settings['data']['objective']} of at most {settings['data']['block_size']} tokens, {counts}"),
        ("data fingerprint", _plain(data["fingerprint"][:16])),
    ]


_MEASUREMENTS = (("optimizer state", "optimizer_bytes"), ("peak memory", "peak_memory_bytes"))
_OPTIMIZER_NAMES = {
    "adamw_fused": "AdamW",
    "adamw": "AdamW",
    "adamw8bit": "AdamW with moments in 8 bits",
    "paged_adamw8bit": "paged AdamW with moments in 8 bits",
}


def _optional_hyperparameters(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows that only some runs have."""
    rows = []
    if settings["mode"] == "lora" and settings["lora"].get("plus_ratio", 1) != 1:
        rows.append(("LoRA+", f"B matrices at {settings['lora']['plus_ratio']:g} times the learning rate"))
    if settings["model"].get("quant"):
        rows.append(("base", settings["model"]["quant"] + (", double" if settings["model"]["quant_double"] else "")))
    if settings["engine"].get("activation_checkpointing"):
        rows.append(("activations", "computed again in backward"))
    return rows


def _events(records: list[Record], event: str) -> list[EventRecord]:
    return [r for r in records if isinstance(r, EventRecord) and r.event == event]


def _describe_early_stop(records: list[Record]) -> str:
    return "".join(f" The run {_plain(event.message)}." for event in _events(records, "early_stop")[-1:])


def _diagnostics_section(records: list[Record]) -> list[str]:
    """What the run noticed of itself, over its whole length; nothing where all was well."""
    lines = [f"- step {event.step:,}: {_plain(event.message)}" for event in _events(records, "diagnosis")]
    return ["### Diagnosis", "", "What the run noticed of itself:", "", *lines, ""] if lines else []


def _reference_section(metadata: Mapping[str, Any]) -> list[str]:
    """Why the run cannot be held against the reference; nothing where nobody asked for that."""
    if not reference.is_asked_for(metadata["preset"], metadata["not_comparable_with_card"]):
        return []
    reasons = "; ".join(metadata["not_comparable_with_card"])
    for name in (metadata["data"]["source"], metadata["model"]["name"]):
        reasons = reasons.replace(name, public_name(name))
    losses = ", ".join(f"{row.val_loss}" for row in reference.CURVE)
    return [
        "### Compared with",
        "",
        f"The card `{reference.NAME}` (validation loss {losses} after its three epochs): not comparable, for these "
        f"reasons: {_plain(reasons)}.",
        "",
    ]


def _results_table(records: list[Record]) -> list[str]:
    """A line for each evaluation, with the train loss where an epoch ended; of one step evaluated twice the later."""
    train_losses = {r.step: f" {r.train_loss:.4f}" for r in records if isinstance(r, EpochRecord)}
    evals = {r.step: r for r in records if isinstance(r, EvalRecord)}
    return [
        f"| {r.epoch:.4g} | {step:,} |{train_losses.get(step, '')} | {r.loss:.4f} | {perplexity(r.loss):.3f} |"
        for step, r in sorted(evals.items())
    ]
