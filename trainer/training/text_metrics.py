"""How like their references generated texts are: exact match, BLEU, chrF, ROUGE-L, and what ACLED notes must repeat.

BLEU and chrF are sacrebleu's over the whole set, with its default settings, from 0 to 100; the others are shares.
"""

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from trainer.config.errors import UserError
from trainer.data.acled import FIELDS

_WORDS = (
    "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_DEATH = re.compile(r"\b(kill(ed|ing|s)?|dead|deaths?|died|fatalit(y|ies))\b", re.IGNORECASE)
_NONE = re.compile(r"\b(no|without|any|zero|0)\b", re.IGNORECASE)


def check_installed() -> None:
    """UserError in one line where what --metrics needs is not installed; imports nothing."""
    for package in ("sacrebleu", "rouge_score"):
        if find_spec(package) is None:
            raise UserError(f"--metrics: needs {package}, which is not installed; pip install '.[metrics]'")


def text_scores(completions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """exact_match and rouge_l (F-measure, mean over the texts) from 0 to 1, bleu and chrf from 0 to 100."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    told, wanted = [text.strip() for text in completions], [text.strip() for text in references]
    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score(ref, text)["rougeL"].fmeasure for text, ref in zip(told, wanted, strict=True)]
    return {
        "exact_match": sum(text == ref for text, ref in zip(told, wanted, strict=True)) / len(told),
        "bleu": BLEU().corpus_score(told, [wanted]).score,
        "chrf": CHRF().corpus_score(told, [wanted]).score,
        "rouge_l": sum(rouge) / len(rouge),
    }


def acled_scores(notes: Sequence[str], prompts: Sequence[str]) -> dict[str, float]:
    """Of notes, the shares that repeat their prompt's date, place and fatalities right, and that invent deaths.

    A note of an event without fatalities has none to repeat: there `invented_deaths` says how many tell of some. What
    no prompt has is left out.
    """
    events = [fields(prompt) for prompt in prompts]
    rules: dict[str, Any] = {
        "date": _repeats("Date"), "place": _repeats("Location"), "fatalities": _deaths, "invented_deaths": _invented,
    }  # fmt: skip
    shares = {}
    for name, rule in rules.items():
        marks = [rule(note, event) for note, event in zip(notes, events, strict=True)]
        known = [mark for mark in marks if mark is not None]
        if known:
            shares[name] = sum(known) / len(known)
    return shares


def fields(prompt: str) -> dict[str, str]:
    """{label: text} of a prompt that `trainer.data.acled.prompt_of` made."""
    lines = (line.partition(": ") for line in prompt.splitlines())
    return {label: text for label, _, text in lines if label in FIELDS.values() and text}


def _repeats(label: str) -> Any:
    def rule(note: str, event: Mapping[str, str]) -> bool | None:
        wanted = event.get(label)
        return None if wanted is None else re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", note, re.I) is not None

    return rule


def _deaths(note: str, event: Mapping[str, str]) -> bool | None:
    """Right where a sentence on deaths has the number, in digits or words."""
    number = _number(event)
    if not number:
        return None
    spelt = f"{number}|{number:,}" + (f"|{_WORDS[number]}" if number < len(_WORDS) else "")
    return any(
        re.search(rf"(?<![\w,.])(?:{spelt})(?![\w]|[,.]\d)", sentence, re.IGNORECASE) for sentence in _told(note)
    )


def _invented(note: str, event: Mapping[str, str]) -> bool | None:
    return None if _number(event) != 0 else any(not _NONE.search(sentence) for sentence in _told(note))


def _number(event: Mapping[str, str]) -> int | None:
    told = event.get("Fatalities", "")
    return int(told) if told.isdigit() else None


def _told(note: str) -> list[str]:
    """The sentences on deaths."""
    return [sentence for sentence in re.split(r"(?<=[.;!?])\s", note) if _DEATH.search(sentence)]
