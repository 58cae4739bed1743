"""ATen operations and bytes of one step as a GPU would run it, counted with fake tensors: no GPU is needed.

An operation is about one kernel. Bytes are those of its inputs and outputs, each once: what it would move if nothing
stayed in a cache. Predicted time: each operation takes the longest of its bytes at an H100's memory, its products at
its matrix units, both at what large kernels reach of them, and a kernel's own least; without the host and any overlap.
`launch/bench.py operations` prints the table that tests/unit/tools/test_operations.py guards.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from trainer.config import cli
from trainer.distributed.gradients import total_norm
from trainer.distributed.memory_count import PassSetup, simulated_pass
from trainer.model.build import TrainableModel, build_model

BYTES_PER_SECOND, FLOPS, KERNEL_SECONDS = 2.7e12, 550e12, 2.5e-6  # of an H100: of 3.35e12 and 990e12 as stated
_FREE = ("aten.empty", "aten.detach", "aten.new_empty", "aten.lift_fresh", "aten.record_stream")
#: {row: (mode, micro-batch)}, blocks of 1,024 tokens of GPT-2 124M in bf16
ROWS = {"full, batch 2": ("full", 2), "LoRA, batch 2": ("lora", 2), "full, batch 16": ("full", 16)}


@dataclass(frozen=True, kw_only=True)
class StepCount:
    """What one step takes."""

    pass_operations: int  #: of forward and backward
    pass_bytes: int
    update_operations: int  #: of norm, clipping and AdamW
    update_bytes: int
    seconds: float  #: of both, predicted


class OperationCount(TorchDispatchMode):
    """Operations that write something, by name, and the bytes of what they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.num_bytes = 0
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        storages = {id(t.untyped_storage()) for t in inputs}
        is_view = not func._schema.is_mutable and all(id(t.untyped_storage()) in storages for t in outputs)
        if not (is_view or name.startswith(_FREE)):
            self.counts[name] += 1
            num_bytes = sum(t.numel() * t.element_size() for t in {id(t): t for t in (*inputs, *outputs)}.values())
            count_flops = flop_registry.get(func.overloadpacket)
            shapes = [arg for arg in args if not isinstance(arg, torch.dtype)]  # a product's `out_dtype`
            flops = count_flops(*shapes, **(kwargs or {}), out_val=result) if count_flops else 0
            self.num_bytes += num_bytes
            self.seconds += max(num_bytes / BYTES_PER_SECOND, flops / FLOPS, KERNEL_SECONDS)
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def count_step(mode: str, micro_batch_size: int) -> StepCount:
    """Of GPT-2 124M on one GPU, in bf16."""
    argv = ["--mode", mode, "--preset", "card", "--model", "gpt2", "--init", "random"]
    is_lora = mode == "lora"
    setup = PassSetup(
        micro_batch_size=micro_batch_size, sequence_length=1024, precision="bf16", is_gpu=True,
        uses_fused_lora=is_lora, casts_frozen_weights=is_lora,
    )  # fmt: skip

    def build() -> TrainableModel:
        return build_model(cli.parse_args(argv).settings, on_meta=True)

    with simulated_pass(build, setup) as (loss_module, ids, _):
        params = [p for p in loss_module.parameters() if p.requires_grad]
        with OperationCount() as in_pass:
            loss_sum, _ = loss_module(ids, ids)
            loss_sum.backward()
        optimizer: Any = torch.optim.AdamW(params, fused=True)
        _run_update(params, optimizer)  # makes the moments
        with OperationCount() as in_update:
            _run_update(params, optimizer)
    return StepCount(
        pass_operations=in_pass.counts.total(), pass_bytes=in_pass.num_bytes,
        update_operations=in_update.counts.total(), update_bytes=in_update.num_bytes,
        seconds=in_pass.seconds + in_update.seconds,
    )  # fmt: skip


def _run_update(params: Sequence[nn.Parameter], optimizer: Any) -> None:
    """What `NativeStepper` does of its own on a GPU."""
    grad_norm = total_norm([p.grad for p in params if p.grad is not None])
    optimizer.found_inf = (~torch.isfinite(grad_norm)).float()
    optimizer.grad_scale = (grad_norm + 1e-6).clamp(min=1.0)
    optimizer.step()


def operations_table(count: Callable[[str, int], StepCount] = count_step) -> str:
    """Markdown, a line for each of `ROWS`."""
    lines = ["| GPT-2 124M, bf16 | forward, backward | GB moved | update | GB moved | ms predicted |"]
    lines.append("|---|" + "--:|" * 5)
    for name, (mode, micro_batch_size) in ROWS.items():
        step = count(mode, micro_batch_size)
        lines.append(
            f"| {name} | {step.pass_operations:,} | {step.pass_bytes / 1e9:.2f} | {step.update_operations:,} | "
            f"{step.update_bytes / 1e9:.2f} | {1e3 * step.seconds:.1f} |"
        )
    return "\n".join(lines) + "\n"
