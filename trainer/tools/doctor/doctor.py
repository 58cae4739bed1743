"""`launch/doctor.py`: all checks in order, printed or as JSON; the exit code says whether there was an error."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from trainer.config.cli import CliArgs
from trainer.config.errors import UserError
from trainer.distributed.process_group import DistContext, simulated_context
from trainer.tools.doctor import checks
from trainer.tools.doctor.checks import ERROR, LEVELS, OK, WARNING, Check, format_bytes, judge
from trainer.tools.doctor.prove import prove
from trainer.tools.trial_engine import FINDER_FILES, plan_run
from trainer.tracking.console import make_console
from trainer.training.run_folder import is_unused

COLOURS = dict(zip(LEVELS, ("green", "yellow", "red bold"), strict=True))
MEMORY_COLUMNS = ("weights", "gradients", "optimizer", "activations", "passing", "peak")


def run_doctor(
    cli_args: CliArgs,
    *,
    world_size: int | None,
    gpu_memory_bytes: int | None = None,
    as_json: bool,
    proof_seconds: float | None = None,
) -> int:
    """All sections; 0, or 1 where there was an error.

    `world_size`: ranks that the run will have (None: one for each GPU of this machine); `proof_seconds`: in which every
    ZeRO stage and way to run steps is held against a plain loop (None: there is no proof).

    For GPUs that are planned for and not here, what this machine has is not looked at.
    """
    dist_context = simulated_context(world_size or max(1, torch.cuda.device_count()), gpu_memory_bytes=gpu_memory_bytes)
    console = None if as_json else make_console()
    all_checks: list[dict[str, str]] = []

    def print_line(line: str) -> None:
        if console is not None:
            console.print(line, soft_wrap=True)

    def add(title: str, check: Check) -> None:
        all_checks.append({"section": title, **check._asdict()})
        colour = COLOURS[check.level]
        print_line(f"  [{colour}]{check.level:<8}[/{colour}] {check.name:<13} {escape(check.message)}")
        if check.remedy:
            print_line(f"  {'':<8} {'remedy':<13} {escape(check.remedy)}")

    def add_section(title: str, results: Iterable[Check]) -> None:
        print_line(f"\n[bold]{title}[/bold]")
        try:
            for check in results:
                add(title, check)
        except UserError as error:
            message, _, remedy = str(error).partition("; ")
            add(title, Check(ERROR, title, message, remedy))

    run: dict[str, Any] = {}  # plan and data, once the settings have passed
    memory_table: list[dict[str, Any]] = []
    if gpu_memory_bytes is None:
        add_section("environment", checks.check_environment(dist_context.world_size))
    add_section("run", _resolve_run(cli_args, dist_context, run))
    if run:
        plan, data = run["plan"], run["data"]
        add_section("data", checks.check_data(data))
        memory_table = checks.build_memory_table(plan, int(data.train.lengths().max()))
        add_section("memory, counted", checks.check_memory(plan, memory_table))
        print_line("\n  per rank       " + " ".join(f"{name:>11}" for name in MEMORY_COLUMNS))
        for row in memory_table:
            cells = " ".join(f"{format_bytes(row[name]):>11}" for name in MEMORY_COLUMNS)
            notes = f"  {format_bytes(row['host'])} of the host's" if row["host"] else ""
            notes += "  does not fit" * (not row["fits"]) + "  <- chosen" * row["chosen"]
            print_line(f"  {row['ds_config']:<14} {cells}{notes}")
        if proof_seconds is not None:
            add_section(f"proof in {plan.precision}", prove(plan, data, proof_seconds))
    counts = {level: sum(check["level"] == level for check in all_checks) for level in LEVELS}
    if as_json:
        summary = dict(run["plan"].summary_lines()) if run else None
        content = {"format": 2, "plan": summary, "checks": all_checks, "memory": memory_table}
        print(json.dumps({**content, **counts}, indent=1))
    print_line("\n{ok} ok, {warning} warnings, {error} errors".format(**counts))
    return int(counts[ERROR] > 0)


def _resolve_run(cli_args: CliArgs, dist_context: DistContext, run: dict[str, Any]) -> Iterator[Check]:
    """The plan of the run, as train.py would make it, and its data; they are left in `run`."""
    folder = Path(cli_args.settings.run_folder)
    is_used = cli_args.resume is None and not is_unused(folder, FINDER_FILES)
    message = f"{folder}{' is not empty' * is_used}"
    yield judge(is_used, ERROR, "run folder", message, "another --output-dir, or --resume to go on with that run")
    run["plan"], run["data"] = plan_run(cli_args.settings, dist_context)
    for name, text in run["plan"].summary_lines():
        yield Check(WARNING if name == "warning" else OK, name, text)
