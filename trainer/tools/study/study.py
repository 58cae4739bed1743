"""Many runs to choose a method and a learning rate by: which there are, running them, and the table they come to."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.config.schema import Settings, scientific
from trainer.report.full_vs_lora import best_loss
from trainer.report.paired_interval import Group, Spread, difference, groups
from trainer.report.run_data import Run, Unreadable, read_folder

LAUNCH = Path(__file__).parents[3] / "launch"
FAMILIES = {
    "full": ("--mode", "full"),
    "lora": ("--mode", "lora"),
    "dora": ("--mode", "lora", "--adapter", "dora"),
    "rslora": ("--mode", "lora", "--adapter", "rslora"),
    "pissa": ("--mode", "lora", "--adapter", "pissa"),
    "lora-nf4": ("--mode", "lora", "--quant", "nf4"),
    "lora-int8": ("--mode", "lora", "--quant", "int8"),
}
OWN = ("--mode", "--adapter", "--quant", "--seed", "--out", "--run-name", "--resume", "--lora-rank")  # set per trial
COMMON = ("--samples", "0", "--save-every", "never")  # what the passed flags may override


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Which trials there are. Factors multiply full training's learning rate: --lr, or that of the preset."""

    families: tuple[str, ...]
    seeds: tuple[int, ...]
    ranks: tuple[int, ...]  #: of `lora`; the other adapters take the first
    full_factors: tuple[float, ...]
    lora_factors: tuple[float, ...]  #: of `lora`
    other_factors: tuple[float, ...]  #: of the other adapters

    def __post_init__(self) -> None:
        for family in self.families:
            if family not in FAMILIES:
                raise UserError(f"--ways {family}: expected some of {', '.join(FAMILIES)}")
        for flag, values in (
            ("--ways", self.families), ("--seeds", self.seeds), ("--ranks", self.ranks),
            ("--full-factors", self.full_factors), ("--lora-factors", self.lora_factors),
            ("--other-factors", self.other_factors),
        ):  # fmt: skip
            if not values or len(set(values)) < len(values):
                raise UserError(f"{flag}: expected one value or more, none of them twice")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of launch/train.py."""

    name: str  #: of its folder and its run
    folder: Path
    words: tuple[str, ...]  #: its flags

    @property
    def settings(self) -> Settings:
        """What the flags come to; UserError on a mistake in them."""
        return cli.read(self.words).settings


def trials(grid: Grid, out: Path, passed: Sequence[str]) -> list[Trial]:
    """Every trial, one seed after the other, so that what is done after a while is a whole grid of fewer seeds."""
    for word in passed:
        if word.partition("=")[0] in OWN:
            raise UserError(f"{word}: the study sets it for each of its runs; expected other flags of launch/train.py")
    rate = cli.read(["--mode", "full", *passed]).settings.train.lr
    made = [
        _trial(family, rank, factor * rate, seed, out, passed)
        for seed in grid.seeds
        for family in grid.families
        for rank in {"full": (None,), "lora": grid.ranks}.get(family, grid.ranks[:1])
        for factor in {"full": grid.full_factors, "lora": grid.lora_factors}.get(family, grid.other_factors)
    ]
    for trial in made:
        _ = trial.settings  # a mistake is found before the first of them runs
    return made


def _trial(family: str, rank: int | None, rate: float, seed: int, out: Path, passed: Sequence[str]) -> Trial:
    name = "-".join([family, *([f"r{rank}"] if rank else []), f"lr{rate:.3g}", f"s{seed}"])
    ranked = ["--lora-rank", str(rank)] if rank else []
    words = [*FAMILIES[family], *COMMON, *passed, *ranked, "--lr", f"{rate:.6g}", "--seed", str(seed)]
    folder = out / name
    return Trial(name=name, folder=folder, words=(*words, "--out", str(folder), "--run-name", name))


# --- running ---


def carry_out(made: Sequence[Trial], at_once: int, say: Callable[[str], None]) -> list[str]:
    """Run those that are not finished, `at_once` side by side; returns one line for each that failed.

    A trial that was cut off is gone on with. UserError, before any of them runs, where a folder holds another run.
    """
    waiting = [trial for trial in made if not _finished(trial)]
    say(f"{len(made)} runs, {len(made) - len(waiting)} of them finished before")
    threads = str(max(1, len(os.sched_getaffinity(0)) // at_once))
    env = {"OMP_NUM_THREADS": threads, **os.environ}

    def work(trial: Trial) -> str | None:
        again = ["--resume"] if (trial.folder / "run.json").exists() else []
        command = [sys.executable, str(LAUNCH / "train.py"), *trial.words, *again]
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode == 0:
            say(_told(trial))
            return None
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        say(f"{trial.name}: failed: {last}")
        return f"{trial.name}: {last}"

    with ThreadPoolExecutor(at_once) as pool:
        return [line for line in pool.map(work, waiting) if line]


def _finished(trial: Trial) -> bool:
    """Whether the folder holds this very trial, finished; UserError where it holds another."""
    try:
        stored = json.loads((trial.folder / "run.json").read_text())["settings"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError) as problem:
        raise UserError(
            f"{trial.folder}: its run.json cannot be read ({problem}); name another folder with --out"
        ) from None
    before, now = (scientific(one) | {"data": one.data.data, "val_data": one.data.val_data}
                   for one in (Settings.from_dict(stored), trial.settings))  # fmt: skip
    for name in now:
        if before.get(name) != now[name]:
            raise UserError(
                f"{trial.folder} holds a run with {name} {before.get(name)}, now it is {now[name]}; "
                "name another folder with --out"
            )
    run = _read(trial.folder)
    return run is not None and run.finished


def _read(folder: Path) -> Run | None:
    try:
        return read_folder(folder)
    except Unreadable:
        return None


def _told(trial: Trial) -> str:
    run = _read(trial.folder)
    return f"{trial.name}: validation loss {run.best['loss']:.4f}" if run and run.best else f"{trial.name}: done"


# --- the table ---


def read(folders: Iterable[Path]) -> list[Group]:
    """The finished runs of these folders by what they have in common, the seed apart."""
    found = groups([run for folder in folders if (run := _read(folder)) is not None and run.finished and run.best])
    return sorted(found, key=lambda group: (*_place(group), _rate(group)))


def _place(group: Group) -> tuple[int, int]:
    return list(FAMILIES).index(family) if (family := _family(group)) in FAMILIES else len(FAMILIES), _rank(group) or 0


def _family(group: Group) -> str:
    run = group.runs[0]
    name = "full" if run.mode == "full" else str(run.fact("settings.lora.adapter"))
    return f"{name}-{run.fact('settings.model.quant')}" if run.fact("settings.model.quant") else name


def _rank(group: Group) -> int | None:
    return None if group.mode == "full" else int(group.runs[0].fact("settings.lora.rank"))


def _rate(group: Group) -> float:
    return float(group.runs[0].fact("resolved.lr"))


def best_of(found: Sequence[Group]) -> dict[str, Group]:
    """{family: its group with the lowest mean validation loss}."""
    best: dict[str, Group] = {}
    for group in sorted(found, key=lambda group: best_loss(group).mean):
        best.setdefault(_family(group), group)
    return best


def table(found: Sequence[Group]) -> list[str]:
    """The lines of a Markdown table, the best of each family in bold, and what is to be known beside it."""
    best = best_of(found)
    full = best_loss(best["full"]) if "full" in best else None
    lines = [
        "| way | rank | learning rate | trainable | validation loss | seeds | to the best full |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for group in found:
        loss, bold = best_loss(group), "**" if best[_family(group)] is group else ""
        cells = [
            f"{bold}{_family(group)}{bold}", str(_rank(group) or "-"), f"{_rate(group):.3g}",
            f"{group.runs[0].fact('model.trainable'):,}", f"{bold}{_spread(loss)}{bold}", str(loss.n),
            _gap(loss, full),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *_edges(found, best)]


def _spread(loss: Spread) -> str:
    return f"{loss.mean:.4f}" + (f" ± {loss.sd:.4f}" if loss.sd is not None else "")


def _gap(loss: Spread, full: Spread | None) -> str:
    """The difference to the best full, with a star where it exceeds the spread between seeds (`report.seeds.RULE`)."""
    if full is None or loss == full:
        return "-"
    gap = difference(loss, full)
    return f"{gap.difference:+.4f}" + ("*" if gap.exceeds else "")


def _edges(found: Sequence[Group], best: dict[str, Group]) -> list[str]:
    """A line for each family whose best rate is the smallest or the largest of those that were tried."""
    lines = ["± is one sample standard deviation over seeds; * a difference that exceeds the spread between seeds."]
    for family, group in best.items():
        rates = sorted({_rate(other) for other in found if _family(other) == family and _rank(other) == _rank(group)})
        if len(rates) > 1 and _rate(group) in (rates[0], rates[-1]):
            side = "smallest" if _rate(group) == rates[0] else "largest"
            lines.append(f"{family}: {_rate(group):.3g} is the {side} rate tried; a better one may lie beyond it.")
    return lines
