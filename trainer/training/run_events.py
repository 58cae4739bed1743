"""The events at the two ends of a process of a run: resumed, and finished."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.files import folder_size
from trainer.tracking.records import EventRecord
from trainer.training.checkpoint import Checkpoint
from trainer.training.run_plan import RunPlan
from trainer.training.train_state import TrainState


def resumed_event(
    plan: RunPlan, state: TrainState, changes: Mapping[str, Any], source: Checkpoint | None, num_truncated: int
) -> EventRecord:
    """From where a run goes on, how many rows after it were cut off, and what changed: {name: [old, new]}."""
    origin = source.folder.name if source else "the start: the run had no checkpoint"
    message = f"resumed from {origin}" + (f", {num_truncated} rows after it cut off" if num_truncated else "")
    message += "".join(f"; passed over: {reason}" for reason in (source.skipped_reasons if source else ()))
    message += "".join(f"; {name} changed from {old} to {new}" for name, (old, new) in changes.items())
    facts = {
        "checkpoint": origin,
        "rows_cut": num_truncated,
        "changed": changes,
        "resolved": plan.resolved(),
        "execution": plan.execution_entry(state.step),
    }
    return EventRecord(event="resumed", step=state.step, message=message, time=state.elapsed_seconds, facts=facts)


def finished_event(
    plan: RunPlan,
    state: TrainState,
    *,
    elapsed_seconds: float,
    measurements: Mapping[str, Any],
    choice: Mapping[str, Any] | None,
    export_summary: str,
) -> EventRecord:
    """The end of a run: what it took, its last and best losses, and what was exported.

    `choice`: which weights were exported (`which`, `step`, `loss`), None for none. Parameters: one a fact.
    """
    folder, schedule = Path(plan.settings.run_folder), plan.schedule
    facts = {
        "wall_seconds": elapsed_seconds,
        "device_hours": elapsed_seconds * plan.dist_context.world_size / 3600,
        **measurements,
        "checkpoint_bytes": folder_size(max((folder / "checkpoints").glob("step-*"), default=None)),
        "export_bytes": folder_size(folder / "model"),
        "best": vars(state.best) if state.best else None,
        "final": {"step": state.step, "epoch": schedule.record_axes(state)["epoch"], "loss": state.val_loss},
        "early_stop": schedule.is_stopped_early(state) and state.step < schedule.total_steps,
        "exported": choice,
        "export": export_summary,
    }
    where = f"{folder / 'model'} " if choice else ""
    if choice and choice["step"] != state.step:
        where += f"holds step {choice['step']}, the best, "
    message = f"finished after {state.step} steps; {where}{export_summary}"
    return EventRecord(event="finished", step=state.step, message=message, time=elapsed_seconds, facts=facts)
