"""answer.json: a verdict for machines, flat enough for `pd.json_normalize` to make one table of many studies."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.config.files import name_data
from trainer.report.comparable import SeedGroup
from trainer.report.interval import MIN_SEEDS
from trainer.report.judge import FullVsLora
from trainer.report.sentence import Verdict

SCHEMA_VERSION = 3


def to_answer(verdict: Verdict) -> dict[str, Any]:
    """The content of answer.json: what was asked, of the primary comparison its numbers, and all comparisons."""
    comparisons = [_describe_comparison(pair) for pair in verdict.comparisons]
    primary = {name: x for facts in comparisons[:1] for name, x in facts.items() if name != "decisive_records"}
    return {
        "schema_version": SCHEMA_VERSION,
        "answer": verdict.answer,
        **primary,
        "sentence": verdict.sentence,
        "next_step": verdict.next_step,
        "comparisons": comparisons,
        "lora_ranks": [
            {"rank": r.rank, "excess": asdict(r.excess), "p_after_holm": r.p_value, "is_good_enough": r.is_good_enough}
            for r in verdict.ranks
        ],
        "smallest_good_enough_rank": next((r.rank for r in verdict.ranks if r.is_good_enough), None),
        "not_counted": verdict.num_not_counted,
        **({"study": dict(verdict.study.facts)} if verdict.study else {}),
    }


def _describe_comparison(pair: FullVsLora) -> dict[str, Any]:
    run, judged, num_seeds = pair.full.runs[0], pair.judged, len(pair.pairs)
    model_name = str(run.get("model.name"))
    scope = "methods" if num_seeds >= MIN_SEEDS else "provisional" if num_seeds > 1 else "these models"
    is_ranked = not pair.blockers
    has_score = judged is not None and judged is not pair.losses

    def describe_mode(group: SeedGroup, loss: float) -> dict[str, Any]:
        tradeoff = pair.tradeoffs.get(group.mode)
        return {
            "label": group.label_with_lr,
            "lr": group.runs[0].get("resolved.lr"),
            "lora_rank": group.runs[0].get("settings.lora.rank") if group.mode == "lora" else None,
            "runs": [run.run_id for run in group.finished_runs],
            "loss": loss if is_ranked else None,
            "score": judged.score(group.mode) if judged is not None and has_score else None,
            "forgetting": asdict(tradeoff.forgetting) if tradeoff else None,
        }

    return {
        "model": {
            "name": name_data(model_name) if Path(model_name).is_absolute() else model_name,  # a hub id is whole
            **{name: run.get(f"model.{name}") for name in ("fingerprint", "parameters")},
        },
        "data": {
            "source": name_data(str(run.get("data.source"))),
            **{name: run.get(f"data.{name}") for name in ("fingerprint", "val_fingerprint", "tokenizer", "objective")},
        },
        "answer": pair.answer,
        "not_ranked_because": list(pair.blockers),
        "measure": pair.margin.measure,
        "scope": scope,
        "seeds": [full.get("settings.train.seed") for full, _ in pair.pairs],
        "num_seeds": num_seeds,
        "split": judged.split if judged else None,
        "records": judged.num_records if judged else None,
        "effective_records": pair.excess.effective_units if pair.excess and pair.unit != "points" else None,
        "no_records_because": pair.no_losses,
        "base_loss": pair.base_loss if is_ranked else None,
        "full": describe_mode(pair.full, pair.full_loss),
        "lora": describe_mode(pair.lora, pair.lora_loss),
        "margin": asdict(pair.margin),
        "excess": asdict(pair.excess) if pair.excess else None,
        "beyond_margin": asdict(pair.contrast) if pair.contrast else None,
        "mcnemar_p": pair.mcnemar,
        "forgetting": asdict(pair.forgetting) if pair.forgetting else None,
        "forgetting_points": asdict(pair.forgetting_points) if pair.forgetting_points else None,
        "doubt": pair.doubt,
        "decisive_records": [{"record": name, "excess": excess} for name, excess in pair.decisive],
        "is_margin_under_floor": pair.is_margin_under_floor,
        "parameters": pair.parameters,
        "time": asdict(pair.time),
        "memory": asdict(pair.memory),
    }
