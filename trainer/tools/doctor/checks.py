"""What the doctor looks at before anything runs: this machine, the prepared rows, the plan, and its memory."""

import contextlib
import math
import os
import platform
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from trainer.config.choices import DS_CONFIG_NAMES
from trainer.config.settings import Settings
from trainer.config.text import list_some
from trainer.data.dataset import PreparedDataset
from trainer.distributed.deepspeed_config import read_deepspeed_file
from trainer.distributed.launch_environment import FORWARDED_PREFIXES
from trainer.distributed.memory import required_bytes
from trainer.distributed.preflight import package_version
from trainer.distributed.process_group import find_free_port, forwarded_env_prefixes
from trainer.model.build import TrainableModel
from trainer.training.run_plan import RunPlan

OK, WARNING, ERROR = LEVELS = ("ok", "warning", "error")

DISTRIBUTION = "gpt2-full-vs-lora"
LAUNCHER_PORT = 29500  # of `deepspeed` and `torchrun`, where none is named
SHARED_MEMORY = Path("/dev/shm")
MIN_SHM_BYTES = 2**30  # NCCL's buffers between the GPUs of one machine, some 10 MB a pair
HOSTFILE = Path("/job/hostfile")  # DeepSpeed's default: where it is, `deepspeed` starts on several machines

MIN_VAL_EXAMPLES, MIN_VAL_TOKENS = 30, 5_000  # of validation; fewer, and chance moves its loss
MAX_DROPPED_SHARE = 0.01  # of the records
MAX_SHARED_SHARE = 0.01  # of the validation records, that also stand in the training data
MAX_REPEATED_SHARE = 0.1  # of the training texts
MIN_TARGET_SHARE = 0.1  # of the training tokens
MAX_UNSEEN_SHARE = 0.01  # of the validation tokens, whose id the training data never show
MAX_TOKENS_SCANNED = 5 * 10**7  # enough to tell, and seconds

MIN_STEPS = 20  # in all; fewer say nothing of a learning rate
MANY_ACCUMULATION_STEPS = 8  # of one or two rows each: the device has little to do at a time
TIGHT_SHARE = 0.9  # of the memory; above it the allocator's gaps may not fit


class Check(NamedTuple):
    """One thing that was looked at; `remedy` is empty where there is nothing to do."""

    level: str
    name: str
    message: str
    remedy: str = ""


def judge(is_bad: bool, level: str, name: str, message: str, remedy: str) -> Check:
    """`level` with its remedy where it is bad, else ok without."""
    return Check(level, name, message, remedy) if is_bad else Check(OK, name, message)


