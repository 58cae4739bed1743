"""The model card of an exported folder, in the Hub's form."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.config import reference
from trainer.config.errors import escape_controls
from trainer.config.text import escape_markdown
from trainer.export.folder import is_hub_id, public_name
from trainer.export.verify import QUANTIZATION_FILE, VerificationResult
from trainer.tracking.records import EpochRecord, EvalRecord, EventRecord, Record, perplexity
from trainer.training.lr_schedule import describe_schedule

TEMPLATE = Path(__file__).with_suffix(".md")
PACKAGES = ("torch", "transformers", "deepspeed", "peft")
ADAPTER_NAMES = {"lora": "LoRA", "dora": "DoRA", "rslora": "rank-stabilised LoRA", "pissa": "PiSSA"}
OPTIMIZER_NAMES = {
    "adamw_fused": "AdamW",
    "adamw": "AdamW",
    "adamw8bit": "AdamW with moments in 8 bits",
    "paged_adamw8bit": "paged AdamW with moments in 8 bits",
}


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
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    model, data = metadata["model"], metadata["data"]
    all_records = list(records)
    events = [record for record in all_records if isinstance(record, EventRecord)]
    measured = next((event.facts for event in reversed(events) if event.event == "finished"), {})
    is_adapter = metadata["mode"] == "lora" and not is_merged
    source = public_name(data["source"])
    metrics = {"loss": "validation loss", "perplexity": "perplexity"}
    values = {} if (loss := verification.loss) is None else {"loss": loss, "perplexity": perplexity(loss)}
    base = {}
    if model["init"] == "pretrained" and is_hub_id(model["name"]):
        base = {"base_model": model["name"], "base_model_relation": "adapter" if is_adapter else "finetune"}
    card_data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[
            re.sub(r"(LMHeadModel|ForCausalLM)$", "", model["class"]).lower(),
            metadata["mode"],
            "deepspeed",
            *(["lora-merged"] if is_merged else []),
        ],
        model_name=escape_controls(metadata["name"]),
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=source,
                dataset_name=source,
                dataset_split="validation",
                metric_type=metric,
                metric_name=metrics[metric],
                metric_value=value,
            )
            for metric, value in values.items()
        ],
        **base,
    )
    reasons = "; ".join(metadata["not_comparable_with_card"])
    for name in (data["source"], model["name"]):
        reasons = reasons.replace(name, public_name(name))
    is_asked_for = reference.is_asked_for(metadata["preset"], metadata["not_comparable_with_card"])
    tying = "" if verification.is_tied is None else " Input and output embeddings are two tensors"
    if verification.is_tied:
        tying = " Input and output embeddings are one tensor, stored once"
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=_plain(metadata["name"]),
        description=_describe_model(metadata, step, is_merged) + (f" {choice_reason}" if choice_reason else ""),
        verification=_plain(verification.summary()) + loss_change,
        tying=tying and f"{tying}{' after the adapters were folded in' * is_merged}.",
        hyperparameters=list(_list_hyperparameters(metadata, measurements or measured)),
        results=_list_results([record for record in all_records if record.step <= step]),
        early_stop="".join(f" The run {_plain(e.message)}." for e in events if e.event == "early_stop"),
        reference=reference.NAME,
        reference_losses=", ".join(f"{row.val_loss}" for row in reference.CURVE),
        not_comparable=_plain(reasons) if is_asked_for else "",
        answer=_plain(answer),
        diagnoses=[(f"{e.step:,}", _plain(e.message)) for e in events if e.event == "diagnosis"],
        versions=[(name, _plain(version)) for name in PACKAGES if (version := metadata["versions"].get(name))],
    )
    return f"{card}\n"


def _plain(text: str) -> str:
    """Text as Markdown shows it unchanged."""
    return escape_markdown(escape_controls(text))


def _code(text: str) -> str:
    """Text as a code span, in a fence longer than any run of backticks in it."""
    text = escape_controls(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def _describe_model(metadata: Mapping[str, Any], step: int, is_merged: bool) -> str:
    model, lora = metadata["model"], metadata["settings"]["lora"]
    method = "every weight"
    if metadata["mode"] == "lora":
        modules = lora.get("modules_to_save")
        method = (
            f"{ADAPTER_NAMES[lora.get('adapter', 'lora')]} adapters, rank {lora['rank']}, alpha {lora['alpha']:g}, "
            f"on {_plain(', '.join(model['lora_targets']))}"
            + (f", and the base's own {', '.join(modules)}" if modules else "")
        )
    text = (
        f"{_code(public_name(model['name']))}{'' if model['init'] == 'pretrained' else ', from random weights,'} "
        f"fine-tuned on {_code(public_name(metadata['data']['source']))} ({method}: {model['trainable']:,} of "
        f"{model['parameters']:,} parameters, {100 * model['share']:.2f}%), after step {step:,} of "
        f"{metadata['resolved']['total_steps']:,}."
    )
    if is_merged:
        return f"{text} The adapters are folded into the weights: this is a plain model."
    return text + _describe_base(metadata) if metadata["mode"] == "lora" else text


def _describe_base(metadata: Mapping[str, Any]) -> str:
    name, settings = metadata["model"]["name"], metadata["settings"]
    is_random = metadata["model"]["init"] == "random"
    base = json.dumps(name) if is_hub_id(name) and not is_random else "BASE"
    text = f" Load it with {_code(f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), ADAPTER)')}"
    text += ", `ADAPTER` being this folder" + (", `BASE` its base's." if base == "BASE" else ".")
    if is_random:
        text += " Its base is random weights, kept only in the folder `base` of the run; it is nothing without them."
    if quant := settings["model"].get("quant"):
        double = ", its scales in 8 bits" if settings["model"]["quant_double"] else ""
        text += (
            f" It was trained on the base in {quant}{double} (weights before that: fingerprint "
            f"{_code(metadata['model']['fingerprint'])}); `{QUANTIZATION_FILE}` holds the arguments of "
            "transformers' `BitsAndBytesConfig` that pack it again. On the float32 base it answers otherwise."
        )
    if settings["lora"].get("adapter") == "pissa":
        text += " PiSSA's start is taken off again: this is an ordinary LoRA adapter of twice the rank."
    return text


def _list_hyperparameters(metadata: Mapping[str, Any], measurements: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    settings, resolved, data = metadata["settings"], metadata["resolved"], metadata["data"]
    train, model = settings["train"], settings["model"]
    lr_shape = describe_schedule(train["schedule"], min_lr=train["min_lr"], warmup_steps=resolved["warmup_steps"])
    yield "learning rate", f"{train['lr']:g}, {lr_shape}"
    yield (
        "optimizer",
        f"{OPTIMIZER_NAMES[train.get('optim', 'adamw_fused')]}, betas ({train['beta1']}, {train['beta2']}), "
        f"epsilon {train['epsilon']:g}, weight decay {train['weight_decay']:g}",
    )
    for name, key in (("optimizer state", "optimizer_bytes"), ("peak memory", "peak_memory_bytes")):
        if key in measurements:
            yield name, f"{measurements[key]:,} bytes on a rank"
    if settings["mode"] == "lora" and settings["lora"].get("plus_ratio", 1) != 1:
        yield "LoRA+", f"B matrices at {settings['lora']['plus_ratio']:g} times the learning rate"
    if model.get("quant"):
        yield "base", model["quant"] + (", double" if model["quant_double"] else "")
    if settings["engine"].get("activation_checkpointing"):
        yield "activations", "computed again in backward"
    yield "gradient clipping", f"{train['max_grad_norm']:g}" if train["max_grad_norm"] else "off"
    yield (
        "batch",
        f"{resolved['micro_batch']} micro-batch x {resolved['accumulation']} accumulation x {resolved['ranks']} "
        f"rank{'s' * (resolved['ranks'] > 1)} = {resolved['global_batch']} examples a step",
    )
    epochs = resolved["total_steps"] / resolved["steps_per_epoch"]
    yield "epochs", f"{epochs:.4g} ({resolved['total_steps']:,} steps, {resolved['steps_per_epoch']:,} an epoch)"
    yield "seed", f"{train['seed']}"
    yield "dropout", f"{resolved['dropout']:g}"
    yield "precision", resolved["precision"]
    yield "ZeRO file", _plain(resolved["ds_config"])
    counts = f"{data['train']['examples']:,} for training, {data['val']['examples']:,} for validation"
    yield "rows", f"{settings['data']['objective']} of at most {settings['data']['block_size']} tokens, {counts}"
    yield "data fingerprint", _plain(data["fingerprint"][:16])


def _list_results(records: list[Record]) -> list[tuple[str, ...]]:
    """A row for each evaluation, with the train loss where an epoch ended; of one step evaluated twice the later."""
    train_losses = {r.step: f"{r.train_loss:.4f}" for r in records if isinstance(r, EpochRecord)}
    evals = {r.step: r for r in records if isinstance(r, EvalRecord)}
    return [
        (f"{r.epoch:.4g}", f"{step:,}", train_losses.get(step, ""), f"{r.loss:.4f}", f"{perplexity(r.loss):.3f}")
        for step, r in sorted(evals.items())
    ]
