"""What test_export.py does on real ranks: many exports in one group, and runs whose export is broken on purpose."""

import os
import subprocess
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ranks
import torch
from torch import Tensor

from trainer import run
from trainer.config import cli
from trainer.data.dataset import load
from trainer.distributed.engine import Engine
from trainer.distributed.process_group import leave_world, start_world
from trainer.export import folder, verify, verify_worker
from trainer.export.folder import base_of, gathered, save_folder
from trainer.export.verify import check_logits, fixed_rows
from trainer.model.build import build, load_config
from trainer.training.checkpoint import Checkpoints, Progress
from trainer.training.loop import train
from trainer.training.run_plan import make_plan


def export_all(jobs: list[dict[str, Any]]) -> int:
    """For each job `{name, flags, data, out}`: train, gather, rank 0 writes the folder out/name and its facts."""
    world = start_world()
    try:
        for job in jobs:
            settings = cli.read(job["flags"]).settings
            data, out = load(Path(job["data"])), Path(job["out"])
            model = build(settings)
            plan = make_plan(settings, world, data, model.facts, load_config(settings.model))
            engine = Engine(world, model, plan.deepspeed, settings.train, plan.precision)
            saver = Checkpoints(out / f"{job['name']}-checkpoints", world, keep=1, identity={"base": "test"})
            records = list(train(engine, data, plan.course, Progress(), saver, lambda: False))
            ids = fixed_rows(data)
            logits = check_logits(model.module, ids, world.device)
            alive = Alive()
            weights = gathered(alive.watch(engine.state.whole_weights()), keep=world.rank == 0)
            most = world.gather(alive.most)
            if world.rank == 0:
                (out / job["name"]).mkdir()
                save_folder(
                    out / job["name"], model.module, weights, base=base_of(model, out),
                    tokenizer=settings.model.model,
                )  # fmt: skip
                loss = [r.loss for r in records if hasattr(r, "eval_tokens")][-1]
                np.savez(
                    out / f"{job['name']}.npz", ids=ids, logits=logits, loss=loss, alive=most, count=len(weights),
                    tied=model.tied,
                )  # fmt: skip
    finally:
        leave_world()
    return 0


class Alive:
    """Counts how many tensors of a stream are alive at one time."""

    def __init__(self) -> None:
        self.most = 0
        self.seen: list[Any] = []

    def watch(self, stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stream:
            self.seen.append(weakref.ref(tensor))
            yield name, tensor
            del tensor
            self.most = max(self.most, sum(ref() is not None for ref in self.seen))


def in_this_process(job: Path) -> "subprocess.CompletedProcess[str]":
    """Stands for `check._fresh_process` where a test is about what comes of the answer; saves ten seconds."""
    import json

    try:
        answer = verify_worker.verify(json.loads(job.read_text()))
    except Exception as problem:
        return subprocess.CompletedProcess([], 1, stdout="", stderr=f"Traceback\n{problem}")
    return subprocess.CompletedProcess([], 0, stdout=json.dumps(answer), stderr="")


def quick(arguments: list[str]) -> int:
    """A whole run that checks its export in the same process."""
    verify._fresh_process = in_this_process
    return ranks.command(arguments)


def counted(arguments: list[str], place: str) -> int:
    """A whole run of which each rank writes down how many gathered tensors it kept."""
    honest = run.gathered

    def gathered(weights: Iterator[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
        kept = honest(weights, keep=keep)
        (Path(place) / f"kept-{os.environ['RANK']}").write_text(str(len(kept)))
        return kept

    run.gathered = gathered
    return ranks.command(arguments)


def broken(arguments: list[str], how: str) -> int:
    """A whole run whose export goes wrong in the way `how`."""
    honest = folder.save_folder

    def save(place: Path, module: Any, weights: dict[str, Tensor], **rest: Any) -> None:
        honest(place, module, BREAK[how](weights), **rest)

    folder.save_folder = save
    return quick(arguments)


def _transpose(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: w.T.contiguous() if n.endswith("h.0.attn.c_proj.weight") else w for n, w in weights.items()}


def _forget(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.zeros_like(w) if ".lora_B." in n else w for n, w in weights.items()}


BREAK = {"transposed": _transpose, "zeroed": _forget}
