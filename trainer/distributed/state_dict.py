"""The state of a run on its ranks: weights and moments read whole, and set from a checkpoint, by the same names and
tensors under every ZeRO stage and number of ranks."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.errors import UserError
from trainer.distributed import deepspeed_internals
from trainer.distributed.process_group import DistContext
from trainer.model import optimizer

#: of DeepSpeed's DynamicLossScaler
_LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class EngineState:
    """What a step changes: the trained weights and what the optimizer keeps of them."""

    def __init__(
        self,
        dist_context: DistContext,
        deepspeed_engine: Any,
        trainable_params: Mapping[str, nn.Parameter],
        *,
        stage: int,
        precision: str,
    ):
        self.dist_context = dist_context
        self.deepspeed_engine = deepspeed_engine
        self.optimizer = deepspeed_engine.optimizer  # DeepSpeed's around ours, but under stage 0
        self.trainable_params = trainable_params
        self.precision = precision
        self._stage = stage
        self._torch_optimizer = self.optimizer if stage == 0 else self.optimizer.optimizer
        self._fragments = import_module("deepspeed.utils")

    # --- without gathering ---

    def fits_unsharded(self) -> bool:
        """Whether every rank has room for all weights within half of what is free; all ranks must call."""
        device = self.dist_context.device
        if self._stage < 3 or device.type != "cuda":
            return True
        total_bytes = sum(p.ds_numel * p.element_size() for p in self.deepspeed_engine.module.parameters())
        return all(self.dist_context.all_gather_object(total_bytes < torch.cuda.mem_get_info(device)[0] / 2))

    def optimizer_bytes(self) -> int:
        return optimizer.count_state_bytes(self._torch_optimizer)

    def loss_scale(self) -> dict[str, Any] | None:
        """Where fp16's dynamic loss scale stands; None in other precisions, where nothing is scaled."""
        if self.precision != "fp16":
            return None
        return {name: getattr(self.optimizer.loss_scaler, name) for name in _LOSS_SCALER_FIELDS}

    # --- full state, the same under every stage and number of ranks ---

    def state_dict_layout(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, shape) of all that `iter_state_dict` yields, in its order, without gathering anything."""
        if self._stage == 0:
            yield from ((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.iter_state_dict())
            return
        for name, parameter in self.trainable_params.items():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO-3 its own shape is empty
            for key in ("weight", *optimizer.MOMENTS):
                yield f"{key}/{name}", torch.float32, shape

    def iter_state_dict(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every trained weight (float32) and its two moments (float32, or 8-bit codes followed by
        their scales), one at a time; all ranks must iterate."""
        if self._stage in (1, 2):
            deepspeed_internals.link_optimizer_state(self.optimizer)
        for name, parameter in self.trainable_params.items():
            self.dist_context.watchdog.heartbeat()
            if self._stage == 0:
                yield f"weight/{name}", parameter.detach()
                for state_key, tensor in optimizer.iter_named_state(self.optimizer.state[parameter]):
                    yield f"{state_key}/{name}", tensor
            else:
                yield f"weight/{name}", self._fragments.safe_get_full_fp32_param(parameter)
                for key in optimizer.MOMENTS:
                    yield f"{key}/{name}", self._fragments.safe_get_full_optimizer_state(parameter, key)

    def load_state_dict(
        self, read_tensor: Callable[[str], Tensor], num_steps: int, loss_scale: Mapping[str, Any] | None
    ) -> None:
        """Set AdamW's two moments and its count of steps, and what fp16 keeps beside its halved weights; the weights
        were in the model before. UserError where the moments are of an optimizer that holds them otherwise."""
        self._set_step_counts(num_steps)
        for name, parameter in self.trainable_params.items():
            targets: dict[str, Tensor | None] = dict.fromkeys(optimizer.MOMENTS)
            if self._stage == 0:
                targets = dict(optimizer.iter_named_state(self.optimizer.state[parameter]))
            for key, target in targets.items():
                value = read_tensor(f"{key}/{name}")
                if value.dtype != (torch.float32 if target is None else target.dtype):
                    raise UserError(
                        "--resume: the checkpoint holds the moments of another kind of --optim, 8-bit or 32-bit; pass "
                        "the one it had"
                    )
                if target is not None:
                    target.copy_(value)
                elif self._stage == 3:  # `safe_set_full_optimizer_state` takes no share of a size that is not even
                    share = deepspeed_internals.local_share(parameter, value, self.dist_context)
                    self._fragments.safe_set_local_optimizer_state(parameter, share, key)
                else:
                    self._fragments.safe_set_full_optimizer_state(parameter, value, key)
            if self.precision == "fp16":  # its float32 copy was made from the weights after they were halved
                self._fragments.safe_set_full_fp32_param(parameter, read_tensor(f"weight/{name}"))
        for key, value in (loss_scale or {}).items():
            setattr(self.optimizer.loss_scaler, key, value)

    def _set_step_counts(self, num_steps: int) -> None:
        """AdamW's state as it is after so many steps, its moments zero where there were none."""
        flat_params = [flat for group in self._torch_optimizer.param_groups for flat in group["params"]]
        if self._stage:
            flat_params = deepspeed_internals.flat_partitions(self.optimizer, self._stage)
        is_fused = self._torch_optimizer.defaults.get("fused")  # the others read their counts: on a GPU they would wait
        for flat in flat_params:
            state = self._torch_optimizer.state[flat]
            if not state:
                state.update({key: torch.zeros_like(flat) for key in optimizer.MOMENTS})
                state["step"] = torch.zeros((), device=flat.device if is_fused else "cpu")
            if torch.is_tensor(state["step"]):
                state["step"].fill_(num_steps)
            else:  # bitsandbytes'
                state["step"] = num_steps
        if self._stage in (1, 2):
            deepspeed_internals.link_optimizer_state(self.optimizer)

    # --- the weights that the model computes with ---

    def load_weights(self, read_tensor: Callable[[str], Tensor]) -> None:
        """Set the trained weights that the model computes with; what the optimizer keeps of them stays as it is."""
        for name, parameter in self.trainable_params.items():
            value = read_tensor(f"weight/{name}")
            if self._stage == 3:
                parameter.ds_tensor.data.copy_(deepspeed_internals.local_share(parameter, value, self.dist_context))
            if self._stage < 3 or parameter.ds_status.name == "AVAILABLE":
                parameter.data.copy_(value)

    def gathered_model(self) -> contextlib.AbstractContextManager[Any]:
        """While it is open every rank has all weights, which it may read; all ranks must enter."""
        if self._stage < 3:
            return contextlib.nullcontext()
        return import_module("deepspeed.runtime.zero").unwrap_model_for_generation(self.deepspeed_engine)

    def gather_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor on the CPU) of every trained weight in the names of `model.module`; all ranks must iterate."""
        for name, parameter in self.trainable_params.items():
            with import_module("deepspeed").zero.GatheredParameters([parameter], enabled=self._stage == 3):
                yield name, parameter.detach().float().cpu().clone()
