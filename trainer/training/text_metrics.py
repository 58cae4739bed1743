"""How like their references generated texts are: exact match, BLEU, chrF, ROUGE-L, and what ACLED notes must repeat.

BLEU and chrF are sacrebleu's over the whole set, with its default settings, from 0 to 100; the others are shares.
"""

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import zip_longest
from typing import Any

from trainer.config.errors import UserError
from trainer.data.acled import FIELDS

_NUMBER_WORDS = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
)
_DEATH_PATTERN = re.compile(r"\b(kill(ed|ing|s)?|dead|deaths?|died|fatalit(y|ies))\b", re.IGNORECASE)
_NEGATION_PATTERN = re.compile(r"\b(no|without|any|zero|0)\b", re.IGNORECASE)


def check_installed(flag: str) -> None:
    """UserError in one line where what the scores of `flag` need is not installed; imports nothing."""
    for package in ("sacrebleu", "rouge_score"):
        if find_spec(package) is None:
            raise UserError(f"{flag}: needs {package}, which is not installed; pip install '.[metrics]'")


def text_scores(completions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """exact_match and rouge_l (F-measure, mean over the texts) from 0 to 1, bleu and chrf from 0 to 100.

    `references`: one or more of each completion. A match with any of them counts; BLEU and chrF take several as they
    are defined, of ROUGE-L the highest counts (Lin, 2004).
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    predictions = [text.strip() for text in completions]
    targets = [[text.strip() for text in texts] for texts in references]
    scorer = RougeScorer(["rougeL"])
    rouge = [
        max(scorer.score(target, text)["rougeL"].fmeasure for target in texts)
        for text, texts in zip(predictions, targets, strict=True)
    ]
    streams = [list(stream) for stream in zip_longest(*targets)]  # None where a text has fewer references
    return {
        "exact_match": sum(text in texts for text, texts in zip(predictions, targets, strict=True)) / len(predictions),
        "bleu": BLEU().corpus_score(predictions, streams).score,
        "chrf": CHRF().corpus_score(predictions, streams).score,
        "rouge_l": sum(rouge) / len(rouge),
    }


def acled_scores(notes: Sequence[str], prompts: Sequence[str]) -> dict[str, float]:
    """Of notes, the shares that repeat their prompt's date, place and fatalities right, and that invent deaths.

    A note of an event without fatalities has none to repeat: there `invented_deaths` says how many tell of some. What
    no prompt has is left out.
    """
    events = [parse_fields(prompt) for prompt in prompts]
    rules: dict[str, Any] = {
        "date": _mentions_field("Date"),
        "place": _mentions_field("Location"),
        "fatalities": _states_death_toll,
        "invented_deaths": _invents_deaths,
    }
    shares = {}
    for name, rule in rules.items():
        results = [rule(note, event) for note, event in zip(notes, events, strict=True)]
        applicable = [result for result in results if result is not None]
        if applicable:
            shares[name] = sum(applicable) / len(applicable)
    return shares


def parse_fields(prompt: str) -> dict[str, str]:
    """{label: text} of a prompt that `trainer.data.acled.format_prompt` made."""
    lines = (line.partition(": ") for line in prompt.splitlines())
    return {label: text for label, _, text in lines if label in FIELDS.values() and text}


def _mentions_field(label: str) -> Any:
    def rule(note: str, event: Mapping[str, str]) -> bool | None:
        expected = event.get(label)
        return None if expected is None else re.search(rf"(?<!\w){re.escape(expected)}(?!\w)", note, re.I) is not None

    return rule


def _states_death_toll(note: str, event: Mapping[str, str]) -> bool | None:
    """Right where a sentence on deaths has the number, in digits or words."""
    num_deaths = _parse_num_deaths(event)
    if not num_deaths:
        return None
    spellings = "|".join([f"{num_deaths}", f"{num_deaths:,}", *_NUMBER_WORDS[num_deaths : num_deaths + 1]])
    number_pattern = re.compile(rf"(?<![\w,.])(?:{spellings})(?![\w]|[,.]\d)", re.IGNORECASE)
    return any(number_pattern.search(sentence) for sentence in _death_sentences(note))


def _invents_deaths(note: str, event: Mapping[str, str]) -> bool | None:
    if _parse_num_deaths(event) != 0:
        return None
    return any(not _NEGATION_PATTERN.search(sentence) for sentence in _death_sentences(note))


def _parse_num_deaths(event: Mapping[str, str]) -> int | None:
    value = event.get("Fatalities", "")
    return int(value) if value.isdigit() else None


def _death_sentences(note: str) -> list[str]:
    return [sentence for sentence in re.split(r"(?<=[.;!?])\s", note) if _DEATH_PATTERN.search(sentence)]
