"""`launch/doctor.py`: all checks in order, printed or as JSON; the exit code says whether there was an error."""

import json
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from trainer.config.cli import CliArgs
from trainer.config.errors import UserError
from trainer.data.dataset import PreparedDataset, prepare
from trainer.distributed.process_group import DistContext, simulated_context
from trainer.model.build import TrainableModel, build_model, get_max_positions, load_config
from trainer.tools.doctor import data_checks, environment_checks, memory_checks, plan_checks
from trainer.tools.doctor.check_result import ERROR, LEVELS, CheckResult, format_bytes, make_result, ok_result
from trainer.tools.doctor.prove import Proof
from trainer.tools.doctor.smoke_test import SmokeTest, estimate_costs
from trainer.tools.finders.files import FINDER_FILES, PROOF_FILE
from trainer.tracking.console import make_console
from trainer.tracking.tensorboard_logger import check_loggers
from trainer.training.plan_validation import validate_early
from trainer.training.run_folder import is_unused
from trainer.training.run_plan import RunPlan, make_plan

COLOURS = dict(zip(LEVELS, ("green", "yellow", "red bold"), strict=True))
MEMORY_COLUMNS = ("weights", "gradients", "optimizer", "activations", "passing", "peak")


class DoctorReport:
    """One visit: collects the checks of each section and shows them as they come."""

    def __init__(self, cli_args: CliArgs, dist_context: DistContext, *, quiet: bool):
        self.cli_args = cli_args
        self.dist_context = dist_context
        self.console = None if quiet else make_console()
        self.results: list[tuple[str, CheckResult]] = []
        self.plan: RunPlan | None = None
        self.model: TrainableModel | None = None
        self.data: PreparedDataset | None = None
        self.memory_table: list[dict[str, Any]] = []

    def add_section(self, title: str, checks: Iterable[CheckResult]) -> None:
        """Take the checks of a section, one at a time; a mistake of the user's becomes one of them."""
        self.print_line(f"\n[bold]{title}[/bold]")
        try:
            for result in checks:
                self._add(title, result)
        except UserError as error:
            message, _, remedy = str(error).partition("; ")
            self._add(title, CheckResult(ERROR, title, message, remedy))

    def _add(self, title: str, result: CheckResult) -> None:
        self.results.append((title, result))
        colour = COLOURS[result.level]
        self.print_line(f"  [{colour}]{result.level:<8}[/{colour}] {result.name:<13} {escape(result.message)}")
        if result.remedy:
            self.print_line(f"  {'':<8} {'remedy':<13} {escape(result.remedy)}")

    def print_line(self, line: str) -> None:
        """Print a line, unless only JSON is asked for."""
        if self.console is not None:
            self.console.print(line, soft_wrap=True)

    def resolve_run(self) -> Iterable[CheckResult]:
        """Settings, data and model of the run, as train.py would resolve them."""
        settings = self.cli_args.settings
        dist_context = self.dist_context
        validate_early(settings, dist_context)
        check_loggers(settings.output)
        yield ok_result("settings", " ".join(settings.overridden) or "nothing overridden")
        yield _check_run_folder(settings.run_folder, is_resumed=self.cli_args.resume is not None)
        model_config = load_config(settings.model)
        self.data = prepare(
            settings.data,
            model=settings.model.model,
            global_batch=settings.train.global_batch,
            max_positions=get_max_positions(model_config),
            log=partial(print, file=sys.stderr, flush=True),
        )
        yield ok_result("data", f"{self.data.metadata['source']}: read and tokenised")
        self.model = build_model(settings, on_meta=True)
        self.plan = make_plan(settings, dist_context, self.data, self.model.metadata, model_config)
        world_size = dist_context.world_size
        yield ok_result("plan", f"{self.plan.settings.run_name} on {world_size} rank{'s' * (world_size > 1)}")

    def print_memory_table(self) -> None:
        """The table of ZeRO files; the chosen one is marked."""
        self.print_line("\n  per rank       " + " ".join(f"{name:>11}" for name in MEMORY_COLUMNS))
        for row in self.memory_table:
            cells = " ".join(f"{format_bytes(row[name]):>11}" for name in MEMORY_COLUMNS)
            host_note = f"  {format_bytes(row['host'])} of the host's" if row["host"] else ""
            notes = host_note + "  does not fit" * (not row["fits"]) + "  <- chosen" * row["chosen"]
            self.print_line(f"  {row['ds_config']:<14} {cells}{notes}")

    def as_json(self, measured_cost: dict[str, Any]) -> dict[str, Any]:
        """Everything for machines."""
        return {
            "format": 1,
            "plan": dict(self.plan.summary_lines()) if self.plan else None,
            "checks": [{"section": section, **vars(result)} for section, result in self.results],
            "memory": self.memory_table,
            "measured": measured_cost,
            **{level: sum(result.level == level for _, result in self.results) for level in LEVELS},
        }


