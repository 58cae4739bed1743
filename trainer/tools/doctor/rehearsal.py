"""The run itself in small, by the program itself: a few steps, saved half way, then resumed from there.

`launch/train.py` is started twice with the user's flags in a temporary folder, on the disk of the run folder. What the
resumed part records must be what the first part did.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config.cli import CliArgs, to_argv
from trainer.config.text import format_duration
from trainer.data.dataset import PreparedDataset
from trainer.distributed.cuda_graphs import MAX_DIFFERENCE, NUM_WARMUP_CALLS
from trainer.tools.doctor.checks import ERROR, OK, WARNING, Check, format_bytes, judge
from trainer.tools.worker_processes import failure_reason, worker_environ
from trainer.training.run_plan import RunPlan

TRAIN_SCRIPT = Path(__file__).parents[3] / "launch" / "train.py"
NUM_STEPS = 2  # before the checkpoint and after it, beside those before CUDA graphs are recorded
CPU_RESUME_TOLERANCE = 1e-5  # relative difference of losses after a resume, where sums may be taken in another order


def rehearse(cli_args: CliArgs, plan: RunPlan, limit_seconds: float, measured: dict[str, Any]) -> Iterator[Check]:
    """Both parts; stops at the first that fails. `measured`: what the first took, for `estimate_costs`."""
    deadline = time.monotonic() + limit_seconds
    num_warmup_steps = NUM_WARMUP_CALLS + 1 if plan.execution.cuda_graphs else 0
    save_step = num_warmup_steps + NUM_STEPS
    num_steps, world_size = 2 * save_step, plan.dist_context.world_size
    parents = Path(plan.settings.run_folder).absolute().parents
    with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=next(path for path in parents if path.exists())) as temp:
        run_folder = Path(temp) / "run"
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={world_size}"] if world_size > 1 else []
        output_flags = {
            "output_dir": str(run_folder),
            "eval_every": "never",
            "save_every": str(save_step),
            "save_total_limit": 3,
            "wandb": "disabled",
            "run_name": "rehearsal",
        }
        train_flags = {"max_steps": num_steps, "warmup_steps": 0, "warmup_ratio": 0.0}
        flags = to_argv(cli_args.settings, {"train": train_flags, "output": output_flags})
        argv = [sys.executable, *launcher, str(TRAIN_SCRIPT), *flags]
        start_time = time.monotonic()
        exit_code, reason = _run_program(argv, Path(temp) / "output", deadline)
        elapsed_seconds = time.monotonic() - start_time
        steps, evals, events = _read_rows(run_folder)
        if exit_code is None:
            message = f"{len(steps)} of {num_steps} steps in {limit_seconds:.0f} s, given up"
            remedy = "allow more time with --limit SECONDS, or leave it out with --no-rehearsal"
            yield Check(WARNING, "rehearsal", message, remedy)
            return
        if exit_code != 0:
            message = f"failed after {len(steps)} steps: {reason}"
            yield Check(ERROR, "rehearsal", message, "the run itself would fail like this")
            return
        losses, val_losses = ([row["loss"] for row in rows] for rows in (steps, evals))
        message = f"{num_steps} steps in {elapsed_seconds:.0f} s, loss {losses[0]:.4f} to {losses[-1]:.4f}"
        yield Check(OK, "train", message)
        fallbacks = [row for row in events if row["event"] == "execution"]
        path = fallbacks[-1]["path"] if fallbacks else plan.execution.path
        if plan.execution.path != "eager":  # how steps really ran, what was verified, and why something was not
            verified = [row["message"] for row in events if row["event"] == "checked"]
            message = "; ".join([path, *verified])
            message += f"; {fallbacks[-1]['message']}" if fallbacks else ""
            remedy = (
                f"the numbers are right; --execution {'eager' if path == 'eager' else 'auto'} asks for nothing else"
            )
            yield judge(bool(fallbacks), WARNING, "execution", message, remedy)
        yield Check(OK, "evaluate", f"validation loss {val_losses[0]:.4f} before, {val_losses[-1]:.4f} after")
        (finished,) = (row for row in events if row["event"] == "finished")
        yield Check(OK, "save", f"checkpoint of {format_bytes(finished['checkpoint_bytes'])}")
        yield Check(OK, "export", f"{format_bytes(finished['export_bytes'])}, {finished['export']}")
        # The first step warms up, too; the time of the first evaluation is all that was before it.
        step_times = [(b["tokens"] - a["tokens"]) / b["tokens_per_second"] for a, b in itertools.pairwise(steps)]
        measured |= {
            "step_seconds": statistics.fmean(step_times[num_warmup_steps:]),
            "overhead_seconds": elapsed_seconds - evals[-1]["time"],
            "eval_seconds_per_token": evals[0]["time"] / evals[0]["eval_tokens"],
            **{name: finished[name] for name in ("checkpoint_bytes", "export_bytes", "peak_memory_bytes")},
        }
        exit_code, reason = _run_program([*argv, "--resume", f"step-{save_step}"], Path(temp) / "output", deadline)
        if exit_code is None:
            yield Check(WARNING, "resume", f"not done within {limit_seconds:.0f} s", "--limit SECONDS")
            return
        if exit_code != 0:
            yield Check(ERROR, "resume", f"failed: {reason}", "a stopped run could not go on")
            return
        steps, evals, _ = _read_rows(run_folder)
        resumed = [*(row["loss"] for row in steps[save_step:]), evals[-1]["loss"]]
        expected = [*losses[save_step:], val_losses[-1]]
        difference = max(abs(a / b - 1) for a, b in zip(resumed, expected, strict=True))
        # A GPU's attention adds its gradients in any order, and the steps after a resume are eager at first.
        is_gpu = plan.dist_context.device.type == "cuda"
        same = "bit for bit the same" if expected == resumed else f"the same within {difference:.0e}"
        yield judge(
            difference > (MAX_DIFFERENCE[plan.precision] if is_gpu else CPU_RESUME_TOLERANCE),
            ERROR,
            "resume",
            f"from step {save_step}: losses {same}",
            "a resumed run would not be the run that was stopped; report this with the flags",
        )


def estimate_costs(
    plan: RunPlan, data: PreparedDataset, measured: dict[str, Any], estimated_bytes: float
) -> Iterator[Check]:
    """Time and disk of the whole run, from what the rehearsal took; its memory beside `estimated_bytes`."""
    total_steps, settings = plan.schedule.total_steps, plan.settings
    num_evaluations = sum(plan.schedule.is_eval_due(step) for step in range(total_steps + 1))
    eval_seconds = measured["eval_seconds_per_token"] * data.metadata["val"]["num_target_tokens"]
    step_seconds, overhead_seconds = measured["step_seconds"], measured["overhead_seconds"]
    seconds = total_steps * step_seconds + num_evaluations * eval_seconds + overhead_seconds
    message = f"about {format_duration(seconds)}: {total_steps:,} steps of {step_seconds:.2f} s, {num_evaluations} "
    message += f"evaluations of {eval_seconds:.1f} s, {overhead_seconds:.0f} s around them"
    yield Check(OK, "time", message)
    peak = format_bytes(measured["peak_memory_bytes"])
    message = f"{peak} at most on a rank in the rehearsal, {format_bytes(estimated_bytes)} as counted"
    yield Check(OK, "memory", message)
    num_checkpoints = settings.output.save_total_limit + 2  # with the best one and the one that is being written
    needed_bytes = num_checkpoints * measured["checkpoint_bytes"] + 2 * measured["export_bytes"]
    parents = Path(settings.run_folder).absolute().parents
    free_bytes = shutil.disk_usage(next(path for path in parents if path.exists())).free
    yield judge(
        free_bytes < needed_bytes,
        ERROR,
        "disk",
        f"{format_bytes(needed_bytes)} at most ({num_checkpoints} checkpoints of "
        f"{format_bytes(measured['checkpoint_bytes'])}, export {format_bytes(measured['export_bytes'])}), "
        f"{format_bytes(free_bytes)} free",
        "--save-total-limit fewer, or --output-dir on another disk",
    )


def _run_program(argv: list[str], log: Path, deadline: float) -> tuple[int | None, str]:
    """(exit code, None where the time is over; why it failed) of a program, which has ended with all its ranks."""
    with open(log, "wb") as output:
        process = subprocess.Popen(
            argv, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True, env=worker_environ()
        )
    exit_code = None
    try:
        exit_code = process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:  # asked first, so that launchers take their ranks with them
        for signal_number, timeout_seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal_number)
                process.wait(timeout_seconds)
    return exit_code, failure_reason(log)


def _read_rows(run_folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """The whole rows of metrics.jsonl: steps, evaluations, and events with their facts among the other fields."""
    path = run_folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
    steps, evals, events = ([row for row in rows if row["kind"] == kind] for kind in ("step", "eval", "event"))
    return steps, evals, [{**row, **(row.get("facts") or {})} for row in events]
