"""A few fixed validation prompts, completed greedily at every evaluation: what the numbers look like as text."""

import time
from dataclasses import dataclass
from typing import Any

from trainer.config.errors import UserError
from trainer.config.schema import Settings
from trainer.data.dataset import Prepared
from trainer.data.tokenizer import encode, load_tokenizer
from trainer.distributed.engine import Engine
from trainer.model.build import positions
from trainer.tracking.records import EvalRecord, EventRecord
from trainer.training.text_metrics import acled_scores, text_scores

LONGEST = 128  # tokens of a completion
BEYOND = 8  # tokens that a completion may be longer than the longest reference
OPENING = 32  # tokens of a text without a prompt that serve as one, at most half of it
LEAST = 8  # tokens that must be left for a completion


@dataclass(frozen=True)
class Prompt:
    """A prompt, its token ids, and the text that the data have after it."""

    text: str
    ids: tuple[int, ...]
    reference: str
    length: int  #: of the reference, tokens


def make_prompts(data: Prepared, tokenizer: Any, room: int | None) -> list[Prompt]:
    """The kept validation texts as prompts; those that leave no room (`room`: the model's positions) are left out."""
    found = []
    befores = encode(tokenizer, [prompt for prompt, _ in data.val_texts])
    afters = encode(tokenizer, [completion for _, completion in data.val_texts])
    for (prompt, reference), before, after in zip(data.val_texts, befores, afters, strict=True):
        ids, rest = [int(i) for i in before], [int(i) for i in after]
        if not ids:
            cut = min(OPENING, len(rest) // 2)
            ids, rest = rest[:cut], rest[cut:]
            prompt, reference = tokenizer.decode(ids), tokenizer.decode(rest)
        if ids and rest and (room is None or len(ids) + LEAST <= room):
            found.append(Prompt(prompt, tuple(ids), reference, len(rest)))
    return found


class Sampler:
    """Completes prompts and, with --metrics, scores them. `seconds`: what that took so far, beside the training."""

    def __init__(self, engine: Engine, data: Prepared, settings: Settings):
        self.engine, self.settings, self.seconds = engine, settings, 0.0
        self.acled = data.facts["form"] == "acled"
        self.prompts: list[Prompt] = []
        self.why_not = ""  #: why none are made although they were asked for
        if not wanted(settings) or data.facts["tokenizer"] is None:
            return
        self.tokenizer = load_tokenizer(settings.model.model)
        room = positions(engine.model.causal.config)
        prompts = make_prompts(data, self.tokenizer, room)
        self.prompts = prompts if settings.output.metrics else prompts[: settings.output.samples]
        if self.prompts and not engine.can_be_whole():
            self.prompts, self.why_not = [], "the whole model does not fit on one rank beside its share of ZeRO-3"
        self.most = min(LONGEST, BEYOND + max((prompt.length for prompt in self.prompts), default=0))
        if room is not None and self.prompts:
            self.most = min(self.most, room - max(len(prompt.ids) for prompt in self.prompts))

    def take(self, record: EvalRecord) -> EventRecord | None:
        """The samples of the weights that were just evaluated; all ranks must call, rank 0 gets the event."""
        if not self.prompts:
            return None
        began = time.perf_counter()
        ids = self.engine.complete([prompt.ids for prompt in self.prompts], self.most, self.tokenizer.eos_token_id)
        if ids is None:
            return None
        texts = [self.tokenizer.decode(one, skip_special_tokens=True) for one in ids]
        scores = self._scores(texts) if self.settings.output.metrics else {}
        spent = time.perf_counter() - began
        self.seconds += spent
        shown = [
            {"prompt": prompt.text, "reference": prompt.reference, "completion": text}
            for prompt, text in list(zip(self.prompts, texts, strict=True))[: self.settings.output.samples]
        ]
        facts = {
            "epoch": record.epoch, "samples": record.samples, "tokens": record.tokens, "seconds": spent,
            "texts": shown, **({"scored": len(texts), "scores": scores} if scores else {}),
        }  # fmt: skip
        told = ", ".join(f"{name} {value:.3g}" for name, value in scores.items() if "/" not in name)
        message = f"{len(texts)} completions after step {record.step}: {told}" if scores else ""
        return EventRecord(event="samples", step=record.step, message=message, time=record.time + spent, facts=facts)

    def _scores(self, texts: list[str]) -> dict[str, float]:
        references = [prompt.reference for prompt in self.prompts]
        scores = text_scores(texts, references)
        if self.acled:
            prompts = [prompt.text for prompt in self.prompts]
            scores |= acled_scores(texts, prompts)
            scores |= {f"reference/{name}": share for name, share in acled_scores(references, prompts).items()}
        return scores


def wanted(settings: Settings) -> bool:
    """Whether anything is to be completed."""
    return bool(settings.output.samples or settings.output.metrics)


def check_data(settings: Settings, data: Prepared) -> None:
    """UserError where --metrics has nothing to compare: texts without prompts, or token ids."""
    if settings.output.metrics and not any(prompt for prompt, _ in data.val_texts):
        raise UserError(
            f"--metrics: {settings.data.data} has no prompts to complete; pass --prompt and --completion, or leave "
            "--metrics out"
        )
