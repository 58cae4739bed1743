"""Settings + ZeRO file -> DeepSpeed's dict -> engine: the only door to deepspeed.

DeepSpeed divides weights, gradients and optimizer state over the ranks; the numbers are ours. The optimizer is ours
under every stage (`trainer.optim`), the schedule stays out of DeepSpeed's dict, the loss is divided by the tokens of
the global batch before the first backward, and the engine never counts micro-batches for us. bf16 is autocast over
float32 weights, so that every stage does the same arithmetic.
"""

import contextlib
import hashlib
import json
import math
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GenerationConfig

from trainer import optim, quant
from trainer.data import MicroBatch
from trainer.errors import RunFailed, UserError
from trainer.loss import TokenLoss
from trainer.memory import Counts
from trainer.memory import state as model_state
from trainer.model import Model
from trainer.settings import DS_NAMES, EIGHT_BIT, HANG_TIMEOUT_MOST, Batch, TrainSettings
from trainer.watch import Board

T = TypeVar("T")

DS_FOLDER = Path(__file__).parent.parent / "ds_configs"
STATE_SHARE = 0.25  # of a device's memory; model state beyond it is worth dividing further
COLLECTIVE_TIMEOUT = timedelta(seconds=HANG_TIMEOUT_MOST)  # that of the groups which DeepSpeed makes for itself
PREPARE_TIMEOUT = timedelta(hours=24)  # one rank tokenises while the others wait


# --- the ranks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run and what each computes on."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    threads: int  #: of the processor, per rank
    host: Any  #: group for Python objects, patient; None where there is one rank
    board: Board  #: what the ranks know of one another while they wait

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host)
        return values

    def once(self, make: Callable[[], T], *, per_node: bool = False) -> T:
        """What `make` returns on rank 0 (on each node's first rank), for everybody; its errors are everybody's too."""
        leader = self.local_rank == 0 if per_node else self.rank == 0
        value, problem = None, None
        if leader:
            try:
                value = make()
            except (UserError, RunFailed) as error:
                problem = error
            except BaseException as error:
                self.gather((None, RunFailed(f"rank {self.rank}: {type(error).__name__}: {error}")))
                raise
        answers = self.gather((value, problem))
        for _, failed in answers:
            if failed is not None:
                raise failed
        return answers[self.rank - self.local_rank if per_node else 0][0]  # type: ignore[return-value]

    @property
    def nodes(self) -> int:
        """Machines taking part, each with the same number of ranks."""
        return self.size // self.local_size


def start_world(device: str | None = None) -> World:
    """Join the other ranks; `deepspeed`, `torchrun` and plain `python` all come through here.

    Without a launcher there is one rank. GPUs speak NCCL, processors gloo.
    """
    # The launchers set these; without one a run is its own world on a port that is free.
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size)
    on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    if on_gpu and local_size > torch.cuda.device_count():  # of all of them, so that every rank knows
        raise UserError(
            f"{local_size} ranks on a machine with {torch.cuda.device_count()} GPUs: start at most one rank a GPU"
        )
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = _deepspeed()
    if not on_gpu:
        # Collectives over shared memory are compiled at first use, need a compiler, leave files in /dev/shm when
        # killed, and ZeRO never calls them: an empty list of operators switches the attempt off.
        vars(import_module("deepspeed.ops"))["__compatible_ops__"] = {}
    threads = _threads(local_size)
    torch.set_num_threads(threads)
    if on_gpu:
        torch.cuda.set_device(local_rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            verbose=False,
            auto_mpi_discovery=False,
            timeout=COLLECTIVE_TIMEOUT,
        )
    host = dist.new_group(backend="gloo", timeout=PREPARE_TIMEOUT) if size > 1 else None
    where = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return World(
        rank=rank, size=size, local_rank=local_rank, local_size=local_size, device=where, threads=threads, host=host,
        board=Board(rank, size, _store(rank, host) if size > 1 else None),
    )  # fmt: skip


