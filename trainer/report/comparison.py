"""The whole comparison, made once and written in every form: console, HTML, Markdown, JSON, pictures."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import reference
from trainer.config.errors import UserError
from trainer.report.comparability import (
    COMPARABILITY_KEYS,
    comparable_sets,
    compare_metadata,
    comparison_blockers,
    reference_blockers,
    shorten_reason,
)
from trainer.report.load import LoadProblem
from trainer.report.run_data import RunData
from trainer.report.seed_groups import SeedGroup, group_by_seed
from trainer.report.tables import (
    Table,
    build_diagnostics_table,
    build_epoch_table,
    build_generation_table,
    build_run_table,
    build_score_table,
    build_settings_tables,
)
from trainer.report.verdict import Verdict, build_verdict


@dataclass(frozen=True)
class Comparison:
    """Runs by group, what they come to, and the tables."""

    groups: tuple[SeedGroup, ...]
    problems: tuple[LoadProblem, ...]
    with_reference: bool
    verdict: Verdict
    comparability_notes: tuple[str, ...]  #: one line each on what may be held against what
    by_epoch: Table
    by_run: Table
    differing_settings: Table
    shared_settings: Table
    diagnostics: Table
    scores: Table
    generations: Table

    @property
    def runs(self) -> list[RunData]:
        """All runs, by group."""
        return [run for group in self.groups for run in group.runs]


def compare(runs: Sequence[RunData], problems: Sequence[LoadProblem] = (), with_reference: bool = True) -> Comparison:
    """The comparison of `runs` with one another and, unless told not to, with the card."""
    groups = group_by_seed(runs)
    differing_settings, shared_settings = build_settings_tables(groups, with_reference)
    return Comparison(
        groups=tuple(groups),
        problems=tuple(problems),
        with_reference=with_reference,
        verdict=build_verdict(groups, with_reference),
        comparability_notes=tuple(_comparability_notes(runs, with_reference)),
        by_epoch=build_epoch_table(groups, with_reference),
        by_run=build_run_table(groups, with_reference),
        differing_settings=differing_settings,
        shared_settings=shared_settings,
        diagnostics=build_diagnostics_table(groups),
        scores=build_score_table(groups),
        generations=build_generation_table(groups),
    )


def _comparability_notes(runs: Sequence[RunData], with_reference: bool) -> list[str]:
    """What may be held against what, and why not."""
    lines = []
    sets = comparable_sets(runs)
    if len(sets) == 1 and len(runs) > 1:
        lines.append(f"The runs are comparable with one another: {', '.join(COMPARABILITY_KEYS)} agree.")
    first_run = sets[0][0]
    for other_set in sets[1:]:
        names = _join_names(other_set)
        reasons = comparison_blockers(other_set[0], first_run)
        lines.append(f"{names} and {_join_names(sets[0])} are not comparable: {'; '.join(reasons)}.")
    if with_reference:
        by_reason: dict[tuple[str, ...], list[RunData]] = {}
        for run in runs:
            by_reason.setdefault(tuple(reference_blockers(run)), []).append(run)
        for reason, members in by_reason.items():
            verb = "is" if len(members) == 1 else "are"
            if reason:
                lines.append(f"{_join_names(members)} {verb} not comparable with the card: {'; '.join(reason)}.")
            else:
                lines.append(
                    f"{_join_names(members)} {verb} comparable with the card as far as it tells: "
                    "all that is known of it agrees."
                )
        lines.append(f"U{reference.UNKNOWN_REASON[1:]}.")
    return lines


def _join_names(runs: Sequence[RunData]) -> str:
    names = [run.name for run in runs]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def to_json(comparison: Comparison, checks: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Everything in the tables, with numbers as numbers."""
    runs = comparison.runs
    columns = [group.label for group in comparison.groups]
    metadata_fields = compare_metadata([group.runs for group in comparison.groups], comparison.with_reference)
    names = (["card"] if comparison.with_reference else []) + columns
    return {
        "format": 1,
        "verdict": {
            "sentence": comparison.verdict.sentence,
            "details": list(comparison.verdict.details),
            **comparison.verdict.numbers,
        },
        "comparable": {
            "lines": list(comparison.comparability_notes),
            "sets": [[run.run_id for run in members] for members in comparable_sets(runs)],
            "card": {
                run.run_id: {"comparable": not reference_blockers(run), "reasons": reference_blockers(run)}
                for run in runs
            }
            if comparison.with_reference
            else None,
            "unknown_of_card": list(reference.UNKNOWN_DATA),
        },
        "groups": [
            {"label": group.label, "mode": group.mode, "runs": [run.run_id for run in group.runs]}
            for group in comparison.groups
        ],
        "by_epoch": comparison.by_epoch.to_records(),
        "by_run": comparison.by_run.to_records(),
        "diagnosis": comparison.diagnostics.to_records(),
        "scores": comparison.scores.to_records(),
        "samples": comparison.generations.to_records(),
        "facts": {
            field.name: {
                "same": field.is_same,
                "values": {
                    name: value if is_known else "unknown"
                    for name, value, is_known in zip(names, field.values, field.is_known, strict=True)
                },
            }
            for field in metadata_fields
        },
        "evaluations": {
            run.run_id: [
                dict(zip(run.evals, map(_finite_or_none, row), strict=True))
                for row in zip(*run.evals.values(), strict=True)
            ]
            for run in runs
        },
        "problems": [
            {"source": problem.source, "text": problem.text, "left_out": problem.is_excluded}
            for problem in comparison.problems
        ],
        "checks": list(checks),
    }


def _finite_or_none(value: Any) -> float | None:
    number = float(value)
    return number if number - number == 0 else None  # NaN and infinity are no JSON


def write_report(comparison: Comparison, output_dir: Path, checks: Sequence[dict[str, Any]] = ()) -> list[Path]:
    """Write report.html, report.md, curves.png, curves.svg and comparison.json, and return their paths.

    A folder that cannot be written is a UserError.
    """
    from trainer.report import html, markdown, plots

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "comparison.json").write_text(
            json.dumps(replace_non_finite(to_json(comparison, checks)), indent=1, allow_nan=False, ensure_ascii=False)
            + "\n",
            encoding="utf-8",
        )
        plots.save_figure(comparison.groups, comparison.with_reference, output_dir)
        (output_dir / "report.md").write_text(markdown.render(comparison), encoding="utf-8")
        (output_dir / "report.html").write_text(html.render(comparison), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: cannot write there ({error.strerror or error})") from error
    return [output_dir / name for name in ("report.html", "report.md", "curves.png", "curves.svg", "comparison.json")]


def replace_non_finite(value: Any) -> Any:
    """`value` with NaN and infinity, which JSON does not know, as null."""
    if isinstance(value, dict):
        return {str(key): replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(item) for item in value]
    if isinstance(value, float):
        return _finite_or_none(value)
    return value


__all__ = ["Comparison", "compare", "replace_non_finite", "shorten_reason", "to_json", "write_report"]
