"""Many small runs in one group of ranks: engine and loop without export, for the invariance and resume matrices."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranks import on_ranks

from trainer.config import cli
from trainer.data.dataset import load
from trainer.data.token_dataset import Rows
from trainer.distributed.process_group import World, leave_world, start_world
from trainer.model.build import build, load_config
from trainer.run import _engine
from trainer.tracking.records import to_line
from trainer.training.checkpoint import Checkpoints, choose
from trainer.training.loop import evaluate, train
from trainer.training.run_plan import make_plan

AT_ONCE = 20  # jobs of one group of ranks; each takes a second or less on a quiet machine


def on_cells(ranks: int, jobs: list[dict[str, Any]], log: Path, target: Callable[..., int] | None = None) -> None:
    """Do the jobs in groups of ranks, each small enough to tell a slow machine from a rank that hangs."""
    for start in range(0, len(jobs), AT_ONCE):
        code = on_ranks(ranks, target or run_cells, jobs[start : start + AT_ONCE], log=log)
        assert code == 0, log.read_text()[-4000:]


def run_cells(jobs: list[dict[str, Any]]) -> int:
    """Run each job `{name, flags, data, out}`: its records go to out/name.jsonl, its final weights to out/name.npz.

    With `resume: [name, step]` it goes on from that step's checkpoint of that job, which ran earlier or on other ranks.
    """
    world = start_world()
    try:
        for job in jobs:
            run_cell(world, job)
    finally:
        leave_world()
    return 0


def run_cell(world: World, job: dict[str, Any]) -> None:
    """One job of `run_cells`."""
    settings = cli.read(job["flags"]).settings
    data = load(Path(job["data"]))
    model = build(settings, device=world.device)
    plan = make_plan(settings, world, data, model.facts, load_config(settings.model))
    out = Path(job["out"])
    name, step = job.get("resume", (None, None))
    point = choose(out / f"{name}-checkpoints", f"step-{step}") if name else None
    engine, progress = _engine(plan, model, point)
    saver = Checkpoints(out / f"{job['name']}-checkpoints", world, keep=99, identity={"base": "test"})
    records = list(train(engine, data, plan.course, progress, saver, lambda: False))
    weights = {name: tensor.numpy().copy() for name, tensor in engine.state.whole_weights()}
    if world.rank == 0:
        (out / f"{job['name']}.jsonl").write_text("".join(to_line(r) + "\n" for r in records))
        np.savez(out / f"{job['name']}.npz", **weights)


def evaluate_cells(jobs: list[dict[str, Any]]) -> int:
    """Evaluate each job's fresh model with every batch size of `batches`, on the rows as they are and turned round.

    The losses go to out/name.json as {batch size: [as they are, turned round]}.
    """
    world = start_world()
    try:
        for job in jobs:
            settings = cli.read(job["flags"]).settings
            data = load(Path(job["data"]))
            model = build(settings)
            plan = make_plan(settings, world, data, model.facts, load_config(settings.model))
            engine, _ = _engine(plan, model, None)
            sides = (data.val, turned_round(data.val))
            losses = {batch: [evaluate(engine, side, batch)[0] for side in sides] for batch in job["batches"]}
            if world.rank == 0:
                (Path(job["out"]) / f"{job['name']}.json").write_text(json.dumps(losses))
    finally:
        leave_world()
    return 0


def turned_round(rows: Rows) -> Rows:
    """The same rows, last one first."""
    texts = [rows.row(i) for i in reversed(range(len(rows)))]
    return Rows(
        ids=np.concatenate(texts),
        offsets=np.cumsum([0, *map(len, texts)]),
        first=np.ascontiguousarray(rows.first[::-1]),
    )


def read_cell(out: Path, name: str) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """(rows, weights) of a cell."""
    rows = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    return rows, dict(np.load(out / f"{name}.npz"))


def reference(arguments: list[str], data_folder: Path) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """The same run as a plain PyTorch loop in one process: no DeepSpeed, no micro-batches, no code of the loop's.

    Each step feeds the whole global batch as one padded batch through the model's own logits. Returns
    (rows of step and evaluation losses and gradient norms, final weights).
    """
    from trainer.data.sampler import epoch_order

    settings = cli.read(arguments).settings
    data = load(data_folder)
    model = build(settings)
    train_settings, module = settings.train, model.module
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    adam = torch.optim.AdamW(trained.values(), lr=train_settings.lr, weight_decay=train_settings.weight_decay, eps=1e-8)
    per_epoch = -(-len(data.train) // train_settings.global_batch)
    total = train_settings.max_steps or round(train_settings.epochs * per_epoch)
    rows: list[dict[str, float]] = []

    def nll(indices: np.ndarray, side: Any) -> tuple[torch.Tensor, int]:
        width = max(len(side.row(i)) for i in indices)
        ids = torch.zeros(len(indices), width, dtype=torch.long)
        counts = torch.zeros(len(indices), width, dtype=torch.bool)
        for n, i in enumerate(indices):
            row = side.row(i)
            ids[n, : len(row)] = torch.from_numpy(row)
            counts[n, int(side.first[i]) : len(row)] = True
        logits = module(input_ids=ids, use_cache=False).logits
        picked = torch.log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
        return -(picked * counts[:, 1:]).sum(), int(counts[:, 1:].sum())

    def evaluate() -> None:
        module.eval()
        with torch.no_grad():
            parts = [nll(np.array([i]), data.val) for i in range(len(data.val))]
        rows.append({"kind": "eval", "loss": sum(p[0].item() for p in parts) / sum(p[1] for p in parts)})
        module.train()

    evaluate()
    module.train()
    for step in range(total):
        epoch, place = divmod(step, per_epoch)
        order = epoch_order(
            data.train, seed=train_settings.seed, epoch=epoch, global_batch=train_settings.global_batch,
            shuffle=settings.data.shuffle, by_length=settings.data.objective == "completion",
        )  # fmt: skip
        batch = order[place * train_settings.global_batch : (place + 1) * train_settings.global_batch]
        summed, counted = nll(batch, data.train)
        loss = summed / counted
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), train_settings.clip)
        for group in adam.param_groups:
            group["lr"] = train_settings.lr * (total - step) / total
        adam.step()
        adam.zero_grad()
        rows.append({"kind": "step", "loss": loss.item(), "grad_norm": float(norm)})
        if (step + 1) % per_epoch == 0 or step + 1 == total:
            evaluate()
    return rows, {name: p.detach().numpy().copy() for name, p in trained.items()}
