"""The model on its ranks: run optimizer steps, evaluate, generate."""

import contextlib
import hashlib
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from trainer.config.errors import TrainingError, first_line
from trainer.config.settings import TrainSettings
from trainer.data.sampler import IGNORE_INDEX, GlobalBatch, MicroBatch
from trainer.distributed.decoding import Completion, decode
from trainer.distributed.execution import CUDAGraphRunner, ExecutionPlan, cast_frozen_weights
from trainer.distributed.machine import peak_memory_bytes, tune_malloc
from trainer.distributed.process_group import DistContext
from trainer.distributed.state_dict import EngineState
from trainer.distributed.stepper import DeepSpeedStepper, NonFiniteError, PlainStepper
from trainer.model import attention, optimizer, quantization
from trainer.model.build import TrainableModel, get_max_positions, to_float32
from trainer.model.loss import CausalLMLoss

T = TypeVar("T")

GRAPH_WIDTH_MULTIPLE = 64  # tokens; rows of other lengths are padded to it for CUDA graphs, so that shapes come again


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did."""

    loss_sum: float  #: summed loss of the global batch, nats
    grad_norm: float  #: of the global gradient before clipping
    is_skipped: bool  #: whether fp16 left the update out
    stop_requested: bool  #: whether any rank wants the run to stop
    lr: float
    elapsed_seconds: float  #: since it was launched, or since the step before it ended


class Engine:
    """The model on its ranks: optimizer steps, evaluation, generation, and the full state."""

    def __init__(
        self,
        dist_context: DistContext,
        model: TrainableModel,
        deepspeed_config: Mapping[str, Any],
        train_settings: TrainSettings,
        plan: ExecutionPlan,
    ):
        self.dist_context = dist_context
        self.model = model
        self.plan = plan
        self.plan_changes: list[dict[str, Any]] = []  #: `ExecutionPlan.as_entry` of those that took its place, in order
        self.graph_checks: list[str] = []  #: one line for each CUDA graph that was compared with its eager step
        self.data_wait_seconds = 0.0  #: until the rows of steps were drawn
        self._seed = train_settings.seed
        self._launch_time = self._last_end_time = 0.0
        self._autocast_dtype = torch.bfloat16 if plan.precision == "bf16" else None
        if dist_context.device.type == "cpu":
            tune_malloc()
        stage = int(deepspeed_config["zero_optimization"].get("stage", 0))
        if stage < 3:  # which places them one by one
            to_float32(model.module)
        if plan.packed_rows:  # our own attention reads a row as one example
            model.causal.set_attn_implementation("sdpa")
        if plan.blockwise_attention:
            attention.install_on_cpu(model.module, model.causal)
        quantization.set_compute_dtype(model.module, self._autocast_dtype or torch.float32)
        if plan.frozen_dtype == "bfloat16":  # before a GPU has to hold them in float32
            cast_frozen_weights(model)
        self._loss_module = CausalLMLoss(model.causal, self._autocast_dtype, train_settings.label_smoothing)
        head_problem = place_model(self._loss_module, model, deepspeed_config, dist_context)
        self.trainable_params = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        embeddings = [layer.weight for layer in model.causal.modules() if isinstance(layer, nn.Embedding)]
        adamw = optimizer.build_optimizer(self.trainable_params.values(), train_settings, embeddings=embeddings)
        self.deepspeed_engine, self.optimizer = import_module("deepspeed").initialize(
            model=self._loss_module, optimizer=adamw, config=dict(deepspeed_config), dist_init_required=False
        )[:2]
        self.deepspeed_engine.train()
        self.stepper: PlainStepper | DeepSpeedStepper = DeepSpeedStepper(self.deepspeed_engine, plan.precision)
        self._graphs: CUDAGraphRunner | None = None
        if stage == 0:
            self.stepper = PlainStepper(
                dist_context,
                self.optimizer,
                self._loss_module,
                list(self.trainable_params.values()),
                train_settings.max_grad_norm,
                skips_on_device=plan.finite_check == "device",
            )
            if plan.cuda_graphs:
                self._graphs = CUDAGraphRunner(self.stepper, precision=plan.precision, checks=self.graph_checks)
        self.state = EngineState(
            dist_context, self.deepspeed_engine, self.trainable_params, stage=stage, precision=plan.precision
        )
        if head_problem:
            self._change_plan(0, head_problem, chunked_loss=False)

    def _change_plan(self, step: int, reason: str, **fields: Any) -> None:
        self.plan = replace(self.plan, **fields)
        self.plan_changes.append(self.plan.as_entry(step, reason))

    # --- optimizer steps ---

    def run(
        self,
        batches: Iterable[GlobalBatch],
        lr_at: Callable[[int], float],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[GlobalBatch, StepResult]]:
        """One optimizer step a batch, in order; ends early, on all ranks alike, where one should stop. With two steps
        in flight the weights are ahead of what was yielded, until the batches end. NonFiniteError, with its batch and
        the weights of the step before it, unless fp16 may skip."""
        in_flight: deque[tuple[GlobalBatch, Callable[[], StepResult]]] = deque()
        iterator = iter(batches)
        batch: GlobalBatch | None = None
        try:
            while True:
                start_time = time.perf_counter()
                batch = next(iterator, None)
                self.data_wait_seconds += time.perf_counter() - start_time
                if batch is None:
                    break
                in_flight.append((batch, self._launch(batch, lr_at(batch.step), should_stop)))
                if len(in_flight) < self.plan.steps_in_flight:
                    continue
                batch, wait = in_flight.popleft()
                result = wait()
                yield batch, result
                if result.stop_requested:
                    break
            for batch, wait in in_flight:
                yield batch, wait()
        except NonFiniteError as error:
            error.batch = batch
            raise

    def _launch(self, batch: GlobalBatch, lr: float, should_stop: Callable[[], bool]) -> Callable[[], StepResult]:
        self.fall_back(batch.step)
        self._launch_time = time.perf_counter()

        def compute_losses() -> list[Tensor]:
            loss_sums = []
            buckets = self.stepper.buckets if isinstance(self.stepper, PlainStepper) else None
            for micro_batch in batch.micro_batches:
                if buckets and self.plan.overlaps_reduction and micro_batch is batch.micro_batches[-1]:
                    buckets.is_overlapping = True
                loss_sums.append(
                    self.forward_backward(micro_batch, step=batch.step, num_target_tokens=batch.num_target_tokens)
                )
            return loss_sums

        return self.launch_update(lr, self._call_beside_graphs(compute_losses), should_stop=should_stop())

    def _call_beside_graphs(self, call: Callable[[], T]) -> T:
        """What `call` returns; where it has no memory beside CUDA graphs they go, and it is called once more."""
        try:
            return call()
        except torch.OutOfMemoryError as error:
            if self._graphs is None or not self._graphs.captured:
                raise
            reason = first_line(error)
        self._graphs.drop_recordings(reason)  # now that the error holds no tensors of the call
        return call()

    def fall_back(self, step: int) -> None:
        """Before a step: where recording a CUDA graph has failed, go on eagerly. Whether gradients are reduced during
        the backward stays as it is: on another rank the recording may have worked."""
        if self._graphs is not None and self._graphs.capture_error:
            if self.dist_context.device.type == "cuda":
                torch.cuda.synchronize(self.dist_context.device)  # a replay of what is dropped may still be under way
            self._change_plan(step, self._graphs.capture_error, cuda_graphs=False, eager_reason="recording failed")
            self._graphs = None

    def forward_backward(self, micro_batch: MicroBatch, *, step: int, num_target_tokens: int) -> Tensor:
        """Forward and backward of one micro-batch; returns its summed loss, float64 on the device. `num_target_tokens`:
        of the whole global batch. Dropout depends on seed, step and the rows' place in the global batch, not on the
        rank."""
        self.dist_context.watchdog.heartbeat(step)
        self._set_training(True)
        digest = hashlib.sha256(f"{self._seed}/{step}/{micro_batch.index}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little") >> 1
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` formats the call stack for each absent device
        if self.dist_context.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        width_multiple = GRAPH_WIDTH_MULTIPLE if self.plan.cuda_graphs else 1
        max_width = get_max_positions(self.model.causal.config)
        ids, labels = copy_to_device(micro_batch, self.dist_context.device, width_multiple, max_width)
        loss_weight = self.stepper.grad_divisor / num_target_tokens
        if micro_batch.position_ids is not None:  # several examples a row: never recorded, as shapes rarely repeat
            position_ids = torch.from_numpy(micro_batch.position_ids).to(self.dist_context.device)
            return self.stepper.backward(ids, labels, loss_weight, position_ids).double().sum()
        return (self._graphs or self.stepper).backward(ids, labels, loss_weight).double().sum()

    def launch_update(
        self, lr: float, loss_sums: Sequence[Tensor], *, should_stop: bool = False
    ) -> Callable[[], StepResult]:
        """Reduce, measure, clip and update; what is returned waits until it is done. Raises NonFiniteError, with the
        weights untouched, here or there, unless fp16 may skip. `loss_sums`: of `forward_backward`."""
        context, launch_time = self.dist_context, self._launch_time
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # One row a rank, [ranks, micro-batches + 1]: its sums, and whether it wants to stop. `tensor` would wait.
        stop_flag = torch.full((), float(should_stop), dtype=torch.float64, device=context.device)
        rows = own_row = torch.stack([*loss_sums, stop_flag])
        if context.world_size > 1:
            rows = own_row.new_empty(context.world_size * len(own_row))
            dist.all_gather_into_tensor(rows, own_row)

        def wait_for_sums(read: Callable[[], list[float]]) -> tuple[float, bool, list[float]]:
            """(exact sum of all micro-batches' sums, whether any rank wants to stop, the numbers after these)."""
            numbers, width = read(), len(own_row)
            sums = [value for index, value in enumerate(numbers[: len(rows)], 1) if index % width]
            if not all(map(math.isfinite, sums)):
                raise NonFiniteError("loss nan")
            return math.fsum(sums), any(numbers[width - 1 : len(rows) : width]), numbers[len(rows) :]

        if self.plan.finite_check == "host":
            wait_for_sums(copy_to_host(rows))
        grad_norm, is_skipped = self.stepper.optimizer_step(torch.isfinite(rows).all())
        norm = torch.as_tensor(grad_norm, dtype=torch.float64, device=context.device)
        read_numbers = copy_to_host(torch.cat([rows, norm[None]]))

        def wait() -> StepResult:
            loss_sum, stop_requested, (grad_norm,) = wait_for_sums(read_numbers)
            if not (math.isfinite(grad_norm) or self.plan.precision == "fp16"):
                raise NonFiniteError(f"gradient norm {grad_norm}")
            start_time, self._last_end_time = max(launch_time, self._last_end_time), time.perf_counter()
            return StepResult(
                loss_sum=loss_sum,
                grad_norm=grad_norm,
                is_skipped=is_skipped,
                stop_requested=stop_requested,
                lr=lr,
                elapsed_seconds=self._last_end_time - start_time,
            )

        return wait

    # --- evaluation and generation ---

    @torch.no_grad()
    def evaluate(self, micro_batch: MicroBatch) -> Tensor:
        """Summed loss of each row, without dropout: float64 on the device."""
        self.dist_context.watchdog.heartbeat()
        self._set_training(False)
        ids, labels = copy_to_device(micro_batch, self.dist_context.device)
        return self._call_beside_graphs(lambda: self.deepspeed_engine(ids, labels)[1]).double()

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        end_token_ids: Sequence[int],
        *,
        batch_size: int,
    ) -> list[Completion]:
        """Greedy continuations of token ids, of at most `limits` tokens each, for every rank; all must call. The
        batches are the same for any number of ranks. TrainingError, on all ranks alike, where one of them fails."""
        if not self.state.fits_unsharded():
            raise TrainingError("the whole model does not fit on one rank beside its share of ZeRO-3")
        context, batches = self.dist_context, []
        order = sorted(range(len(prompts)), key=lambda i: (limits[i], len(prompts[i])), reverse=True)  # little padding
        for _, group in itertools.groupby(order, key=limits.__getitem__):
            equal = list(group)
            batches += [equal[start : start + batch_size] for start in range(0, len(equal), batch_size)]
        context.watchdog.heartbeat()
        self._set_training(False)
        own: dict[int, Completion] = {}
        failure = ""
        with self.state.gathered_model():
            try:
                for batch in batches[context.rank :: context.world_size]:
                    decode_batch = partial(
                        decode,
                        self.model.causal,
                        [prompts[i] for i in batch],
                        limits[batch[0]],
                        end_token_ids,
                        autocast_dtype=self._autocast_dtype,
                        on_token=context.watchdog.heartbeat,
                    )
                    own.update(zip(batch, self._call_beside_graphs(decode_batch), strict=True))
            except RuntimeError as error:  # also of torch, where a device has no memory left
                failure = f"{context.name_of(context.rank)}: {first_line(error)}"
        of_ranks = context.all_gather_object((own, failure))
        if failures := [failure for _, failure in of_ranks if failure]:
            raise TrainingError(f"no text could be generated on {failures[0]}")
        everything = {i: completion for completions, _ in of_ranks for i, completion in completions.items()}
        return [everything[i] for i in range(len(prompts))]

    def _set_training(self, is_training: bool) -> None:
        if self._loss_module.training != is_training:  # both walk over all modules
            self.deepspeed_engine.train(is_training)

    # --- memory ---

    def measure_memory(self) -> dict[str, int]:
        """peak_memory_bytes and optimizer_bytes, the largest of the ranks; all must call."""
        own = {
            "peak_memory_bytes": peak_memory_bytes(self.dist_context.device),
            "optimizer_bytes": self.state.optimizer_bytes(),
        }
        of_ranks = self.dist_context.all_gather_object(own)
        return {name: max(numbers[name] for numbers in of_ranks) for name in own}

    def release_memory(self) -> None:
        """Give back what weights, gradients and optimizer state took; nothing may be asked of this engine any more."""
        parameters = [*self.model.module.parameters(), *(p for g in self.optimizer.param_groups for p in g["params"])]
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        buckets = getattr(self.stepper, "buckets", None)
        for tensor in [*parameters, *(p.grad for p in parameters), *states, buckets and buckets.flat]:
            if isinstance(tensor, Tensor):
                with contextlib.suppress(RuntimeError):  # mapped from a file
                    tensor.untyped_storage().resize_(0)
        self._graphs = None  # they hold memory that belongs to them alone
        if self.dist_context.device.type == "cuda":
            torch.cuda.empty_cache()


