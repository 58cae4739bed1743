"""How a model comes from the host to the device of its rank."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from trainer.kernels.linear_cross_entropy import CausalLMLoss
from trainer.model.build import TrainableModel


def place_model(
    loss_module: CausalLMLoss, model: TrainableModel, deepspeed_config: Mapping[str, Any], device: torch.device
) -> str:
    """Move the model there; returns what its loss finds of its head (`CausalLMLoss.verify`). All ranks must call.

    Under ZeRO 3 it goes weight by weight, and of each only this rank's part stays. A packed base is there already.
    """
    if int(deepspeed_config["zero_optimization"].get("stage", 0)) < 3 or model.quant_settings is not None:
        loss_module.to(device)
        return loss_module.verify()
    head_problem = loss_module.verify()
    if "fp16" in deepspeed_config:
        loss_module.half()
    import_module("deepspeed").zero.Init(module=loss_module, config_dict_or_path=dict(deepspeed_config))
    for buffer in loss_module.buffers():
        buffer.data = buffer.data.to(device)
    return head_problem
