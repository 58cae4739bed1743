"""A checkpoint into a model and an engine, on every rank.

On one host each rank opens the file. On several rank 0 alone does, and sends one tensor at a time: the others need not
see its folder, and what may lie under that name on their disks is not looked at.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainer.config.errors import UserError
from trainer.training.checkpoint import Checkpoint

if TYPE_CHECKING:
    from trainer.distributed.engine import Engine
    from trainer.distributed.process_group import DistContext


def load_weights(checkpoint: Checkpoint, module: nn.Module, context: "DistContext | None" = None) -> None:
    """Put a checkpoint's weights into the model, before the engine divides it. UserError where they are another's.

    `context`: of the ranks, which must all call; None: of one process that is nobody's rank.
    """
    trainable_params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    layout = checkpoint.layout() if context is None else context.on_rank_zero(checkpoint.layout)
    saved_shapes = {
        name.removeprefix("weight/"): shape for name, (shape, _) in layout.items() if name.startswith("weight/")
    }
    if {name: tuple(p.shape) for name, p in trainable_params.items()} != saved_shapes:
        mismatched = sorted(set(trainable_params) ^ set(saved_shapes)) or [
            n for n, p in trainable_params.items() if tuple(p.shape) != saved_shapes[n]
        ]
        raise UserError(
            f"checkpoint {checkpoint.folder} is of another model: {mismatched[0]} and {len(mismatched) - 1} more differ"
        )
    cpu = torch.device("cpu")
    read_tensor = checkpoint.tensor_reader(cpu) if context is None else _shared_reader(checkpoint, context, cpu)
    with torch.no_grad():
        for name, parameter in trainable_params.items():
            parameter.copy_(read_tensor(f"weight/{name}"))


def load_optimizer(checkpoint: Checkpoint, engine: "Engine") -> None:
    """Put a checkpoint's moments and counts into an engine that was built around its weights; all ranks must call."""
    state = checkpoint.train_state
    reader = _shared_reader(checkpoint, engine.dist_context, engine.dist_context.device)
    engine.state.load_state_dict(reader, state.step - state.skipped_steps, checkpoint.metadata.get("loss_scale"))


def load_for_evaluation(checkpoint: Checkpoint, engine: "Engine") -> None:
    """Put a checkpoint's weights into an engine that trains no more; all ranks must call."""
    engine.state.load_weights(_shared_reader(checkpoint, engine.dist_context, engine.dist_context.device))


def _shared_reader(checkpoint: Checkpoint, context: "DistContext", device: torch.device) -> Callable[[str], Tensor]:
    """As `Checkpoint.tensor_reader`; all ranks must ask for the same names in one order."""
    if context.num_nodes == 1:
        return checkpoint.tensor_reader(device)
    layout = context.on_rank_zero(checkpoint.layout)
    read_from_disk = checkpoint.tensor_reader(torch.device("cpu")) if context.rank == 0 else None

    def read(name: str) -> Tensor:
        shape, dtype = layout[name]
        tensor = torch.empty(shape, dtype=dtype) if read_from_disk is None else read_from_disk(name)
        context.broadcast(tensor)
        return tensor.to(device)

    return read
