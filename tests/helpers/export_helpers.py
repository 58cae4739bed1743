"""What test_export.py does on real ranks: many exports in one group, and runs whose export is broken on purpose."""

import os
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helpers import launch_ranks
from helpers.engines import joined_ranks, start_engine
from trainer.export import folder, run_export
from trainer.export.folder import FolderContent, base_model_ref, collect_state_dict, save_folder, training_tokenizer
from trainer.export.verify import compute_logits, fixed_input_ids
from trainer.training.loop import train


def export_jobs(jobs: list[dict[str, Any]]) -> int:
    """For each job `{name, flags, data, out}`: train, gather, rank 0 writes the folder out/name and its facts."""
    with joined_ranks() as dist_context:
        for job in jobs:
            run = start_engine(job, dist_context)
            settings, data, model, engine, out = run.settings, run.data, run.model, run.engine, Path(job["out"])
            manager = run.checkpoint_manager(out / f"{job['name']}-checkpoints", save_total_limit=1)
            records = list(train(engine, data, run.plan.schedule, run.state, manager, lambda: False))
            input_ids = fixed_input_ids(data)
            logits = compute_logits(model.module, input_ids, dist_context.device)
            live_tensors = LiveTensorCounter()
            weights = collect_state_dict(
                live_tensors.track(engine.state.gather_weights()), should_keep=dist_context.rank == 0
            )
            peak_counts = dist_context.all_gather_object(live_tensors.peak_count)
            if dist_context.rank == 0:
                (out / job["name"]).mkdir()
                content = FolderContent(
                    module=model.module,
                    state_dict=weights,
                    base_model=base_model_ref(model, out),
                    tokenizer=training_tokenizer(settings.model.model, data.metadata),
                )
                save_folder(out / job["name"], content)
                loss = [r.loss for r in records if hasattr(r, "eval_tokens")][-1]
                np.savez(
                    out / f"{job['name']}.npz",
                    ids=input_ids,
                    logits=logits,
                    loss=loss,
                    alive=peak_counts,
                    count=len(weights),
                    tied=model.has_tied_embeddings,
                )
    return 0


class LiveTensorCounter:
    """Counts how many tensors of a stream are alive at one time."""

    def __init__(self) -> None:
        self.peak_count = 0
        self.references: list[Any] = []

    def track(self, stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stream:
            self.references.append(weakref.ref(tensor))
            yield name, tensor
            del tensor
            self.peak_count = max(self.peak_count, sum(reference() is not None for reference in self.references))


def train_counting_gathered(argv: list[str], out_dir: str) -> int:
    """A whole run of which each rank writes down how many gathered tensors it kept."""
    original = run_export.collect_state_dict

    def gather_and_count(weights: Iterator[tuple[str, Tensor]], *, should_keep: bool) -> dict[str, Tensor]:
        tensors = original(weights, should_keep=should_keep)
        (Path(out_dir) / f"kept-{os.environ['RANK']}").write_text(str(len(tensors)))
        return tensors

    run_export.collect_state_dict = gather_and_count
    return launch_ranks.run_train_script(argv)


def train_with_damaged_export(argv: list[str], damage: str) -> int:
    """A whole run whose export goes wrong by `damage`."""
    original = folder.save_folder

    def save_damaged(out_dir: Path, content: FolderContent) -> None:
        original(out_dir, replace(content, state_dict=DAMAGE[damage](dict(content.state_dict))))

    folder.save_folder = save_damaged
    return launch_ranks.run_train_script(argv)


def _transpose_weight(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: w.T.contiguous() if n.endswith("h.0.attn.c_proj.weight") else w for n, w in weights.items()}


def _zero_lora_b(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.zeros_like(w) if ".lora_B." in n else w for n, w in weights.items()}


DAMAGE = {"transposed": _transpose_weight, "zeroed": _zero_lora_b}
