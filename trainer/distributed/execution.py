"""What runs how: one frozen plan, made by one function, passed to the engine, printed and recorded as it is.

A fallback while running is a new plan (`dataclasses.replace`) at a step boundary, with its reason.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from trainer.config.settings import Settings
from trainer.config.validation import graph_blocker
from trainer.distributed.process_group import DistContext
from trainer.distributed.steppers import supports_native_stepper


@dataclass(frozen=True, kw_only=True)
class ExecutionPlan:
    """How forward, backward and update are computed; none of it changes the numbers beyond rounding."""

    precision: str  #: fp32, or the type that autocast gives to products: bf16, fp16
    stepper: Literal["native", "deepspeed"]  #: whose reduction, norm and update
    cuda_graphs: bool  #: forward and backward of shapes that come again are recorded and replayed
    compiled_shapes: tuple[tuple[int, int], ...]  #: [rows, tokens] of micro-batches that are compiled for; (): none
    fused_lora: bool  #: a frozen layer and its adapter are one operation (`trainer.kernels.fused_lora`)
    blockwise_attention: bool  #: dropout, and GPT-2's attention with it, by `trainer.kernels.cpu_attention`
    packed_rows: bool  #: several examples share a row, which transformers' own attention masks from one another
    frozen_dtype: Literal["float32", "bfloat16"]  #: in which the frozen base is held
    chunked_loss: bool  #: logits are made and dropped in pieces; else all at once, by the model itself
    overlaps_reduction: bool  #: gradients are reduced over the ranks while the step's last backward runs
    finite_check: Literal["device", "host"]  #: who leaves out the update of a step that is not finite
    steps_in_flight: Literal[1, 2]  #: 2: a step is launched before the numbers of the one before it are read

    @property
    def path(self) -> str:
        """eager, graphs, compile, or compile+graphs."""
        parts = ["compile"] * bool(self.compiled_shapes) + ["graphs"] * self.cuda_graphs
        return "+".join(parts) or "eager"

    def describe(self) -> str:
        """One line for people."""
        parts = [
            f"{self.path}, {self.stepper} stepper",
            "adapters fused with their layers" * self.fused_lora,
            "blockwise attention and dropout" * self.blockwise_attention,
            "packed rows" * self.packed_rows,
            "frozen weights in bfloat16" * (self.frozen_dtype == "bfloat16"),
            "whole logits" * (not self.chunked_loss),
            "gradients reduced during the backward" * self.overlaps_reduction,
            "one step ahead" * (self.steps_in_flight == 2),
        ]
        return ", ".join(filter(None, parts))

    def as_dict(self) -> dict[str, Any]:
        """For run.json."""
        return {"path": self.path, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class PlanChange:
    """A plan that took the place of another while the run went on."""

    step: int  #: the first step that runs by it
    plan: ExecutionPlan
    reason: str


def make_execution_plan(
    settings: Settings,
    dist_context: DistContext,
    deepspeed_config: Mapping[str, Any],
    *,
    precision: str,
    model_dropout: float,
    micro_batch_size: int,
) -> ExecutionPlan:
    """The plan of a run. `model_dropout`: the largest dropout probability of the base model.

    `--execution auto` records CUDA graphs on a GPU and is eager on a CPU; compiling is done where it is asked for.
    """
    stage = int(deepspeed_config["zero_optimization"].get("stage", 0))
    is_gpu = dist_context.device.type == "cuda"
    lora, quant = settings.lora, settings.model.quant
    is_native = supports_native_stepper(deepspeed_config, world_size=dist_context.world_size, precision=precision)
    is_compiled = settings.engine.execution == "compile"
    can_record = is_gpu and is_native and not graph_blocker(settings)
    has_adapters = settings.mode == "lora"
    lora_dropout = lora.dropout if has_adapters else 0.0
    is_plain_lora = has_adapters and lora.adapter != "dora" and not lora_dropout and quant is None
    is_fused_adamw = settings.train.optim == "adamw_fused"
    rows = (micro_batch_size, settings.train.eval_batch)
    records = can_record and settings.engine.execution != "eager"
    return ExecutionPlan(
        precision=precision,
        stepper="native" if is_native else "deepspeed",
        cuda_graphs=records,
        compiled_shapes=tuple((n, settings.data.block_size) for n in dict.fromkeys(rows)) if is_compiled else (),
        fused_lora=is_plain_lora and stage < 3 and not is_compiled,
        blockwise_attention=(
            not (is_gpu or is_compiled or settings.data.packing) and max(model_dropout, lora_dropout) > 0
        ),
        packed_rows=settings.data.packing,
        frozen_dtype="bfloat16" if precision == "bf16" and stage < 3 and has_adapters and not quant else "float32",
        chunked_loss=True,  # until the model's own logits say otherwise
        overlaps_reduction=is_native and dist_context.world_size > 1 and not records,
        finite_check="device" if is_native and is_fused_adamw else "host",
        steps_in_flight=2 if is_gpu and is_native and is_fused_adamw else 1,
    )
