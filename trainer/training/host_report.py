"""What the plan of a run on several hosts says of them: folders and clocks that are not the same on all."""

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path

from trainer.data.cache import resolve_cache_dir
from trainer.distributed.process_group import DistContext
from trainer.tracking.run_lock import LOCK_FILE
from trainer.tracking.wandb_environment import wandb_mode
from trainer.training.run_plan import RunPlan

MAX_CLOCK_SECONDS = 5.0  # of which a busy host may be late itself


def with_host_lines(plan: RunPlan) -> RunPlan:
    """The plan, with what there is to say of several hosts. All ranks must call, and rank 0 hold the run folder."""
    context = plan.dist_context
    if context.num_nodes == 1:
        return plan
    lines = [("environment", _describe_environment(plan, context))]
    if note := _describe_clocks(context):
        lines.append(("note", note))
    folder, here = Path(plan.settings.run_folder), context.hosts[0]
    if without := ", ".join(_hosts_without_run_folder(folder, context)):
        only_here = f"only {here} holds the checkpoints and can be the first to resume"
        lines.append(("note", f"{folder} of {here} is not seen on {without}: {only_here}"))
    return replace(plan, host_lines=tuple(lines))


def _describe_environment(plan: RunPlan, context: DistContext) -> str:
    """W&B's mode on rank 0, which logs, and the folders of every host: `deepspeed` hands on no variable for them."""
    mode = context.on_rank_zero(lambda: wandb_mode(plan.settings.output.wandb))
    folders = f"cache {resolve_cache_dir()}, HF home {os.environ.get('HF_HOME') or '~/.cache/huggingface'}"
    by_host = dict(zip(context.hosts, context.all_gather_object(folders), strict=True))
    if len(set(by_host.values())) == 1:
        return f"W&B {mode}; {folders}"
    return f"W&B {mode}; " + "; ".join(f"on {host} {text}" for host, text in by_host.items())


def _describe_clocks(context: DistContext) -> str | None:
    """Which two hosts say a time that differs by more than their answers do; the rows have rank 0's."""
    context.all_gather_object(None)  # all go on from here at nearly one moment
    times = dict(zip(context.hosts, context.all_gather_object(time.time()), strict=True))
    early, late = min(times, key=times.__getitem__), max(times, key=times.__getitem__)
    seconds = times[late] - times[early]
    return f"the clock of {late} is {seconds:,.0f} s ahead of that of {early}" if seconds > MAX_CLOCK_SECONDS else None


def _hosts_without_run_folder(folder: Path, context: DistContext) -> list[str]:
    """The hosts that do not see the file which rank 0 keeps in the run folder while it writes there."""
    probe = None
    with contextlib.suppress(OSError):
        probe = (folder / LOCK_FILE).read_text()
    probes = context.all_gather_object(probe)
    hosts = (host for host, other in zip(context.hosts, probes, strict=True) if other != probes[0])
    return list(dict.fromkeys(hosts))