class _WeightByWeight(nn.Module):
    """Gives DeepSpeed, which divides a weight before it asks for the next one, each as a copy of its own: before, they
    lie in a file that all ranks of a machine map into the same memory as long as nobody writes there."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.module = module
        self.dtype = dtype

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for parameter in self.module.parameters(recurse):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(self.dtype, copy=True)
            yield parameter


def place_model(
    loss_module: CausalLMLoss, model: TrainableModel, deepspeed_config: Mapping[str, Any], context: DistContext
) -> str:
    """Move the model there; returns what its loss finds of its head (`CausalLMLoss.verify`). All ranks must call. Under
    ZeRO 3 it goes weight by weight, with rank 0's values. A packed base is there already."""
    if int(deepspeed_config["zero_optimization"].get("stage", 0)) < 3 or model.quant_settings is not None:
        loss_module.to(context.device)
        return loss_module.verify()
    head_problem = context.on_rank_zero(loss_module.verify)
    if head_problem:
        loss_module.uses_head = False
    weights = _WeightByWeight(loss_module, torch.float16 if "fp16" in deepspeed_config else torch.float32)
    import_module("deepspeed").zero.Init(module=weights, config_dict_or_path=dict(deepspeed_config))
    for buffer in loss_module.buffers():
        buffer.data = buffer.data.to(context.device).contiguous()
        dist.broadcast(buffer.data.view(-1).view(torch.uint8), 0)
    return head_problem


