"""The whole comparison, made once: groups, verdict and tables, before it is written in any form."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config import reference
from trainer.report.comparability import COMPARABILITY_KEYS, comparable_sets, comparison_blockers, reference_blockers
from trainer.report.detail_tables import (
    build_diagnostics_table,
    build_generation_table,
    build_score_table,
    build_settings_tables,
)
from trainer.report.load import LoadProblem
from trainer.report.options import DEFAULT_OPTIONS, ComparisonOptions
from trainer.report.run_data import RunData
from trainer.report.seed_groups import SeedGroup, group_by_seed
from trainer.report.tables import Table, build_epoch_table, build_run_table
from trainer.report.verdict import Verdict, build_verdict


@dataclass(frozen=True, kw_only=True)
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
    def optional_tables(self) -> list[Table]:
        """What runs noticed, scored and generated, where there is any of it."""
        return [table for table in (self.diagnostics, self.scores, self.generations) if len(table)]

    @property
    def runs(self) -> list[RunData]:
        """All runs, by group."""
        return [run for group in self.groups for run in group.runs]


def compare(
    runs: Sequence[RunData],
    problems: Sequence[LoadProblem] = (),
    with_reference: bool = True,
    options: ComparisonOptions = DEFAULT_OPTIONS,
) -> Comparison:
    """The comparison of `runs` with one another and, with `with_reference`, with the card."""
    return compare_run_groups(group_by_seed(runs), problems, with_reference, options)


def compare_run_groups(
    groups: Sequence[SeedGroup],
    problems: Sequence[LoadProblem] = (),
    with_reference: bool = True,
    options: ComparisonOptions = DEFAULT_OPTIONS,
) -> Comparison:
    """The same of runs whose groups are known."""
    runs = [run for group in groups for run in group.runs]
    differing_settings, shared_settings = build_settings_tables(groups, with_reference)
    return Comparison(
        groups=tuple(groups),
        problems=tuple(problems),
        with_reference=with_reference,
        verdict=build_verdict(groups, with_reference, options),
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
    sets = comparable_sets(runs, lambda run: run)
    if len(sets) == 1 and len(runs) > 1:
        lines.append(f"The losses of all runs are on the same data: {', '.join(COMPARABILITY_KEYS)} agree.")
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
