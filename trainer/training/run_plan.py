"""Everything that is decided before the first step: what `--dry-run` prints and run.json keeps."""

import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from trainer.config import reference
from trainer.config.errors import UserError
from trainer.config.schema import COMPILE_FROM, EIGHT_BIT, Settings, why_not_compiled
from trainer.data.dataset import Prepared
from trainer.distributed.deepspeed_config import ZeroFile, choose_zero_file, deepspeed_dict, read_zero_file
from trainer.distributed.frozen_bf16 import holds_halves
from trainer.distributed.memory_estimate import Counts
from trainer.distributed.process_group import World, device_memory, has_bf16
from trainer.distributed.steppers import goes_direct
from trainer.model import optimizer
from trainer.model.build import build, dropouts, load_config, positions
from trainer.training.loop import Course
from trainer.training.text_metrics import check_installed

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "datasets", "bitsandbytes", "wandb", "numpy")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run before it starts."""

    settings: Settings
    world: World
    course: Course
    zero: ZeroFile
    precision: str
    deepspeed: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    dropout: float
    compiled: bool

    @property
    def direct(self) -> bool:
        """Whether gradients go past DeepSpeed's hooks, which this plan does not need."""
        return goes_direct(self.deepspeed, size=self.world.size, precision=self.precision)

    @property
    def recorded(self) -> bool:
        """Whether forward and backward are to be recorded as CUDA graphs."""
        plain = not (self.settings.model.quant or self.settings.engine.checkpoint_activations)
        return self.world.device.type == "cuda" and self.direct and plain

    @property
    def by_blocks(self) -> bool:
        """Whether dropout, and GPT-2's attention with it, are this program's own: on a processor, not compiled."""
        return self.world.device.type == "cpu" and self.dropout > 0 and not self.compiled

    @property
    def in_common(self) -> bool:
        """Whether the ranks of one processor hold weights and moments once and divide the update."""
        float32 = self.precision != "fp16" and self.settings.train.optim not in EIGHT_BIT
        return self.world.is_one_processor and self.zero.stage == 0 and float32

    @property
    def halved(self) -> bool:
        """Whether the frozen base is held in bfloat16."""
        return holds_halves(
            precision=self.precision, stage=self.zero.stage, adapters=self.settings.mode == "lora",
            packed=self.settings.model.quant is not None,
        )  # fmt: skip

    def fuses_adapters(self, stage: int) -> bool:
        """Whether, under a stage of ZeRO, an adapter is one operation with its layer (`trainer.kernels.fused_lora`)."""
        settings, lora = self.settings, self.settings.lora
        plain = lora.adapter != "dora" and not lora.dropout and settings.model.quant is None
        return settings.mode == "lora" and plain and stage < 3 and not self.compiled

    @property
    def shapes(self) -> set[tuple[int, ...]]:
        """Shapes [rows, tokens] of micro-batches that are compiled for; the ragged ends are not."""
        width = self.settings.data.block_size
        return {(self.course.batch.micro, width), (self.settings.train.eval_batch, width)} if self.compiled else set()

    def lines(self) -> list[tuple[str, str]]:
        """The plan as (what, value) for people."""
        model, course, settings = self.model, self.course, self.settings
        train, val = self.data["train"], self.data["val"]
        rows = "blocks" if settings.data.objective == "blocks" else "rows"
        peak = f"{settings.train.lr:g}, linear to 0" + (
            f" after {settings.train.warmup_steps} warm-up steps" if settings.train.warmup_steps else ", no warm-up"
        )
        lines = [
            ("run", f"{settings.run_name} (--mode {settings.mode}, --preset {settings.preset})"),
            ("overridden", " ".join(settings.overridden) or "nothing"),
            ("model", f"{model['name']}, {model['init']}: {model['parameters']:,} parameters"),
            ("trainable", f"{model['trainable']:,} ({100 * model['share']:.2f}%)" + _targets(settings, model)),
            (
                "data",
                f"{self.data['source']}: {train['examples']:,} {rows} of at most {settings.data.block_size} tokens, "
                f"{train['tokens']:,} tokens",
            ),
            (
                "validation",
                f"{val['examples']:,} {rows}, {val['counted_tokens']:,} counted tokens ({self.data['split']})",
            ),
            ("batch", str(course.batch)),
            ("steps", f"{course.steps_per_epoch:,} per epoch, {course.total_steps:,} in all"),
            ("learning rate", peak),
            ("ZeRO file", f"{self.zero.name}: {self.zero.reason}"),
            ("steps run", self._way()),
            ("precision", f"{self.precision} on {self.world.size} x {_device_name(self.world.device)}"),
            ("output", f"{settings.run_folder}"),
        ]
        notes = [*self.data.get("notices", []), *_notes(settings, model)]
        if settings.train.optim == "paged_adamw8bit" and self.world.device.type == "cpu":
            notes.append("paged_adamw8bit: on a processor nothing is paged; the same as adamw8bit")
        return lines + [("note", notice) for notice in notes]

    def as_json(self, *, run_id: str, wandb: dict[str, Any]) -> dict[str, Any]:
        """The content of run.json."""
        settings = self.settings
        return {
            "format": 1,
            "run_id": run_id,
            "name": settings.run_name,
            "mode": settings.mode,
            "preset": settings.preset,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "settings": settings.as_dict(),
            "overridden": list(settings.overridden),
            "resolved": self.resolved(),
            "deepspeed": self.deepspeed,
            "data": self.data,
            "model": self.model,
            "not_comparable_with_card": self.not_comparable(),
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
            "git": _git(),
            "hardware": _hardware(self.world),
            "wandb": wandb,
        }

    def _way(self) -> str:
        way = "directly, past DeepSpeed's hooks" if self.direct else "through DeepSpeed"
        way += ", compiled" * self.compiled + ", recorded as CUDA graphs" * self.recorded
        way += ", state in common" * self.in_common
        way += ", adapters fused with their layers" * self.fuses_adapters(self.zero.stage)
        return way + ", dropout by blocks" * self.by_blocks + ", the frozen base in bfloat16" * self.halved

    def resolved(self) -> dict[str, Any]:
        """What was derived or chosen."""
        world, course, settings = self.world, self.course, self.settings
        return {
            "lr": settings.train.lr,
            "precision": self.precision,
            "ds_config": self.zero.name,
            "ds_reason": self.zero.reason,
            "ranks": world.size,
            "nodes": world.nodes,
            "device": world.device.type,
            "backend": "nccl" if world.device.type == "cuda" else "gloo",
            "threads_per_rank": world.threads,
            "micro_batch": course.batch.micro,
            "accumulation": course.batch.accumulation,
            "global_batch": course.batch.global_batch,
            "steps_per_epoch": course.steps_per_epoch,
            "total_steps": course.total_steps,
            "dropout": self.dropout,
            "direct": self.direct,
            "compiled": self.compiled,
            "recorded": self.recorded,
            "state_in_common": self.in_common,
            "adapters_fused": self.fuses_adapters(self.zero.stage),
            "dropout_by_blocks": self.by_blocks,
            "base_in_bf16": self.halved,
        }

    def not_comparable(self) -> list[str]:
        """Why the losses cannot be held against the card's."""
        return reference.why_not_comparable(
            data=self.data["source"], vocabulary=self.data["vocabulary"], block_size=self.settings.data.block_size,
            objective=self.settings.data.objective, model=self.settings.model.model,
            examples=self.data["train"]["examples"],
        )  # fmt: skip


