"""Everything that is decided or refused before the first step: what `--dry-run` prints and run.json keeps."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from trainer.config import reference
from trainer.config.choices import DEMO_DATA, DEMO_MODEL, EIGHT_BIT_OPTIMIZERS
from trainer.config.cli import to_argv
from trainer.config.errors import UserError
from trainer.config.files import require_place_for_folder
from trainer.config.run_metadata import SCHEMA_VERSION
from trainer.config.settings import Settings
from trainer.config.text import shorten
from trainer.data import hf_hub
from trainer.data.dataset import PreparedDataset
from trainer.data.sources import refuse_missing_files
from trainer.data.tokenizer import find_model
from trainer.distributed.deepspeed_config import DeepSpeedFile, build_deepspeed_config, read_deepspeed_file
from trainer.distributed.execution import ExecutionPlan, make_execution_plan
from trainer.distributed.memory import MemoryEstimate, choose_deepspeed_file, estimate_rank_memory, required_bytes
from trainer.distributed.process_group import DistContext, config_digest, package_version
from trainer.model.build import TrainableModel, build_model, get_dropout_probabilities, get_max_positions, load_config
from trainer.model.model_files import describe_bf16_ties, measure_bf16_ties
from trainer.training.schedule import TrainSchedule, describe_schedule
from trainer.training.scorers import check_scorers

OBJECTIVES = {
    "blocks": "blocks: loss on every token, records joined and cut",
    "completion": "completion: loss on completions (of chats the assistant's turns), one record a row",
}
#: line of the plan -> how the flags begin from which its value follows
FLAGS_OF_LINES = {
    "model": "--model --init --quant --dropout",
    "trainable": "--lora- --adapter --modules-to-save --peft-config",
    "data": "--data --block-size --max-samples",
    "mixture": "--data",
    "validation": "--val- --split-by",
    "test": "--test-",
    "format": "--prompt --completion --chat-template",
    "objective": "--objective --prompt --completion",
    "batch": "--global-batch --micro-batch --packing",
    "steps": "--epochs --max-steps --global-batch",
    "learning rate": "--lr --schedule --warmup- --min-lr",
    "scores": "--score",
    "precision": "--precision",
    "ZeRO file": "--ds-config",
    "execution": "--execution --activation-checkpointing",
    "output": "--output-dir --run-name",
}
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "datasets", "bitsandbytes", "wandb", "numpy")
WARNING = "warning: "  # how a note begins that a user must not miss


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run before it starts."""

    settings: Settings
    dist_context: DistContext
    schedule: TrainSchedule
    deepspeed_file: DeepSpeedFile
    deepspeed_config: dict[str, Any]
    execution: ExecutionPlan
    model_info: dict[str, Any]
    data_info: dict[str, Any]
    dropout: float  #: the largest dropout probability of the base model
    #: of a rank under a ZeRO file; with another `row_length` or `micro_batch_size` where these are passed
    estimate_memory: Callable[..., MemoryEstimate]
    spellings: tuple[str, ...] = ()  #: what flags of other programs were taken for
    host_lines: tuple[tuple[str, str], ...] = ()  #: what there is to say of several hosts, (what, value)

    @property
    def precision(self) -> str:
        return self.execution.precision

    def summary_lines(self) -> list[tuple[str, str]]:
        return [line for _, lines in self.sections() for line in lines]

    def set_by_user(self) -> set[str]:
        """The lines of the plan whose value follows from a flag that the user gave."""
        flags = self.settings.overridden
        return {
            key for key, starts in FLAGS_OF_LINES.items() if any(f.startswith(tuple(starts.split())) for f in flags)
        }

    def sections(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """(heading, (what, value) lines) of the plan for people: what is trained, on what, how and where; notes."""
        model_info, data_info, schedule, settings = self.model_info, self.data_info, self.schedule, self.settings
        train, unit = data_info["train"], "blocks" if data_info["objective"] == "blocks" else "examples"

        def describe_split(split: str) -> str:
            counts, num_seen = data_info[split], data_info["num_seen"].get(split)
            text = f"{counts['examples']:,} {unit}"
            text += f" ({num_seen:,} of {counts['records']:,} records are not new)" if num_seen else ""
            text += f", {counts['num_target_tokens']:,} target tokens"
            fraction = {"val": settings.data.val_fraction, "test": settings.data.test_fraction}.get(split, 0.0)
            is_split_off = data_info["split"] != "given" if split == "val" else fraction
            return text + (f" ({fraction:.3g} of the records, split off by hash)" if is_split_off else "")

        model_name = model_info["name"] + (f" on {model_info['base']}" if "base" in model_info else "")
        trained = "every weight"
        if model_info["lora_targets"]:
            adapter = "" if settings.lora.kind == "lora" else f"{settings.lora.kind} "
            also = "".join(f", and {name}" for name in settings.lora.modules_to_save)
            trained = f"{adapter}adapters on {', '.join(model_info['lora_targets'])}{also}"
        rows = f"{train['examples']:,} {unit} of at most {settings.data.block_size} tokens, {train['tokens']:,} tokens"
        lr_shape = describe_schedule(
            settings.train.schedule, min_lr=settings.train.min_lr, warmup_steps=schedule.num_warmup_steps
        )
        words = to_argv(settings, {})[4:]  # behind mode and preset
        run = [
            ("run", f"{settings.run_name} (--mode {settings.mode}, --preset {settings.preset})"),
            ("you set (*)", shlex.join(shorten(word, 60) for word in words) or "nothing"),
        ]
        run += [("spellings", "; ".join(self.spellings))] if self.spellings else []
        model = [
            ("model", f"{model_name}, {model_info['init']}: {model_info['parameters']:,} parameters"),
            ("trainable", f"{model_info['trainable']:,} ({100 * model_info['share']:.2f}%), {trained}"),
        ]
        splits = [("validation", describe_split("val"))]
        splits += [("validation", f"{name}: {describe_split(f'val-{name}')}") for name in data_info["val_sets"]]
        splits += [("test", describe_split("test"))] if data_info.get("test", {}).get("examples") else []
        data = [
            ("data", f"{data_info['source']}: {rows}, fingerprint {data_info['fingerprint'][:12]}"),
            *splits,
            ("format", f"{data_info['form']}: {data_info['form_meaning']}"),
            ("objective", OBJECTIVES[data_info["objective"]]),
            ("example", f"{data_info['example']} (⟦ ⟧ around target tokens)"),
        ]
        for part in data_info["mixture"]:
            passes = part["share"] * train["examples"] / part["examples"]
            text = f"{part['share']:.3g} of the examples from {part['source']}, {part['examples']:,} {unit}"
            data.append(("mixture", f"{text}: {passes:.3g} passes over them an epoch"))
        training = [
            ("batch", str(schedule.batch)),
            ("steps", f"{schedule.steps_per_epoch:,} per epoch, {schedule.total_steps:,} in all"),
            ("learning rate", f"{settings.train.lr:g}, {lr_shape}"),
        ]
        device = self.dist_context.devices[self.dist_context.rank]
        if settings.output.score and settings.output.export != "none":
            names = ", ".join(settings.output.score)
            training.append(("scores", f"{names} of a greedy text for each test record, at the end"))
        machine = [
            ("precision", f"{self.precision} on {self.dist_context.world_size} x {device['name']}"),
            ("ZeRO file", f"{self.deepspeed_file.name}: {self.deepspeed_file.reason}"),
            ("execution", self.execution.describe()),
            *([("hosts", self.dist_context.describe_hosts())] if self.dist_context.world_size > 1 else []),
            *self.host_lines,
            ("output", f"{settings.run_folder}"),
        ]
        notes = [*data_info.get("notices", []), *collect_notes(settings, model_info)]
        warnings = [note.removeprefix(WARNING) for note in notes if note.startswith(WARNING)]
        return [
            ("", run),
            ("What is trained", model),
            ("On what", data),
            ("How", training),
            ("Where", machine),
            ("Notes", [("note", n) for n in notes if not n.startswith(WARNING)]),
            ("Warnings", [("warning", warning) for warning in warnings]),
        ]

    def to_metadata(self, *, run_id: str, wandb: dict[str, Any]) -> dict[str, Any]:
        settings = self.settings
        return {
            "schema_version": SCHEMA_VERSION,
            "run_id": run_id,
            "name": settings.run_name,
            "mode": settings.mode,
            "preset": settings.preset,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "settings": settings.as_dict(),
            "overridden": list(settings.overridden),
            "resolved": self.resolved(),
            "execution": [self.execution.as_entry(0, "as planned")],
            "deepspeed": self.deepspeed_config,
            "data": self.data_info,
            "model": self.model_info,
            "not_comparable_with_card": self.incomparable_reasons,
            "versions": package_versions(),
            "git": git_state(),
            "hardware": describe_hardware(self.dist_context),
            "wandb": wandb,
        }

    def checkpoint_identity(self) -> dict[str, Any]:
        """Of which model, data and settings a checkpoint is the state, and on what its loss was computed."""
        return {
            "base": self.model_info["fingerprint"],
            "data": self.data_info["fingerprint"],
            "fixed": {**self.settings.fixed_on_resume(), "model_config": self.model_info["config"]},
            "precision": self.precision,
            "device": self.dist_context.device.type,
        }

    def resolved(self) -> dict[str, Any]:
        dist_context, schedule, settings = self.dist_context, self.schedule, self.settings
        return {
            "lr": settings.train.lr,
            "precision": self.precision,
            "ds_config": self.deepspeed_file.name,
            "ds_reason": self.deepspeed_file.reason,
            "ranks": dist_context.world_size,
            "nodes": dist_context.num_nodes,
            "device": dist_context.device.type,
            "threads_per_rank": dist_context.num_threads,
            "micro_batch": schedule.batch.micro_batch_size,
            "accumulation": schedule.batch.gradient_accumulation_steps,
            "global_batch": schedule.batch.global_batch,
            "steps_per_epoch": schedule.steps_per_epoch,
            "total_steps": schedule.total_steps,
            "warmup_steps": schedule.num_warmup_steps,
            "dropout": self.dropout,
        }

    @property
    def incomparable_reasons(self) -> list[str]:
        return [*reference.disagreements(self.data_info, self.model_info), reference.UNKNOWN_REASON]


def validate_early(settings: Settings, dist_context: DistContext) -> None:
    """Refuse what is wrong with batch sum, ZeRO file, device, targets or output before data and weights are touched."""
    engine, on_cpu = settings.engine, dist_context.device.type == "cpu"
    settings.train.batch(dist_context.world_size)
    require_place_for_folder(Path(settings.run_folder), f"--output-dir {settings.run_folder}")
    if settings.output.export != "none":  # else no test record is looked at
        check_scorers(settings.output.score)
    if engine.execution == "graphs" and on_cpu:
        raise UserError("--execution graphs: CUDA graphs need a GPU; expected auto or eager")
    if engine.precision == "fp16" and on_cpu:
        raise UserError("--precision fp16: not supported on a CPU; use fp32 or bf16")
    if engine.ds_config is not None:
        validate_stage(settings, read_deepspeed_file(engine.ds_config))
    if not Path(find_model(settings.model.model).path).exists():  # a missing file is said before the Hub is asked
        refuse_missing_files(settings.data)
    block_size, max_positions = settings.data.block_size, get_max_positions(load_config(settings.model))
    if max_positions is not None and block_size > max_positions:
        raise UserError(f"--block-size {block_size}: {settings.model.model} takes at most {max_positions} tokens")
    build_model(settings, on_meta=True)  # what cannot be built, and targets and ranks, without reading weights


def validate_stage(settings: Settings, deepspeed_file: DeepSpeedFile) -> None:
    """UserError where what is trained gives wrong numbers, or none, under this ZeRO stage."""
    stage, engine, optim = deepspeed_file.stage, settings.engine, settings.train.optim
    packed = f"--quant {settings.model.quant}" + " --adapter dora" * (settings.lora.adapter == "dora")
    rules = (  # ZeRO joins all tensors and cuts them by rank, and so the 8-bit blocks
        (stage > 0 and optim in EIGHT_BIT_OPTIMIZERS, f"--optim {optim}: would depend on the number of ranks", "zero0"),
        (stage > 0 and engine.execution == "graphs", "--execution graphs: its steps are eager", "zero0"),
        (stage == 0 and engine.precision == "fp16", "--precision fp16: has no loss scale", "zero1 to zero3"),
        (stage == 3 and _needs_whole_weights(settings), f"{packed}: needs whole weights", "zero0, zero1 or zero2"),
    )
    for is_refused, problem, expected in rules:
        if is_refused:
            raise UserError(f"{problem} under ZeRO {stage}; expected --ds-config {expected}")


def _needs_whole_weights(settings: Settings) -> bool:
    """bitsandbytes keeps a whole copy of each int8 weight, and dora reads whole packed ones."""
    return settings.model.quant == "int8" or bool(settings.model.quant and settings.lora.adapter == "dora")


def make_plan(settings: Settings, dist_context: DistContext, data: PreparedDataset) -> RunPlan:
    """The plan of a run, from its settings, its data and its model without weights."""
    model_config, model_info = load_config(settings.model), build_model(settings, on_meta=True).metadata
    objective, block_size = data.metadata["objective"], settings.data.block_size or data.metadata["block_size"]
    settings = replace(settings, data=replace(settings.data, objective=objective, block_size=block_size))
    vocab_size = data.metadata["vocabulary"]
    if vocab_size > model_config.vocab_size:
        raise UserError(
            f"--model {settings.model.model}: it has {model_config.vocab_size:,} token ids, the data uses up to "
            f"{vocab_size:,}; pass a model that goes with the tokenizer"
        )
    batch = settings.train.batch(dist_context.world_size)
    if settings.data.packing:
        if objective != "completion":
            raise UserError("--packing: blocks are full already; expected --objective completion, or chat")
        batch = replace(batch, packed_width=block_size)
    # What depends on the machine is chosen by rank 0, from the least of all devices.
    least = "bf16" if all(device["bf16"] for device in dist_context.devices) else "fp32"
    precision = dist_context.on_rank_zero(lambda: settings.engine.precision or least)
    dropout = max(get_dropout_probabilities(model_config).values(), default=0.0)

    estimate_memory = partial(
        estimate_rank_memory,
        settings,
        dist_context,
        model_info,
        precision=precision,
        row_length=int(data.train.lengths().max()),
        micro_batch_size=batch.micro_batch_size,
    )

    def decide() -> tuple[DeepSpeedFile, ExecutionPlan]:
        if settings.engine.ds_config:
            file = read_deepspeed_file(settings.engine.ds_config)
        elif settings.train.optim in EIGHT_BIT_OPTIMIZERS or settings.engine.execution == "graphs":
            file = read_deepspeed_file("zero0", "8-bit optimizers and --execution graphs need it")
        else:
            file = choose_deepspeed_file(
                model_info=model_info,
                world_size=dist_context.world_size,
                device_memory_bytes=dist_context.least_memory_bytes(),
                precision=precision,
                estimate_bytes=lambda file: required_bytes(estimate_memory(file), model_info, dist_context.device)[0],
                stages=range(3 if _needs_whole_weights(settings) else 4),
            )
        validate_stage(settings, file)
        return file, make_execution_plan(
            settings, dist_context, stage=file.stage, precision=precision, model_dropout=dropout
        )

    if precision == "bf16" and settings.model.init == "pretrained":
        folder = hf_hub.find_model_folder(find_model(settings.model.model).path)
        model_info = {**model_info, "bf16_ties": dist_context.on_rank_zero(lambda: measure_bf16_ties(folder))}
    deepspeed_file, execution = dist_context.on_rank_zero(decide)
    schedule = TrainSchedule(
        settings=settings,
        batch=batch,
        num_examples=len(data.train),
        total_steps=settings.train.total_steps(len(data.train)),
        steps_per_epoch=settings.train.steps_per_epoch(len(data.train)),
    )
    return RunPlan(
        settings=settings,
        dist_context=dist_context,
        deepspeed_file=deepspeed_file,
        schedule=schedule,
        deepspeed_config=build_deepspeed_config(
            deepspeed_file, batch=batch, max_grad_norm=settings.train.max_grad_norm, precision=precision
        ),
        execution=execution,
        model_info={**model_info, "config": config_digest(load_config(replace(settings.model, dropout=None)))},
        data_info=data.metadata,
        dropout=dropout,
        estimate_memory=estimate_memory,
    )


def build_planned_model(plan: RunPlan, *, with_fingerprint: bool = False) -> TrainableModel:
    """The model of a plan with its weights: under ZeRO 3 on the first rank of each host alone, as DeepSpeed sends the
    others their shares. A packed base is each rank's own."""
    context, settings = plan.dist_context, plan.settings
    return build_model(
        settings,
        with_fingerprint=with_fingerprint and context.local_rank == 0,
        device=context.device,
        as_stored=True,
        with_values=plan.deepspeed_file.stage < 3 or context.local_rank == 0 or settings.model.quant is not None,
    )


def collect_notes(settings: Settings, model_info: dict[str, Any]) -> list[str]:
    """What the settings mean for this model and its data, where that is worth a line."""
    notes, model, flags, preset = [], settings.model.model, settings.overridden, settings.preset
    if preset in ("gpt2", "finetune", "demo") and model != DEMO_MODEL and "--lr" not in flags:
        advice = f"of --preset {preset}, a guess for your data; launch/study.py compares several"
        notes.append(f"learning rate {settings.train.lr:g}: {advice}")
    if model == DEMO_MODEL and settings.data.data != DEMO_DATA and "--model" not in flags:
        notes.append(f"--preset demo trains {DEMO_MODEL}, the embedded toy, on your data; expected --model gpt2")
    if settings.mode == "full" and settings.train.weight_decay:
        notes.append("weight decay acts on every trained weight; transformers leaves biases and norms out")
    if settings.mode == "full" and (ignored := [flag for flag in flags if flag.startswith("--lora-")]):
        notes.append(f"{', '.join(ignored)}: ignored with --mode full")
    if settings.output.score and settings.output.export == "none":
        notes.append("--score: ignored with --export none, which leaves the test records unseen")
    if ties := describe_bf16_ties(model_info.get("bf16_ties", 0.0)):
        notes.append(WARNING + ties)
    return notes


def package_versions() -> dict[str, str | None]:
    return {"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}}


def git_state() -> dict[str, Any] | None:
    """Commit of the code that runs, and whether it was changed since; None outside a checkout."""
    options: Any = {"cwd": Path(__file__).parent, "stderr": subprocess.DEVNULL, "timeout": 10, "text": True}
    try:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], **options).strip()
        return {"commit": commit, "dirty": bool(subprocess.check_output(["git", "status", "--porcelain"], **options))}
    except (OSError, subprocess.SubprocessError):
        return None


def describe_hardware(dist_context: DistContext) -> dict[str, Any]:
    is_gpu = dist_context.device.type == "cuda"
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": dist_context.devices[dist_context.rank]["name"] if is_gpu else None,
        "gpus": dist_context.world_size if is_gpu else 0,
    }


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
