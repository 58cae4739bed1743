"""Fixed validation prompts, completed greedily at every evaluation, and how like their references the texts are."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import zip_longest
from typing import Any

from trainer.config.errors import UserError
from trainer.config.settings import Settings
from trainer.data.chat import end_token_ids
from trainer.data.dataset import PreparedDataset
from trainer.data.tokenizer import encode, load_tokenizer
from trainer.distributed.engine import Engine
from trainer.model.build import get_max_positions
from trainer.tracking.records import EvalRecord, EventRecord, Record

MAX_COMPLETION_TOKENS = 128  # tokens of a completion
EXTRA_COMPLETION_TOKENS = 8  # tokens that a completion may be longer than the longest reference
MAX_OPENING_TOKENS = 32  # tokens of a text without a prompt that serve as one, at most half of it
MIN_COMPLETION_TOKENS = 8  # tokens that must be left for a completion


@dataclass(frozen=True, kw_only=True)
class EvalPrompt:
    """A prompt, its token ids, and the texts that the data have after it."""

    text: str
    ids: tuple[int, ...]
    references: tuple[str, ...] = ()  #: none for a prompt that a user typed
    reference_length: int = 0  #: of the longest reference, tokens


def make_prompts(data: PreparedDataset, tokenizer: Any, max_positions: int | None) -> list[EvalPrompt]:
    """The kept validation texts as prompts, records of one prompt together; those that leave no room
    (`max_positions`: the model's positions) are left out."""
    prompts: dict[str | int, EvalPrompt] = {}
    all_ids = encode(tokenizer, [text for pair in data.val_texts for text in pair])
    for number, (prompt, reference) in enumerate(data.val_texts):
        key = prompt or number  # texts without a prompt share nothing
        ids, reference_ids = ([int(i) for i in encoded] for encoded in all_ids[2 * number : 2 * number + 2])
        if not ids:
            num_opening_tokens = min(MAX_OPENING_TOKENS, len(reference_ids) // 2)
            ids, reference_ids = reference_ids[:num_opening_tokens], reference_ids[num_opening_tokens:]
            prompt, reference = tokenizer.decode(ids), tokenizer.decode(reference_ids)
        if ids and reference_ids and (max_positions is None or len(ids) + MIN_COMPLETION_TOKENS <= max_positions):
            known = prompts.get(key, EvalPrompt(text=prompt, ids=tuple(ids)))
            length = max(len(reference_ids), known.reference_length)
            prompts[key] = replace(known, references=(*known.references, reference), reference_length=length)
    return list(prompts.values())


def completion_length(prompts: Sequence[EvalPrompt], max_positions: int | None) -> int:
    """Tokens to generate: some more than the longest reference, as many as fit behind the longest prompt."""
    longest_reference = max((prompt.reference_length for prompt in prompts), default=0)
    length = min(MAX_COMPLETION_TOKENS, EXTRA_COMPLETION_TOKENS + longest_reference)
    if max_positions is None or not prompts:
        return length
    return min(length, max_positions - max(len(prompt.ids) for prompt in prompts))


class GenerationEvaluator:
    """Completes prompts and, with --score-samples, scores them."""

    def __init__(self, engine: Engine, data: PreparedDataset, settings: Settings):
        self.engine, self.settings = engine, settings
        self.elapsed_seconds = 0.0  #: what the samples of the whole run took so far
        self.base_completions: list[str] = []  #: of the model before the first step, where they are known
        self.prompts: list[EvalPrompt] = []
        self.disabled_reason = ""  #: why none are made although they were asked for
        output = settings.output
        if not (output.num_samples or output.score_samples) or data.metadata["tokenizer"] is None:
            return
        self.tokenizer = load_tokenizer(settings.model.model)
        self.end_token_ids = end_token_ids(self.tokenizer, data.metadata.get("chat_template"))
        max_positions = get_max_positions(engine.model.causal.config)
        prompts = make_prompts(data, self.tokenizer, max_positions)
        self.prompts = prompts if output.score_samples else prompts[: output.num_samples]
        if self.prompts and not engine.state.fits_unsharded():
            self.prompts = []
            self.disabled_reason = "the whole model does not fit on one rank beside its share of ZeRO-3"
        self.max_new_tokens = completion_length(self.prompts, max_positions)

    def replay(self, records: Iterable[Record]) -> Iterator[Record]:
        """The same rows, which an earlier process left; of its samples the time and the base's texts are taken over."""
        for record in records:
            if isinstance(record, EventRecord) and record.event == "samples":
                with contextlib.suppress(KeyError, TypeError):  # facts that somebody edited
                    self.elapsed_seconds += record.facts["seconds"]
                    texts = record.facts["texts"]
                    is_of_these = all(t["prompt"] == p.text for t, p in zip(texts, self.prompts, strict=False))
                    if record.step == 0 and is_of_these:  # a resume may be allowed other data
                        self.base_completions = [text["completion"] for text in texts]
            yield record

    def evaluate(self, record: EvalRecord) -> EventRecord | None:
        """The samples of the weights that were just evaluated; all ranks must call, rank 0 gets the event."""
        if not self.prompts:
            return None
        start_time = time.perf_counter()
        prompt_ids = [prompt.ids for prompt in self.prompts]
        completions = self.engine.generate(prompt_ids, self.max_new_tokens, self.end_token_ids)
        if completions is None:
            return None
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
        references = [prompt.references for prompt in self.prompts]
        scores = text_scores(texts, references) if self.settings.output.score_samples else {}
        seconds = time.perf_counter() - start_time
        self.elapsed_seconds += seconds
        if record.step == 0:
            self.base_completions = texts
        keys, examples = ("prompt", "reference", "references", "base", "completion"), []
        for prompt, text, base in zip_longest(self.prompts, texts, self.base_completions[: len(texts)]):
            values = (prompt.text, prompt.references[0], len(prompt.references), base, text)
            examples.append(dict(zip(keys, values, strict=True)))
        facts: dict[str, Any] = {name: getattr(record, name) for name in ("epoch", "samples", "tokens")}
        facts |= {"seconds": seconds, "texts": examples[: self.settings.output.num_samples]}
        message = ""
        if scores:
            facts |= {"scored": len(texts), "scores": scores}
            summary = ", ".join(f"{name} {value:.3g}" for name, value in scores.items())
            message = f"{len(texts)} completions after step {record.step}: {summary}"
        now = record.time + seconds
        return EventRecord(event="samples", step=record.step, message=message, time=now, facts=facts)


def check_prompts_available(settings: Settings, data: PreparedDataset) -> None:
    """UserError where --score-samples has nothing to compare: texts without prompts, or token ids."""
    if settings.output.score_samples and not any(prompt for prompt, _ in data.val_texts):
        raise UserError(
            f"--score-samples: {settings.data.data} has no prompts to complete; pass --prompt and --completion, or "
            "leave --score-samples out"
        )


def check_installed(flag: str) -> None:
    """UserError in one line where what the scores of `flag` need is not installed; imports nothing."""
    for package in ("sacrebleu", "rouge_score"):
        if find_spec(package) is None:
            raise UserError(f"{flag}: needs {package}, which is not installed; pip install '.[metrics]'")


def text_scores(completions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """exact_match and rouge_l (F-measure, mean over the texts) from 0 to 1; bleu and chrf from 0 to 100,
    sacrebleu's over the whole set with its default settings.

    `references`: one or more of each completion. A match with any of them counts; BLEU and chrF take several as they
    are defined, of ROUGE-L the highest counts (Lin, 2004).
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    predictions = [text.strip() for text in completions]
    targets = [[text.strip() for text in texts] for texts in references]
    pairs = list(zip(predictions, targets, strict=True))
    scorer = RougeScorer(["rougeL"])
    rouge = [max(scorer.score(target, text)["rougeL"].fmeasure for target in texts) for text, texts in pairs]
    streams = [list(stream) for stream in zip_longest(*targets)]  # None where a text has fewer references
    return {
        "exact_match": sum(text in texts for text, texts in pairs) / len(pairs),
        "bleu": BLEU().corpus_score(predictions, streams).score,
        "chrf": CHRF().corpus_score(predictions, streams).score,
        "rouge_l": sum(rouge) / len(rouge),
    }
