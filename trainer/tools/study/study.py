"""Many runs to choose a method and a learning rate by: which there are, running them, and the table they come to."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.config.run_metadata import read_run_metadata
from trainer.config.settings import Settings, fields_fixed_on_resume
from trainer.distributed.launch_environment import without_launcher
from trainer.report.full_vs_lora import best_loss
from trainer.report.run_data import RunData, RunReadError, read_folder
from trainer.report.seed_groups import MeanStd, SeedGroup, group_by_seed, welch_difference

LAUNCH_FOLDER = Path(__file__).parents[3] / "launch"
METHODS = {
    "full": ("--mode", "full"),
    "lora": ("--mode", "lora"),
    "dora": ("--mode", "lora", "--adapter", "dora"),
    "rslora": ("--mode", "lora", "--adapter", "rslora"),
    "pissa": ("--mode", "lora", "--adapter", "pissa"),
    "lora-nf4": ("--mode", "lora", "--quant", "nf4"),
    "lora-int8": ("--mode", "lora", "--quant", "int8"),
}
RESERVED_FLAGS = (
    "--mode",
    "--adapter",
    "--quant",
    "--seed",
    "--output-dir",
    "--run-name",
    "--resume",
    "--lora-rank",
)  # set per trial
DEFAULT_ARGV = ("--num-samples", "0", "--save-every", "never")  # what the passed flags may override


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Which trials there are. Factors multiply full training's learning rate: --lr, or that of the preset."""

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    lora_ranks: tuple[int, ...]  #: of `lora`; the other adapters take the first
    full_factors: tuple[float, ...]
    lora_factors: tuple[float, ...]  #: of `lora`
    other_factors: tuple[float, ...]  #: of the other adapters

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise UserError(f"--methods {method}: expected some of {', '.join(METHODS)}")
        for flag, values in (
            ("--methods", self.methods), ("--seeds", self.seeds), ("--ranks", self.lora_ranks),
            ("--full-factors", self.full_factors), ("--lora-factors", self.lora_factors),
            ("--other-factors", self.other_factors),
        ):  # fmt: skip
            if not values or len(set(values)) < len(values):
                raise UserError(f"{flag}: expected one value or more, none of them twice")


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One run of launch/train.py."""

    name: str  #: of its folder and its run
    folder: Path
    argv: tuple[str, ...]  #: its flags

    @property
    def settings(self) -> Settings:
        """What the flags come to; UserError on a mistake in them."""
        return cli.parse_args(self.argv).settings


def build_runs(search_space: SearchSpace, output_dir: Path, extra_argv: Sequence[str]) -> list[StudyRun]:
    """Every trial, one seed after the other, so that what is done after a while is a whole grid of fewer seeds."""
    for argument in extra_argv:
        if argument.partition("=")[0] in RESERVED_FLAGS:
            raise UserError(
                f"{argument}: the study sets it for each of its runs; expected other flags of launch/train.py"
            )
    base_lr = cli.parse_args(["--mode", "full", *extra_argv]).settings.train.lr
    study_runs = [
        _build_run(method, lora_rank, factor * base_lr, seed, output_dir, extra_argv)
        for seed in search_space.seeds
        for method in search_space.methods
        for lora_rank in {"full": (None,), "lora": search_space.lora_ranks}.get(method, search_space.lora_ranks[:1])
        for factor in {"full": search_space.full_factors, "lora": search_space.lora_factors}.get(
            method, search_space.other_factors
        )
    ]
    for study_run in study_runs:
        _ = study_run.settings  # a mistake is found before the first of them runs
    return study_runs


def _build_run(
    method: str, lora_rank: int | None, lr: float, seed: int, output_dir: Path, extra_argv: Sequence[str]
) -> StudyRun:
    name = "-".join([method, *([f"r{lora_rank}"] if lora_rank else []), f"lr{lr:.3g}", f"s{seed}"])
    rank_argv = ["--lora-rank", str(lora_rank)] if lora_rank else []
    argv = [*METHODS[method], *DEFAULT_ARGV, *extra_argv, *rank_argv, "--lr", f"{lr:.6g}", "--seed", str(seed)]
    folder = output_dir / name
    return StudyRun(name=name, folder=folder, argv=(*argv, "--output-dir", str(folder), "--run-name", name))


# --- running ---


def execute_runs(study_runs: Sequence[StudyRun], workers: int, log: Callable[[str], None]) -> list[str]:
    """Run those that are not finished, `at_once` side by side; returns one line for each that failed.

    A trial that was cut off is gone on with. UserError, before any of them runs, where a folder holds another run.
    """
    pending_runs = [study_run for study_run in study_runs if not _is_finished(study_run)]
    log(f"{len(study_runs)} runs, {len(study_runs) - len(pending_runs)} of them finished before")
    num_threads = str(max(1, len(os.sched_getaffinity(0)) // workers))
    env = {"OMP_NUM_THREADS": num_threads, **without_launcher(os.environ)}

    def execute(study_run: StudyRun) -> str | None:
        resume_argv = ["--resume"] if (study_run.folder / "run.json").exists() else []
        command = [sys.executable, str(LAUNCH_FOLDER / "train.py"), *study_run.argv, *resume_argv]
        process = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if process.returncode == 0:
            log(_describe_result(study_run))
            return None
        last_line = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        log(f"{study_run.name}: failed: {last_line}")
        return f"{study_run.name}: {last_line}"

    with ThreadPoolExecutor(workers) as pool:
        return [line for line in pool.map(execute, pending_runs) if line]


def _is_finished(study_run: StudyRun) -> bool:
    """Whether the folder holds this very trial, finished; UserError where it holds another."""
    metadata_path = study_run.folder / "run.json"
    if not metadata_path.exists():
        return False
    stored_settings = read_run_metadata(metadata_path)["settings"]
    stored_fields, current_fields = (fields_fixed_on_resume(settings) | {"data": settings.data.data,
        "val_data": settings.data.val_data}
                   for settings in (Settings.from_dict(stored_settings), study_run.settings))  # fmt: skip
    for name in current_fields:
        if stored_fields.get(name) != current_fields[name]:
            raise UserError(
                f"{study_run.folder} holds a run with {name} {stored_fields.get(name)}, now it is "
                f"{current_fields[name]}; "
                "name another folder with --output-dir"
            )
    run = _try_read(study_run.folder)
    return run is not None and run.is_finished


def _try_read(folder: Path) -> RunData | None:
    try:
        return read_folder(folder)
    except RunReadError:
        return None


def _describe_result(study_run: StudyRun) -> str:
    run = _try_read(study_run.folder)
    return (
        f"{study_run.name}: validation loss {run.best_eval['loss']:.4f}"
        if run and run.best_eval
        else f"{study_run.name}: done"
    )


# --- the table ---


def read_groups(folders: Iterable[Path]) -> list[SeedGroup]:
    """The finished runs of these folders by what they have in common, the seed apart."""
    method_groups = group_by_seed(
        [run for folder in folders if (run := _try_read(folder)) is not None and run.is_finished and run.best_eval]
    )
    return sorted(method_groups, key=lambda group: (*_sort_key(group), _lr(group)))


def _sort_key(group: SeedGroup) -> tuple[int, int]:
    return list(METHODS).index(method) if (method := _method_name(group)) in METHODS else len(METHODS), _lora_rank(
        group
    ) or 0


def _method_name(group: SeedGroup) -> str:
    run = group.runs[0]
    name = "full" if run.mode == "full" else str(run.get("settings.lora.adapter"))
    return f"{name}-{run.get('settings.model.quant')}" if run.get("settings.model.quant") else name


def _lora_rank(group: SeedGroup) -> int | None:
    return None if group.mode == "full" else int(group.runs[0].get("settings.lora.rank"))


def _lr(group: SeedGroup) -> float:
    return float(group.runs[0].get("resolved.lr"))


def best_by_method(method_groups: Sequence[SeedGroup]) -> dict[str, SeedGroup]:
    """{family: its group with the lowest mean validation loss}."""
    best: dict[str, SeedGroup] = {}
    for group in sorted(method_groups, key=lambda group: best_loss(group).mean):
        best.setdefault(_method_name(group), group)
    return best


def markdown_table(method_groups: Sequence[SeedGroup]) -> list[str]:
    """The lines of a Markdown table, the best of each family in bold, and what is to be known beside it."""
    best = best_by_method(method_groups)
    full = best_loss(best["full"]) if "full" in best else None
    lines = [
        "| way | rank | learning rate | trainable | validation loss | seeds | to the best full |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for group in method_groups:
        loss, bold = best_loss(group), "**" if best[_method_name(group)] is group else ""
        cells = [
            f"{bold}{_method_name(group)}{bold}", str(_lora_rank(group) or "-"), f"{_lr(group):.3g}",
            f"{group.runs[0].get('model.trainable'):,}", f"{bold}{_format_loss(loss)}{bold}", str(loss.n),
            _format_gap(loss, full),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *_edge_notes(method_groups, best)]


def _format_loss(loss: MeanStd) -> str:
    return f"{loss.mean:.4f}" + (f" ± {loss.sd:.4f}" if loss.sd is not None else "")


def _format_gap(loss: MeanStd, full: MeanStd | None) -> str:
    """The difference to the best full, with a star where it exceeds the spread between seeds (`WELCH_RULE`)."""
    if full is None or loss == full:
        return "-"
    mean_difference = welch_difference(loss, full)
    return f"{mean_difference.difference:+.4f}" + ("*" if mean_difference.exceeds else "")


def _edge_notes(method_groups: Sequence[SeedGroup], best: dict[str, SeedGroup]) -> list[str]:
    """A line for each family whose best rate is the smallest or the largest of those that were tried."""
    lines = ["± is one sample standard deviation over seeds; * a difference that exceeds the spread between seeds."]
    for method, group in best.items():
        lrs = sorted(
            {
                _lr(candidate)
                for candidate in method_groups
                if _method_name(candidate) == method and _lora_rank(candidate) == _lora_rank(group)
            }
        )
        if len(lrs) > 1 and _lr(group) in (lrs[0], lrs[-1]):
            side = "smallest" if _lr(group) == lrs[0] else "largest"
            lines.append(f"{method}: {_lr(group):.3g} is the {side} rate tried; a better one may lie beyond it.")
    return lines
