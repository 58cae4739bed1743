"""Names inside DeepSpeed, used where it has no public call; checked against DeepSpeed 0.19.8.

`tests/distributed/test_deepspeed_internals.py` fails where an upgrade changes one.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from trainer.distributed.process_group import DistContext


def skip_compiled_collectives() -> None:
    """Before DeepSpeed joins on a CPU: use no collectives over shared memory, which ZeRO never calls. They are compiled
    at first use, need a compiler and leave files in /dev/shm when killed. An empty list of operators switches the
    attempt off."""
    vars(import_module("deepspeed.ops"))["__compatible_ops__"] = {}


def flat_partitions(zero_optimizer: Any, stage: int) -> list[Tensor]:
    """This rank's float32 share of each group of weights, by which the optimizer keeps its state under ZeRO 1 to 3."""
    return zero_optimizer.fp32_partitioned_groups_flat if stage == 3 else zero_optimizer.single_partition_of_fp32_groups


def link_optimizer_state(zero_optimizer: Any) -> None:
    """Under ZeRO 1 and 2: let `safe_get_full_optimizer_state` and `safe_set_...` find the state of every weight.
    DeepSpeed does so once, after the first step of the first group: not before a step, and not for a second group."""
    zero_optimizer._hp_optimizer_states_linked = False
    zero_optimizer._lazy_init_hp_params_optimizer_state()


def local_share(parameter: nn.Parameter, value: Tensor, context: "DistContext") -> Tensor:
    """What a rank holds of a value of a whole weight under ZeRO 3; the last rank's share is padded."""
    shard_size = parameter.ds_tensor.ds_numel
    flat = torch.nn.functional.pad(value.flatten(), (0, shard_size * context.world_size - value.numel()))
    return flat[shard_size * context.rank : shard_size * (context.rank + 1)]