def planned_world(ranks: int, device: str | None = None) -> World:
    """The world that a run on `ranks` ranks of this machine would have, without joining anybody: for a plan only."""
    on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    where = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    return World(
        rank=0, size=ranks, local_rank=0, local_size=ranks, device=where, threads=_threads(ranks), host=None,
        board=Board(0, ranks, None),
    )  # fmt: skip


def forwarded_variables() -> tuple[str, ...]:
    """Beginnings of the environment variables that `deepspeed` hands on to other machines."""
    runner = import_module("deepspeed.launcher.runner")
    accelerator = import_module("deepspeed.accelerator").get_accelerator()
    return (*runner.EXPORT_ENVS, *accelerator.export_envs())


def _store(rank: int, host: Any) -> dist.TCPStore:
    """A key-value store on rank 0, apart from the launcher's: that one may go first."""
    address = os.environ["MASTER_ADDR"]
    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = [store.port if store else 0]
    dist.broadcast_object_list(port, 0, group=host)
    return store or dist.TCPStore(address, port[0], is_master=False, wait_for_workers=False)


def lost_peer(problem: BaseException) -> bool:
    """Whether a collective failed because another rank is no longer there, as gloo and NCCL put it."""
    if isinstance(problem, dist.DistError):
        return True
    words = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
    return isinstance(problem, RuntimeError) and any(word in str(problem) for word in words)


def leave_world() -> None:
    """Leave the process group; without it a finished rank may abort at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _deepspeed() -> Any:
    import deepspeed

    return deepspeed


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _threads(local_size: int) -> int:
    """Threads for one rank: what the user set, else this rank's share of the cores it may use."""
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return int(os.environ["OMP_NUM_THREADS"])
    return max(1, len(os.sched_getaffinity(0)) // local_size)


# --- DeepSpeed's dict --------------------------------------------------------------------------------------------

_OURS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "scheduler",
    "fp16", "bf16", "torch_autocast", "gradient_clipping", "managed_gradient_accumulation", "steps_per_print",
    "wandb", "tensorboard", "csv_monitor", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
)  # fmt: skip
_THEIRS = (
    "zero_optimization", "communication_data_type", "comms_logger", "prescale_gradients", "gradient_predivide_factor",
    "wall_clock_breakdown", "aio",
)  # fmt: skip
_NEVER = {
    "prescale_gradients": "it scales the gradients, which are already the mean over the global batch",
    "gradient_predivide_factor": "it scales the gradients, which are already the mean over the global batch",
    "round_robin_gradients": "it returns other parameters' values when the full state is read for a checkpoint",
}


@dataclass(frozen=True, kw_only=True)
class ZeroFile:
    """A ZeRO file that was read and checked."""

    name: str
    content: dict[str, Any]
    reason: str

    @property
    def stage(self) -> int:
        """0 to 3."""
        return int(self.content["zero_optimization"].get("stage", 0))

    @property
    def offload(self) -> bool:
        """Whether optimizer state or weights live in the host's memory."""
        return self.optimizer_on_host or self.weights_on_host

    @property
    def optimizer_on_host(self) -> bool:
        """Whether the optimizer's state lives in the host's memory."""
        return self._device("offload_optimizer") != "none"

    @property
    def weights_on_host(self) -> bool:
        """Whether the weights do, between the moments when a layer needs them."""
        return self._device("offload_param") != "none"

    def _device(self, key: str) -> str:
        return str((self.content["zero_optimization"].get(key) or {}).get("device", "none"))


