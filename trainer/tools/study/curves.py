"""A study's searches as curves: loss against rate for the picture, and loss against cost for the views.

They were chosen by what they show, so nothing here is a claim with the answer's level.
"""

import math
from pathlib import Path

from trainer.config.run_metadata import read_run_metadata
from trainer.report.options import RateCurve
from trainer.report.run_data import RunData
from trainer.report.run_folder import read_folder
from trainer.report.views import Curve, Point, View, build_views
from trainer.tools.study.finalist_timing import Timing
from trainer.tools.study.rule import PRIMARY, Rule
from trainer.tools.study.search import MethodSearch, Results
from trainer.tools.study.worker import run_folder


def rate_curves(folder: Path, rule: Rule, results: Results) -> tuple[RateCurve, ...]:
    """Both methods' validation losses by rate, a curve a rung: the mean over search seeds, the best of the ranks."""
    curves = []
    for method in PRIMARY:
        search = MethodSearch(rule, method, results)
        for rung, num_steps in enumerate(rule.rungs):
            losses: dict[float, float] = {}
            run_ids: list[str] = []
            for candidate in {spec.candidate for spec in search.trials if spec.num_steps == num_steps}:
                trials = search.specs_at(candidate, rung)
                loss = sum(results[spec.name] for spec in trials) / len(trials)
                if math.isfinite(loss):
                    losses[candidate.lr] = min(loss, losses.get(candidate.lr, loss))
                    if num_steps == rule.total_steps:
                        run_ids += [read_run_metadata(run_folder(folder, s) / "run.json")["run_id"] for s in trials]
            ordered = dict(sorted(losses.items()))
            curves.append(RateCurve(mode=method, losses=ordered, num_steps=num_steps, run_ids=tuple(sorted(run_ids))))
    return tuple(curves)


def study_views(folder: Path, rule: Rule, results: Results, timing: Timing) -> tuple[View, ...]:
    """Full against LoRA at equal tokens, FLOPs, seconds and peak memory, one curve for each search seed.

    Of each rung the lowest validation loss over the rates that were tried: a whole run of its own length.
    """
    curves = {
        method: [_curve(folder, rule, results, method, seed, timing) for seed in rule.search_seeds]
        for method in PRIMARY
    }
    return build_views(curves["full"], curves["lora"], no_seconds=timing.blocker)


def _curve(folder: Path, rule: Rule, results: Results, method: str, seed: int, timing: Timing) -> Curve:
    """The best run of each rung. Parameters: what decides which runs these are, and their cost."""
    specs = [spec for spec in MethodSearch(rule, method, results).trials if spec.seed == seed]
    best = [
        min(
            (spec for spec in specs if spec.num_steps == num_steps and math.isfinite(results[spec.name])),
            key=lambda spec: results[spec.name],
        )
        for num_steps in rule.rungs
    ]
    return [_point(read_folder(run_folder(folder, spec)), method, timing) for spec in best]


def _point(run: RunData, method: str, timing: Timing) -> Point:
    """The end of a run; its time and memory are those of the timed runs, taken in alternation and of equal length."""
    end = {name: float(values[-1]) for name, values in run.evals.items()}
    step_flops, step_seconds = run.get("model.step_flops"), timing.mean_step_seconds.get(method)
    return Point(
        loss=end["loss"],
        tokens=end["tokens"],
        flops=None if step_flops is None else step_flops * end["step"],
        seconds=None if step_seconds is None else step_seconds * end["step"],
        peak_memory_bytes=None if timing.reason else timing.peak_memory_bytes[method],
    )
