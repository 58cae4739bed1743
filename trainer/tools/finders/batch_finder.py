"""`--find-batch`: the fastest micro-batch that fits, for the same global batch, by real steps of the longest rows.

Each rank starts a process of its own for the trials (`trainer.tools.finders.batch_size_worker`) and watches it. One
rank's process that runs out of memory leaves the others waiting in a collective: the parents tell one another through
their own group, and end all of them.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.batch_config import BatchConfig
from trainer.config.errors import TrainingError
from trainer.config.files import write_atomically
from trainer.data.dataset import PreparedDataset
from trainer.distributed.process_group import find_free_port
from trainer.tools.finders.batch_size_worker import OUT_OF_MEMORY_EXIT_CODE
from trainer.tools.finders.files import output_folder
from trainer.tools.worker_processes import ROOT, last_line
from trainer.training.memory_check import estimate_plan, free_host_bytes, required_bytes
from trainer.training.run_plan import RunPlan

#: Of the memory that is free; on a processor what is beyond is taken from other programs, not refused.
MEMORY_BUDGET_SHARE = 0.8
POLL_SECONDS = 0.2  # seconds between two looks at the process
GRACE_SECONDS = 3.0  # seconds that the other ranks' processes get to say why they ended
WORKER_COMMAND = ("-m", "trainer.tools.finders.batch_size_worker")
OOM_KILL_EXIT_CODES = (-9, 137)  # by the system, which is how a processor's memory runs out
EQUAL_SPEED_SHARE = 0.03  # of the speed; within it two sizes are as fast, and the smaller one needs less memory


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One micro-batch as it ran: a whole step of the global batch, or why there is none."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    fits: bool
    failure_reason: str = ""  #: why it does not fit
    step_seconds: float = 0.0  #: of one step
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0  #: bytes on the rank that needs most


def find_micro_batch_size(plan: RunPlan, data: PreparedDataset) -> int:
    """Try, say, and leave find-batch.json in the run folder; 0, or TrainingError where no micro-batch fits."""
    row_length = int(data.train.lengths().max())
    sizes = candidate_sizes(plan.schedule.batch.global_batch, plan.dist_context.world_size)
    sizes, budget = sizes_within_budget(plan, sizes, row_length)
    trials: dict[int, TrialResult] = {}
    while sizes_to_try := next_sizes(sizes, {size: trial.fits for size, trial in trials.items()}):
        if plan.dist_context.rank == 0:
            print(f"trying micro-batch {', '.join(map(str, sizes_to_try))} ...", flush=True)
        trials |= {trial.micro_batch_size: trial for trial in run_trials(plan, data.folder, sizes_to_try)}
    sorted_trials = [trials[size] for size in sorted(trials)]
    plan.dist_context.on_rank_zero(lambda: _report(plan, sorted_trials, row_length, budget))
    return 0


def candidate_sizes(global_batch: int, world_size: int) -> list[int]:
    """Every micro-batch that leaves the global batch as it is: the divisors of a rank's share, ascending."""
    examples_per_rank = global_batch // world_size
    return [size for size in range(1, examples_per_rank + 1) if examples_per_rank % size == 0]


def ladder(sizes: Sequence[int]) -> list[int]:
    """The sizes to climb: each at least twice the one before, and the largest."""
    ladder_sizes: list[int] = []
    for size in sizes:
        if not ladder_sizes or size >= 2 * ladder_sizes[-1] or size == sizes[-1]:
            ladder_sizes.append(size)
    return ladder_sizes


