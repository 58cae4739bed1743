"""A run's parts in a test, from its flags: data, model, plan, and the engine on its ranks."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from trainer.config import cli
from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset, load
from trainer.data.prepare import prepare
from trainer.distributed.deepspeed_config import read_deepspeed_file
from trainer.distributed.engine import Engine
from trainer.distributed.execution import ExecutionPlan, make_execution_plan
from trainer.distributed.process_group import DistContext, destroy_process_group, init_distributed, simulated_context
from trainer.model.build import TrainableModel, build_model
from trainer.model.lora import adopt_adapter
from trainer.run import build_engine
from trainer.training.checkpoint import Checkpoint, CheckpointManager
from trainer.training.run_plan import RunPlan, build_planned_model, make_plan
from trainer.training.schedule import BestCheckpoint, TrainState

STUB_IDENTITY = {"base": "test", "data": "test", "fixed": {}, "precision": "fp32", "device": "cpu"}


@dataclass(frozen=True)
class PlannedRun:
    """All that is decided before an engine starts."""

    settings: Settings
    data: PreparedDataset
    model: TrainableModel
    plan: RunPlan


@dataclass(frozen=True)
class StartedRun(PlannedRun):
    """The same with its engine, at the beginning or where a checkpoint stood."""

    engine: Engine
    state: TrainState

    def checkpoint_manager(self, folder: Path, *, save_total_limit: int = 99) -> CheckpointManager:
        context, identity = self.plan.dist_context, self.plan.checkpoint_identity()
        return CheckpointManager(folder, context, save_total_limit=save_total_limit, identity=identity)


@contextlib.contextmanager
def joined_ranks() -> Iterator[DistContext]:
    """This process as a rank of its group, which it leaves at the end."""
    try:
        yield init_distributed()
    finally:
        destroy_process_group()


def context_of_hosts(*hosts: str, gather: Callable[[Any], list[Any]]) -> DistContext:
    """Rank 0's context of a run with a rank on each of these; `gather(value)`: what all ranks say when it says that."""
    context = replace(simulated_context(len(hosts)), hosts=hosts)
    object.__setattr__(context, "all_gather_object", gather)
    return context


def prepare_data(argv: Sequence[str]) -> Path:
    settings = cli.parse_args(["--mode", "full", *argv]).settings
    return prepare(settings.data, model=settings.model.model, global_batch=settings.train.global_batch).folder


def plan_run(
    argv: Sequence[str], dist_context: DistContext, data: str | Path | None = None, *, on_meta: bool = False
) -> PlannedRun:
    """The plan of a run on its ranks; `data`: the folder of its prepared rows; left out: they are prepared."""
    settings = adopt_adapter(cli.parse_args(list(argv)).settings)
    dataset = load(Path(data) if data is not None else prepare_data(argv))
    model = build_model(settings, on_meta=True)
    plan = make_plan(settings, dist_context, dataset)
    if not on_meta:
        model = build_planned_model(plan, with_fingerprint=True)
        plan = replace(plan, model_info={**plan.model_info, "fingerprint": model.metadata["fingerprint"]})
    return PlannedRun(settings, dataset, model, plan)


def plan_execution(*flags: str, device: str = "cpu", ranks: int = 1, model_dropout: float = 0.0) -> ExecutionPlan:
    """The execution plan of these flags, without a model or a process group."""
    settings = cli.parse_args(["--mode", "lora", "--preset", "card", *flags]).settings
    precision = settings.engine.precision or "fp32"
    stage = read_deepspeed_file(settings.engine.ds_config or "zero0").stage
    context = replace(simulated_context(ranks), device=torch.device(device))
    return make_execution_plan(settings, context, stage=stage, precision=precision, model_dropout=model_dropout)


def start_engine(job: Mapping[str, Any], dist_context: DistContext, checkpoint: Checkpoint | None = None) -> StartedRun:
    """The engine of a job `{flags, data}`; `execution`: fields of the execution plan that are other than planned."""
    planned = plan_run(job["flags"], dist_context, job["data"])
    plan = replace(planned.plan, execution=replace(planned.plan.execution, **job.get("execution", {})))
    engine, state = build_engine(plan, planned.model, checkpoint)
    return StartedRun(planned.settings, planned.data, planned.model, plan, engine, state)


def save_stub_checkpoint(folder: Path, step: int, *, limit: int = 2, loss: float | None = None) -> None:
    """The checkpoint of one weight, which has the number of its step as its value; `loss`: of its evaluation."""
    weight = torch.full((3,), float(step))
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    state = SimpleNamespace(
        iter_state_dict=lambda: ((f"{kind}/w", weight) for kind in kinds),
        state_dict_layout=lambda: [(f"{kind}/w", torch.float32, (3,)) for kind in kinds],
        loss_scale=lambda: None,
    )
    engine: Any = SimpleNamespace(trainable_params={"w": weight}, state=state)
    best = BestCheckpoint(step=step, epoch=0.0, loss=loss) if loss is not None else None
    manager = CheckpointManager(folder, simulated_context(1), save_total_limit=limit, identity=STUB_IDENTITY)
    manager.save(engine, TrainState(step=step, best=best, val_loss=loss))
