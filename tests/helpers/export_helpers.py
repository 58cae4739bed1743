"""What test_export.py does on real ranks: many checkpoints in one group, and runs whose export is broken on purpose."""

import json
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers import launch_ranks
from helpers.engines import joined_ranks, start_engine
from trainer.export import export_cli
from trainer.tracking.wandb_logger import wandb_block
from trainer.training.loop import train


def checkpoint_jobs(jobs: list[dict[str, Any]]) -> int:
    """For each job `{name, flags, data, out}`: train, and leave a run folder out/name with a checkpoint.

    out/name.json: of each rank how many gathered tensors were alive at one time while it was saved.
    """
    with joined_ranks() as dist_context:
        for job in jobs:
            run, folder = start_engine(job, dist_context), Path(job["out"]) / job["name"]
            live_tensors = LiveTensorCounter(run.engine.state.iter_state_dict)
            run.engine.state.iter_state_dict = live_tensors.track  # type: ignore[method-assign]
            manager = run.checkpoint_manager(folder / "checkpoints", base=run.model.metadata["fingerprint"])
            for _ in train(run.engine, run.data, run.plan.schedule, run.state, manager, lambda: False):
                pass
            counts = dist_context.all_gather_object(live_tensors.peak_count)
            if dist_context.rank == 0:
                metadata = run.plan.to_metadata(run_id="test", wandb=wandb_block(run.settings.output, "test"))
                (folder / "run.json").write_text(json.dumps(metadata))
                folder.with_suffix(".json").write_text(json.dumps(counts))
    return 0


class LiveTensorCounter:
    """Counts how many tensors of a stream are alive at one time."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.peak_count = 0

    def track(self) -> Iterator[tuple[str, Tensor]]:
        references: list[Any] = []
        for name, tensor in self.stream():
            references.append(weakref.ref(tensor))
            yield name, tensor
            del tensor
            self.peak_count = max(self.peak_count, sum(reference() is not None for reference in references))


def train_with_damaged_export(argv: list[str], damage: str) -> int:
    """A whole run whose export goes wrong by `damage`."""
    for name in ("save_plain_model", "save_adapter"):
        setattr(export_cli, name, _damaged(getattr(export_cli, name), damage))
    return launch_ranks.run_train_script(argv)


def _damaged(save: Any, damage: str) -> Any:
    def save_damaged(folder: Path, model: Any, state_dict: Mapping[str, Tensor], *more: Any) -> None:
        save(folder, model, DAMAGE[damage](dict(state_dict)), *more)

    return save_damaged


def _transpose_weight(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: w.T.contiguous() if n.endswith("h.0.attn.c_proj.weight") else w for n, w in weights.items()}


def _zero_lora_b(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.zeros_like(w) if ".lora_B." in n else w for n, w in weights.items()}


DAMAGE = {"transposed": _transpose_weight, "zeroed": _zero_lora_b}
