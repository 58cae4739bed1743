"""The runs that a command line names, each read from where it lies; what cannot be read is said, not raised."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.report.run_data import Run, Unreadable, read_folder


@dataclasses.dataclass(frozen=True)
class Problem:
    """One line on a run that is not, or not wholly, in the comparison."""

    source: str
    text: str
    left_out: bool

    def __str__(self) -> str:
        return f"{self.source}: {self.text}"


def gather(sources: Sequence[str]) -> tuple[list[Run], list[Problem]]:
    """The runs that can be read, with names of their own, and what is wrong with these and the others."""
    runs: list[Run] = []
    problems: list[Problem] = []
    for source in sources:
        try:
            run = read(source)
            same = next((other for other in runs if other.run_id == run.run_id), None)
            if same is not None:
                raise Unreadable(f"same run id as {same.source} ({run.run_id}): the same run, or a copy of it")
            runs.append(run)
        except Unreadable as problem:
            problems.append(Problem(source, f"{problem}; left out", left_out=True))
            continue
        problems += [Problem(source, note, left_out=False) for note in run.notes]
    return with_own_names(runs), problems


def read(source: str) -> Run:
    """The run of a run folder, a W&B file or folder, or a path on the W&B server; Unreadable where there is none."""
    path = Path(source)
    if (path / "run.json").exists() or (path / "metrics.jsonl").exists():
        return read_folder(path)
    if path.exists():
        from trainer.report.wandb_runs import offline_files, read_offline

        files = offline_files(path)
        if not files:
            raise Unreadable("holds neither run.json and metrics.jsonl nor a W&B run")
        return read_offline(source, files)
    from trainer.report.wandb_runs import is_wandb_path, read_online

    if not is_wandb_path(source):
        raise Unreadable("no such run folder: expected a run folder, an offline W&B folder, or entity/project/run_id")
    return read_online(source)


def with_own_names(runs: list[Run]) -> list[Run]:
    """The runs, those that share a name told apart by their seed, or by their id where a seed is there twice."""
    seeds: dict[str, list[Any]] = {}
    for run in runs:
        seeds.setdefault(run.name, []).append(run.fact("settings.train.seed"))

    def own(run: Run) -> str:
        same = seeds[run.name]
        if len(same) == 1:
            return run.name
        return (
            f"{run.name} (seed {run.fact('settings.train.seed')})"
            if len(set(same)) == len(same)
            else (f"{run.name} ({run.run_id})")
        )

    return [dataclasses.replace(run, name=own(run)) for run in runs]
