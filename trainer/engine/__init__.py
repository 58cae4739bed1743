"""Settings + ZeRO file -> DeepSpeed's dict -> engine: the only door to deepspeed.

DeepSpeed divides weights, gradients and optimizer state over the ranks; the numbers are ours. The optimizer is ours
under every stage (`trainer.optim`), the schedule stays out of DeepSpeed's dict, the loss is divided by the tokens of
the global batch before the first backward, and the engine never counts micro-batches for us. bf16 is autocast over
float32 weights, so that every stage does the same arithmetic.
"""

from trainer.engine.engine import Engine, Step
from trainer.engine.halves import holds_halves
from trainer.engine.ways import NotFinite, goes_direct
from trainer.engine.world import (
    World,
    device_memory,
    forwarded_variables,
    free_port,
    has_bf16,
    leave_world,
    lost_peer,
    peak_memory,
    planned_world,
    start_world,
)
from trainer.engine.zero import DS_FOLDER, ZeroFile, choose_zero_file, deepspeed_dict, read_zero_file

__all__ = [
    "DS_FOLDER",
    "Engine",
    "NotFinite",
    "Step",
    "World",
    "ZeroFile",
    "choose_zero_file",
    "deepspeed_dict",
    "device_memory",
    "forwarded_variables",
    "free_port",
    "goes_direct",
    "has_bf16",
    "holds_halves",
    "leave_world",
    "lost_peer",
    "peak_memory",
    "planned_world",
    "read_zero_file",
    "start_world",
]