# --- rows of tokens to the device, numbers from it: the host waits for nothing but what it reads ---


def copy_to_device(
    micro_batch: MicroBatch, device: torch.device, width_multiple: int = 1, max_width: int | None = None
) -> tuple[Tensor, Tensor]:
    """(ids, labels) [rows, width]; one-example rows are padded to a multiple of `width_multiple` below `max_width`."""
    ids, labels = torch.from_numpy(micro_batch.input_ids), torch.from_numpy(micro_batch.labels)
    width = ids.shape[1]
    padding = min(width + -width % width_multiple, max_width or 2**62) - width
    if padding > 0 and micro_batch.position_ids is None:
        ids, labels = functional.pad(ids, (0, padding)), functional.pad(labels, (0, padding), value=IGNORE_INDEX)
    if device.type != "cuda":
        return ids, labels
    return ids.pin_memory().to(device, non_blocking=True), labels.pin_memory().to(device, non_blocking=True)


def copy_to_host(numbers: Tensor) -> Callable[[], list[float]]:
    """Queue a copy of a flat tensor now; what is returned waits for that copy alone: a read at the time the numbers are
    wanted would be queued behind the next step."""
    if not numbers.is_cuda:
        return numbers.tolist
    buffer = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    buffer.copy_(numbers, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def read() -> list[float]:
        done.synchronize()
        return buffer.tolist()

    return read