def read_zero_file(name: str, reason: str = "asked for") -> ZeroFile:
    """One of `ds_configs/` by name, or a path; UserError names the file and the key for anything unknown or doubled."""
    path = DS_FOLDER / f"{name}.json" if name in DS_NAMES else Path(name)
    if not path.is_file():
        raise UserError(f"--ds-config {name}: no such file; pass {', '.join(DS_NAMES)} or a path to a JSON file")
    try:
        content = json.loads(path.read_text(), object_pairs_hook=_no_doubles)
    except ValueError as problem:
        raise UserError(f"--ds-config {path}: not JSON: {problem}") from problem
    _check_keys(path, content)
    return ZeroFile(name=name if name in DS_NAMES else path.stem, content=content, reason=reason)


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    doubled = {key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1}
    if doubled:
        raise ValueError(f"key {sorted(doubled)[0]} stands there twice")
    return dict(pairs)


def _check_keys(path: Path, content: Any) -> None:
    if not isinstance(content, dict) or not isinstance(content.get("zero_optimization"), dict):
        raise UserError(f"--ds-config {path}: expected an object with the key zero_optimization")
    for key, where, value in _walk(content):
        if value == "auto":
            raise UserError(f'--ds-config {path}: {where} is "auto"; give a value, nothing here fills it in')
        if key in _NEVER:
            raise UserError(f"--ds-config {path}: {where} is refused: {_NEVER[key]}")
    for key in content:
        if key in _OURS:
            raise UserError(f"--ds-config {path}: {key} comes from the flags, not from this file; take it out")
        if key not in _THEIRS:
            raise UserError(
                f"--ds-config {path}: unknown key {key}; known are {', '.join(k for k in _THEIRS if k not in _NEVER)}"
            )
    _deepspeed()
    zero_config = import_module("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    zero = content["zero_optimization"]
    fields = zero_config.model_fields  # their documented names are the aliases, but both are taken
    names = {field.alias: name for name, field in fields.items() if field.alias} | {name: name for name in fields}
    for key in zero:
        if key not in names:
            raise UserError(f"--ds-config {path}: unknown key zero_optimization.{key}")
        if [names[other] for other in zero if other in names].count(names[key]) > 1:
            raise UserError(f"--ds-config {path}: zero_optimization.{key} stands there twice, under two of its names")
    if zero.get("stage", 0) not in range(4):
        raise UserError(f"--ds-config {path}: zero_optimization.stage {zero['stage']}: expected 0, 1, 2 or 3")
    try:
        zero_config(**zero)
    except ValueError as problem:  # pydantic's
        raise UserError(f"--ds-config {path}: {_first(problem)}") from problem
    stage = zero.get("stage", 0)
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = (zero.get(key) or {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise UserError(f"--ds-config {path}: zero_optimization.{key}.device {device}: expected cpu or none")
        if device == "cpu" and stage < least:
            raise UserError(f"--ds-config {path}: zero_optimization.{key} needs stage {least} or more, not {stage}")


def _first(problem: Any) -> str:
    """The first thing that DeepSpeed's own check of its keys complains of: where, the value, what is expected."""
    found = problem.errors()[0]
    where = ".".join(map(str, ("zero_optimization", *found["loc"])))
    if found["type"] == "extra_forbidden":
        return f"unknown key {where}"
    value = "" if isinstance(found["input"], dict) else f" {json.dumps(found['input'])}"
    return f"{where}{value}: {found['msg'][:1].lower()}{found['msg'][1:]}"


def _walk(value: Any, where: str = "") -> Iterator[tuple[str, str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            path = f"{where}.{key}" if where else key
            yield key, path, inner
            yield from _walk(inner, path)


def choose_zero_file(*, counts: Counts, ranks: int, memory: int | None, precision: str) -> ZeroFile:
    """The ZeRO file where the user named none, and why: by the state per rank of `trainer.memory`."""

    def held(stage: int) -> float:
        return model_state(counts, stage=stage, ranks=ranks, precision=precision).total

    def fits(size: float) -> bool:
        return memory is None or size <= STATE_SHARE * memory

    whole = held(0)
    if ranks == 1 and precision != "fp16":
        if fits(whole):
            return read_zero_file("zero0", "one rank: there is nothing to divide")
        return read_zero_file(
            "zero2_offload", f"one rank, and {whole / 2**30:.1f} GiB of model state: the optimizer's moves to the host"
        )
    if fits(held(1)):
        return read_zero_file("zero1", "optimizer state is divided over the ranks at no extra communication")
    if fits(held(2)):
        return read_zero_file(
            "zero2", f"{whole / 2**30:.1f} GiB of model state: gradients and optimizer state are divided"
        )
    return read_zero_file("zero3", f"{whole / 2**30:.1f} GiB of model state: weights are divided too")


def deepspeed_dict(zero: ZeroFile, *, batch: Batch, clip: float, precision: str) -> dict[str, Any]:
    """DeepSpeed's whole configuration, pure: the ZeRO file and what the settings say; no key comes from both."""
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": 1,  # never divides: the loss is already divided by the global batch's tokens
        "managed_gradient_accumulation": False,  # step() is the boundary, also after a short last group
        "gradient_clipping": clip if zero.stage else 0.0,  # left out means 1.0; stage 0 is clipped where it is measured
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if zero.stage:
        # Otherwise offload wants DeepSpeed's own Adam, other numbers and a compiler.
        ours |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    if precision == "fp16":
        ours["fp16"] = {"enabled": True}
    return {**zero.content, **ours}


# --- the engine --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one optimizer step did: the norm of the global gradient before clipping, and whether it was applied."""

    grad_norm: float
    skipped: bool


class NotFinite(Exception):
    """The global gradient of a step is NaN or infinite; the weights are still those before the step."""


class Engine:
    """The model on its ranks: accumulate micro-batches, step, evaluate, read and write the full state."""

    def __init__(self, world: World, model: Model, config: Mapping[str, Any], train: TrainSettings, precision: str):
        self.world = world
        self.model = model
        self.seed = train.seed
        self.clip = train.clip
        self.precision = precision
        self.eight_bit = train.optim in EIGHT_BIT
        self.waited = 0.0  # seconds until the device had done what it was asked for
        self._grad_norm: Tensor | None = None
        self._stage = int(config["zero_optimization"].get("stage", 0))
        quant.compute_in(model.module, torch.bfloat16 if precision == "bf16" else torch.float32)
        loss = TokenLoss(model.causal, torch.bfloat16 if precision == "bf16" else None).to(world.device)
        named = [(name, p) for name, p in model.module.named_parameters() if p.requires_grad]
        self.trainable: dict[str, nn.Parameter] = dict(named)
        ratios = {model.rate_of(name): None for name in self.trainable}  # a set in order: alike on every rank
        groups = [
            {"params": [p for n, p in named if model.rate_of(n) == ratio], "lr": train.lr * ratio, "lr_ratio": ratio}
            for ratio in ratios
        ]
        optimizer = optim.make(groups, train, whole=model.embeddings)
        if self._stage == 0:
            optimizer.register_step_pre_hook(lambda *_: self._measure_and_clip())
        self.deepspeed, self.optimizer, _, _ = _deepspeed().initialize(
            model=loss, optimizer=optimizer, config=dict(config), dist_init_required=False
        )
        self.deepspeed.train()

    def accumulate(self, micro: MicroBatch, *, step: int, counted: int) -> Tensor:
        """Forward and backward of one micro-batch; returns its summed loss, float64 on the device.

        `counted`: targets of the whole global batch. Dropout depends on seed, step and the rows' place in the
        global batch, not on the rank: a resumed run, or one on other ranks, draws the same masks.
        """
        self.world.board.beat()
        torch.manual_seed(_dropout_seed(self.seed, step, micro.index))
        total, rows = self.deepspeed(*self._to_device(micro))
        loss = total * (self.world.size / counted)  # the ranks' gradients are averaged
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        return rows.double().sum()

    def step(self, lr: float) -> Step:
        """Reduce, measure, clip, update. Raises NotFinite, with the weights untouched, unless fp16 may skip."""
        self.world.board.beat()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        skipped_before = self.deepspeed.skipped_steps
        try:
            self.deepspeed.step()
        except NotFinite:  # stage 0; the others clear up themselves
            self.deepspeed._running_engine_step = False  # else every later backward would reduce, as a step's does
            for parameter in self.trainable.values():
                parameter.grad = None
            raise
        norm = float(
            self._grad_norm
            if self._stage == 0 and self._grad_norm is not None
            else self.deepspeed.get_global_grad_norm()
        )
        skipped = self.deepspeed.skipped_steps > skipped_before
        if self.precision != "fp16" and (skipped or not math.isfinite(norm)):
            raise NotFinite(f"gradient norm {norm}")
        return Step(grad_norm=norm, skipped=skipped)

    def total(self, sums: list[Tensor], stop: bool) -> tuple[float, bool]:
        """(exact sum of everybody's micro-batch sums, whether anybody wants to stop): the same on every rank."""
        self.world.board.beat()
        mine = torch.stack([*sums, torch.tensor(float(stop), dtype=torch.float64, device=self.world.device)])
        everybody = mine
        if self.world.size > 1:
            everybody = mine.new_empty(self.world.size * len(mine))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch is renaming the function
                dist.all_gather_into_tensor(everybody, mine)
        began = time.perf_counter()
        table = everybody.view(self.world.size, -1).tolist()  # the first time that a step needs the device's answer
        self.waited += time.perf_counter() - began
        values = [value for row in table for value in row[:-1]]
        total = math.fsum(values) if all(map(math.isfinite, values)) else math.nan
        return total, any(row[-1] for row in table)

    @torch.no_grad()
    def evaluate(self, micro: MicroBatch) -> list[float]:
        """Summed loss of each row, without dropout."""
        self.world.board.beat()
        self.deepspeed.eval()
        _, rows = self.deepspeed(*self._to_device(micro))
        self.deepspeed.train()
        return rows.double().tolist()

    def _to_device(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        ids, labels = torch.from_numpy(micro.input_ids), torch.from_numpy(micro.labels)
        return ids.to(self.world.device, non_blocking=True), labels.to(self.world.device, non_blocking=True)

    def _measure_and_clip(self) -> None:
        """Stage 0 only: the gradients are reduced and whole here. The formula of torch's clip_grad_norm_."""
        gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
        self._grad_norm = nn.utils.get_total_norm(gradients)
        if not torch.isfinite(self._grad_norm):
            raise NotFinite(f"gradient norm {float(self._grad_norm)}")
        if self.clip:
            nn.utils.clip_grads_with_norm_(self.trainable.values(), self.clip, self._grad_norm)

    @torch.no_grad()
    def complete(self, prompts: Sequence[Sequence[int]], most: int, end: int) -> list[list[int]] | None:
        """Greedy continuations of token ids on rank 0, None on the others; all ranks must call.

        Each is at most `most` tokens, without the token `end` at which it stops. One batch, padded on the left, on one
        rank: so no number of ranks changes a text. ZeRO-3 gathers the weights once, for all tokens.
        """
        self.world.board.beat()
        self.deepspeed.eval()
        with self._whole_model():
            made = self._greedy(prompts, most, end) if self.world.rank == 0 else None
        self.deepspeed.train()
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

    # --- a copy of this rank's part of the state ---

    def remember(self) -> Callable[[], None]:
        """Copy to the host all that a step changes; the function returned restores it bit for bit. All ranks call both.

        Between the two only whole steps may be taken: gradients are not kept.
        """
        inner = self._inner()
        tensors = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in self._held()]
        states = {
            flat: {
                key: value.to("cpu", copy=True) if isinstance(value, Tensor) else value for key, value in state.items()
            }
            for flat, state in inner.state.items()
        }
        rates = [group["lr"] for group in self.optimizer.param_groups]
        counters = {name: getattr(self.deepspeed, name) for name in _COUNTERS}
        scaler = getattr(self.optimizer, "loss_scaler", None)
        scale = dict(vars(scaler)) if hasattr(scaler, "__dict__") else {}

        @torch.no_grad()
        def restore() -> None:
            for tensor, kept in tensors:
                tensor.detach().copy_(kept)
            for flat in [flat for flat in inner.state if flat not in states]:
                for value in inner.state[flat].values():  # not taken away, DeepSpeed points to them: AdamW begins at 0
                    value.zero_()
            for flat, state in states.items():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        inner.state[flat][key].copy_(value)
                    else:
                        inner.state[flat][key] = value
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            for name, count in counters.items():
                setattr(self.deepspeed, name, count)
            if scale:
                vars(scaler).update(scale)
            if self._stage == 3:
                self._gather_anew()

        return restore

    def _inner(self) -> Any:
        """torch's optimizer."""
        return self.optimizer if self._stage == 0 else self.optimizer.optimizer

    def _held(self) -> list[Tensor]:
        """Weights as this rank holds them, and ZeRO's float32 copies of its share."""
        if self._stage == 3:
            return [p.ds_tensor for p in self.trainable.values()] + list(self.optimizer.fp32_partitioned_groups_flat)
        own = [p.data for p in self.trainable.values()]
        return own if self._stage == 0 else own + list(self.optimizer.single_partition_of_fp32_groups)

    def _gather_anew(self) -> None:
        """Let go of weights that ZeRO-3 still holds whole, and put together those that it always holds."""
        whole = [p for p in self.trainable.values() if p.ds_status.name == "AVAILABLE"]
        if whole:
            whole[0].partition(whole, has_been_updated=False)
        lasting = [p for p in self.optimizer.persistent_parameters if p.ds_status.name != "AVAILABLE"]
        if lasting:
            lasting[0].all_gather(lasting)

    # --- full state, the same under every stage and number of ranks ---

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every trained weight (float32) and its two moments, one at a time; all ranks must iterate.

        The moments are float32, or 8-bit codes followed by their scales.
        """
        fragments = import_module("deepspeed.utils.tensor_fragment")
        if self._stage in (1, 2):
            # DeepSpeed links weights to their state once, after the first group's first step: the state of the other
            # groups (LoRA+ has two) is not there yet.
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.trainable.items():
            self.world.board.beat()
            if self._stage == 0:
                yield f"weight/{name}", parameter.detach()
                for kind, tensor in optim.state_of(self.optimizer.state[parameter]):
                    yield f"{kind}/{name}", tensor
            else:
                yield f"weight/{name}", fragments.safe_get_full_fp32_param(parameter)
                yield f"exp_avg/{name}", fragments.safe_get_full_optimizer_state(parameter, "exp_avg")
                yield f"exp_avg_sq/{name}", fragments.safe_get_full_optimizer_state(parameter, "exp_avg_sq")

    def layout(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, shape) of all that `full_state` yields, in its order, without gathering anything."""
        for name, parameter in self.trainable.items():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO-3 its own shape is empty
            yield f"weight/{name}", torch.float32, shape
            if self._stage == 0:
                for kind, tensor in optim.state_of(self.optimizer.state[parameter]):
                    yield f"{kind}/{name}", tensor.dtype, tuple(tensor.shape)
            else:
                for kind in optim.KINDS:
                    yield f"{kind}/{name}", torch.float32, shape

    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state on this rank."""
        return optim.state_bytes(self._inner())

    def loss_scale(self) -> dict[str, Any] | None:
        """Where fp16's dynamic loss scale stands; None in other precisions, where nothing is scaled."""
        if self.precision != "fp16":
            return None
        return {name: getattr(self.optimizer.loss_scaler, name) for name in _LOSS_SCALE}

    def load_state(self, read: Callable[[str], Tensor], steps: int, loss_scale: Mapping[str, Any] | None) -> None:
        """Set AdamW's two moments and its count of steps, and what fp16 keeps beside its halved weights.

        The weights were in the model before the engine was made. UserError where the moments are of an optimizer
        that holds them otherwise.
        """
        if self.eight_bit:
            self._load_codes(read, steps)
            return
        inner = self._inner()
        held = [flat for group in inner.param_groups for flat in group["params"]]
        if self._stage == 3:  # lends its shares to the optimizer for the length of a step only
            held = self.optimizer.fp32_partitioned_groups_flat
        for flat in held:
            inner.state[flat] = {
                "step": torch.tensor(float(steps), device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        for name, parameter in self.trainable.items():
            for key in ("exp_avg", "exp_avg_sq"):
                value = read(f"{key}/{name}")
                if value.dtype != torch.float32:
                    raise UserError(_OTHER_OPTIMIZER)
                self._set_moment(parameter, key, value)
            if self.precision == "fp16":  # its float32 copy was made from the weights after they were halved
                fragments = import_module("deepspeed.utils.tensor_fragment")
                fragments.safe_set_full_fp32_param(parameter, read(f"weight/{name}"))
        for key, value in (loss_scale or {}).items():
            setattr(self.optimizer.loss_scaler, key, value)

    def _load_codes(self, read: Callable[[str], Tensor], steps: int) -> None:
        for name, parameter in self.trainable.items():
            state = self.optimizer.state[parameter]
            state["step"] = steps
            for kind, tensor in optim.state_of(state):
                value = read(f"{kind}/{name}")
                if value.dtype != tensor.dtype:
                    raise UserError(_OTHER_OPTIMIZER)
                tensor.copy_(value)

    def _set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self._stage == 0:
            self.optimizer.state[parameter][key].copy_(value)
        elif self._stage == 3:
            fragments = import_module("deepspeed.utils.tensor_fragment")
            size = parameter.ds_tensor.ds_numel  # this rank's share, the last one padded
            flat = torch.nn.functional.pad(value.flatten(), (0, size * self.world.size - value.numel()))
            mine = flat[size * self.world.rank : size * (self.world.rank + 1)]
            fragments.safe_set_local_optimizer_state(parameter, mine, key)
        elif parameter._hp_mapping is not None:  # None: another rank has all of it
            mapping = parameter._hp_mapping
            whole, mine = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
            flat = self._flat_partition(parameter)
            state = self.optimizer.optimizer.state[flat][key]
            state.narrow(0, whole.start, whole.numel).copy_(value.flatten().narrow(0, mine.start, mine.numel))

    def _flat_partition(self, parameter: nn.Parameter) -> Tensor:
        for group, flat in zip(
            self.optimizer.bit16_groups, self.optimizer.single_partition_of_fp32_groups, strict=True
        ):
            if any(member is parameter for member in group):
                return flat
        raise AssertionError("every trained parameter is in one of ZeRO's groups")

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor on the CPU) of every trained weight in the names of `model.module`; all ranks must iterate."""
        for name, parameter in self.trainable.items():
            if self._stage == 3:
                with _deepspeed().zero.GatheredParameters([parameter]):
                    yield name, parameter.detach().float().cpu().clone()
            else:
                yield name, parameter.detach().float().cpu()


_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's DynamicLossScaler
_OTHER_OPTIMIZER = (
    "--resume: the checkpoint holds the moments of another kind of --optim, 8-bit or 32-bit; expected the one it had"
)
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def _dropout_seed(seed: int, step: int, index: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{index}".encode()).digest()[:8], "little") >> 1


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory; None for a processor, where state is not what runs out."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def peak_memory(device: torch.device) -> int:
    """Bytes: the GPU allocator's peak, or the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 itself, not by emulation."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
