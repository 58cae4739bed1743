"""Which way a run's steps take: as asked, as its earlier part took, as timed before on this hardware, or to be timed.

A choice that was timed is kept in the cache by all that the times depend on, and the first one holds: runs that follow,
and those that were being timed meanwhile, take it too.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.settings import Settings
from trainer.data.cache import resolve_cache_dir
from trainer.distributed.execution import ExecutionPath, choose_path, paths_to_time, possible_paths
from trainer.distributed.process_group import DistContext
from trainer.training.provenance import cpu_name, device_name, package_versions
from trainer.training.schedule import TrainSchedule

AS_PLANNED = "as planned"
CHOICE_VERSION = 1  # of what the times depend on in this code: paths, verification, kernels
NOT_OF_THE_SHAPE = ("fingerprint", "name", "init", "step_flops")  # of a model's facts: no time depends on them


@dataclass(frozen=True, kw_only=True)
class ExecutionChoice:
    """How the first step runs, why, and what is timed after it."""

    path: ExecutionPath
    reason: str = AS_PLANNED
    timed_paths: tuple[ExecutionPath, ...] = ()
    file: Path | None = None  #: where the choice that timing leads to is kept


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a choice, and the times of steps, depend on."""

    settings: Settings
    dist_context: DistContext
    deepspeed_config: Mapping[str, Any]
    precision: str
    schedule: TrainSchedule
    model_info: Mapping[str, Any]

    def choice_file(self, timed_paths: Sequence[str]) -> Path:
        """Where the choice among these is kept for this model's shape, device, versions, ranks, batch and rows.

        A longer run has more to choose from, and does not take what a short one found without them.
        """
        settings, context = self.settings, self.dist_context
        key = {
            "version": CHOICE_VERSION,
            "timed": list(timed_paths),
            "model": {name: value for name, value in self.model_info.items() if name not in NOT_OF_THE_SHAPE},
            "device": [device_name(context), cpu_name()],
            "ranks": [context.world_size, context.num_nodes],
            "versions": package_versions(),
            "deepspeed": dict(self.deepspeed_config),
            "precision": self.precision,
            "batch": vars(self.schedule.batch),
            "rows": [settings.data.block_size, settings.data.objective, settings.train.eval_batch],
            "optim": settings.train.optim,
            "lora": vars(settings.lora) if settings.mode == "lora" else None,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:32]
        return resolve_cache_dir() / "execution" / f"{digest}.json"


def choose_execution(facts: RunFacts, previous_execution: Sequence[Mapping[str, Any]]) -> ExecutionChoice:
    """The choice for a run, the same on all ranks. `previous_execution`: of the run that is resumed, else empty."""
    settings, schedule = facts.settings, facts.schedule
    paths = possible_paths(settings, facts.dist_context, facts.deepspeed_config, precision=facts.precision)
    num_tokens = schedule.total_steps * schedule.batch.global_batch * settings.data.block_size
    timed = paths_to_time(settings, facts.dist_context, paths, num_steps=schedule.total_steps, num_tokens=num_tokens)
    last = previous_execution[-1] if previous_execution else {}
    if settings.engine.execution == "auto" and last and not last.get("timed") and last["path"] in paths:
        return ExecutionChoice(path=last["path"], reason="as its earlier part ran")
    if not timed:
        return ExecutionChoice(path=choose_path(settings, paths))
    file = facts.choice_file(timed)
    known = facts.dist_context.on_rank_zero(lambda: read_choice(file))
    if known is not None and known["path"] in paths:
        return ExecutionChoice(path=known["path"], reason=f"timed before: {known['message']}")
    return ExecutionChoice(path=timed[0], timed_paths=timed, file=file)


def read_choice(file: Path) -> dict[str, Any] | None:
    """{"path", "message"} of a choice; None where there is none, or nothing that can be read."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and {"path", "message"} <= content.keys():
            return content
    return None


def settle_choice(file: Path, choice: dict[str, Any]) -> dict[str, Any]:
    """Keep a choice unless there is one, and return the one that holds. A cache that cannot be written is no error."""
    temporary_file = file.with_name(f".{secrets.token_hex(6)}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary_file.write_text(json.dumps(choice) + "\n")
        try:
            os.link(temporary_file, file)  # whole, and only where no other run was first
        except FileExistsError:
            known = read_choice(file)
            if known is not None:
                return known
            os.replace(temporary_file, file)
    except OSError:
        pass
    finally:
        temporary_file.unlink(missing_ok=True)
    return choice
