"""The model card of an exported folder, in the Hub's form; its text is in model_card.md."""

import contextlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.config import reference
from trainer.config.choices import DEMO_DATA, scorer_file
from trainer.config.errors import escape_controls
from trainer.config.files import split_weights
from trainer.config.settings import LoraSettings
from trainer.config.text import escape_markdown
from trainer.data.hf_hub import find_model_folder
from trainer.data.tokenizer import find_model
from trainer.export.folder import is_hub_id, public_name
from trainer.export.verify import VerificationResult
from trainer.tracking.eval_records import score_name
from trainer.tracking.records import EpochRecord, EvalRecord, EventRecord, Record, is_number, perplexity
from trainer.training.schedule import describe_schedule


def render_model_card(
    metadata: Mapping[str, Any],
    records: Iterable[Record],
    verification: VerificationResult,
    *,
    step: int,
    is_merged: bool = False,
    answer: str = "",
    license: str | None = None,
) -> str:
    """The card's Markdown; names and texts of the run are data, none of it markup. `metadata`: the content of run.json,
    with the settings and the data of these weights; `step`: the one after which they stood; `answer`: the sentence of a
    comparison of LoRA with full; `license`: of the base."""
    from huggingface_hub import ModelCard, ModelCardData

    model, data, train = metadata["model"], metadata["data"], metadata["settings"]["train"]
    lora = metadata["settings"]["lora"]
    records = [record for record in records if record.step <= step or isinstance(record, EventRecord)]
    resolved = metadata["resolved"]  # and by what a resume before this step went on
    for record in records:
        if isinstance(record, EventRecord) and record.event == "resumed" and record.step < step:
            changed = record.facts.get("resolved")
            resolved = resolved | changed if isinstance(changed, dict) else resolved
    evals = {r.step: r for r in records if isinstance(r, EvalRecord)}  # of one step evaluated twice the later
    base_name = model.get("base", model["name"])
    base_model = base_name if model["init"] == "pretrained" and is_hub_id(base_name) else None
    losses = {} if (loss := verification.loss) is None else {"loss": loss, "perplexity": perplexity(loss)}
    tests = [r.facts for r in records if isinstance(r, EventRecord) and r.event == "test_scores" and r.step == step]
    scores = {}
    for scorer in metadata["settings"]["output"]["score"] if tests else ():
        if is_number(score := tests[-1]["scores"].get(score_name(scorer))):
            scores[public_name(scorer) if scorer_file(scorer) else scorer] = score
    datasets = [part.partition(":")[0] for part, _ in split_weights(data["source"])]
    not_comparable = ""
    if reference.is_asked_for(metadata["preset"], metadata["not_comparable_with_card"]):
        not_comparable = "; ".join(metadata["not_comparable_with_card"])
        for name in (data["source"], model["name"]):
            not_comparable = not_comparable.replace(name, public_name(name))
    card = ModelCard.from_template(
        ModelCardData(),
        template_path=str(Path(__file__).with_suffix(".md")),
        **{**metadata, "resolved": resolved},
        evals=[evals[number] for number in sorted(evals)],
        train_losses={record.step: record.train_loss for record in records if isinstance(record, EpochRecord)},
        events=[record for record in records if record.kind == "event"],
        lr_shape=describe_schedule(train["schedule"], min_lr=train["min_lr"], warmup_steps=resolved["warmup_steps"]),
        license=license,
        datasets=[d for d in datasets if is_hub_id(d) and not Path(d).suffix and d != DEMO_DATA],
        results={"validation": losses, "test": scores},
        verification=verification,
        step=step,
        is_adapter=metadata["mode"] == "lora" and not is_merged,
        adapter_kind=LoraSettings(**{key: lora[key] for key in ("adapter", "peft_config") if key in lora}).kind,
        base_model=base_model,
        not_comparable=not_comparable,
        reference=reference,
        answer=answer,
        perplexity=perplexity,
        public_name=public_name,
        printable=escape_controls,
        plain=lambda text: escape_markdown(escape_controls(text)),
        code=_code,
    )
    return f"{card}\n"


def read_license(model: str) -> str | None:
    """The license that the card of a model's base names, where it lies beside the weights."""
    from huggingface_hub import ModelCard

    source, license = find_model(model), None
    with contextlib.suppress(Exception):  # anybody's text
        license = ModelCard.load(find_model_folder(source.path, source.revision) / "README.md").data.license
    return license if re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,40}", str(license)) and license else None


def _code(text: str) -> str:
    """Text as a code span, in a fence longer than any run of backticks in it."""
    text = escape_controls(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in (text[:1], text[-1:]) else f"{fence}{text}{fence}"
