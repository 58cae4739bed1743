"""What runs how: one frozen plan, made by one function, passed to the engine, printed and recorded as it is.

A fallback while running is a new plan (`dataclasses.replace`) at a step boundary, with its reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from trainer.config.settings import Settings, compile_blocker, graph_blocker
from trainer.distributed.process_group import DistContext
from trainer.distributed.steppers import supports_native_stepper
from trainer.model.loss import uses_gpu_form

ExecutionPath = Literal["eager", "graphs", "compile", "compile+graphs"]
PATHS: tuple[ExecutionPath, ...] = get_args(ExecutionPath)
# What tuning must be worth: it gives each path about ten steps, and a compiled path a minute to compile.
MIN_TUNED_STEPS = 200
MIN_COMPILED_TOKENS = 20_000_000


@dataclass(frozen=True, kw_only=True)
class ExecutionPlan:
    """How forward, backward and update are computed; none of it changes the numbers beyond rounding."""

    precision: str  #: fp32, or the type that autocast gives to products: bf16, fp16
    stepper: Literal["native", "deepspeed"]  #: whose reduction, norm and update
    cuda_graphs: bool  #: forward and backward of shapes that come again are recorded and replayed
    compiled_shapes: tuple[tuple[int, int], ...]  #: [rows, tokens] of micro-batches that are compiled for; (): none
    fused_lora: bool  #: a frozen layer and its adapter are one operation (`trainer.model.fused_lora`)
    blockwise_attention: bool  #: dropout, and GPT-2's attention with it, by `trainer.model.cpu_attention`
    packed_rows: bool  #: several examples share a row, which transformers' own attention masks from one another
    frozen_dtype: Literal["float32", "bfloat16"]  #: in which the frozen base is held
    chunked_loss: bool  #: logits are made and dropped in pieces; else all at once, by the model itself
    overlaps_reduction: bool  #: gradients are reduced over the ranks while the step's last backward runs
    finite_check: Literal["device", "host"]  #: who leaves out the update of a step that is not finite
    steps_in_flight: Literal[1, 2]  #: 2: a step is launched before the numbers of the one before it are read

    @property
    def path(self) -> str:
        """One of PATHS."""
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
    timings: Sequence[Mapping[str, Any]] = ()  #: of the plans that were timed before

    def as_dict(self) -> dict[str, Any]:
        """For run.json."""
        timings = {"timings": list(self.timings)} if self.timings else {}
        return {"step": self.step, "reason": self.reason, **self.plan.as_dict(), **timings}


def possible_paths(
    settings: Settings, dist_context: DistContext, deepspeed_config: Mapping[str, Any], *, precision: str
) -> tuple[ExecutionPath, ...]:
    """The ways in which steps of these settings can run on this device, whatever `--execution` says."""
    is_native = supports_native_stepper(deepspeed_config, world_size=dist_context.world_size, precision=precision)
    has_whole_rows = not settings.data.packing  # packed rows are of ever other shapes
    records = uses_gpu_form(dist_context.device) and is_native and has_whole_rows and not graph_blocker(settings)
    stage = int(deepspeed_config["zero_optimization"].get("stage", 0))
    compiles = stage < 3 and has_whole_rows and not compile_blocker(settings)
    allowed = {"eager": True, "graphs": records, "compile": compiles, "compile+graphs": records and compiles}
    return tuple(path for path in PATHS if allowed[path])


def paths_to_time(
    settings: Settings, dist_context: DistContext, paths: Sequence[ExecutionPath], *, num_steps: int, num_tokens: int
) -> tuple[ExecutionPath, ...]:
    """Those of `paths` that `--execution auto` times in a run so long; () where none is worth it."""
    if settings.engine.execution != "auto" or not uses_gpu_form(dist_context.device) or num_steps < MIN_TUNED_STEPS:
        return ()
    timed = [path for path in paths if "compile" not in path or num_tokens >= MIN_COMPILED_TOKENS]
    return tuple(timed) if len(timed) > 1 else ()


def choose_path(settings: Settings, paths: Sequence[ExecutionPath]) -> ExecutionPath:
    """What `--execution` asks for, among the possible; auto: recorded where that can be."""
    wanted: dict[str, tuple[ExecutionPath, ...]] = {
        "auto": ("graphs",),
        "eager": (),
        "graphs": ("graphs",),
        "compile": ("compile+graphs", "compile"),
    }
    return next((path for path in wanted[settings.engine.execution] if path in paths), "eager")


def make_execution_plan(
    settings: Settings,
    dist_context: DistContext,
    deepspeed_config: Mapping[str, Any],
    *,
    precision: str,
    model_dropout: float,
    micro_batch_size: int,
    path: ExecutionPath | None = None,
) -> ExecutionPlan:
    """The plan of a run. `model_dropout`: the largest dropout probability of the base model.

    `path`: how steps run, one of `possible_paths`; left out: as `--execution` asks (`choose_path`).
    Parameters: the facts of a run that it follows from.
    """
    stage = int(deepspeed_config["zero_optimization"].get("stage", 0))
    is_gpu = uses_gpu_form(dist_context.device)
    lora, quant = settings.lora, settings.model.quant
    is_native = supports_native_stepper(deepspeed_config, world_size=dist_context.world_size, precision=precision)
    path = path or choose_path(settings, possible_paths(settings, dist_context, deepspeed_config, precision=precision))
    is_compiled = "compile" in path
    has_adapters = settings.mode == "lora"
    lora_dropout = lora.dropout if has_adapters else 0.0
    is_plain_lora = has_adapters and lora.adapter != "dora" and not lora_dropout and quant is None
    is_fused_adamw = settings.train.optim == "adamw_fused"
    rows = (micro_batch_size, settings.train.eval_batch)
    return ExecutionPlan(
        precision=precision,
        stepper="native" if is_native else "deepspeed",
        cuda_graphs="graphs" in path,
        compiled_shapes=tuple((n, settings.data.block_size) for n in dict.fromkeys(rows)) if is_compiled else (),
        fused_lora=is_plain_lora and stage < 3,
        blockwise_attention=(
            not (is_gpu or is_compiled or settings.data.packing) and max(model_dropout, lora_dropout) > 0
        ),
        packed_rows=settings.data.packing,
        frozen_dtype="bfloat16" if precision == "bf16" and stage < 3 and has_adapters and not quant else "float32",
        chunked_loss=True,  # until the model's own logits say otherwise
        overlaps_reduction=is_native and dist_context.world_size > 1 and "graphs" not in path,
        finite_check="device" if is_native and is_fused_adamw else "host",
        steps_in_flight=2 if is_gpu and is_native and is_fused_adamw else 1,
    )
