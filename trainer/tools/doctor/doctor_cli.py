"""`launch/doctor.py`: all checks in order, printed or as JSON; the exit code says whether there was an error."""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.config.cli import Request
from trainer.data.dataset import Prepared, prepare
from trainer.distributed.process_group import planned_world
from trainer.model.build import Model, build, load_config
from trainer.tools.doctor import data_checks, environment_checks, memory_checks, plan_checks
from trainer.tools.doctor.check_result import ERROR, LEVELS, OK, Check, fine, guarded, size
from trainer.tools.doctor.smoke_test import Rehearsal, costs
from trainer.tools.finders.files import LEFT
from trainer.tracking.console import console
from trainer.tracking.loggers import check
from trainer.training.run_plan import Plan, check_early, make_plan

COLOURS = {OK: "green", "warning": "yellow", ERROR: "red bold"}
COLUMNS = ("weights", "gradients", "optimizer", "activations", "logits", "peak")


class Doctor:
    """One visit: collects the checks of each section and shows them as they come."""

    def __init__(self, request: Request, *, ranks: int, quiet: bool):
        self.request = request
        self.ranks = ranks
        self.console = None if quiet else console()
        self.found: list[tuple[str, Check]] = []
        self.plan: Plan | None = None
        self.model: Model | None = None
        self.data: Prepared | None = None
        self.table: list[memory_checks.Row] = []

    def section(self, title: str, checks: Iterable[Check]) -> None:
        """Take the checks of a section, one at a time; a mistake of the user's becomes one of them."""
        self.show(f"\n[bold]{title}[/bold]")
        for one in guarded(title, lambda: checks):
            self.found.append((title, one))
            colour = COLOURS[one.level]
            self.show(f"  [{colour}]{one.level:<8}[/{colour}] {one.what:<13} {_plain(one.found)}")
            if one.remedy:
                self.show(f"  {'':<8} {'remedy':<13} {_plain(one.remedy)}")

    def show(self, line: str) -> None:
        """Print a line, unless only JSON is asked for."""
        if self.console is not None:
            self.console.print(line, soft_wrap=True)

    def decide(self) -> Iterable[Check]:
        """Settings, data and model of the run, as train.py would resolve them."""
        settings = self.request.settings
        world = planned_world(self.ranks)
        check_early(settings, world)
        check(settings.output)
        yield fine("settings", " ".join(settings.overridden) or "nothing overridden")
        yield _folder(settings.run_folder, resumed=self.request.resume is not None)

        def say(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        self.data = prepare(
            settings.data, model=settings.model.model, global_batch=settings.train.global_batch, say=say
        )
        yield fine("data", f"{self.data.facts['source']}: read and tokenised")
        self.model = build(settings, on_meta=True)
        self.plan = make_plan(settings, world, self.data, self.model.facts, load_config(settings.model))
        yield fine("plan", f"{self.plan.settings.run_name} on {self.ranks} rank{'s' * (self.ranks > 1)}")

    def show_memory(self) -> None:
        """The table of ZeRO files; the chosen one is marked."""
        self.show("\n  per rank       " + " ".join(f"{name:>11}" for name in COLUMNS))
        for row in self.table:
            values = row.as_json()
            cells = " ".join(f"{size(values[name]):>11}" for name in COLUMNS)
            host = f"  {size(row.host)} of the host's" if row.host else ""
            mark = "  <- chosen" if row.chosen else ""
            self.show(f"  {row.name:<14} {cells}{host}{'' if row.fits else '  does not fit'}{mark}")

    def as_json(self, estimates: dict[str, Any]) -> dict[str, Any]:
        """Everything for machines."""
        return {
            "format": 1,
            "plan": dict(self.plan.lines()) if self.plan else None,
            "checks": [{"section": section, **vars(one)} for section, one in self.found],
            "memory": [row.as_json() for row in self.table],
            "measured": estimates,
            **{level: sum(one.level == level for _, one in self.found) for level in LEVELS},
        }


def run(
    request: Request, *, environ: Mapping[str, str], ranks: int | None, as_json: bool, rehearse: bool, limit: float
) -> int:  # fmt: skip
    """All sections; 0, or 1 where there was an error."""
    ranks = ranks or (torch.cuda.device_count() if torch.cuda.is_available() else 1)
    doctor = Doctor(request, ranks=ranks, quiet=as_json)
    doctor.section("environment", environment_checks.check(ranks, environ))
    doctor.section("run", doctor.decide())
    measured: dict[str, Any] = {}
    plan, model, data = doctor.plan, doctor.model, doctor.data
    if plan is not None and model is not None and data is not None:
        doctor.section("data", data_checks.check(plan.settings, data))
        doctor.section("model", plan_checks.check_model(plan, model))
        doctor.section("steps", plan_checks.check_course(plan))
        doctor.table = memory_checks.rows(plan, int(data.train.lengths().max()))
        doctor.section("memory, by formula", memory_checks.check(plan, doctor.table))
        doctor.show_memory()
        chosen = next(row for row in doctor.table if row.chosen)
        if rehearse and chosen.fits:
            rehearsal = Rehearsal(request, plan, data, limit=limit, near=_near(Path(plan.settings.run_folder)))
            doctor.section("rehearsal", rehearsal.check())
            if rehearsal.measured is not None:
                doctor.section("cost", costs(plan, data, rehearsal.measured, chosen.device))
                measured = vars(rehearsal.measured)
    result = doctor.as_json(measured)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        doctor.show(f"\n{result[OK]} ok, {result['warning']} warnings, {result[ERROR]} errors")
    return 1 if result[ERROR] else 0


def _near(folder: Path) -> Path:
    """Where the rehearsal's files go: on the disk of the run folder, which is what will be filled."""
    return next(place for place in folder.absolute().parents if place.exists())


def _folder(folder: str, *, resumed: bool) -> Check:
    path = Path(folder)
    if not resumed and path.is_dir() and any(one.name not in LEFT for one in path.iterdir()):
        return Check(
            level=ERROR, what="run folder", found=f"{folder} is not empty",
            remedy="another --out, or --resume to go on with that run",
        )  # fmt: skip
    return fine("run folder", folder)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