def format_bytes(num_bytes: float) -> str:
    """Bytes for people: 812 MiB, 3.4 GiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


# --- environment ---


def check_environment(world_size: int, environ: Mapping[str, str]) -> Iterator[Check]:
    """`world_size`: ranks of this machine; `environ`: as the user set it."""
    try:
        package = metadata.metadata(DISTRIBUTION)
        yield from check_packages(str(package["Requires-Python"] or ""), metadata.requires(DISTRIBUTION) or [])
    except metadata.PackageNotFoundError:
        message = f"{DISTRIBUTION} is not installed, so its supported versions are unknown"
        yield Check(WARNING, "packages", message, "pip install -e . in its folder")
    yield from check_devices(world_size)
    if SHARED_MEMORY.is_dir():  # through which NCCL's ranks of one machine talk
        free_bytes = shutil.disk_usage(SHARED_MEMORY).free
        is_short = world_size > 1 and torch.cuda.is_available() and free_bytes < MIN_SHM_BYTES
        remedy = "docker run --shm-size=2g (or --ipc=host)"
        yield judge(is_short, WARNING, "/dev/shm", f"{format_bytes(free_bytes)} free", remedy)
    yield check_port(LAUNCHER_PORT)
    if host := environ.get("MASTER_ADDR"):
        yield check_master_address(host)
    yield check_threads(world_size)
    if HOSTFILE.exists():
        yield check_forwarded_variables(environ)


def check_packages(python_range: str, requirements: Iterable[str]) -> Iterator[Check]:
    """Whether each package is there, in the range that this program was installed with."""
    if platform.python_version() not in SpecifierSet(python_range):
        message = f"{platform.python_version()}, supported is {python_range}"
        yield Check(ERROR, "Python", message, "make a virtual environment with such a Python")
    satisfied = [f"Python {platform.python_version()}"]
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, specifier = requirement.name, requirement.specifier
        version = package_version(name)
        if version is not None and specifier.contains(version, prereleases=True):
            satisfied.append(f"{name} {version}")
        else:
            message = f"{version or 'missing'}, supported is {specifier or 'any'}"
            yield Check(ERROR, name, message, f"pip install '{name}{specifier}'")
    yield Check(OK, "packages", f"{list_some(satisfied, 20)}: in the supported ranges")


def check_devices(world_size: int) -> Iterator[Check]:
    """GPUs, whether each rank has one and all are alike, bf16, and what the ranks would communicate with."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus:
        gpus = [torch.cuda.get_device_properties(number) for number in range(num_gpus)]
        names = list_some((f"{gpu.name} {format_bytes(gpu.total_memory)}" for gpu in gpus), 6)
        remedy = f"start at most {num_gpus}: deepspeed --num_gpus {num_gpus}"
        yield judge(world_size > num_gpus, ERROR, "GPUs", f"{names} for {world_size} ranks", remedy)
        if len({(gpu.name, gpu.total_memory) for gpu in gpus[:world_size]}) > 1:
            message = "they are not alike: each step waits for the slowest"
            yield Check(WARNING, "GPUs", message, "choose equal ones with CUDA_VISIBLE_DEVICES")
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        message = f"{gpus[0].name} {'supports it' if has_bf16 else 'does not support it: fp32, much slower'}"
        yield judge(not has_bf16, WARNING, "bf16", message, "--precision fp16 --ds-config zero1, or a newer GPU")
    else:
        has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
        problem = "torch sees none though a driver is there" if has_driver else "none"
        is_bad = has_driver and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
        message = f"{problem}: runs on {len(os.sched_getaffinity(0))} processor cores"
        remedy = "install the CUDA build of torch that the driver takes (nvidia-smi names the newest)"
        yield judge(is_bad, WARNING, "GPUs", message, remedy)
    has_backend = {"nccl": dist.is_nccl_available() or not num_gpus, "gloo": dist.is_gloo_available()}
    missing = [name for name, is_available in has_backend.items() if not is_available]
    nccl = f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))} and " if num_gpus and not missing else ""
    level = ERROR if world_size > 1 or "gloo" in missing else WARNING
    message = f"this torch has no {', '.join(missing)}" if missing else f"{nccl}gloo"
    yield judge(bool(missing), level, "backends", message, "install a torch with it (the official wheels have it)")