def check_early(settings: Settings, world: World) -> None:
    """What can be refused before data and weights are touched: batch sum, ZeRO file, device, targets, output."""
    settings.train.batch(world.size)
    _check_writable(Path(settings.run_folder))
    optimizer.refuse_early(settings.train, stage=None, on_cpu=world.device.type == "cpu")
    if settings.output.metrics:
        check_installed()
    if settings.engine.precision == "fp16" and world.device.type == "cpu":
        raise UserError("--precision fp16: processors do not compute in it; use fp32 or bf16")
    if settings.engine.ds_config is not None:
        zero = read_zero_file(settings.engine.ds_config)
        _refuse_stage(settings, zero)
        if zero.stage == 0 and settings.engine.precision == "fp16":
            raise UserError("--precision fp16 needs ZeRO 1 or more for its loss scale; use --ds-config zero1, or bf16")
    limit = positions(load_config(settings.model))
    if limit is not None and settings.data.block_size > limit:
        raise UserError(f"--block-size {settings.data.block_size}: {settings.model.model} takes at most {limit} tokens")
    if settings.mode == "lora":
        build(settings, on_meta=True)  # its targets and ranks are checked there, without weights


def _check_writable(folder: Path) -> None:
    """UserError where nothing can be written to the run folder, or to the nearest folder above it that is there."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryDirectory(prefix=".writable-", dir=place).cleanup()
    except OSError as problem:
        raise UserError(
            f"{folder}: cannot write there: {problem.strerror}; name another folder with --out"
        ) from problem


def _refuse_stage(settings: Settings, zero: ZeroFile) -> None:
    """UserError where what is trained gives wrong numbers, or none, under this ZeRO stage."""
    optimizer.refuse_early(settings.train, stage=zero.stage, on_cpu=False)
    if zero.stage == 3 and settings.engine.compile == "on":
        raise UserError(
            "--compile on: not under ZeRO 3, which brings each layer's weights together by hooks; expected zero0, "
            "zero1 or zero2"
        )
    if zero.stage == 3 and settings.model.quant and settings.lora.adapter == "dora":
        raise UserError(
            f"--quant {settings.model.quant}: dora reads whole packed weights, which ZeRO 3 has divided; expected "
            "--ds-config zero0, zero1 or zero2, or another --adapter"
        )
    if zero.stage == 3 and settings.model.quant == "int8":
        raise UserError(
            "--quant int8: not under ZeRO 3: bitsandbytes keeps a whole copy of each weight beside what ZeRO divides; "
            "expected --ds-config zero0, zero1 or zero2, or --quant nf4"
        )


def _zero_file(settings: Settings, world: World, model: dict[str, Any], precision: str) -> ZeroFile:
    if settings.engine.ds_config:
        return read_zero_file(settings.engine.ds_config)
    if settings.train.optim in EIGHT_BIT:
        return read_zero_file("zero0", f"--optim {settings.train.optim} is not divided")
    return choose_zero_file(
        counts=Counts.of(model), ranks=world.size, memory=device_memory(world.device), precision=precision,
        in_common=world.is_one_processor,
    )  # fmt: skip


def make_plan(settings: Settings, world: World, data: Prepared, model: dict[str, Any], config: Any) -> Plan:
    """The plan of a run, from its settings, its data and its model's facts (`trainer.model.build`)."""
    vocabulary = data.facts["vocabulary"]
    if vocabulary > config.vocab_size:
        raise UserError(
            f"--model {settings.model.model}: it has {config.vocab_size:,} token ids, the data uses up to "
            f"{vocabulary:,}; pass a model that goes with the tokenizer"
        )
    batch = settings.train.batch(world.size)
    precision = settings.engine.precision or ("bf16" if has_bf16(world.device) else "fp32")
    zero = _zero_file(settings, world, model, precision)
    _refuse_stage(settings, zero)
    examples = len(data.train)
    course = Course(
        settings=settings, batch=batch, total_steps=settings.train.total_steps(examples),
        steps_per_epoch=settings.train.steps_per_epoch(examples),
    )  # fmt: skip
    return Plan(
        settings=settings, world=world, course=course, zero=zero, precision=precision,
        compiled=_compiled(settings, world, course, zero),
        deepspeed=deepspeed_dict(zero, batch=batch, clip=settings.train.clip, precision=precision),
        model=model, data=data.facts, dropout=max(dropouts(config).values(), default=0.0),
    )  # fmt: skip


