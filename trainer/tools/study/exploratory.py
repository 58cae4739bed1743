"""What a study says beside its answer: both methods at equal cost, and whether the adapters could hold the data.

The curves are the search's: of each rung the lowest validation loss over the rates that were tried, a whole run of its
own length each. They were chosen by what they show, so nothing here is a claim with the answer's level.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.config.run_metadata import read_run_metadata
from trainer.report.exploratory import describe_capacity
from trainer.report.run_folder import read_folder
from trainer.report.seed_groups import group_by_seed
from trainer.report.views import Curve, Point, View, build_views
from trainer.tools.study.finalist_timing import Timing
from trainer.tools.study.rule import PRIMARY, Rule
from trainer.tools.study.search import MethodSearch, Results, TrialSpec
from trainer.tools.study.worker import run_folder
from trainer.tracking.records import EvalRecord, EventRecord, Record, read_records


def study_views(folder: Path, rule: Rule, results: Results, timing: Timing | None) -> tuple[View, ...]:
    """Full against LoRA at equal tokens, FLOPs, seconds and peak memory, one curve for each search seed."""
    step_seconds = {}
    if timing is not None and not timing.reason:
        step_seconds = {method: statistics.median(values) for method, values in timing.step_seconds.items()}
    curves = {
        method: [_curve(folder, rule, results, method, seed, step_seconds.get(method)) for seed in rule.search_seeds]
        for method in PRIMARY
    }
    return build_views(curves["full"], curves["lora"], no_seconds=timing.reason if timing else "not timed")


def _curve(
    folder: Path, rule: Rule, results: Results, method: str, seed: int, step_seconds: float | None
) -> Curve:  # fmt: skip
    """The best run of each rung. Parameters: what decides which runs these are, and their cost."""
    specs = [spec for spec in MethodSearch(rule, method).trials(results) if spec.seed == seed]
    best = [
        min((spec for spec in specs if spec.num_steps == num_steps), key=lambda spec: results[spec.name])
        for num_steps in rule.rungs
    ]
    return [_point(run_folder(folder, spec), spec, results[spec.name], step_seconds) for spec in best]


def _point(folder: Path, spec: TrialSpec, loss: float, step_seconds: float | None) -> Point:
    records = list(read_records(folder / "metrics.jsonl", with_steps=False))
    metadata = read_run_metadata(folder / "run.json")
    step_flops = metadata["model"].get("step_flops")
    return Point(
        loss=loss, tokens=[record.tokens for record in records if isinstance(record, EvalRecord)][-1],
        flops=None if step_flops is None else step_flops * spec.num_steps,
        seconds=None if step_seconds is None else step_seconds * spec.num_steps,
        peak_memory_bytes=_finished_facts(records)["peak_memory_bytes"],
    )  # fmt: skip


def _finished_facts(records: Sequence[Record]) -> Mapping[str, Any]:
    return next(r.facts or {} for r in records if isinstance(r, EventRecord) and r.event == "finished")


def describe_study_capacity(folder: Path, answers: Sequence[TrialSpec]) -> list[str]:
    """One line on what the chosen adapters can hold of the data; none where no run was through the data once."""
    lora_run = next(spec for spec in answers if spec.candidate.method == PRIMARY[1])
    return describe_capacity(group_by_seed([read_folder(run_folder(folder, lora_run))])[0])
