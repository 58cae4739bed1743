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

from trainer.config.schema import EIGHT_BIT, TrainSettings
from trainer.data.sampler import MicroBatch
from trainer.distributed.cuda_graphs import WARM, Graphs
from trainer.distributed.frozen_bf16 import Halves, holds_halves
from trainer.distributed.process_group import World, keep_freed_memory
from trainer.distributed.state_dict import State
from trainer.distributed.steppers import Direct, NotFinite, ThroughDeepSpeed, goes_direct
from trainer.kernels import cpu_attention, fused_lora
from trainer.kernels.linear_cross_entropy import TokenLoss
from trainer.model import optimizer, quantization
from trainer.model.build import Model
from trainer.model.lora import plain_layers


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one optimizer step did."""

    nll: float  #: summed loss of the global batch, nats
    grad_norm: float  #: of the global gradient before clipping
    skipped: bool  #: whether fp16 left the update out
    stop: bool  #: whether any rank wants the run to stop


class Engine:
    """The model on its ranks: accumulate micro-batches, step, evaluate, read and write the full state."""

    def __init__(
        self, world: World, model: Model, config: Mapping[str, Any], train: TrainSettings, precision: str,
        *, compiled: Collection[tuple[int, ...]] = (),
    ):  # fmt: skip
        """`config`: DeepSpeed's dict; `compiled`: the shapes [rows, tokens] of micro-batches to compile for."""
        self.world = world
        self.model = model
        self.seed = train.seed
        self.precision = precision
        self.waited = 0.0  # seconds until the device had done what it was asked for
        self._stage = int(config["zero_optimization"].get("stage", 0))
        if world.device.type == "cpu":
            keep_freed_memory()
            if not compiled:  # a compiler has its own
                cpu_attention.install(model.module, model.causal)
        if not compiled and self._stage < 3 and model.is_adapter:
            fused_lora.install(plain_layers(model.module))
        quantization.compute_in(model.module, torch.bfloat16 if precision == "bf16" else torch.float32)
        self._loss = TokenLoss(model.causal, torch.bfloat16 if precision == "bf16" else None).to(world.device)
        named = [(name, p) for name, p in model.module.named_parameters() if p.requires_grad]
        self.trainable: dict[str, nn.Parameter] = dict(named)
        ratios = {model.rate_of(name): None for name in self.trainable}  # a set in order: alike on every rank
        groups = [
            {"params": [p for n, p in named if model.rate_of(n) == ratio], "lr": train.lr * ratio, "lr_ratio": ratio}
            for ratio in ratios
        ]
        made = import_module("deepspeed").initialize(
            model=self._loss, optimizer=optimizer.make(groups, train, whole=model.embeddings), config=dict(config),
            dist_init_required=False,
        )  # fmt: skip
        self.deepspeed, self.optimizer = made[0], made[1]
        self.deepspeed.train()
        self.way: Direct | ThroughDeepSpeed = (
            Direct(world, self.deepspeed, self._loss, list(self.trainable.values()), train.clip)
            if goes_direct(config, size=world.size, precision=precision)
            else ThroughDeepSpeed(self.deepspeed, precision)
        )
        self.state = State(
            world, self.deepspeed, self.trainable, stage=self._stage, precision=precision,
            eight_bit=train.optim in EIGHT_BIT,
        )  # fmt: skip
        if compiled:
            self._loss.compile_for(set(compiled))
        self._halves = (
            Halves(model, keep=world.rank == 0)
            if holds_halves(
                precision=precision, stage=self._stage, adapters=model.is_adapter, packed=model.packed is not None
            )
            else None
        )
        self._graphs = Graphs(self._loss, list(self.trainable.values())) if self._records(model) else None

    def _records(self, model: Model) -> bool:
        """Whether forward and backward may be recorded: what packed weights and recomputed blocks do may not."""
        again = getattr(model.causal, "is_gradient_checkpointing", False)
        return self.world.device.type == "cuda" and isinstance(self.way, Direct) and not model.packed and not again

    @property
    def warm_steps(self) -> int:
        """Steps after which the following ones take as long as all later ones."""
        return WARM + 2 if self._graphs else 1

    @property
    def notices(self) -> list[str]:
        """What did not go the fast way although it was meant to."""
        return [*self._loss.told, *(self._graphs.told if self._graphs else [])]

    def accumulate(self, micro: MicroBatch, *, step: int, counted: int) -> Tensor:
        """Forward and backward of one micro-batch; returns its summed loss, float64 on the device.

        `counted`: targets of the whole global batch. Dropout depends on seed, step and the rows' place in the
        global batch, not on the rank: a resumed run, or one on other ranks, draws the same masks.
        """
        self.world.board.beat()
        self._train(True)
        torch.manual_seed(_dropout_seed(self.seed, step, micro.index))
        given = (*self._to_device(micro), self.way.parts / counted)
        rows = self._graphs.backward(*given) if self._graphs else None
        return (self.way.backward(*given) if rows is None else rows).double().sum()

    @property
    def lags(self) -> bool:
        """Whether a step may be asked for before the numbers of the one before it are read, so that none waits.

        Where one was not finite the device leaves out what follows, too.
        """
        return self.way.guarded and self.world.device.type == "cuda"

    def step(self, lr: float, sums: Sequence[Tensor], *, stop: bool = False) -> Step:
        """Reduce, measure, clip, update. Raises NotFinite, with the weights untouched, unless fp16 may skip.

        `sums`: what `accumulate` returned for this rank's micro-batches; `stop`: whether this rank wants to stop.
        """
        return self.ask(lr, sums, stop=stop)()

    def ask(self, lr: float, sums: Sequence[Tensor], *, stop: bool = False) -> Callable[[], Step]:
        """Ask for such a step; what is returned waits until it is done and tells of it, or raises."""
        self.world.board.beat()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        everybody = self._everybody(sums, stop)
        read = None if self.way.guarded else self._read(everybody)
        done = self.way.update(torch.isfinite(everybody).all())

        def told() -> Step:
            nll, wanted = read or self._read(everybody)
            norm = float(done.grad_norm)
            if not (math.isfinite(norm) or self.precision == "fp16"):
                raise NotFinite(f"gradient norm {norm}")
            return Step(nll=nll, grad_norm=norm, skipped=done.skipped, stop=wanted)

        return told

    def put_back(self) -> None:
        """After the last step: give the frozen base its float32 back, for readers outside autocast.

        On rank 0; the others' is only of that type. Nothing may be trained or evaluated here afterwards.
        """
        if self._halves is not None:
            self._halves.put_back()

    def drop(self) -> None:
        """Let no gradient stay after a refused step. The state may be worthless then: for those who restore it."""
        self.way.drop()

    def _everybody(self, sums: Sequence[Tensor], stop: bool) -> Tensor:
        """One row a rank, on the device: its micro-batches' sums and whether it wants to stop."""
        asked = torch.full((), float(stop), dtype=torch.float64, device=self.world.device)  # a copy would wait
        mine = torch.stack([*sums, asked])
        everybody = mine
        if self.world.size > 1:
            everybody = mine.new_empty(self.world.size * len(mine))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch is renaming the function
                dist.all_gather_into_tensor(everybody, mine)
        return everybody.view(self.world.size, -1)

    def _read(self, everybody: Tensor) -> tuple[float, bool]:
        """(exact sum of all micro-batches' sums, whether anybody wants to stop). Raises NotFinite."""
        began = time.perf_counter()
        table = everybody.tolist()  # the first time that a step needs the device's answer
        self.waited += time.perf_counter() - began
        values = [value for row in table for value in row[:-1]]
        if not all(map(math.isfinite, values)):
            raise NotFinite("loss nan")
        return math.fsum(values), any(row[-1] for row in table)

    @torch.no_grad()
    def evaluate(self, micro: MicroBatch) -> Tensor:
        """Summed loss of each row, without dropout: float64 on the device."""
        self.world.board.beat()
        self._train(False)
        given = self._to_device(micro)
        rows = self._graphs.forward(*given) if self._graphs else None
        return (self.way.forward(*given) if rows is None else rows).double()

    def _train(self, train: bool) -> None:
        if self._loss.training != train:  # both walk over all modules
            self.deepspeed.train(train)

    def _to_device(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        ids, labels = torch.from_numpy(micro.input_ids), torch.from_numpy(micro.labels)
        if self.world.device.type != "cuda":
            return ids, labels
        device = self.world.device
        return ids.pin_memory().to(device, non_blocking=True), labels.pin_memory().to(device, non_blocking=True)

    @torch.no_grad()
    def complete(self, prompts: Sequence[Sequence[int]], most: int, end: int) -> list[list[int]] | None:
        """Greedy continuations of token ids on rank 0, None on the others; all ranks must call.

        Each is at most `most` tokens, without the token `end` at which it stops. One batch, padded on the left, on one
        rank: so no number of ranks changes a text. ZeRO-3 gathers the weights once, for all tokens.
        """
        self.world.board.beat()
        self._train(False)
        with self._whole_model():
            made = self._greedy(prompts, most, end) if self.world.rank == 0 else None
        return made

    def can_be_whole(self) -> bool:
        """Whether every rank has room for all weights beside what it holds; all ranks must call. Half of what is free
        is left to the work on them."""
        if self._stage < 3 or self.world.device.type != "cuda":
            return True
        size = sum(p.ds_numel * p.element_size() for p in self.deepspeed.module.parameters())
        return all(self.world.gather(size < torch.cuda.mem_get_info(self.world.device)[0] / 2))

    def _whole_model(self) -> contextlib.AbstractContextManager[Any]:
        if self._stage < 3:
            return contextlib.nullcontext()
        return import_module("deepspeed.runtime.zero").unwrap_model_for_generation(self.deepspeed)

    def _greedy(self, prompts: Sequence[Sequence[int]], most: int, end: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[end] * (width - len(one)) + list(one) for one in prompts], device=self.world.device)
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=self.world.device)
        greedy = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=most, eos_token_id=end, pad_token_id=end, use_cache=True
        )
        half = self.precision == "bf16"
        with torch.autocast(self.world.device.type, torch.bfloat16) if half else contextlib.nullcontext():
            whole = self.model.causal.generate(
                input_ids=ids, attention_mask=mask, logits_processor=[self._beat], generation_config=greedy
            )
        made = whole[:, width:].tolist()
        return [one[: one.index(end)] if end in one else one for one in made]

    def _beat(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.world.board.beat()  # the other ranks wait
        return scores

    def largest(self, names: Iterable[str]) -> float:
        """The largest entry, by size, of these trained weights over all ranks; all ranks must call."""
        mine = [getattr(self.trainable[name], "ds_tensor", self.trainable[name]).detach() for name in names]
        return max(self.world.gather(max((float(part.abs().max()) for part in mine if part.numel()), default=0.0)))


def _dropout_seed(seed: int, step: int, index: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{index}".encode()).digest()[:8], "little") >> 1