def _compiled(settings: Settings, world: World, course: Course, zero: ZeroFile) -> bool:
    """Whether steps are compiled: where that was asked for, or in a run on a GPU that is long enough."""
    if settings.engine.compile == "off" or why_not_compiled(settings) or zero.stage == 3:
        return False
    tokens = course.total_steps * course.batch.global_batch // world.size * settings.data.block_size
    return settings.engine.compile == "on" or (world.device.type == "cuda" and tokens >= COMPILE_FROM)


def _targets(settings: Settings, model: dict[str, Any]) -> str:
    if not model["lora_targets"]:
        return ", every weight"
    kind = "" if settings.lora.adapter == "lora" else f"{settings.lora.adapter} "
    also = f", and {', '.join(settings.lora.train_also)}" if settings.lora.train_also else ""
    return f", {kind}adapters on {', '.join(model['lora_targets'])}{also}"


def _notes(settings: Settings, model: dict[str, Any]) -> list[str]:
    """What the adapters, the packing and the optimizer mean for this model, where that is worth a line."""
    notes = []
    idle = [flag for flag in settings.overridden if flag.startswith("--lora-")] if settings.mode == "full" else []
    if idle:
        notes.append(f"{', '.join(idle)}: of no effect with --mode full")
    if settings.mode == "lora" and settings.lora.plus_ratio != 1:
        notes.append(f"LoRA+: B matrices learn at {settings.lora.plus_ratio:g} times the learning rate")
    if settings.model.quant:
        double = ", scales in 8 bits" if settings.model.quant_double else ""
        notes.append(
            f"base in {settings.model.quant}{double}: {model['frozen_bytes'] / 2**20:,.1f} MiB of frozen weights; "
            f"in float32 {model['parameters'] / 2**18:,.1f} MiB"
        )
    kept = model.get("kept_in_32_bits")
    if kept and kept["kept_tensors"]:
        share = kept["kept_parameters"] / kept["parameters"]
        notes.append(
            f"{settings.train.optim}: {kept['kept_tensors']} of {kept['tensors']} trained tensors ({share:.0%} of the "
            f"parameters) are embeddings or under {optimizer.SMALLEST:,} elements: their moments stay in 32 bits and "
            "nothing is saved"
        )
    return notes


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the code that runs, and whether it was changed since; None outside a checkout."""
    here = Path(__file__).parents[1]

    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        return {"commit": ask("rev-parse", "HEAD").strip(), "dirty": bool(ask("status", "--porcelain").strip())}
    except (OSError, subprocess.SubprocessError):
        return None


def _hardware(world: World) -> dict[str, Any]:
    gpu = world.device.type == "cuda"
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name(world.device) if gpu else None,
        "gpus": world.size if gpu else 0,
        "gpus_here": torch.cuda.device_count(),
    }


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
