"""Texts that are generated greedily: of some validation prompts at every evaluation, to look at, and at a run's end of
all test records, and of retained ones that are prompts with references, to be scored."""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trainer.config.errors import TrainingError, UserError
from trainer.config.settings import Settings
from trainer.data.chat import end_token_ids
from trainer.data.dataset import PreparedDataset, TokenDataset
from trainer.data.tokenizer import encode, load_tokenizer
from trainer.data.unseen import SPLIT_NAMES
from trainer.distributed.engine import Engine
from trainer.model.build import get_max_positions
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, score_name, write_evaluation
from trainer.tracking.records import EvalRecord, EventRecord, Record
from trainer.training.scorers import ScorerError, check_references, score_texts

ScoredSplit = Literal["test", "retain"]
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
    room = math.inf if max_positions is None else max_positions - max((len(p.ids) for p in prompts), default=0)
    return int(min(MAX_COMPLETION_TOKENS, EXTRA_COMPLETION_TOKENS + longest_reference, room))


class GenerationEvaluator:
    """Completes some validation prompts at each evaluation."""

    def __init__(self, engine: Engine, data: PreparedDataset, settings: Settings):
        self.engine, self.settings = engine, settings
        self.base_texts: dict[str, str] = {}  #: {prompt: completion} before the first step, where they are known
        self.prompts: list[EvalPrompt] = []
        if not settings.output.num_samples:
            return
        self.tokenizer = load_tokenizer(settings.model.model)
        self.end_token_ids = end_token_ids(self.tokenizer, data.metadata.get("chat_template"))
        max_positions = get_max_positions(engine.model.causal.config)
        self.prompts = make_prompts(data, self.tokenizer, max_positions)[: settings.output.num_samples]
        self.max_new_tokens = completion_length(self.prompts, max_positions)

    def replay(self, records: Iterable[Record]) -> Iterator[Record]:
        """The same rows, which an earlier process left; of the first samples the base's texts are taken over."""
        for record in records:
            if isinstance(record, EventRecord) and record.event == "samples" and not record.step:
                with contextlib.suppress(KeyError, TypeError):  # facts that somebody edited
                    self.base_texts = {text["prompt"]: text["completion"] for text in record.facts["texts"]}
            yield record

    def evaluate(self, record: EvalRecord) -> EventRecord | None:
        """The samples of the weights that were just evaluated; all ranks must call."""
        if not self.prompts:
            return None
        start_time, number = time.perf_counter(), len(self.prompts)
        prompt_ids, limits = [prompt.ids for prompt in self.prompts], [self.max_new_tokens] * number
        try:
            completions = self.engine.generate(prompt_ids, limits, self.end_token_ids, batch_size=number)
        except TrainingError as error:
            self.prompts = []
            return EventRecord(event="samples_off", step=record.step, message=f"no samples: {error}", time=record.time)
        texts = [self.tokenizer.decode(completion.ids, skip_special_tokens=True) for completion in completions]
        seconds = time.perf_counter() - start_time
        if record.step == 0:
            self.base_texts = {prompt.text: text for prompt, text in zip(self.prompts, texts, strict=True)}
        examples = [
            {"prompt": p.text, "reference": p.references[0], "completion": text, "base": self.base_texts.get(p.text)}
            for p, text in zip(self.prompts, texts, strict=True)
        ]
        facts: dict[str, Any] = {name: getattr(record, name) for name in ("epoch", "samples", "tokens")}
        facts |= {"seconds": seconds, "texts": examples}
        return EventRecord(event="samples", step=record.step, message="", time=record.time + seconds, facts=facts)


class PromptRow(NamedTuple):
    """A record as what a model is asked, and what it should answer."""

    prompt: tuple[int, ...]
    reference: tuple[int, ...]
    is_whole: bool  #: False where the row was cut within its reference


def split_rows(dataset: TokenDataset, end_ids: Sequence[int], block_size: int) -> list[PromptRow]:
    """The records of a split: the last target tokens of each are the reference, what stands before is the prompt.
    `end_ids`: the tokens at which a generated text ends."""
    rows = []
    for i in range(len(dataset)):
        ids, is_target = dataset.row(i).tolist(), dataset.is_target(i)
        end = len(ids) - int(is_target[::-1].argmax())
        start = end - int((~is_target[:end][::-1]).argmax())
        is_whole = ids[end - 1] in end_ids or len(ids) < block_size
        rows.append(PromptRow(tuple(ids[:start]), tuple(ids[start:end]), is_whole))
    return rows


