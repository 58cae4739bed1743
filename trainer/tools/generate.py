"""`launch/generate.py`: what the base and the runs on it make of the same prompts, side by side."""

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.config.errors import UserError
from trainer.config.run_metadata import read_run_metadata
from trainer.config.settings import LoraSettings, Settings
from trainer.data.chat import ChatTemplate, Conversation, end_token_ids
from trainer.data.prepare import prepare
from trainer.data.readers import RecordError, require_valid_unicode
from trainer.data.tokenizer import encode, find_model, load_tokenizer
from trainer.distributed.decoding import decode
from trainer.export.export_cli import load_model_at_checkpoint, trained_settings
from trainer.model.build import TrainableModel, build_model, get_max_positions, load_config
from trainer.tracking.console import show_lines
from trainer.training.checkpoint import resolve_checkpoint
from trainer.training.generation import EvalPrompt, completion_length, make_prompts
from trainer.training.scorers import ScorerError, check_references, check_scorers, score_texts

BATCH_SIZE = 16  # prompts in one batch
DEFAULT_NUM_PROMPTS = 4


def generate(args: argparse.Namespace) -> int:
    """Complete the prompts by each model and show the texts. `args`: the flags of launch/generate.py. UserError."""
    check_scorers(args.score)
    all_metadata = [read_run_metadata(folder / "run.json") for folder in args.runs]
    names = [metadata["name"] for metadata in all_metadata]
    loaders: dict[str, Callable[[], TrainableModel]] = {}  # each base once, before the first run on it
    fingerprints = set()
    for folder, metadata, name in zip(args.runs, all_metadata, names, strict=True):
        data, base, settings = metadata["data"], metadata["model"], Settings(**metadata["settings"])
        if any(data.get(key) != all_metadata[0]["data"].get(key) for key in ("tokenizer", "chat_template")):
            raise UserError(
                f"{folder}: has another tokenizer or chat template than {args.runs[0]}; expected runs with the same"
            )
        if base["fingerprint"] not in fingerprints:
            fingerprints.add(base["fingerprint"])
            label = f"base ({base['name'].rstrip('/').rsplit('/', 1)[-1]})"
            loaders[label] = partial(_load_base, folder, settings, base["fingerprint"])
        checkpoint = resolve_checkpoint(folder / "checkpoints", args.checkpoint, flag="--checkpoint")
        settings = trained_settings(metadata, checkpoint)
        label = name if names.count(name) == 1 else str(folder)
        loaders[label] = partial(load_model_at_checkpoint, folder, settings, checkpoint, metadata)
    settings, template = Settings(**all_metadata[0]["settings"]), all_metadata[0]["data"].get("chat_template")
    tokenizer, max_positions = load_tokenizer(settings.model.model), get_max_positions(load_config(settings.model))
    chat = None if template is None else ChatTemplate(tokenizer, template)
    prompts = [make_prompt(text, tokenizer, chat, max_positions) for text in args.prompt]
    if not args.prompt:
        data = prepare(settings.data, model=settings.model.model, global_batch=settings.train.global_batch)
        prompts = make_prompts(data, tokenizer, max_positions)[: args.num or DEFAULT_NUM_PROMPTS]
        if not prompts:
            raise UserError(f"{args.runs[0]}: no validation record fits the model; pass --prompt TEXT")
    pairs = [(i, reference) for i, prompt in enumerate(prompts) for reference in prompt.references]
    check_references(args.score, [text for _, text in pairs], "prompt")
    length, ends = args.max_new_tokens, end_token_ids(tokenizer, template)
    if length is None:
        length = completion_length(prompts, None) if pairs else 64
    if max_positions is not None:
        length = max(1, min(length, max_positions - max(len(prompt.ids) for prompt in prompts)))
    texts: dict[str, list[str]] = {}
    for label, load in loaders.items():
        causal, texts[label] = load().causal, []
        for start in range(0, len(prompts), BATCH_SIZE):
            batch = [prompt.ids for prompt in prompts[start : start + BATCH_SIZE]]
            for completion in decode(causal, batch, length, ends):
                texts[label].append(tokenizer.decode(completion.ids, skip_special_tokens=True))
    for i, prompt in enumerate(prompts):
        lines = [("prompt", prompt.text)]
        for number, reference in enumerate(prompt.references, start=1):
            lines.append(("reference" if len(prompt.references) == 1 else f"reference {number}", reference))
        show_lines([*lines, *((label, completions[i]) for label, completions in texts.items())])
        print(flush=True)
    for label, completions in texts.items():
        for name in args.score:
            best: dict[int, float] = {}  # of each prompt, over its references
            try:
                scores = score_texts(name, [completions[i] for i, _ in pairs], [text for _, text in pairs])
            except ScorerError as error:
                raise UserError(f"--score {name}: it {error}") from None
            for (i, _), score in zip(pairs, scores, strict=True):
                if score is not None:
                    best[i] = max(score, best.get(i, 0.0))
            print(f"{label}: {name} {sum(best.values()) / len(best):.3g} over {len(best)} prompts", flush=True)
    return 0


def _load_base(run_folder: Path, run_settings: Settings, fingerprint: str) -> TrainableModel:
    model_settings = dataclasses.replace(run_settings.model, quant=None, quant_double=False)
    settings = dataclasses.replace(run_settings, model=model_settings)
    if find_model(model_settings.model).adapter is None:  # else the base is the adapter as it was
        settings = dataclasses.replace(settings, mode="full", lora=LoraSettings())
    model = build_model(settings)
    if model.metadata["fingerprint"] != fingerprint:
        raise UserError(f"{run_folder}: its base model has changed since; restore it")
    model.causal.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return model


def make_prompt(text: str, tokenizer: Any, chat: ChatTemplate | None, max_positions: int | None) -> EvalPrompt:
    """`text`: the only message, where the runs were trained on conversations."""
    prompt = chat.prompt_text(Conversation(messages=[{"role": "user", "content": text}])) if chat else text
    try:
        require_valid_unicode(prompt, "text")
    except RecordError as error:
        raise UserError(f"--prompt: {error}") from error
    (ids,) = encode(tokenizer, [prompt])
    most = len(ids) + 1 if max_positions is None else max_positions - 1
    if not 1 <= len(ids) <= most:
        raise UserError(f"--prompt: {len(ids)} tokens; expected from 1 to {most}")
    return EvalPrompt(text=text, ids=tuple(ids.tolist()), references=(), reference_length=0)
