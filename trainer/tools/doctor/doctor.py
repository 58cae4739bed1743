"""`launch/doctor.py`: all checks in order, printed or as JSON; the exit code says whether there was an error."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from trainer.config.cli import CliArgs
from trainer.config.errors import UserError
from trainer.data.prepare import prepare
from trainer.distributed.process_group import DistContext, simulated_context
from trainer.model.build import build_model, get_max_positions, load_config
from trainer.tools.doctor import checks
from trainer.tools.doctor.checks import ERROR, LEVELS, OK, Check, format_bytes, judge
from trainer.tools.doctor.prove import prove
from trainer.tools.doctor.rehearsal import estimate_costs, rehearse
from trainer.tools.trial_engine import FINDER_FILES
from trainer.tracking.console import make_console
from trainer.tracking.optional_loggers import check_loggers
from trainer.training.run_folder import is_unused
from trainer.training.run_plan import make_plan, validate_early

COLOURS = dict(zip(LEVELS, ("green", "yellow", "red bold"), strict=True))
MEMORY_COLUMNS = ("weights", "gradients", "optimizer", "activations", "passing", "peak")


class Report:
    """The checks of all sections; each is printed as it comes, unless only JSON is asked for."""

    def __init__(self, *, quiet: bool):
        self.console = None if quiet else make_console()
        self.checks: list[dict[str, str]] = []

    def print(self, line: str) -> None:
        if self.console is not None:
            self.console.print(line, soft_wrap=True)

    def add_section(self, title: str, results: Iterable[Check]) -> None:
        """Take the checks of a section, one at a time; a mistake of the user's becomes one of them."""
        self.print(f"\n[bold]{title}[/bold]")
        try:
            for check in results:
                self._add(title, check)
        except UserError as error:
            message, _, remedy = str(error).partition("; ")
            self._add(title, Check(ERROR, title, message, remedy))

    def _add(self, title: str, check: Check) -> None:
        self.checks.append({"section": title, **check._asdict()})
        colour = COLOURS[check.level]
        self.print(f"  [{colour}]{check.level:<8}[/{colour}] {check.name:<13} {escape(check.message)}")
        if check.remedy:
            self.print(f"  {'':<8} {'remedy':<13} {escape(check.remedy)}")


def run_doctor(
    cli_args: CliArgs,
    *,
    world_size: int | None,
    gpu_memory_bytes: int | None = None,
    environ: Mapping[str, str],
    as_json: bool,
    limit_seconds: float | None,
    proves: bool = False,
) -> int:
    """All sections; 0, or 1 where there was an error.

    `world_size`: ranks that the run will have (None: one for each GPU of this machine); `environ`: as the user set it;
    `limit_seconds`: of the rehearsal (None: there is none).

    For GPUs that are planned for and not here, what this machine has is not looked at. `proves`: in the place of the
    rehearsal every ZeRO stage and way to run steps is held against a plain loop.
    """
    world_size = world_size or max(1, torch.cuda.device_count())
    dist_context = simulated_context(world_size, gpu_memory_bytes=gpu_memory_bytes)
    is_elsewhere = gpu_memory_bytes is not None
    report = Report(quiet=as_json)
    if not is_elsewhere:
        report.add_section("environment", checks.check_environment(dist_context.world_size, environ))
    run: dict[str, Any] = {}  # plan, data and model, once the settings have passed
    report.add_section("run", _resolve_run(cli_args, dist_context, run))
    memory_table: list[dict[str, Any]] = []
    measured: dict[str, Any] = {}
    if run:
        plan, data = run["plan"], run["data"]
        report.add_section("data", checks.check_data(plan.settings, data))
        report.add_section("model", checks.check_model(plan, run["model"]))
        report.add_section("steps", checks.check_schedule(plan))
        memory_table = checks.build_memory_table(plan, int(data.train.lengths().max()))
        report.add_section("memory, counted", checks.check_memory(plan, memory_table))
        report.print("\n  per rank       " + " ".join(f"{name:>11}" for name in MEMORY_COLUMNS))
        for row in memory_table:
            cells = " ".join(f"{format_bytes(row[name]):>11}" for name in MEMORY_COLUMNS)
            notes = f"  {format_bytes(row['host'])} of the host's" if row["host"] else ""
            notes += "  does not fit" * (not row["fits"]) + "  <- chosen" * row["chosen"]
            report.print(f"  {row['ds_config']:<14} {cells}{notes}")
        chosen = next(row for row in memory_table if row["chosen"])
        if limit_seconds is not None and not is_elsewhere:
            if proves:
                report.add_section(f"proof in {plan.precision}", prove(plan, data, limit_seconds))
            elif chosen["fits"]:
                report.add_section("rehearsal", rehearse(cli_args, plan, limit_seconds, measured))
                if measured:
                    report.add_section("cost", estimate_costs(plan, data, measured, chosen["peak"]))
    counts = {level: sum(check["level"] == level for check in report.checks) for level in LEVELS}
    if as_json:
        summary = dict(run["plan"].summary_lines()) if run else None
        content = {"format": 1, "plan": summary, "checks": report.checks, "memory": memory_table, "measured": measured}
        print(json.dumps({**content, **counts}, indent=1))
    report.print("\n{ok} ok, {warning} warnings, {error} errors".format(**counts))
    return int(counts[ERROR] > 0)


def _resolve_run(cli_args: CliArgs, dist_context: DistContext, run: dict[str, Any]) -> Iterator[Check]:
    """Settings, data and model of the run, as train.py would resolve them; they are left in `run`."""
    settings = cli_args.settings
    validate_early(settings, dist_context)
    check_loggers(settings.output)
    is_used = cli_args.resume is None and not is_unused(Path(settings.run_folder), FINDER_FILES)
    message = settings.run_folder + " is not empty" * is_used
    yield judge(is_used, ERROR, "run folder", message, "another --output-dir, or --resume to go on with that run")
    model_config = load_config(settings.model)
    data = prepare(
        settings.data,
        model=settings.model.model,
        global_batch=settings.train.global_batch,
        max_positions=get_max_positions(model_config),
        log=partial(print, file=sys.stderr, flush=True),
    )
    model = build_model(settings, on_meta=True)
    plan = make_plan(settings, dist_context, data, model.metadata, model_config)
    run.update(plan=plan, data=data, model=model)
    for name, text in plan.summary_lines():
        yield Check(OK, name, text)