def check_port(port: int) -> Check:
    """Whether the port that the launchers take where none is named is free."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
            return Check(OK, "port", f"{port} is free")
        except OSError:
            remedy = f"deepspeed --master_port {find_free_port()} ... (it ignores MASTER_PORT in the environment)"
    return Check(WARNING, "port", f"{port}, the launchers' default, is in use", remedy)


def check_master_address(host: str) -> Check:
    """Whether the host at which the ranks would meet has an address."""
    try:
        socket.getaddrinfo(host, None)
        return Check(OK, "MASTER_ADDR", f"{host} has an address")
    except OSError as error:
        message = f"{host}: {error.strerror or error}"
        return Check(ERROR, "MASTER_ADDR", message, "unset it, or name the first machine of the run")


def check_threads(world_size: int) -> Check:
    """Threads of all ranks against the cores there are."""
    num_cores, omp_num_threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS", "")
    share = max(1, num_cores // world_size)
    threads_per_rank = int(omp_num_threads) if omp_num_threads.isdigit() else share
    num_threads = threads_per_rank * world_size
    message = f"{threads_per_rank} a rank x {world_size} = {num_threads} on {num_cores} cores"
    remedy = f"OMP_NUM_THREADS={share}" if world_size <= num_cores else f"at most {num_cores} ranks on a processor"
    return judge(num_threads > num_cores, WARNING, "threads", message, remedy)


def check_forwarded_variables(environ: Mapping[str, str]) -> Check:
    """Variables set here that `deepspeed` would not hand to other machines; names only, their values may be secret."""
    in_files: set[str] = set()
    for path in (Path.home() / ".deepspeed_env", Path(".deepspeed_env")):
        with contextlib.suppress(OSError):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
            in_files |= {line.split("=", 1)[0].strip() for line in lines if "=" in line}
    needed = sorted(name for name in environ if name.startswith(FORWARDED_PREFIXES))
    forwarded = forwarded_env_prefixes()
    names = [name for name in needed if not name.startswith(forwarded) and name not in in_files]
    if not names:
        return Check(OK, "variables", "none is set that other machines would miss")
    message = f"not forwarded to other machines: {list_some(names, 6)}"
    remedy = "start with what launch/cluster.py --hosts writes, or put such lines into ~/.deepspeed_env: "
    return Check(WARNING, "variables", message, remedy + list_some((f"{name}=..." for name in names), 20))


# --- data ---


def check_data(settings: Settings, data: PreparedDataset) -> Iterator[Check]:
    """Counts, lengths, what was left out, what stands on both sides, what is masked, what training never shows."""
    train, val = data.metadata["train"], data.metadata["val"]
    is_small = val["examples"] < MIN_VAL_EXAMPLES or val["num_target_tokens"] < MIN_VAL_TOKENS
    message = "{records:,} records, {examples:,} examples, {num_target_tokens:,} target tokens".format(**val)
    remedy = f"under {MIN_VAL_EXAMPLES} examples or {MIN_VAL_TOKENS:,} tokens chance decides: "
    yield judge(is_small, WARNING, "validation", message, remedy + "raise --val-fraction or give --val-data")
    if settings.data.objective != "blocks":
        quantiles = np.quantile(data.train.lengths(), [0, 0.5, 0.95, 1], method="nearest")
        yield Check(OK, "lengths", "shortest {}, median {}, 95% within {}, longest {} tokens".format(*quantiles))
        for split, info in (("train", train), ("val", val)):
            if num_dropped := info["records"] - info["examples"]:
                share = num_dropped / info["records"]
                message = f"{split}: {num_dropped:,} of {info['records']:,} records ({share:.1%}) are longer than "
                message += f"{settings.data.block_size} tokens and left out"
                yield judge(share > MAX_DROPPED_SHARE, WARNING, "too long", message, "raise --block-size")
    num_shared = data.metadata["equal_to_train"]["val"]
    message = f"{num_shared:,} of {val['records']:,} validation records also stand in the training data"
    remedy = "drop them from one side: the validation loss partly measures memorization"
    yield judge(num_shared > MAX_SHARED_SHARE * val["records"], WARNING, "duplicates", message, remedy)
    num_repeated = data.metadata["repeated_in_train"]
    message = f"{num_repeated:,} of {train['records']:,} training records are repeats"
    is_bad = num_repeated > MAX_REPEATED_SHARE * train["records"]
    yield judge(is_bad, WARNING, "repeats", message, "drop them, unless their weight is meant")
    target_counts = data.train.num_target_tokens()
    target_share = int(target_counts.sum()) / int(data.train.lengths().sum())
    message = f"{1 - target_share:.1%} of the training tokens are not counted in the loss"
    remedy = "shorten the prompt, or train on whole texts with --objective blocks"
    yield judge(target_share < MIN_TARGET_SHARE, WARNING, "masked", message, remedy)
    if num_empty := int((target_counts <= 0).sum()):
        message = f"{num_empty:,} training rows have no target token"
        yield Check(ERROR, "masked", message, "drop records with an empty completion")
    is_seen = np.zeros(data.metadata["vocabulary"], dtype=bool)
    is_seen[data.train.ids[:MAX_TOKENS_SCANNED]] = True
    val_ids = data.val.ids[:MAX_TOKENS_SCANNED]
    unseen_share = float((~is_seen[val_ids]).mean()) if len(val_ids) else 0.0
    message = f"{unseen_share:.2%} of the validation tokens never occur in training, which shows "
    message += f"{int(is_seen.sum()):,} of {len(is_seen):,} token ids"
    remedy = "more training data, or a split that holds the same kinds of text on both sides"
    yield judge(unseen_share > MAX_UNSEEN_SHARE, WARNING, "coverage", message, remedy)


# --- plan and memory ---


def check_model(plan: RunPlan, model: TrainableModel) -> Iterator[Check]:
    """Tied weights, the share that trains."""
    model_info, config = plan.model_info, model.causal.config
    is_tied, should_be_tied = model.has_tied_embeddings, bool(getattr(config, "tie_word_embeddings", False))
    message = f"input and output embeddings are {'one' if is_tied else 'two'}"
    if is_tied != should_be_tied:
        message += f", its configuration says {'one' if should_be_tied else 'two'}"
    remedy = "check that its weights were saved as its configuration says"
    yield judge(is_tied != should_be_tied, WARNING, "tied weights", message, remedy)
    if plan.settings.mode == "lora":
        share = model_info["trainable"] / model_info["parameters"]
        remedy = "adapters as large as the model save nothing: lower --lora-rank"
        yield judge(share > 0.5, WARNING, "adapters", f"{share:.2%} of the weights train", remedy)


def check_schedule(plan: RunPlan) -> Iterator[Check]:
    """The global batch, the number of steps, warm-up, and how often is evaluated and saved."""
    schedule, settings, batch = plan.schedule, plan.settings, plan.schedule.batch
    total_steps = schedule.total_steps
    is_slow = batch.micro_batch_size <= 2 and batch.gradient_accumulation_steps >= MANY_ACCUMULATION_STEPS
    remedy = "a larger --micro-batch is faster where it fits: try --find-batch"
    yield judge(is_slow, WARNING, "batch", str(batch), remedy)
    last_batch_size = plan.data_info["train"]["examples"] % batch.global_batch
    tail = f"; the last of an epoch has {last_batch_size} examples" if last_batch_size else ""
    message = f"{schedule.steps_per_epoch:,} an epoch, {total_steps:,} in all{tail}"
    remedy = "more --epochs, more data or a smaller --global-batch"
    yield judge(total_steps < MIN_STEPS, WARNING, "steps", message, remedy)
    warmup_steps = settings.train.num_warmup_steps(total_steps)
    message = f"{settings.train.lr:g} at its peak"
    message += f" after {warmup_steps} warm-up steps of {total_steps}" if warmup_steps else ""
    remedy = "the peak is never reached: lower --warmup-steps or --warmup-ratio"
    yield judge(warmup_steps >= total_steps, WARNING, "learning rate", message, remedy)
    for flag, interval in (("--eval-every", settings.output.eval_every), ("--save-every", settings.output.save_every)):
        if interval.isdigit() and int(interval) > total_steps:
            message = f"{interval}, the run has {total_steps} steps: only at the end"
            yield Check(WARNING, flag, message, f"{flag} {math.ceil(total_steps / 4)}, or epoch")


def build_memory_table(plan: RunPlan, row_length: int) -> list[dict[str, Any]]:
    """A row for every ZeRO file of this program, and the plan's own where that is another; bytes of a rank.

    `peak`: on the device (for a CPU rank: of memory), all in all; `host`: beside them, where there is a GPU.
    """
    files = [read_deepspeed_file(name) for name in DS_CONFIG_NAMES]
    files += [plan.deepspeed_file] if plan.deepspeed_file.name not in DS_CONFIG_NAMES else []
    table, context = [], plan.dist_context
    for file in files:
        estimate = plan.estimate_memory(file, row_length)
        device_bytes, host_bytes = required_bytes(estimate, plan.model_info, context.device)
        row = {
            "ds_config": file.name,
            "chosen": file.name == plan.deepspeed_file.name,
            "fits": device_bytes <= context.available_bytes() and host_bytes <= context.free_host_bytes(),
            "weights": estimate.weights,
            "gradients": estimate.gradients,
            "optimizer": estimate.optimizer,
            "activations": estimate.activations,
            "passing": estimate.passing,
            "gathered": estimate.gathered,
            "peak": device_bytes,
            "host": host_bytes,
        }
        table.append(row)
    return table


def check_memory(plan: RunPlan, table: list[dict[str, Any]]) -> Iterator[Check]:
    """Whether the chosen file fits, and what would, where it does not."""
    chosen = next(row for row in table if row["chosen"])
    limit_bytes, is_gpu = plan.dist_context.available_bytes(), plan.dist_context.device.type == "cuda"
    capacity = "a GPU" if is_gpu else f"free memory for each of {plan.dist_context.local_world_size}"
    message = f"{chosen['ds_config']}: {format_bytes(chosen['peak'])} at most, {format_bytes(limit_bytes)} {capacity}"
    if not chosen["fits"]:
        fitting = next((row["ds_config"] for row in table if row["fits"]), None)
        remedy = "lower --micro-batch, pass --activation-checkpointing, or take --mode lora or a smaller model"
        remedy = f"--ds-config {fitting} would fit" if fitting else remedy
        yield Check(ERROR, "memory", message, f"{remedy}; --micro-batch 1 needs the least")
        return
    is_tight = chosen["peak"] > TIGHT_SHARE * limit_bytes
    yield judge(is_tight, WARNING, "memory", message, "lower --micro-batch: so close to the limit it may not fit")
    parts = {
        "activations": "activations",
        "passing": "temporary logits, products and gradients",
        "weights": "weights",
        "optimizer": "optimizer state",
    }
    largest = max(parts, key=chosen.__getitem__)
    yield Check(OK, "largest", f"{parts[largest]}, {format_bytes(chosen[largest])}")
