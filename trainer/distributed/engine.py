"""The model on its ranks: accumulate micro-batches, step, evaluate, complete prompts."""

import contextlib
import hashlib
import math
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GenerationConfig

from trainer.config.choices import EIGHT_BIT_OPTIMIZERS
from trainer.config.schema import TrainSettings
from trainer.data.sampler import MicroBatch
from trainer.distributed.cuda_graphs import NUM_WARMUP_CALLS, CUDAGraphRunner
from trainer.distributed.frozen_bf16 import FrozenWeightCast, should_cast_frozen_weights
from trainer.distributed.process_group import DistContext, tune_malloc
from trainer.distributed.state_dict import EngineState
from trainer.distributed.steppers import DeepSpeedStepper, NativeStepper, NonFiniteError, supports_native_stepper
from trainer.kernels import cpu_attention, fused_lora
from trainer.kernels.linear_cross_entropy import CausalLMLoss
from trainer.model import optimizer, quantization
from trainer.model.build import TrainableModel
from trainer.model.lora import find_fusable_layers


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did."""

    loss_sum: float  #: summed loss of the global batch, nats
    grad_norm: float  #: of the global gradient before clipping
    was_skipped: bool  #: whether fp16 left the update out
    stop_requested: bool  #: whether any rank wants the run to stop


class Engine:
    """The model on its ranks: accumulate micro-batches, step, evaluate, read and write the full state."""

    def __init__(
        self, dist_context: DistContext, model: TrainableModel, deepspeed_config: Mapping[str, Any],
        train_settings: TrainSettings, precision: str,
        *, compiled_shapes: Collection[tuple[int, ...]] = (),
    ):  # fmt: skip
        """`deepspeed_config`: DeepSpeed's dict; `compiled_shapes`: the shapes [rows, tokens] of micro-batches to
        compile for."""
        self.dist_context = dist_context
        self.model = model
        self.seed = train_settings.seed
        self.precision = precision
        self.device_wait_seconds = 0.0  # seconds until the device had done what it was asked for
        self._stage = int(deepspeed_config["zero_optimization"].get("stage", 0))
        if dist_context.device.type == "cpu":
            tune_malloc()
            if not compiled_shapes:  # a compiler has its own
                cpu_attention.install(model.module, model.causal)
        if not compiled_shapes and self._stage < 3 and model.is_adapter:
            fused_lora.install(find_fusable_layers(model.module))
        quantization.set_compute_dtype(model.module, torch.bfloat16 if precision == "bf16" else torch.float32)
        self._loss_module = CausalLMLoss(model.causal, torch.bfloat16 if precision == "bf16" else None).to(
            dist_context.device
        )
        named_params = [(name, p) for name, p in model.module.named_parameters() if p.requires_grad]
        self.trainable_params: dict[str, nn.Parameter] = dict(named_params)
        lr_ratios = {
            model.get_lr_multiplier(name): None for name in self.trainable_params
        }  # a set in order: alike on every rank
        param_groups = [
            {
                "params": [p for n, p in named_params if model.get_lr_multiplier(n) == ratio],
                "lr": train_settings.lr * ratio,
                "lr_ratio": ratio,
            }
            for ratio in lr_ratios
        ]
        engine_and_optimizer = import_module("deepspeed").initialize(
            model=self._loss_module, optimizer=optimizer.build_optimizer(param_groups, train_settings,
                fp32_state_params=model.embedding_weights), config=dict(deepspeed_config),
            dist_init_required=False,
        )  # fmt: skip
        self.deepspeed_engine, self.optimizer = engine_and_optimizer[0], engine_and_optimizer[1]
        self.deepspeed_engine.train()
        self.stepper: NativeStepper | DeepSpeedStepper = (
            NativeStepper(
                dist_context,
                self.deepspeed_engine,
                self._loss_module,
                list(self.trainable_params.values()),
                train_settings.max_grad_norm,
            )
            if supports_native_stepper(deepspeed_config, world_size=dist_context.world_size, precision=precision)
            else DeepSpeedStepper(self.deepspeed_engine, precision)
        )
        self.state = EngineState(
            dist_context, self.deepspeed_engine, self.trainable_params, stage=self._stage, precision=precision,
            uses_8bit_optimizer=train_settings.optim in EIGHT_BIT_OPTIMIZERS,
        )  # fmt: skip
        if compiled_shapes:
            self._loss_module.compile_for_shapes(set(compiled_shapes))
        self._frozen_cast = (
            FrozenWeightCast(model, keep_fp32_copy=dist_context.rank == 0)
            if should_cast_frozen_weights(
                precision=precision,
                stage=self._stage,
                has_adapters=model.is_adapter,
                is_quantized=model.quant_settings is not None,
            )
            else None
        )
        self._graph_runner = (
            CUDAGraphRunner(self._loss_module, list(self.trainable_params.values()))
            if self._can_capture_graphs(model)
            else None
        )

    def _can_capture_graphs(self, model: TrainableModel) -> bool:
        """Whether forward and backward may be recorded: what packed weights and recomputed blocks do may not."""
        uses_activation_checkpointing = getattr(model.causal, "is_gradient_checkpointing", False)
        return (
            self.dist_context.device.type == "cuda"
            and isinstance(self.stepper, NativeStepper)
            and not model.quant_settings
            and not uses_activation_checkpointing
        )

    @property
    def num_warmup_steps(self) -> int:
        """Steps after which the following ones take as long as all later ones."""
        return NUM_WARMUP_CALLS + 2 if self._graph_runner else 1

    @property
    def notices(self) -> list[str]:
        """What did not go the fast way although it was meant to."""
        return [*self._loss_module.compile_errors, *(self._graph_runner.notices if self._graph_runner else [])]

    def forward_backward(self, micro_batch: MicroBatch, *, step: int, num_target_tokens: int) -> Tensor:
        """Forward and backward of one micro-batch; returns its summed loss, float64 on the device.

        `num_target_tokens`: targets of the whole global batch. Dropout depends on seed, step and the rows' place in the
        global batch, not on the rank: a resumed run, or one on other ranks, draws the same masks.
        """
        self.dist_context.watchdog.heartbeat()
        self._set_training(True)
        torch.manual_seed(_dropout_seed(self.seed, step, micro_batch.index))
        inputs = (*self._to_device(micro_batch), self.stepper.grad_divisor / num_target_tokens)
        row_losses = self._graph_runner.backward(*inputs) if self._graph_runner else None
        return (self.stepper.backward(*inputs) if row_losses is None else row_losses).double().sum()

    @property
    def supports_steps_in_flight(self) -> bool:
        """Whether a step may be asked for before the numbers of the one before it are read, so that none waits.

        Where one was not finite the device leaves out what follows, too.
        """
        return self.stepper.supports_on_device_skip and self.dist_context.device.type == "cuda"

    def step(self, lr: float, loss_sums: Sequence[Tensor], *, should_stop: bool = False) -> StepResult:
        """Reduce, measure, clip, update. Raises NonFiniteError, with the weights untouched, unless fp16 may skip.

        `loss_sums`: what `forward_backward` returned for this rank's micro-batches; `should_stop`: whether this rank
        wants to stop.
        """
        return self.launch_step(lr, loss_sums, should_stop=should_stop)()

    def launch_step(
        self, lr: float, loss_sums: Sequence[Tensor], *, should_stop: bool = False
    ) -> Callable[[], StepResult]:
        """Ask for such a step; what is returned waits until it is done and tells of it, or raises."""
        self.dist_context.watchdog.heartbeat()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        gathered_sums = self._all_gather_sums(loss_sums, should_stop)
        totals = None if self.stepper.supports_on_device_skip else self._read_totals(gathered_sums)
        step_result = self.stepper.optimizer_step(torch.isfinite(gathered_sums).all())

        def wait() -> StepResult:
            loss_sum, stop_requested = totals or self._read_totals(gathered_sums)
            grad_norm = float(step_result.grad_norm)
            if not (math.isfinite(grad_norm) or self.precision == "fp16"):
                raise NonFiniteError(f"gradient norm {grad_norm}")
            return StepResult(
                loss_sum=loss_sum,
                grad_norm=grad_norm,
                was_skipped=step_result.was_skipped,
                stop_requested=stop_requested,
            )

        return wait

    def restore_fp32(self) -> None:
        """After the last step: give the frozen base its float32 back, for readers outside autocast.

        On rank 0; the others' is only of that type. Nothing may be trained or evaluated here afterwards.
        """
        if self._frozen_cast is not None:
            self._frozen_cast.restore_fp32()

    def discard_step(self) -> None:
        """Let no gradient stay after a refused step. The state may be worthless then: for those who restore it."""
        self.stepper.discard_step()

    def _all_gather_sums(self, loss_sums: Sequence[Tensor], should_stop: bool) -> Tensor:
        """One row a rank, on the device: its micro-batches' sums and whether it wants to stop."""
        stop_flag = torch.full(
            (), float(should_stop), dtype=torch.float64, device=self.dist_context.device
        )  # a copy would wait
        local_sums = torch.stack([*loss_sums, stop_flag])
        gathered_sums = local_sums
        if self.dist_context.world_size > 1:
            gathered_sums = local_sums.new_empty(self.dist_context.world_size * len(local_sums))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch is renaming the function
                dist.all_gather_into_tensor(gathered_sums, local_sums)
        return gathered_sums.view(self.dist_context.world_size, -1)

    def _read_totals(self, gathered_sums: Tensor) -> tuple[float, bool]:
        """(exact sum of all micro-batches' sums, whether anybody wants to stop). Raises NonFiniteError."""
        start_time = time.perf_counter()
        sums_by_rank = gathered_sums.tolist()  # the first time that a step needs the device's answer
        self.device_wait_seconds += time.perf_counter() - start_time
        values = [value for row in sums_by_rank for value in row[:-1]]
        if not all(map(math.isfinite, values)):
            raise NonFiniteError("loss nan")
        return math.fsum(values), any(row[-1] for row in sums_by_rank)

    @torch.no_grad()
    def evaluate(self, micro_batch: MicroBatch) -> Tensor:
        """Summed loss of each row, without dropout: float64 on the device."""
        self.dist_context.watchdog.heartbeat()
        self._set_training(False)
        inputs = self._to_device(micro_batch)
        row_losses = self._graph_runner.forward(*inputs) if self._graph_runner else None
        return (self.stepper.forward(*inputs) if row_losses is None else row_losses).double()

    def _set_training(self, is_training: bool) -> None:
        if self._loss_module.training != is_training:  # both walk over all modules
            self.deepspeed_engine.train(is_training)

    def _to_device(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        ids, labels = torch.from_numpy(micro_batch.input_ids), torch.from_numpy(micro_batch.labels)
        if self.dist_context.device.type != "cuda":
            return ids, labels
        device = self.dist_context.device
        return ids.pin_memory().to(device, non_blocking=True), labels.pin_memory().to(device, non_blocking=True)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_token_id: int
    ) -> list[list[int]] | None:
        """Greedy continuations of token ids on rank 0, None on the others; all ranks must call.

        Each is at most `max_new_tokens` tokens, without the token `eos_token_id` at which it stops. One batch, padded
        on the left, on one
        rank: so no number of ranks changes a text. ZeRO-3 gathers the weights once, for all tokens.
        """
        self.dist_context.watchdog.heartbeat()
        self._set_training(False)
        with self._gathered_model():
            completions = (
                self._generate_greedy(prompts, max_new_tokens, eos_token_id) if self.dist_context.rank == 0 else None
            )
        return completions

    def fits_unsharded(self) -> bool:
        """Whether every rank has room for all weights beside what it holds; all ranks must call. Half of what is free
        is left to the work on them."""
        if self._stage < 3 or self.dist_context.device.type != "cuda":
            return True
        total_bytes = sum(p.ds_numel * p.element_size() for p in self.deepspeed_engine.module.parameters())
        return all(
            self.dist_context.all_gather_object(total_bytes < torch.cuda.mem_get_info(self.dist_context.device)[0] / 2)
        )

    def _gathered_model(self) -> contextlib.AbstractContextManager[Any]:
        if self._stage < 3:
            return contextlib.nullcontext()
        return import_module("deepspeed.runtime.zero").unwrap_model_for_generation(self.deepspeed_engine)

    def _generate_greedy(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_token_id: int
    ) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor(
            [[eos_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts],
            device=self.dist_context.device,
        )
        mask = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.dist_context.device
        )
        generation_config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
            use_cache=True,
        )
        use_autocast = self.precision == "bf16"
        with (
            torch.autocast(self.dist_context.device.type, torch.bfloat16) if use_autocast else contextlib.nullcontext()
        ):
            sequences = self.model.causal.generate(
                input_ids=ids,
                attention_mask=mask,
                logits_processor=[self._heartbeat_per_token],
                generation_config=generation_config,
            )
        completions = sequences[:, width:].tolist()
        return [
            completion[: completion.index(eos_token_id)] if eos_token_id in completion else completion
            for completion in completions
        ]

    def _heartbeat_per_token(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.dist_context.watchdog.heartbeat()  # the other ranks wait
        return scores

    def max_abs(self, names: Iterable[str]) -> float:
        """The largest entry, by size, of these trained weights over all ranks; all ranks must call."""
        local_tensors = [
            getattr(self.trainable_params[name], "ds_tensor", self.trainable_params[name]).detach() for name in names
        ]
        return max(
            self.dist_context.all_gather_object(
                max((float(tensor.abs().max()) for tensor in local_tensors if tensor.numel()), default=0.0)
            )
        )


def _dropout_seed(seed: int, step: int, index: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{index}".encode()).digest()[:8], "little") >> 1
