"""`launch/doctor.py`: all checks in order, then the run itself in small, or the proof."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from trainer.config.choices import DS_CONFIG_NAMES
from trainer.config.cli import CliArgs, to_argv
from trainer.config.errors import UserError
from trainer.config.text import list_some
from trainer.distributed import machine
from trainer.distributed.deepspeed_config import read_deepspeed_file
from trainer.distributed.execution import MAX_DIFFERENCE, NUM_WARMUP_CALLS
from trainer.distributed.memory import required_bytes
from trainer.distributed.process_group import DistContext, simulated_context
from trainer.report.run_data import read_folder
from trainer.tools.doctor.checks import ERROR, LEVELS, OK, WARNING, Check, judge
from trainer.tools.doctor.prove import prove
from trainer.tools.processes import Slot, failure_reason, make_slots, start_run
from trainer.tools.trial_engine import plan_run
from trainer.tracking.console import make_console
from trainer.training.run_folder import describe_use
from trainer.training.run_plan import RunPlan

COLOURS = dict(zip(LEVELS, ("green", "yellow", "red bold"), strict=True))
NUM_STEPS = 2  # of a rehearsal before the checkpoint and after it, beside those before CUDA graphs are recorded
CPU_RESUME_TOLERANCE = 1e-5  # relative difference of losses after a resume, where sums may be taken in another order
MEMORY_COLUMNS = ("weights", "gradients", "optimizer", "activations", "passing")


def run_doctor(
    cli_args: CliArgs, *, world_size: int | None, gpu_memory_bytes: int | None = None, proves: bool = False
) -> int:
    """All sections; 0, or 1 where there was an error. `world_size`: ranks that the run will have (None: one for each
    GPU of this machine). For GPUs that are planned for and not here, what this machine has is not looked at."""
    context = simulated_context(world_size or max(1, torch.cuda.device_count()), gpu_memory_bytes=gpu_memory_bytes)
    console, counts, title = make_console(), dict.fromkeys(LEVELS, 0), ""

    def show(check: Check) -> None:
        counts[check.level] += 1
        colour, texts = COLOURS[check.level], (f"{check.name:<13} {check.message}", f"{'remedy':<13} {check.remedy}")
        console.print(f"  [{colour}]{check.level:<8}[/{colour}] {escape(texts[0])}", soft_wrap=True)
        if check.remedy:
            console.print(f"  {'':<8} {escape(texts[1])}", soft_wrap=True)

    try:
        for part in look(cli_args, context, is_here=gpu_memory_bytes is None, proves=proves):
            if isinstance(part, Check):
                show(part)
            elif part.startswith("  "):
                console.print(part, soft_wrap=True)
            else:
                title = part
                console.print(f"\n[bold]{title}[/bold]")
    except UserError as error:
        message, _, remedy = str(error).partition("; ")
        show(Check(ERROR, title, message, remedy))
    console.print("\n{ok} ok, {warning} warnings, {error} errors".format(**counts))
    return int(counts[ERROR] > 0)


def look(cli_args: CliArgs, context: DistContext, *, is_here: bool, proves: bool) -> Iterator[Check | str]:
    """Headings, checks, and the lines of the memory's table, which are indented; UserError where a run is refused."""
    if is_here:
        yield "environment"
        yield check_gpus(context.world_size)
    yield "run"
    folder = Path(cli_args.settings.run_folder)
    problem, _, remedy = ("" if cli_args.resume else describe_use(folder)).partition("; ")
    yield judge(bool(problem), ERROR, "run folder", problem or str(folder), remedy)
    plan, data = plan_run(cli_args.settings, context)
    for name, text in plan.summary_lines():
        yield Check(WARNING if name == "warning" else OK, name, text)
    yield "memory, counted"
    memory, lines = check_memory(plan, int(data.train.lengths().max()))
    yield memory
    yield from ["  ", *lines]
    if proves:
        yield f"proof in {plan.precision}"
        yield from prove(plan, data)
    elif is_here and memory.level != ERROR:
        yield "rehearsal"
        yield from rehearse(cli_args, plan)


def check_gpus(world_size: int) -> Check:
    """Whether this machine has GPUs for the ranks, and torch can use them."""
    if problem := machine.find_gpu_problem(os.environ):
        return Check(ERROR, "GPUs", *problem.split("; ", 1))
    if not torch.cuda.is_available():
        return Check(OK, "GPUs", f"none: runs on {len(os.sched_getaffinity(0))} processor cores")
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    names = list_some((f"{gpu.name} {format_bytes(gpu.total_memory)}" for gpu in gpus), 6)
    remedy = f"start at most {len(gpus)}: deepspeed --num_gpus {len(gpus)}"
    return judge(world_size > len(gpus), ERROR, "GPUs", f"{names} for {world_size} ranks", remedy)