def _load_rows(
    settings: Settings, data: PreparedDataset, split: ScoredSplit
) -> tuple[Any, tuple[int, ...], list[PromptRow], list[str | None]]:
    tokenizer = load_tokenizer(settings.model.model)
    end_ids = end_token_ids(tokenizer, data.metadata.get("chat_template"))
    rows = split_rows(getattr(data, split), end_ids, data.metadata["block_size"])
    decoded = tokenizer.batch_decode([row.reference for row in rows], skip_special_tokens=True)
    return tokenizer, end_ids, rows, [text if row.is_whole else None for row, text in zip(rows, decoded, strict=True)]


def check_test_records(settings: Settings, data: PreparedDataset) -> None:
    """UserError where the test records are not there for --score, or hold nothing that a scorer compares."""
    output, form = settings.output, data.metadata["form"]
    if not output.score or output.export == "none":  # then no test record is looked at
        return
    if not len(data.test):
        problem = "there are no test records; expected --test-data, or --test-fraction 0.1"
    elif data.metadata["objective"] == "blocks":
        problem = "the test records are joined into blocks; expected --objective completion"
    elif form == "template" and settings.data.prompt is None:
        problem = "the records have no prompts; expected --prompt beside --completion"
    else:
        check_references(output.score, _load_rows(settings, data, "test")[-1], "test record")
        return
    raise UserError(f"--score {output.score[0]}: {problem}")


def score_records(
    settings: Settings,
    data: PreparedDataset,
    engine: Engine,
    split: ScoredSplit = "test",
    *,
    step: int,
    row_nll: Sequence[float],
    now: float,
) -> EventRecord:
    """Generate a text for every record of a split (equal prompts share one) and score it; rank 0 writes both beside the
    record's loss, `row_nll`. What fails is said in the event and costs these scores only. All ranks must call.
    `now`: seconds since the run began."""
    start_time, context = time.perf_counter(), engine.dist_context
    tokenizer, end_ids, rows, references = _load_rows(settings, data, split)
    event, records = f"{split}_scores", f"the {SPLIT_NAMES[split]} records"
    max_positions = get_max_positions(engine.model.causal.config)
    limit = settings.output.score_tokens or EXTRA_COMPLETION_TOKENS + max(len(row.reference) for row in rows)
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    limits = [limit if max_positions is None else min(limit, max_positions - len(prompt)) for prompt in prompts]
    facts: dict[str, Any] = {"step": step, "num_records": len(rows), "num_prompts": len(prompts), "scores": {}}
    try:
        completions = engine.generate(prompts, limits, end_ids, batch_size=settings.train.eval_batch)
    except TrainingError as error:
        message = f"no scores of {records}: {error}"
        return EventRecord(event=event, step=step, message=message, time=now, facts=facts)
    generated = tokenizer.batch_decode([completion.ids for completion in completions], skip_special_tokens=True)
    texts_by_prompt = dict(zip(prompts, generated, strict=True))
    texts = [texts_by_prompt[row.prompt] for row in rows]

    def score() -> tuple[dict[str, list[float | None]], dict[str, str]]:
        scores, failures = dict[str, list[float | None]](), dict[str, str]()
        for scorer in settings.output.score:
            try:
                values = score_texts(scorer, texts, references, on_wait=context.watchdog.heartbeat)
                if all(value is None for value in values):
                    raise ScorerError("finds nothing to compare with in the references")
                scores[scorer] = values
            except ScorerError as error:
                failures[scorer] = str(error)
        write_evaluation(
            Path(settings.run_folder) / EVAL_RECORDS_FOLDER,
            data.row_info(split),
            step=step,
            split=split,
            nll=row_nll,
            texts=texts,
            scores={score_name(scorer): values for scorer, values in scores.items()},
        )
        return scores, failures

    scores, failures = context.on_rank_zero(score)
    parts = []
    for scorer, values in scores.items():
        known = [value for value in values if value is not None]
        facts["scores"][score_name(scorer)] = mean = math.fsum(known) / len(known)
        parts.append(f"{scorer} {mean:.4f} over {len(known)} records with a reference")
    parts += [f"no scores by {scorer}: it {failure}" for scorer, failure in failures.items()]
    if num_ties := sum(completion.is_near_tie for completion in completions):
        parts.append(f"in {num_ties} of {len(prompts)} texts two tokens were equally likely up to rounding")
    facts |= {"failures": failures, "num_near_ties": num_ties, "seconds": time.perf_counter() - start_time}
    message = f"scores of {records} with the weights of step {step}: {'; '.join(parts)}"
    return EventRecord(event=event, step=step, message=message, time=now + facts["seconds"], facts=facts)
