"""How like their references generated texts are: exact match, BLEU, chrF and ROUGE-L.

BLEU and chrF are sacrebleu's over the whole set, with its default settings, from 0 to 100; the others are shares.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import zip_longest

from trainer.config.errors import UserError


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
