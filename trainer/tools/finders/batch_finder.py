"""`--find-batch`: the fastest micro-batch that fits, for the same global batch, on one host.

Rank 0 starts a group of processes for each size (`trainer.tools.finders.batch_worker`), which takes steps of the
longest rows: a rank that runs out of memory leaves the others waiting in a collective, so all of a group are ended.
"""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trainer.config.batch_config import BatchConfig
from trainer.config.errors import TrainingError, UserError
from trainer.config.files import write_atomically
from trainer.data.dataset import PreparedDataset
from trainer.distributed.memory import required_bytes
from trainer.tools.finders.batch_worker import OUT_OF_MEMORY_EXIT_CODE
from trainer.tools.finders.files import output_folder
from trainer.tools.worker_processes import failure_reason, run_ranks
from trainer.training.run_plan import RunPlan

#: Of the memory that is free; on a CPU what is beyond it is taken from other programs, not refused.
MEMORY_BUDGET_SHARE = 0.8
WORKER_COMMAND = ("-m", "trainer.tools.finders.batch_worker")
OOM_KILL_EXIT_CODES = (-9, 137)  # killed by the system, which is how a host's memory runs out
EQUAL_SPEED_SHARE = 0.03  # of the speed; within it two sizes are as fast, and the smaller one needs less memory


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One micro-batch as it ran: a whole step of the global batch, or why there is none."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    fits: bool
    failure_reason: str = ""  #: why it does not fit
    step_seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0  #: on the rank that needs most


def find_micro_batch_size(plan: RunPlan, data: PreparedDataset) -> int:
    """Try, print, and leave find-batch.json in the run folder; returns 0. UserError on several hosts, TrainingError
    where no micro-batch fits."""
    context = plan.dist_context
    if context.local_world_size != context.world_size:
        raise UserError(
            f"--find-batch: {context.world_size} ranks on several hosts; expected one host: try its "
            f"{context.local_world_size} ranks there, with as many times smaller a --global-batch"
        )
    if context.rank > 0:
        return 0
    row_length = int(data.train.lengths().max())
    global_batch = plan.schedule.batch.global_batch
    sizes, budget = sizes_within_budget(plan, candidate_sizes(global_batch, context.world_size), row_length)
    trials: dict[int, TrialResult] = {}
    while (size := next_size(sizes, {size: trial.fits for size, trial in trials.items()})) is not None:
        print(f"trying micro-batch {size} ...", flush=True)
        trials[size] = run_trial(plan, data.folder, size)
    sorted_trials = [trials[size] for size in sorted(trials)]
    best_trial = fastest(sorted_trials)
    content = {
        "format": 1,
        "mode": plan.settings.mode,
        "global_batch": global_batch,
        "width": row_length,
        "tried": [vars(trial) for trial in sorted_trials],
        "suggestion": best_trial.micro_batch_size if best_trial else None,
        "budget": budget,
        "settings": plan.settings.as_dict(),
        "resolved": plan.resolved(),
        "data": plan.data_info["fingerprint"],
    }
    with output_folder(plan) as folder:
        path = folder / "find-batch.json"
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    for line in format_lines(sorted_trials, best_trial, budget, has_dropout=plan.dropout > 0):
        print(line, flush=True)
    if best_trial is None:
        raise TrainingError(
            "--find-batch: not even the smallest micro-batch fits; --ds-config zero3 or zero2_offload, --mode lora "
            "or a shorter --block-size need less"
        )
    print(f"numbers        {path}; nothing was trained", flush=True)
    return 0


def candidate_sizes(global_batch: int, world_size: int) -> list[int]:
    """Every micro-batch that leaves the global batch as it is: the divisors of a rank's share, ascending."""
    examples_per_rank = global_batch // world_size
    return [size for size in range(1, examples_per_rank + 1) if examples_per_rank % size == 0]