def planned_context(world_size: int | None, gpu_memory_bytes: int | None) -> DistContext:
    """The ranks that the run will have, one for each GPU of this machine where nothing else is said."""
    world_size = world_size or (torch.cuda.device_count() if torch.cuda.is_available() else 1)
    return simulated_context(world_size, gpu_memory_bytes=gpu_memory_bytes)


def run_doctor(
    cli_args: CliArgs,
    dist_context: DistContext,
    *,
    environ: Mapping[str, str],
    as_json: bool,
    limit_seconds: float | None,
    proves: bool = False,
) -> int:
    """All sections; 0, or 1 where there was an error. `limit_seconds`: of the rehearsal; None: there is none.

    For GPUs that are planned for and not here, what this machine has is not looked at. `proves`: in the place of the
    rehearsal every ZeRO stage and way to run steps is held against a plain loop.
    """
    is_elsewhere = dist_context.planned_gpu_bytes is not None
    report = DoctorReport(cli_args, dist_context, quiet=as_json)
    if not is_elsewhere:
        report.add_section("environment", environment_checks.check_environment(dist_context.world_size, environ))
    report.add_section("run", report.resolve_run())
    measured_cost: dict[str, Any] = {}
    plan, model, data = report.plan, report.model, report.data
    if plan is not None and model is not None and data is not None:
        report.add_section("data", data_checks.check_data(plan.settings, data))
        report.add_section("model", plan_checks.check_model(plan, model))
        report.add_section("steps", plan_checks.check_schedule(plan))
        report.memory_table = memory_checks.build_memory_table(plan, int(data.train.lengths().max()))
        report.add_section("memory, counted", memory_checks.check_memory(plan, report.memory_table))
        report.print_memory_table()
        chosen_row = next(row for row in report.memory_table if row["chosen"])
        if limit_seconds is not None and not is_elsewhere:
            if proves:
                _run_proof(report, plan, data, limit_seconds)
            elif chosen_row["fits"]:
                measured_cost = _run_rehearsal(report, plan, data, limit_seconds, chosen_row["peak"])
    result = report.as_json(measured_cost)
    if as_json:
        print(json.dumps(result, indent=1))
    report.print_line("\n{ok} ok, {warning} warnings, {error} errors".format(**result))
    return int(result[ERROR] > 0)


def _run_rehearsal(
    report: DoctorReport, plan: RunPlan, data: PreparedDataset, limit_seconds: float, estimated_bytes: float
) -> dict[str, Any]:
    """The sections of a rehearsal, on the disk of the run folder, which is what will be filled; what it measured."""
    parents = Path(plan.settings.run_folder).absolute().parents
    parent_folder = next(parent for parent in parents if parent.exists())
    smoke_test = SmokeTest(report.cli_args, plan, data, limit_seconds=limit_seconds, parent_folder=parent_folder)
    report.add_section("rehearsal", smoke_test.run_checks())
    if smoke_test.cost is None:
        return {}
    report.add_section("cost", estimate_costs(plan, data, smoke_test.cost, estimated_bytes))
    return vars(smoke_test.cost)


def _run_proof(report: DoctorReport, plan: RunPlan, data: PreparedDataset, limit_seconds: float) -> None:
    """The section of a proof, and its JSON in the run folder."""
    proof = Proof(plan, data, limit_seconds=limit_seconds)
    world_sizes = sorted({1, plan.dist_context.world_size})
    report.add_section(f"proof, {proof.num_steps} steps a row in {plan.precision}", proof.run_checks(world_sizes))
    path = Path(plan.settings.run_folder) / PROOF_FILE
    proof.write(path)
    report.print_line(f"  numbers  {path}")


def _check_run_folder(folder: str, *, is_resumed: bool) -> CheckResult:
    is_used = not is_resumed and not is_unused(Path(folder), FINDER_FILES)
    message = f"{folder} is not empty" if is_used else folder
    remedy = "another --output-dir, or --resume to go on with that run"
    return make_result(is_used, ERROR, "run folder", message, remedy)
