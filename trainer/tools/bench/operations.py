"""Operations and bytes of one step as a GPU would run it, counted with fake tensors: no GPU is needed.

An operation is about one kernel: one of ATen, or, of a compiled part, what torch's inductor has joined (by its rules
for a processor, as those for a GPU ask for one; neither compiles anything here). Bytes are those of inputs and outputs,
each once: what it would move if nothing stayed in a cache. Predicted time: each operation takes the longest of its
bytes at an H100's memory, its products at its matrix units, both at what large kernels reach of them, and a kernel's
own least; without the host and any overlap. `launch/bench.py operations` prints the table that
tests/distributed/test_operations.py guards.
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


@dataclass
class Operations:
    """How many, the bytes that they move and the seconds that they would take."""

    number: int = 0
    num_bytes: int = 0
    seconds: float = 0.0

    def add(self, num_bytes: float, flops: float) -> None:
        """One more."""
        self.number += 1
        self.num_bytes += int(num_bytes)
        self.seconds += max(num_bytes / BYTES_PER_SECOND, flops / FLOPS, KERNEL_SECONDS)


class OperationCount(TorchDispatchMode):
    """Operations that write something, by name, and what they take together; compiled ones by `backend`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.total = Operations()
        self._is_paused = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Or nothing would be compiled within it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        storages = {id(t.untyped_storage()) for t in inputs}
        is_view = not func._schema.is_mutable and all(id(t.untyped_storage()) in storages for t in outputs)
        if not (is_view or name.startswith(_FREE) or self._is_paused):
            num_bytes = sum(t.numel() * t.element_size() for t in {id(t): t for t in (*inputs, *outputs)}.values())
            count_flops = flop_registry.get(func.overloadpacket)
            shapes = [arg for arg in args if not isinstance(arg, torch.dtype)]  # a product's `out_dtype`
            self.counts[name] += 1
            self.total.add(num_bytes, count_flops(*shapes, **(kwargs or {}), out_val=result) if count_flops else 0)
        return result

    def backend(self, graph_module: Any, inputs: Sequence[Any]) -> Any:
        """For torch.compile: a function that computes as the graph does and counts as inductor would run it."""
        from torch._dynamo.backends.common import aot_autograd  # takes seconds: only where something is compiled
        from torch._inductor.decomposition import select_decomp_table

        compiler: Any = aot_autograd(
            fw_compiler=self._compile,
            bw_compiler=self._compile,
            decompositions=select_decomp_table,
            keep_inference_input_mutations=True,  # as inductor has it: the loss is written where the logits were
        )
        return compiler(graph_module, inputs)

    def _compile(self, graph_module: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._functorch.aot_autograd import make_boxed_func

        kernels = _joined_kernels(graph_module, inputs)

        def run(*args: Any) -> Any:
            self.counts["compiled"] += len(kernels)
            for num_bytes, flops in kernels:
                self.total.add(num_bytes, flops)
            self._is_paused = True
            try:
                return graph_module.forward(*args)
            finally:
                self._is_paused = False

        return make_boxed_func(run)


def _joined_kernels(graph_module: Any, inputs: Sequence[Any]) -> list[tuple[int, int]]:
    """(bytes moved, operations of products) of each kernel that inductor makes of a graph."""
    from torch._guards import detect_fake_mode
    from torch._inductor import ir, scheduler
    from torch._inductor.compile_fx import _recursive_post_grad_passes
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    mode: Any = detect_fake_mode(inputs)
    with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        _recursive_post_grad_passes(graph_module, False)
        graph: Any = GraphLowering(graph_module, shape_env=mode.shape_env)
        with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
            graph.run(*inputs)
            graph.init_wrapper_code()
            graph._update_scheduler()
            return [
                (node.get_read_write_buffers_sizes(), node.estimate_flops() or 0)
                for node in graph.scheduler.nodes
                if not isinstance(node, scheduler.NopKernelSchedulerNode) and not isinstance(node.node, ir.MultiOutput)
            ]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass(frozen=True, kw_only=True)
class StepCount:
    """What one step takes."""

    in_pass: Operations  #: forward and backward
    in_update: Operations  #: norm, clipping and AdamW

    @property
    def seconds(self) -> float:
        """Predicted, of both."""
        return self.in_pass.seconds + self.in_update.seconds


def count_step(mode: str, micro_batch_size: int, *, is_compiled: bool = False, model: str = "gpt2") -> StepCount:
    """Of GPT-2 124M (or of a folder's model) on one GPU, in bf16; recorded, or `is_compiled` before."""
    argv = ["--mode", mode, "--preset", "card", "--model", model, "--init", "random"]
    is_lora = mode == "lora"
    setup = PassSetup(
        micro_batch_size=micro_batch_size,
        sequence_length=1024,
        precision="bf16",
        is_gpu=True,
        uses_fused_lora=is_lora,
        casts_frozen_weights=is_lora,
    )

    def build() -> TrainableModel:
        return build_model(cli.parse_args(argv).settings, on_meta=True)

    with simulated_pass(build, setup) as (loss_module, ids, _):
        params = [p for p in loss_module.parameters() if p.requires_grad]
        with OperationCount() as count:
            if is_compiled:
                loss_module.compile_for_shapes({tuple(ids.shape)}, backend=count.backend)
                loss_module(ids, ids)[0].backward()  # compiles
                for parameter in params:
                    parameter.grad = None
                count.total = Operations()
            loss_module(ids, ids)[0].backward()
            in_pass = count.total
        assert not loss_module.compile_error, loss_module.compile_error
        optimizer: Any = torch.optim.AdamW(params, fused=True)
        _run_update(params, optimizer)  # makes the moments
        with OperationCount() as count:
            _run_update(params, optimizer)
    return StepCount(in_pass=in_pass, in_update=count.total)


def _run_update(params: Sequence[nn.Parameter], optimizer: Any) -> None:
    """What `NativeStepper` does of its own on a GPU."""
    grad_norm = total_norm([p.grad for p in params if p.grad is not None])
    optimizer.found_inf = (~torch.isfinite(grad_norm)).float()
    optimizer.grad_scale = (grad_norm + 1e-6).clamp(min=1.0)
    optimizer.step()


def operations_table(count: Callable[..., StepCount] = count_step) -> str:
    """Markdown, two lines for each of `ROWS`: recorded, and compiled before."""
    lines = ["| GPT-2 124M, bf16 | forward, backward | GB moved | update | GB moved | ms predicted |"]
    lines.append("|---|" + "--:|" * 5)
    for name, (mode, micro_batch_size) in ROWS.items():
        for is_compiled in (False, True):
            step = count(mode, micro_batch_size, is_compiled=is_compiled)
            cells = [f"{part.number:,} | {part.num_bytes / 1e9:.2f}" for part in (step.in_pass, step.in_update)]
            label = f"{name}, {'compiled' if is_compiled else 'recorded'}"
            lines.append(f"| {label} | {' | '.join(cells)} | {1e3 * step.seconds:.1f} |")
    return "\n".join(lines) + "\n"
