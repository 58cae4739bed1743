"""Many small runs in one group of ranks: engine and loop without export, for the invariance and resume matrices."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helpers.engines import StartedRun, joined_ranks, prepare_data, start_engine
from helpers.launch_ranks import run_on_ranks
from helpers.process_groups import reproducible_records
from helpers.tiny_inputs import tiny_argv
from helpers.tolerances import LOSS_TOLERANCE, NORM_TOLERANCE, WEIGHT_TOLERANCE
from trainer.config import cli
from trainer.data.dataset import TokenDataset, load
from trainer.data.sampler import epoch_order
from trainer.distributed.process_group import DistContext
from trainer.model.build import build_model
from trainer.tracking.records import to_line
from trainer.tracking.wandb_logger import wandb_block
from trainer.training.checkpoint import resolve_checkpoint
from trainer.training.evaluation import evaluate
from trainer.training.loop import train

LEARNING_RATE = 3e-3
GLOBAL_BATCH = 6  # divides by 1, 2 and 3 ranks
NUM_STEPS = 6  # an epoch and more: the last step of an epoch has fewer examples
JOBS_PER_LAUNCH = 20  # jobs of one group of ranks; each takes a second or less on a quiet machine


def make_argv(model: str, data_files: tuple[str, str], mode: str, objective: str) -> list[str]:
    """Flags of a run of the matrix."""
    text = f"--objective {objective} --block-size {16 if objective == 'blocks' else 32} --mode {mode}"
    text += f" --lr {LEARNING_RATE} --max-grad-norm 1.0 --global-batch {GLOBAL_BATCH} --eval-batch 4"
    return tiny_argv(model, data_files, f"{text} --max-steps {NUM_STEPS} --save-every never")


def output_relevant_part(name: str, weight: np.ndarray) -> np.ndarray:
    """The part of a weight that the output depends on: of c_attn's bias [query, key, value] not the keys'."""
    return np.delete(weight, np.s_[len(weight) // 3 : 2 * len(weight) // 3]) if name.endswith("c_attn.bias") else weight


@dataclass(frozen=True, kw_only=True)
class RunDifference:
    """Largest differences of two runs of the same steps: relative, of weights in learning rates."""

    loss: float
    norm: float
    weight: float

    @classmethod
    def between(cls, run: tuple[Any, Mapping[str, Any]], other: tuple[Any, Mapping[str, Any]]) -> "RunDifference":
        """Of (rows, weights) of each; AssertionError where they are not of the same steps and weights."""
        (rows, weights), (other_rows, other_weights) = run, other
        pairs = [(a, b) for a, b in zip(rows, other_rows, strict=True) if "loss" in a]
        assert all(a["kind"] == b["kind"] for a, b in pairs)
        assert weights.keys() == other_weights.keys()
        parts = [[output_relevant_part(name, w[name]) for w in (weights, other_weights)] for name in weights]
        return cls(
            loss=max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs),
            norm=max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in pairs if "grad_norm" in b),
            weight=max(float(np.abs(a - b).max()) for a, b in parts) / LEARNING_RATE,
        )

    def is_rounding(self) -> bool:
        """Within the bounds of another order of the sums."""
        return self.loss <= LOSS_TOLERANCE and self.norm <= NORM_TOLERANCE and self.weight <= WEIGHT_TOLERANCE

    def __str__(self) -> str:
        return f"loss {self.loss:.1e} norm {self.norm:.1e} weights {self.weight:.1e}"


def make_job(out: Path, name: str, flags: list[str], *, data: Path | None = None, **options: Any) -> dict[str, Any]:
    """A run `name` of `run_jobs` that leaves its files in `out`; `data`: prepared ones that are not of these flags."""
    return {"name": name, "flags": flags, "data": str(data or prepare_data(flags)), "out": str(out), **options}


def launch_jobs(
    world_size: int,
    jobs: list[dict[str, Any]],
    log: Path | None = None,
    target: Callable[..., int] | None = None,
    *,
    jobs_per_launch: int = JOBS_PER_LAUNCH,
    on_gpu: bool = False,
) -> None:
    """Do the jobs in groups of ranks, each small enough to tell a slow machine from a rank that hangs."""
    log = log or Path(jobs[0]["out"]) / f"{world_size}.log"
    for start in range(0, len(jobs), jobs_per_launch):
        part = jobs[start : start + jobs_per_launch]
        exit_code = run_on_ranks(world_size, target or run_jobs, part, log=log, on_gpu=on_gpu)
        assert exit_code == 0, log.read_text()[-4000:]


def launch_by_ranks(jobs: list[dict[str, Any]], target: Callable[..., int] | None = None) -> None:
    """Do each job on as many ranks as its `ranks` says."""
    for world_size in sorted({job["ranks"] for job in jobs}):
        launch_jobs(world_size, [job for job in jobs if job["ranks"] == world_size], target=target)


def run_jobs(jobs: list[dict[str, Any]]) -> int:
    """Run each job: its records go to out/name.jsonl, its final weights to out/name.npz, out/name can be exported. With
    `resume: [name, step]` it goes on from that step's checkpoint of that job, which ran earlier or on other ranks; its
    `execution` names fields of the execution plan that are other than planned."""
    with joined_ranks() as dist_context:
        for job in jobs:
            run_job(dist_context, job)
    return 0


def run_job(dist_context: DistContext, job: dict[str, Any]) -> StartedRun:
    """One job of `run_jobs`, at its end."""
    out = Path(job["out"])
    name, step = job.get("resume", (None, None))
    checkpoint = resolve_checkpoint(out / name / "checkpoints", f"step-{step}") if name else None
    run = start_engine(job, dist_context, checkpoint)
    folder = out / job["name"]
    manager = run.checkpoint_manager(folder / "checkpoints")
    records = list(train(run.engine, run.data, run.plan.schedule, run.state, manager, lambda: False))
    weights = {name: tensor.numpy().copy() for name, tensor in run.engine.state.gather_weights()}
    if dist_context.rank == 0:
        (out / f"{job['name']}.jsonl").write_text("".join(to_line(r) + "\n" for r in records))
        np.savez(out / f"{job['name']}.npz", **weights)
        metadata = run.plan.to_metadata(run_id="test", wandb=wandb_block(run.settings.output, "test"))
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text(json.dumps(metadata))
    return run


def evaluate_jobs(jobs: list[dict[str, Any]]) -> int:
    """Evaluate each job's fresh model with every batch size of `batches`, on the rows as they are and turned round. The
    losses go to out/name.json as {batch size: [as they are, turned round]}."""
    with joined_ranks() as dist_context:
        for job in jobs:
            run = start_engine(job, dist_context)
            splits = (run.data.val, reverse_dataset(run.data.val))
            losses = {
                batch_size: [evaluate(run.engine, split, batch_size).loss for split in splits]
                for batch_size in job["batches"]
            }
            if dist_context.rank == 0:
                (Path(job["out"]) / f"{job['name']}.json").write_text(json.dumps(losses))
    return 0


def reverse_dataset(dataset: TokenDataset) -> TokenDataset:
    """The same rows, last one first."""
    token_rows = [dataset.row(i) for i in reversed(range(len(dataset)))]
    return TokenDataset(
        ids=np.concatenate(token_rows),
        offsets=np.cumsum([0, *map(len, token_rows)]),
        target_mask=np.concatenate([dataset.is_target(i) for i in reversed(range(len(dataset)))]).astype(np.uint8),
    )


def read_job_result(out: Path, name: str) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """(rows, weights) of a cell."""
    records = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    return records, dict(np.load(out / f"{name}.npz"))


def assert_resumed_bitwise(out: Path, name: str, resumed_name: str, step: int) -> None:
    """The rows of a run that went on from `step` of another, and its weights, are bitwise those of the other."""
    records, weights = read_job_result(out, name)
    resumed_records, resumed_weights = read_job_result(out, resumed_name)
    assert reproducible_records(resumed_records) == reproducible_records(records, after=step), resumed_name
    assert weights.keys() == resumed_weights.keys(), resumed_name
    assert all(np.array_equal(weights[key], resumed_weights[key]) for key in weights), resumed_name


def train_plain_loop(argv: list[str]) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """The same run as a plain PyTorch loop in one process: no DeepSpeed, no micro-batches, no code of the loop's. Each
    step feeds the whole global batch as one padded batch through the model's own logits. Returns (rows of step and
    evaluation losses and gradient norms, final weights)."""
    settings = cli.parse_args(argv).settings
    data = load(prepare_data(argv))
    model = build_model(settings)
    train_settings, module = settings.train, model.module
    trainable_params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trainable_params.values(), lr=train_settings.lr, weight_decay=train_settings.weight_decay, eps=1e-8
    )
    steps_per_epoch = -(-len(data.train) // train_settings.global_batch)
    total_steps = train_settings.max_steps or round(train_settings.epochs * steps_per_epoch)
    records: list[dict[str, float]] = []

    def sum_nll(indices: np.ndarray, dataset: Any) -> tuple[torch.Tensor, int]:
        width = max(len(dataset.row(i)) for i in indices)
        ids = torch.zeros(len(indices), width, dtype=torch.long)
        is_target = torch.zeros(len(indices), width, dtype=torch.bool)
        for n, i in enumerate(indices):
            row = dataset.row(i)
            ids[n, : len(row)] = torch.from_numpy(row)
            is_target[n, : len(row)] = torch.from_numpy(dataset.is_target(i))
        logits = module(input_ids=ids, use_cache=False).logits
        target_log_probs = torch.log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
        return -(target_log_probs * is_target[:, 1:]).sum(), int(is_target[:, 1:].sum())

    def evaluate() -> None:
        module.eval()
        with torch.no_grad():
            nll_sums, counts = zip(*(sum_nll(np.array([i]), data.val) for i in range(len(data.val))), strict=True)
        records.append({"kind": "eval", "loss": sum(nll.item() for nll in nll_sums) / sum(counts)})
        module.train()

    evaluate()
    for step in range(total_steps):
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        order = epoch_order(
            data.train,
            seed=train_settings.seed,
            epoch=epoch,
            global_batch=train_settings.global_batch,
            group_by_length=settings.data.objective == "completion",
        )
        first = step_in_epoch * train_settings.global_batch
        nll_sum, num_targets = sum_nll(order[first : first + train_settings.global_batch], data.train)
        loss = nll_sum / num_targets
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable_params.values(), train_settings.max_grad_norm)
        for param_group in optimizer.param_groups:
            param_group["lr"] = train_settings.lr * (total_steps - step) / total_steps
        optimizer.step()
        optimizer.zero_grad()
        records.append({"kind": "step", "loss": loss.item(), "grad_norm": float(grad_norm)})
        if (step + 1) % steps_per_epoch == 0 or step + 1 == total_steps:
            evaluate()
    return records, {name: p.detach().numpy().copy() for name, p in trainable_params.items()}
