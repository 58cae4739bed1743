"""What test_methods.py does on real ranks: a run, the same run stopped and resumed, its export loaded again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from cells import read_cell, run_cell

from trainer.config import cli
from trainer.data.dataset import load
from trainer.distributed.process_group import leave_world, start_world
from trainer.export import verify_worker
from trainer.export.folder import base_of, gathered, save_folder
from trainer.export.verify import check_logits, fixed_rows
from trainer.model.build import build, load_config
from trainer.run import _engine
from trainer.training.checkpoint import choose
from trainer.training.loop import evaluate
from trainer.training.run_plan import make_plan

STOP = 2  # the step after which the run is stopped


def prove(jobs: list[dict[str, Any]]) -> int:
    """Of each job `{name, flags, data, out}`: run it whole and again from STOP, then export and verify its end."""
    world = start_world()
    try:
        for job in jobs:
            run_cell(world, job)
            run_cell(world, {**job, "name": f"{job['name']}-again", "resume": [job["name"], STOP]})
            answer = _exported(job, world)
            if world.rank == 0:
                (Path(job["out"]) / f"{job['name']}.json").write_text(json.dumps(answer))
    finally:
        leave_world()
    return 0


def _exported(job: dict[str, Any], world: Any) -> dict[str, Any]:
    """The facts about the folder of the last checkpoint, with what the trained model itself answered."""
    settings, out = cli.read(job["flags"]).settings, Path(job["out"])
    data = load(Path(job["data"]))
    model = build(settings, device=world.device)
    plan = make_plan(settings, world, data, model.facts, load_config(settings.model))
    point = choose(out / f"{job['name']}-checkpoints", "latest")
    engine, progress = _engine(plan, model, point)
    loss, _ = evaluate(engine, data.val, settings.train.eval_batch)
    ids = fixed_rows(data)
    logits = check_logits(model.module, ids, world.device)
    weights = gathered(engine.state.whole_weights(), keep=world.rank == 0)
    optimizer_bytes = engine.state.optimizer_bytes()
    if world.rank:
        return {}
    folder = out / f"{job['name']}-folder"
    folder.mkdir()
    base = base_of(model, out)
    save_folder(folder, model.module, weights, base=base, tokenizer=None)
    np.savez(out / f"{job['name']}-logits.npz", input_ids=ids, logits=logits)
    answer = verify_worker.verify({
        "folder": str(folder), "logits": str(out / f"{job['name']}-logits.npz"), "data": job["data"],
        "eval_batch": settings.train.eval_batch, "device": "cpu", "precision": "fp32",
    })  # fmt: skip
    here = {"trained_loss": loss, "recorded": progress.val_loss, "largest": float(np.abs(logits).max())}
    return {**answer, **here, "optimizer_bytes": optimizer_bytes, "facts": model.facts, "tied_here": model.tied}


def read_proof(out: Path, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], bool, dict[str, Any]]:
    """(rows of the whole run, rows after STOP of the resumed one, whether all weights ended bitwise equal, facts)."""
    rows, weights = read_cell(out, name)
    again, ended = read_cell(out, f"{name}-again")
    same = weights.keys() == ended.keys() and all(np.array_equal(weights[key], ended[key]) for key in weights)
    return rows, again, same, json.loads((out / f"{name}.json").read_text())
