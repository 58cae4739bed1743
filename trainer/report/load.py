"""The runs that a command line names, each read from where it lies; what cannot be read is said, not raised."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.report.run_data import RunData, RunReadError, escape_control
from trainer.report.run_folder import read_folder
from trainer.report.wandb_runs import is_wandb_path, offline_files, read_offline, read_online


@dataclasses.dataclass(frozen=True)
class LoadProblem:
    """One line on a run that is not, or not wholly, in the comparison."""

    source: str
    text: str
    is_excluded: bool

    def __str__(self) -> str:
        return escape_control(f"{self.source}: {self.text}")


def load_runs(sources: Sequence[str]) -> tuple[list[RunData], list[LoadProblem]]:
    """The runs that can be read, with names of their own, and what is wrong with these and the others."""
    runs: list[RunData] = []
    problems: list[LoadProblem] = []
    for source in sources:
        try:
            run = load_run(source)
            duplicate = next((loaded_run for loaded_run in runs if loaded_run.run_id == run.run_id), None)
            if duplicate is not None:
                raise RunReadError(f"same run id as {duplicate.source} ({run.run_id}): the same run, or a copy of it")
        except RunReadError as error:
            problems.append(LoadProblem(source, f"{error}; left out", is_excluded=True))
            continue
        runs.append(run)
        problems += [LoadProblem(source, note, is_excluded=False) for note in run.notes]
    return disambiguate_names(runs), problems


def load_run(source: str) -> RunData:
    """The run of a run folder, a W&B file or folder, or a path on the W&B server; RunReadError where there is none."""
    path = Path(source)
    if (path / "run.json").exists() or (path / "metrics.jsonl").exists():
        return read_folder(path)
    if path.exists():
        files = offline_files(path)
        if not files:
            raise RunReadError("holds neither run.json and metrics.jsonl nor a W&B run")
        return read_offline(source, files)
    if not is_wandb_path(source):
        raise RunReadError("no such run folder: expected a run folder, an offline W&B folder, or entity/project/run_id")
    return read_online(source)


def disambiguate_names(runs: list[RunData]) -> list[RunData]:
    """The runs, those that share a name told apart by their seed, or by their id where a seed is there twice."""
    seeds: dict[str, list[Any]] = {}
    for run in runs:
        seeds.setdefault(run.name, []).append(run.get("settings.train.seed"))

    def unique_name(run: RunData) -> str:
        seeds_of_name = seeds[run.name]
        if len(seeds_of_name) == 1:
            return run.name
        are_distinct = len(set(seeds_of_name)) == len(seeds_of_name)
        return f"{run.name} (seed {run.get('settings.train.seed')})" if are_distinct else f"{run.name} ({run.run_id})"

    return [dataclasses.replace(run, name=unique_name(run)) for run in runs]