def next_size(sizes: Sequence[int], fits_by_size: Mapping[int, bool]) -> int | None:
    """What to try next: at least twice the largest that fits until one does not, then the middle of the gap."""
    largest_fitting = max((size for size, fits in fits_by_size.items() if fits), default=0)
    smallest_failing = min((size for size, fits in fits_by_size.items() if not fits), default=math.inf)
    between = [size for size in sizes if largest_fitting < size < smallest_failing]
    if not between:
        return None
    if smallest_failing == math.inf:
        return next((size for size in between if size >= 2 * largest_fitting), between[-1])
    return between[len(between) // 2]


def fastest(trials: Sequence[TrialResult]) -> TrialResult | None:
    """The smallest micro-batch among those that are as fast as the fastest; None where none fits."""
    fitting = [trial for trial in trials if trial.fits]
    min_speed = (1 - EQUAL_SPEED_SHARE) * max((trial.tokens_per_second for trial in fitting), default=0.0)
    fast = [trial for trial in fitting if trial.tokens_per_second >= min_speed]
    return min(fast, key=lambda trial: trial.micro_batch_size, default=None)


def sizes_within_budget(plan: RunPlan, sizes: Sequence[int], row_length: int) -> tuple[list[int], str]:
    """(ascending sizes that may be tried, what was left out and why): CPU ranks by estimate, GPUs try all."""
    if plan.dist_context.device.type == "cuda":
        return list(sizes), ""
    limit_bytes = MEMORY_BUDGET_SHARE * plan.dist_context.free_host_bytes()
    budget_note = f"budget {limit_bytes / 2**30:.1f} GiB per rank ({MEMORY_BUDGET_SHARE:.0%} of the free memory)"
    for index, size in enumerate(sizes):
        estimate = plan.estimate_memory(plan.deepspeed_file, row_length, size)
        needed_bytes = required_bytes(estimate, plan.model_info["parameters"], plan.dist_context.device)[0]
        if needed_bytes > limit_bytes:
            note = f"not tried: {size} and above, estimated at {needed_bytes / 2**30:.1f} GiB or more"
            return list(sizes[:index]), f"{budget_note}; {note}"
    return list(sizes), budget_note


def run_trial(plan: RunPlan, data_folder: Path, size: int) -> TrialResult:
    """A micro-batch on processes of its own. TrainingError where they end for another reason than memory."""
    world_size, timeout = plan.dist_context.world_size, plan.settings.engine.hang_timeout
    accumulation = BatchConfig.divide(plan.schedule.batch.global_batch, size, world_size).gradient_accumulation_steps
    result = partial(TrialResult, micro_batch_size=size, gradient_accumulation_steps=accumulation)
    with tempfile.TemporaryDirectory(prefix="find-batch-") as scratch:
        job, answer, log = (Path(scratch, name) for name in ("job.json", "answer.json", "log"))
        content = {"settings": plan.settings.as_dict(), "data": str(data_folder), "size": size, "answer": str(answer)}
        job.write_text(json.dumps(content), encoding="utf-8")
        exit_codes = run_ranks([*WORKER_COMMAND, str(job)], world_size, log, timeout_seconds=timeout)
        output = failure_reason(log)
        if exit_codes is None:
            raise TrainingError(f"--find-batch: micro-batch {size} took over {timeout:g} s (--hang-timeout): {output}")
        for rank, exit_code in enumerate(exit_codes):
            if exit_code == OUT_OF_MEMORY_EXIT_CODE:
                return result(fits=False, failure_reason=f"out of memory on rank {rank}")
            if exit_code in OOM_KILL_EXIT_CODES:
                reason = f"killed by the system on rank {rank}, most likely for its memory"
                return result(fits=False, failure_reason=reason)
        if any(exit_codes):
            rank = next(rank for rank, exit_code in enumerate(exit_codes) if exit_code)
            raise TrainingError(f"--find-batch: micro-batch {size} failed on rank {rank}: {output}")
        numbers = json.loads(answer.read_text(encoding="utf-8"))
    return result(
        fits=True,
        step_seconds=numbers["step_seconds"],
        tokens_per_second=numbers["tokens"] / numbers["step_seconds"],
        peak_memory_bytes=numbers["peak_memory_bytes"],
    )


def format_lines(
    trials: Sequence[TrialResult], best_trial: TrialResult | None, budget: str, *, has_dropout: bool
) -> list[str]:
    """The table and the suggestion for people."""
    lines = ["", "micro-batch  accumulation  ms per step    tokens/s  memory of a rank"]
    for trial in trials:
        numbers = (
            f"{1000 * trial.step_seconds:>11,.0f}  {trial.tokens_per_second:>10,.0f}  "
            f"{trial.peak_memory_bytes / 2**30:.2f} GiB"
        )
        outcome = numbers if trial.fits else f"does not fit: {trial.failure_reason}"
        lines.append(f"{trial.micro_batch_size:>11}  {trial.gradient_accumulation_steps:>12}  {outcome}")
    if budget:
        lines.append(budget)
    if best_trial is not None:
        largest = max((trial for trial in trials if trial.fits), key=lambda trial: trial.micro_batch_size)
        gain = best_trial.tokens_per_second / largest.tokens_per_second - 1
        comparison = f"{gain:+.0%} against" if abs(gain) > EQUAL_SPEED_SHARE else "in less memory and as fast as"
        note = f", {comparison} {largest.micro_batch_size}, the largest that fits" * (largest is not best_trial)
        lines.append(
            f"suggestion     --micro-batch {best_trial.micro_batch_size}: {best_trial.tokens_per_second:,.0f} "
            f"tokens/s{note}"
        )
        if has_dropout:
            lines.append("note           another micro-batch draws other dropout masks; all else stays the same run")
    return lines