def check_memory(plan: RunPlan, row_length: int) -> tuple[Check, list[str]]:
    """(Whether the plan's ZeRO file fits, the table: a line for every file of this program, and for the plan's own)."""
    context = plan.dist_context
    is_gpu, fitting, peak_bytes = context.device.type == "cuda", [], 0.0
    limit_bytes = (is_gpu and context.least_memory_bytes()) or context.free_host_bytes()
    lines = ["  per rank       " + " ".join(f"{name:>11}" for name in (*MEMORY_COLUMNS, "peak"))]
    files = {name: read_deepspeed_file(name) for name in DS_CONFIG_NAMES}
    for name, file in (files | {plan.deepspeed_file.name: plan.deepspeed_file}).items():
        estimate = plan.estimate_memory(file, row_length=row_length)
        # on the device (for a CPU rank: of memory), all in all; and beside them, where there is a GPU
        device_bytes, host_bytes = required_bytes(estimate, plan.model_info, context.device)
        if fits := device_bytes <= limit_bytes and host_bytes <= context.free_host_bytes():
            fitting.append(name)
        is_chosen = name == plan.deepspeed_file.name
        peak_bytes = device_bytes if is_chosen else peak_bytes
        cells = [format_bytes(getattr(estimate, column)) for column in MEMORY_COLUMNS] + [format_bytes(device_bytes)]
        notes = f"  {format_bytes(host_bytes)} of the host's" if host_bytes else ""
        notes += "  does not fit" * (not fits) + "  <- chosen" * is_chosen
        lines.append(f"  {name:<14} " + " ".join(f"{cell:>11}" for cell in cells) + notes)
    capacity = "a GPU" if is_gpu else "free memory of a rank"
    name = plan.deepspeed_file.name
    message = f"{name}: {format_bytes(peak_bytes)} at most, {format_bytes(limit_bytes)} {capacity}"
    remedy = "lower --micro-batch, pass --activation-checkpointing, or take --mode lora or a smaller model"
    remedy = f"--ds-config {fitting[0]} would fit" if fitting else remedy
    return judge(name not in fitting, ERROR, "memory", message, f"{remedy}; --micro-batch 1 needs the least"), lines


def format_bytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def rehearse(cli_args: CliArgs, plan: RunPlan) -> Iterator[Check]:
    """launch/train.py twice with the user's flags, on the disk of the run folder: a few steps, saved half way, then
    resumed from there, which must give the same losses."""
    context = plan.dist_context
    save_step = NUM_STEPS + (NUM_WARMUP_CALLS + 1 if plan.execution.cuda_graphs else 0)
    slot = Slot(gpus=(), num_threads=context.num_threads, num_cpu_ranks=context.world_size)
    if context.device.type == "cuda":
        (slot,) = make_slots(1, context.world_size)
    parent = next(path for path in Path(plan.settings.run_folder).absolute().parents if path.exists())
    with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=parent) as temp:
        output: dict[str, Any] = {"output_dir": f"{temp}/run", "eval_every": "never", "save_every": str(save_step)}
        output |= {"save_total_limit": 3, "wandb": "disabled", "run_name": "rehearsal"}
        steps = {"max_steps": 2 * save_step, "warmup_steps": 0, "warmup_ratio": 0.0}
        argv, losses = to_argv(cli_args.settings, {"train": steps, "output": output}), []
        for name, more in (("rehearsal", []), ("resume", ["--resume", f"step-{save_step}"])):
            start_time = time.monotonic()
            process = start_run(slot, [*argv, *more], Path(temp))
            process.join()
            seconds = time.monotonic() - start_time
            if process.exitcode:
                reason = failure_reason(Path(temp, "log"), process.exitcode)
                yield Check(ERROR, name, f"failed: {reason}", "the run itself would fail like this")
                return
            run = read_folder(Path(temp, "run"))
            losses.append([*run.steps["loss"][save_step:], run.evals["loss"][-1]])
            if name == "rehearsal":
                first, last, peak = *run.evals["loss"][[0, -1]], format_bytes(run.summary["peak_memory_bytes"])
                message = f"{2 * save_step} steps, evaluations, checkpoints and export in {seconds:.0f} s, "
                message += f"validation loss {first:.4f} to {last:.4f}, {peak} at most on a rank"
                yield Check(OK, name, message)
    difference = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
    # A GPU's attention adds its gradients in any order, and the steps after a resume are eager at first.
    tolerance = MAX_DIFFERENCE[plan.precision] if context.device.type == "cuda" else CPU_RESUME_TOLERANCE
    same = "bit for bit the same" if losses[0] == losses[1] else f"the same within {difference:.0e}"
    remedy = "a resumed run would not be the run that was stopped; report this with the flags"
    yield judge(difference > tolerance, ERROR, "resume", f"from step {save_step}: losses {same}", remedy)
