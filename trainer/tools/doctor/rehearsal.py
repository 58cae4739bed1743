"""The run itself in small, by the program itself: a few steps, saved half way, then resumed from there.

`launch/train.py` is started twice with the user's flags in a temporary folder, on the disk of the run folder. What the
resumed part records must be what the first part did.
"""

import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config.cli import CliArgs, to_argv
from trainer.config.text import format_duration
from trainer.data.dataset import PreparedDataset
from trainer.distributed.execution import MAX_DIFFERENCE, NUM_WARMUP_CALLS
from trainer.tools.doctor.checks import ERROR, OK, WARNING, Check, format_bytes, judge
from trainer.tools.processes import Slot, failure_reason, make_slots, start_run
from trainer.training.run_plan import RunPlan

NUM_STEPS = 2  # before the checkpoint and after it, beside those before CUDA graphs are recorded
STOP_SECONDS = 10  # that a run gets to end its ranks
CPU_RESUME_TOLERANCE = 1e-5  # relative difference of losses after a resume, where sums may be taken in another order


def rehearse(cli_args: CliArgs, plan: RunPlan, limit_seconds: float, measured: dict[str, Any]) -> Iterator[Check]:
    """Both parts; stops at the first that fails. `measured`: what the first took, for `estimate_costs`."""
    context, deadline = plan.dist_context, time.monotonic() + limit_seconds
    num_warmup_steps = NUM_WARMUP_CALLS + 1 if plan.execution.cuda_graphs else 0
    save_step = num_warmup_steps + NUM_STEPS
    slot = Slot(gpus=(), num_threads=context.num_threads, num_cpu_ranks=context.world_size)
    if context.device.type == "cuda":
        (slot,) = make_slots(1, context.world_size)
    with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=_existing_parent(plan)) as temp:
        output_flags = {
            "output_dir": f"{temp}/run",
            "eval_every": "never",
            "save_every": str(save_step),
            "save_total_limit": 3,
            "wandb": "disabled",
            "run_name": "rehearsal",
        }
        train_flags = {"max_steps": 2 * save_step, "warmup_steps": 0, "warmup_ratio": 0.0}
        argv = to_argv(cli_args.settings, {"train": train_flags, "output": output_flags})
        losses: list[list[float]] = []  # after the checkpoint, of both parts
        for name, more in (("rehearsal", []), ("resume", ["--resume", f"step-{save_step}"])):
            start_time = time.monotonic()
            process = start_run(slot, [*argv, *more], Path(temp))
            process.join(max(1.0, deadline - start_time))
            exit_code, seconds = process.exitcode, time.monotonic() - start_time
            for stop in (process.terminate, process.kill):  # asked first, so that a launcher takes its ranks with it
                stop()
                process.join(STOP_SECONDS)
            path = Path(temp, "run", "metrics.jsonl")
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
            steps, evals, events = ([row for row in rows if row["kind"] == kind] for kind in ("step", "eval", "event"))
            message = f"after {len(steps)} of {2 * save_step} steps"
            if exit_code is None:
                remedy = "allow more time with --limit SECONDS, or leave it out with --no-rehearsal"
                yield Check(WARNING, name, f"given up after {limit_seconds:.0f} s, {message}", remedy)
                return
            if exit_code:
                reason = failure_reason(Path(temp, "log"), exit_code)
                yield Check(ERROR, name, f"failed {message}: {reason}", "the run itself would fail like this")
                return
            losses.append([row["loss"] for row in (*steps[save_step:], evals[-1])])
            if name == "resume":
                break
            message = f"{len(steps)} steps in {seconds:.0f} s, loss {steps[0]['loss']:.4f} to {steps[-1]['loss']:.4f}"
            yield Check(OK, "train", message)
            if plan.execution.path != "eager":  # how steps really ran, what was verified, and why something was not
                fallbacks = [row for row in events if row["event"] == "execution"]
                path_name = fallbacks[-1]["facts"]["path"] if fallbacks else plan.execution.path
                facts = [row["message"] for row in events if row["event"] == "checked"]
                message = "; ".join([path_name, *facts, *(row["message"] for row in fallbacks[-1:])])
                remedy = "none needed: the numbers are right, and --execution eager takes such steps from the start"
                yield judge(bool(fallbacks), WARNING, "execution", message, remedy)
            message = f"validation loss {evals[0]['loss']:.4f} before, {evals[-1]['loss']:.4f} after"
            yield Check(OK, "evaluate", message)
            finished = next(row for row in events if row["event"] == "finished")["facts"]
            yield Check(OK, "save", f"checkpoint of {format_bytes(finished['checkpoint_bytes'])}")
            yield Check(OK, "export", f"{format_bytes(finished['export_bytes'])}, {finished['export']}")
            # The first step warms up, too; the time of the first evaluation is all that was before it.
            step_times = [(b["tokens"] - a["tokens"]) / b["tokens_per_second"] for a, b in itertools.pairwise(steps)]
            measured |= {
                "step_seconds": statistics.fmean(step_times[num_warmup_steps:]),
                "overhead_seconds": seconds - evals[-1]["time"],
                "eval_seconds_per_token": evals[0]["time"] / evals[0]["eval_tokens"],
                **{name: finished[name] for name in ("checkpoint_bytes", "export_bytes", "peak_memory_bytes")},
            }
    difference = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
    # A GPU's attention adds its gradients in any order, and the steps after a resume are eager at first.
    tolerance = MAX_DIFFERENCE[plan.precision] if context.device.type == "cuda" else CPU_RESUME_TOLERANCE
    same = "bit for bit the same" if losses[0] == losses[1] else f"the same within {difference:.0e}"
    remedy = "a resumed run would not be the run that was stopped; report this with the flags"
    yield judge(difference > tolerance, ERROR, "resume", f"from step {save_step}: losses {same}", remedy)


