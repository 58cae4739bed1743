"""The whole comparison, made once and written in every form: console, HTML, Markdown, JSON, pictures."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import reference
from trainer.config.errors import UserError
from trainer.report.comparability import MUST_AGREE, facts, short, together, why_not, why_not_card
from trainer.report.load import Problem
from trainer.report.paired_interval import Group, groups
from trainer.report.run_data import Run
from trainer.report.tables import Table, by_epoch, by_run, diagnosis, same_and_different, samples, scores
from trainer.report.verdict import Verdict, judge


@dataclass(frozen=True)
class Comparison:
    """Runs by group, what they come to, and the tables."""

    groups: tuple[Group, ...]
    problems: tuple[Problem, ...]
    with_card: bool
    verdict: Verdict
    comparable: tuple[str, ...]  #: one line each on what may be held against what
    by_epoch: Table
    by_run: Table
    different: Table
    same: Table
    diagnosis: Table
    scores: Table
    samples: Table

    @property
    def runs(self) -> list[Run]:
        """All runs, by group."""
        return [run for group in self.groups for run in group.runs]


def compare(runs: Sequence[Run], problems: Sequence[Problem] = (), with_card: bool = True) -> Comparison:
    """The comparison of `runs` with one another and, unless told not to, with the card."""
    found = groups(runs)
    different, same = same_and_different(found, with_card)
    return Comparison(
        groups=tuple(found),
        problems=tuple(problems),
        with_card=with_card,
        verdict=judge(found, with_card),
        comparable=tuple(_comparable_lines(runs, with_card)),
        by_epoch=by_epoch(found, with_card),
        by_run=by_run(found, with_card),
        different=different,
        same=same,
        diagnosis=diagnosis(found),
        scores=scores(found),
        samples=samples(found),
    )


def _comparable_lines(runs: Sequence[Run], with_card: bool) -> list[str]:
    """What may be held against what, and why not."""
    lines = []
    sets = together(runs)
    if len(sets) == 1 and len(runs) > 1:
        lines.append(f"The runs are comparable with one another: {', '.join(MUST_AGREE)} agree.")
    first = sets[0][0]
    for others in sets[1:]:
        names = _names(others)
        reasons = why_not(others[0], first)
        lines.append(f"{names} and {_names(sets[0])} are not comparable: {'; '.join(reasons)}.")
    if with_card:
        by_reason: dict[tuple[str, ...], list[Run]] = {}
        for run in runs:
            by_reason.setdefault(tuple(why_not_card(run)), []).append(run)
        for reason, members in by_reason.items():
            verb = "is" if len(members) == 1 else "are"
            if reason:
                lines.append(f"{_names(members)} {verb} not comparable with the card: {'; '.join(reason)}.")
            else:
                lines.append(
                    f"{_names(members)} {verb} comparable with the card as far as it tells: "
                    "all that is known of it agrees."
                )
        lines.append(f"U{reference.UNKNOWN[1:]}.")
    return lines


def _names(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def as_json(comparison: Comparison, checks: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Everything in the tables, with numbers as numbers."""
    runs = comparison.runs
    columns = [group.label for group in comparison.groups]
    found = facts([group.runs for group in comparison.groups], comparison.with_card)
    names = (["card"] if comparison.with_card else []) + columns
    return {
        "format": 1,
        "verdict": {
            "sentence": comparison.verdict.sentence,
            "details": list(comparison.verdict.details),
            **comparison.verdict.numbers,
        },
        "comparable": {
            "lines": list(comparison.comparable),
            "sets": [[run.run_id for run in members] for members in together(runs)],
            "card": {run.run_id: {"comparable": not why_not_card(run), "reasons": why_not_card(run)} for run in runs}
            if comparison.with_card
            else None,
            "unknown_of_card": list(reference.UNKNOWN_DATA),
        },
        "groups": [
            {"label": group.label, "mode": group.mode, "runs": [run.run_id for run in group.runs]}
            for group in comparison.groups
        ],
        "by_epoch": comparison.by_epoch.records(),
        "by_run": comparison.by_run.records(),
        "diagnosis": comparison.diagnosis.records(),
        "scores": comparison.scores.records(),
        "samples": comparison.samples.records(),
        "facts": {
            fact.name: {
                "same": fact.same,
                "values": {
                    name: value if known else "unknown"
                    for name, value, known in zip(names, fact.values, fact.known, strict=True)
                },
            }
            for fact in found
        },
        "evaluations": {
            run.run_id: [
                dict(zip(run.evals, map(_plain, row), strict=True)) for row in zip(*run.evals.values(), strict=True)
            ]
            for run in runs
        },
        "problems": [
            {"source": problem.source, "text": problem.text, "left_out": problem.left_out}
            for problem in comparison.problems
        ],
        "checks": list(checks),
    }


def _plain(value: Any) -> float | None:
    number = float(value)
    return number if number - number == 0 else None  # NaN and infinity are no JSON


def write(comparison: Comparison, folder: Path, checks: Sequence[dict[str, Any]] = ()) -> list[Path]:
    """Write report.html, report.md, curves.png, curves.svg and comparison.json, and return their paths.

    A folder that cannot be written is a UserError.
    """
    from trainer.report import html, markdown, plots

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "comparison.json").write_text(
            json.dumps(finite(as_json(comparison, checks)), indent=1, allow_nan=False, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )
        plots.save_page(comparison.groups, comparison.with_card, folder)
        (folder / "report.md").write_text(markdown.page(comparison), encoding="utf-8")
        (folder / "report.html").write_text(html.page(comparison), encoding="utf-8")
    except OSError as problem:
        raise UserError(f"--out {folder}: cannot write there ({problem.strerror or problem})") from problem
    return [folder / name for name in ("report.html", "report.md", "curves.png", "curves.svg", "comparison.json")]


def finite(value: Any) -> Any:
    """`value` with NaN and infinity, which JSON does not know, as null."""
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float):
        return _plain(value)
    return value


__all__ = ["Comparison", "as_json", "compare", "finite", "short", "write"]
