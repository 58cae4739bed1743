"""answer.json: the sentence, the numbers and the comparisons behind it, for machines."""

import dataclasses
import json
from typing import Any

from trainer.report.exploratory import build_views_of
from trainer.report.full_vs_lora import FullVsLora
from trainer.report.verdict import Verdict


def json_text(content: Any) -> str:
    """Indented JSON; what is no JSON number becomes null."""
    return json.dumps(replace_non_finite(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def replace_non_finite(value: Any) -> Any:
    """`value` with NaN and infinity, which JSON does not know, as null."""
    if isinstance(value, dict):
        return {str(key): replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(item) for item in value]
    if isinstance(value, float):
        return float(value) if value - value == 0 else None
    return value


def to_answer(verdict: Verdict) -> dict[str, Any]:
    """The content of answer.json: the sentence, the three numbers, and each comparison with its interval."""
    return {
        "format": 1,
        "sentence": verdict.sentence,
        "answer": verdict.primary.answer if verdict.primary else None,
        "numbers": [dataclasses.asdict(headline) for headline in verdict.headlines],
        "comparisons": [_comparison_to_dict(comparison) for comparison in verdict.comparisons],
        "views": [
            dataclasses.asdict(view) | {"favours": view.favours}
            for view in (build_views_of(verdict.primary, verdict.study) if verdict.primary else ())
        ],
        "not_counted": verdict.num_not_counted,
        **({"study": dict(verdict.study.facts)} if verdict.study else {}),
    }


def _comparison_to_dict(pair: FullVsLora) -> dict[str, Any]:
    return {
        "answer": pair.answer,
        "not_ranked_because": list(pair.blockers),
        **{
            mode: {
                "label": group.label_with_lr,
                "lr": group.lr,
                "runs": [run.run_id for run in group.finished_runs],
                "loss": loss,
            }
            for mode, group, loss in (("full", pair.full, pair.full_loss), ("lora", pair.lora, pair.lora_loss))
        },
        "seeds": [full.get("settings.train.seed") for full, _ in pair.pairs],
        "split": pair.losses.split if pair.losses else None,
        "records": pair.losses.num_records if pair.losses else None,
        "no_records_because": pair.no_losses,
        "excess": dataclasses.asdict(pair.excess) if pair.excess else None,
        "beyond_margin": dataclasses.asdict(pair.contrast) if pair.contrast else None,
        "margin": dataclasses.asdict(pair.margin),
        "is_margin_under_floor": pair.is_margin_under_floor,
        "parameters": pair.parameters,
        "time": dataclasses.asdict(pair.time),
        "memory": dataclasses.asdict(pair.memory),
    }