def estimate_costs(
    plan: RunPlan, data: PreparedDataset, measured: dict[str, Any], estimated_bytes: float
) -> Iterator[Check]:
    """Time and disk of the whole run, from what the rehearsal took; its memory beside `estimated_bytes`."""
    total_steps, step_seconds = plan.schedule.total_steps, measured["step_seconds"]
    num_evaluations = sum(plan.schedule.is_eval_due(step) for step in range(total_steps + 1))
    eval_seconds = measured["eval_seconds_per_token"] * data.metadata["val"]["num_target_tokens"]
    seconds = total_steps * step_seconds + num_evaluations * eval_seconds + measured["overhead_seconds"]
    message = f"about {format_duration(seconds)}: {total_steps:,} steps of {step_seconds:.2f} s, {num_evaluations} "
    message += f"evaluations of {eval_seconds:.1f} s, {measured['overhead_seconds']:.0f} s around them"
    yield Check(OK, "time", message)
    peak = format_bytes(measured["peak_memory_bytes"])
    message = f"{peak} at most on a rank in the rehearsal, {format_bytes(estimated_bytes)} as counted"
    yield Check(OK, "memory", message)
    checkpoint_bytes, export_bytes = measured["checkpoint_bytes"], measured["export_bytes"]
    num_checkpoints = plan.settings.output.save_total_limit + 2  # with the best one and the one that is being written
    needed_bytes = num_checkpoints * checkpoint_bytes + 2 * export_bytes
    free_bytes = shutil.disk_usage(_existing_parent(plan)).free
    message = f"{format_bytes(needed_bytes)} at most ({num_checkpoints} checkpoints of "
    message += (
        f"{format_bytes(checkpoint_bytes)}, export {format_bytes(export_bytes)}), {format_bytes(free_bytes)} free"
    )
    remedy = "--save-total-limit fewer, or --output-dir on another disk"
    yield judge(free_bytes < needed_bytes, ERROR, "disk", message, remedy)


def _existing_parent(plan: RunPlan) -> Path:
    """The folder on the disk of the run folder."""
    return next(path for path in Path(plan.settings.run_folder).absolute().parents if path.exists())