def next_sizes(sizes: Sequence[int], fits_by_size: Mapping[int, bool]) -> list[int]:
    """What to try after what is known: up the ladder until one does not fit, then halving the gap; [] at the end."""
    largest_fitting = max((size for size, fits in fits_by_size.items() if fits), default=0)
    smallest_failing = min((size for size, fits in fits_by_size.items() if not fits), default=None)
    if smallest_failing is None:
        return ladder([size for size in sizes if size > largest_fitting])
    sizes_between = [size for size in sizes if largest_fitting < size < smallest_failing]
    return [sizes_between[len(sizes_between) // 2]] if sizes_between else []


def fastest(trials: Sequence[TrialResult]) -> TrialResult | None:
    """The one with the most tokens per second; of those within EQUAL_SPEED_SHARE of it the smallest."""
    fitting = [trial for trial in trials if trial.fits]
    min_speed = (1 - EQUAL_SPEED_SHARE) * max((trial.tokens_per_second for trial in fitting), default=0.0)
    fast = [trial for trial in fitting if trial.tokens_per_second >= min_speed]
    return min(fast, key=lambda trial: trial.micro_batch_size, default=None)


def sizes_within_budget(plan: RunPlan, sizes: Sequence[int], row_length: int) -> tuple[list[int], str]:
    """(ascending sizes that may be tried, what was left out and why): CPU ranks by estimate, GPUs try all."""
    if plan.dist_context.device.type == "cuda":
        return list(sizes), ""
    limit_bytes = min(plan.dist_context.all_gather_object(MEMORY_BUDGET_SHARE * free_host_bytes(plan)))
    budget_note = f"budget {limit_bytes / 2**30:.1f} GiB a rank ({MEMORY_BUDGET_SHARE:.0%} of the free memory)"
    for index, micro_batch_size in enumerate(sizes):
        estimate = estimate_plan(plan, plan.deepspeed_file, row_length, micro_batch_size)
        needed_bytes = required_bytes(plan, estimate)[0]
        if needed_bytes > limit_bytes:
            note = f"not tried: {micro_batch_size} and above, {needed_bytes / 2**30:.1f} GiB by estimate"
            return list(sizes[:index]), f"{budget_note}; {note}"
    return list(sizes), budget_note


def run_trials(plan: RunPlan, data_folder: Path, sizes: Sequence[int]) -> list[TrialResult]:
    """Run one group of processes over the sizes, ascending, up to the first that does not fit; the same on all ranks.

    TrainingError where it ends for another reason than memory.
    """
    dist_context = plan.dist_context
    port = dist_context.on_rank_zero(find_free_port)
    with tempfile.TemporaryDirectory(prefix="find-batch-") as scratch:
        folder = Path(scratch)
        job = {
            "settings": plan.settings.as_dict(),
            "data": str(data_folder),
            "sizes": list(sizes),
            "answer": str(folder / "answer"),
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        (folder / "answer").touch()
        exit_code, output = _watch_worker(plan, folder, port)
        lines = (folder / "answer").read_text(encoding="utf-8").splitlines(keepends=True)
    answers = [json.loads(line) for line in lines if line.endswith("\n")]
    ranks = dist_context.all_gather_object((exit_code, output, answers))
    trials = [
        _merge_ranks(plan, size, answers_of_size)
        for size, *answers_of_size in zip(sizes, *(answers for _, _, answers in ranks), strict=False)
    ]
    if len(trials) == len(sizes):
        return trials
    failed_size = sizes[len(trials)]
    for rank, (exit_code, _, _) in enumerate(ranks):
        if exit_code == OUT_OF_MEMORY_EXIT_CODE or exit_code in OOM_KILL_EXIT_CODES:
            killed = "killed by the system, most likely for its memory"
            reason = "out of memory" if exit_code == OUT_OF_MEMORY_EXIT_CODE else killed
            return [*trials, _make_result(plan, failed_size, failure_reason=f"{reason} on rank {rank}")]
    # None: ended here, because of another
    rank, output = next(((rank, output) for rank, (code, output, _) in enumerate(ranks) if code), (0, ranks[0][1]))
    raise TrainingError(f"--find-batch: micro-batch {failed_size} failed on rank {rank}: {output}")


def _watch_worker(plan: RunPlan, folder: Path, port: int) -> tuple[int | None, str]:
    """(exit code of this rank's process, None where it was ended here; its last line). All ranks return together."""
    environ = {
        **os.environ,
        "MASTER_PORT": str(port),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # the processes meet on a port of their own
    log, answer_file = folder / "log", folder / "answer"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, *WORKER_COMMAND, str(folder / "job.json")],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=environ,
        )
    failed_at: float | None = None
    answer_size, last_progress_time = 0, time.monotonic()
    try:
        while True:
            plan.dist_context.watchdog.heartbeat()
            exit_codes = plan.dist_context.all_gather_object(process.poll())
            if None not in exit_codes:
                break
            now = time.monotonic()
            if any(exit_codes):
                failed_at = failed_at or now
            if (new_size := answer_file.stat().st_size) != answer_size:
                answer_size, last_progress_time = new_size, now
            is_hung = now - last_progress_time > plan.settings.engine.hang_timeout
            is_grace_over = failed_at is not None and now - failed_at > GRACE_SECONDS
            if any(plan.dist_context.all_gather_object(is_hung or is_grace_over)):
                break  # all at once, or one would leave while another still asks
            time.sleep(POLL_SECONDS)
        exit_code = process.poll()
    finally:
        process.kill()
        process.wait()
    return exit_code, last_line(log.read_text(encoding="utf-8", errors="replace"))


def _merge_ranks(plan: RunPlan, micro_batch_size: int, answers: Sequence[dict[str, Any]]) -> TrialResult:
    """One size on all ranks: the slowest one's seconds, the largest one's bytes."""
    step_seconds = max(answer["seconds"] for answer in answers)
    return _make_result(
        plan,
        micro_batch_size,
        fits=True,
        step_seconds=step_seconds,
        tokens_per_second=answers[0]["tokens"] / step_seconds,
        peak_memory_bytes=max(answer["peak_memory_bytes"] for answer in answers),
    )


def _make_result(plan: RunPlan, micro_batch_size: int, *, fits: bool = False, **fields: Any) -> TrialResult:
    batch, num_ranks = plan.schedule.batch, plan.dist_context.world_size
    accumulation = BatchConfig.divide(batch.global_batch, micro_batch_size, num_ranks).gradient_accumulation_steps
    return TrialResult(micro_batch_size=micro_batch_size, gradient_accumulation_steps=accumulation, fits=fits, **fields)


def _report(plan: RunPlan, trials: list[TrialResult], row_length: int, budget: str) -> None:
    best_trial = fastest(trials)
    content = {
        "format": 1,
        "mode": plan.settings.mode,
        "global_batch": plan.schedule.batch.global_batch,
        "width": row_length,
        "tried": [vars(trial) for trial in trials],
        "suggestion": best_trial.micro_batch_size if best_trial else None,
        "budget": budget,
        "settings": plan.settings.as_dict(),
        "resolved": plan.resolved(),
        "data": plan.data_info["fingerprint"],
    }
    with output_folder(plan) as folder:
        path = folder / "find-batch.json"
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    for line in format_lines(plan, trials, best_trial, budget):
        print(line, flush=True)
    if best_trial is None:
        raise TrainingError(
            "--find-batch: not even the smallest micro-batch fits; --ds-config zero3 or zero2_offload, --mode lora "
            "or a shorter --block-size need less"
        )
    print(f"numbers        {path}; nothing was trained", flush=True)


def format_lines(
    plan: RunPlan, trials: Sequence[TrialResult], best_trial: TrialResult | None, budget: str
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
        if plan.dropout:
            lines.append("note           another micro-batch draws other dropout masks; all else stays the same run")
    return lines
