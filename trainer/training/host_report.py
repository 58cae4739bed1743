"""What the plan of a run on several hosts says of them: folders and clocks that are not the same on all."""

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path

from trainer.data.cache import resolve_cache_dir
from trainer.distributed.process_group import DistContext
from trainer.tracking.run_lock import LOCK_FILE
from trainer.tracking.wandb_logger import wandb_mode
from trainer.training.run_plan import RunPlan

MAX_CLOCK_SECONDS = 5.0  # of which a busy host may be late itself


def with_host_lines(plan: RunPlan) -> RunPlan:
    """The plan, with what there is to say of several hosts. All ranks must call, and rank 0 hold the run folder."""
    context, folder = plan.dist_context, Path(plan.settings.run_folder)
    if context.num_nodes == 1:
        return plan
    lock = None
    with contextlib.suppress(OSError):  # the file that rank 0 keeps in the run folder while it writes there
        lock = (folder / LOCK_FILE).read_text()
    # `deepspeed` forwards no variable for these.
    folders = f"cache {resolve_cache_dir()}, HF home {os.environ.get('HF_HOME') or '~/.cache/huggingface'}"
    by_host = dict(zip(context.hosts, context.all_gather_object((folders, lock)), strict=True))
    if len({other for other, _ in by_host.values()}) > 1:
        folders = "; ".join(f"on {host} {other}" for host, (other, _) in by_host.items())
    mode = context.on_rank_zero(lambda: wandb_mode(plan.settings.output.wandb))
    lines = [("environment", f"W&B {mode}; {folders}")]
    if note := describe_clocks(context):
        lines.append(("note", note))
    here = context.hosts[0]
    if without := ", ".join(host for host, (_, other) in by_host.items() if other != by_host[here][1]):
        only_here = f"only {here} holds the checkpoints and can be the first to resume"
        lines.append(("note", f"{folder} of {here} is not seen on {without}: {only_here}"))
    return replace(plan, host_lines=tuple(lines))


def describe_clocks(context: DistContext) -> str | None:
    """Which two hosts' clocks differ by more than their answers take; the rows have rank 0's."""
    context.all_gather_object(None)  # all go on from here at nearly one moment
    times = dict(zip(context.hosts, context.all_gather_object(time.time()), strict=True))
    early, late = min(times, key=times.__getitem__), max(times, key=times.__getitem__)
    seconds = times[late] - times[early]
    return f"the clock of {late} is {seconds:,.0f} s ahead of that of {early}" if seconds > MAX_CLOCK_SECONDS else None
