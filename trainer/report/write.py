"""Writing a comparison: answer.json and comparison.json for machines, report.html and report.md, the curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config import reference
from trainer.config.errors import UserError
from trainer.config.files import write_atomically
from trainer.report.answer_json import json_text, to_answer
from trainer.report.comparability import comparable_sets, compare_metadata, reference_blockers
from trainer.report.comparison import Comparison
from trainer.report.run_data import RunData
from trainer.report.tables import REFERENCE_LABEL

FILES = ("report.html", "report.md", "curves.png", "curves.svg", "answer.json", "comparison.json")


def write_report(comparison: Comparison, output_dir: Path, checks: Sequence[dict[str, Any]] = ()) -> list[Path]:
    """Write all FILES and return their paths; a folder that cannot be written is a UserError."""
    from trainer.report import html, markdown, plots

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(output_dir / "answer.json", json_text(to_answer(comparison.verdict)))
        write_atomically(output_dir / "comparison.json", json_text(to_json(comparison, checks)))
        plots.save_figure(comparison.groups, comparison.with_reference, output_dir)
        write_atomically(output_dir / "report.md", markdown.render(comparison))
        write_atomically(output_dir / "report.html", html.render(comparison))
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: cannot write there ({error.strerror or error})") from error
    return [output_dir / name for name in FILES]


def to_json(comparison: Comparison, checks: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The content of comparison.json: everything in the tables, with numbers as numbers."""
    runs = comparison.runs
    return {
        "format": 1,
        "verdict": {**to_answer(comparison.verdict), "details": list(comparison.verdict.details)},
        "comparable": {
            "lines": list(comparison.comparability_notes),
            "sets": [[run.run_id for run in members] for members in comparable_sets(runs, lambda run: run)],
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
        "facts": _facts(comparison),
        "evaluations": {run.run_id: _evaluations(run) for run in runs},
        "problems": [
            {"source": problem.source, "text": problem.text, "left_out": problem.is_excluded}
            for problem in comparison.problems
        ],
        "checks": list(checks),
    }


def _facts(comparison: Comparison) -> dict[str, Any]:
    """Every setting and fact by name: whether it is the same, and its value in each column."""
    names = ([REFERENCE_LABEL] if comparison.with_reference else []) + [group.label for group in comparison.groups]
    return {
        field.name: {
            "same": field.is_same,
            "values": {name: field.values.get(column, "unknown") for column, name in enumerate(names)},
        }
        for field in compare_metadata([group.runs for group in comparison.groups], comparison.with_reference)
    }


def _evaluations(run: RunData) -> list[dict[str, float]]:
    return [dict(zip(run.evals, map(float, row), strict=True)) for row in zip(*run.evals.values(), strict=True)]
