"""Save, list, load: whole or not at all, and the same file whatever the ZeRO stage and the number of ranks.

A checkpoint is a folder `step-NNNNNN` with `state.safetensors` (of each *trained* weight its float32 value and
AdamW's two moments: 12 bytes a parameter; with 8-bit moments 6, and a scale for each 256) and `state.json` (where the
run stood, on what it ran, checksums of the other file, of the rows of metrics.jsonl and the evaluations of
eval_records/ so far, and one of itself). It is written under another name, flushed and renamed, so a folder with the
right name is whole. Dropout, data order and learning rate are functions of seed and step, so nothing else has to be
kept: a frozen base, packed or reduced by pissa, is made again from its own weights.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trainer.config.choices import Precision
from trainer.config.errors import TrainingError, UserError
from trainer.config.fields import Float, NonNegativeInt, Text
from trainer.config.files import new_folder, open_plain_file, read_json_object, write_atomically
from trainer.model import optimizer
from trainer.tracking.run_lock import lock_identity
from trainer.training.schedule import TrainState

if TYPE_CHECKING:  # an export reads checkpoints without DeepSpeed
    from trainer.distributed.engine import Engine
    from trainer.distributed.process_group import DistContext

FORMAT_VERSION = 4
STATE_FILE, METADATA_FILE = "state.safetensors", "state.json"
TensorLayout = tuple[tuple[int, ...], torch.dtype | str]  #: shape and type, one that is none of ours by its name
DTYPES = {torch.float32: "F32", torch.uint8: "U8"}  # as safetensors calls them
MIN_BYTES_PER_TRAINED_WEIGHT = 6  # its value in float32 and AdamW's two moments in 8 bits; 12 with these in float32
NO_RECORDS = {"records": {"num_rows": 0, "sha256": ""}, "evaluations": {"num_evaluations": 0, "sha256": ""}}
SCALE_BLOCK = 256  # elements of 8-bit moments that share a scale
_CHUNK_BYTES = 2**24  # bytes hashed and written at a time


class _RowsDigest(BaseModel):
    num_rows: NonNegativeInt
    sha256: Text


class _EvaluationsDigest(BaseModel):
    num_evaluations: NonNegativeInt
    sha256: Text


class _StateJson(BaseModel):
    format: Literal[4]
    base: Text | None
    data: Text
    fixed: dict[str, Any]  #: the settings that may not change when the run is resumed
    precision: Precision
    device: Text
    bytes: NonNegativeInt
    sha256: Text
    loss_scale: dict[Literal["cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"], Float] | None = None
    progress: TrainState
    records: _RowsDigest
    evaluations: _EvaluationsDigest


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk whose state.json is as it was written; `find_damage` reads the tensors too."""

    folder: Path
    metadata: dict[str, Any]
    train_state: TrainState
    skipped_reasons: tuple[str, ...] = ()  #: why newer ones were not taken

    @property
    def step(self) -> int:
        return self.train_state.step

    @property
    def val_loss(self) -> float | None:
        return self.train_state.val_loss

    def find_damage(self) -> str | None:
        path = self.folder / STATE_FILE
        try:
            with open_plain_file(path) as file:
                is_whole = path.stat().st_size == self.metadata["bytes"]
                is_whole = is_whole and hashlib.file_digest(file, "sha256").hexdigest() == self.metadata["sha256"]
                problem = "" if is_whole else "was changed since it was written"
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        return f"checkpoint {self.folder}: {STATE_FILE} {problem}" if problem else None


def any_checkpoint(folder: Path) -> bool:
    """Whether one stands under `folder`, whole or not; UserError where `folder` is something else."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder} is not a folder; restore the checkpoints of the run")
    return bool(_numbered_folders(folder))


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Those under `folder` with a whole state.json, oldest first. Half-written ones have other names."""
    checkpoints = []
    for step, path in _numbered_folders(folder):
        with contextlib.suppress(UserError, ValidationError, RecursionError):
            metadata = read_json_object(path / METADATA_FILE)
            progress = _StateJson.model_validate(metadata).progress
            is_whole = metadata.get("self") == _metadata_digest(metadata) and progress.as_dict() == metadata["progress"]
            if is_whole and progress.step == step:
                checkpoints.append(Checkpoint(folder=path, metadata=metadata, train_state=progress))
    return checkpoints


def iter_checked_checkpoints(folder: Path) -> Iterator[tuple[Path, Checkpoint | None, str | None]]:
    """(folder, checkpoint where its state.json is whole, damage or None) of each, newest first; read whole."""
    readable = {checkpoint.folder: checkpoint for checkpoint in list_checkpoints(folder)}
    for _, path in reversed(_numbered_folders(folder)):
        checkpoint = readable.get(path)
        missing = f"checkpoint {path}: {METADATA_FILE} is missing or was changed since it was written"
        yield path, checkpoint, checkpoint.find_damage() if checkpoint else missing


def best_checkpoint(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest validation loss of its own weights; the earliest of equals."""
    evaluated = (c for c in checkpoints if c.val_loss is not None)
    return min(evaluated, key=lambda c: (c.val_loss, c.step), default=None)


def resolve_checkpoint(folder: Path, which: str, *, flag: str = "--resume") -> Checkpoint:
    """The checkpoint that `flag` names as latest, best or step-N, its checksum verified. `latest` falls back to the
    newest one that is whole; the ones named are taken or refused."""
    if not re.fullmatch(r"latest|best|step-\d+", which, re.ASCII):
        raise UserError(f"{flag} {which}: expected step-N, best or latest")
    any_checkpoint(folder)
    if which == "latest":
        reasons: list[str] = []
        for _, checkpoint, damage in iter_checked_checkpoints(folder):
            if checkpoint is not None and damage is None:
                return replace(checkpoint, skipped_reasons=tuple(reasons))
            reasons.append(str(damage))
        detail = f" ({reasons[0]})" if reasons else ""
        raise UserError(f"{flag}: no whole checkpoint in {folder}{detail}; train anew, with another --output-dir")
    checkpoints = list_checkpoints(folder)
    available = ", ".join(c.folder.name for c in checkpoints) or "none"
    steps = {checkpoint.step: checkpoint for checkpoint in checkpoints}
    selected = best_checkpoint(checkpoints) if which == "best" else steps.get(int(which.removeprefix("step-")))
    if selected is None:
        raise UserError(f"{flag} {which}: not in {folder}; whole checkpoints there: {available}")
    if damage := selected.find_damage():
        raise UserError(f"{damage}; pass {flag} step-N to take another of {available}")
    return selected


def _numbered_folders(folder: Path) -> list[tuple[int, Path]]:
    matches = ((re.fullmatch(r"step-(\d{6,})", path.name), path) for path in folder.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def _metadata_digest(metadata: Mapping[str, Any]) -> str:
    hashed = {key: metadata[key] for key in sorted(metadata) if key != "self"}
    return hashlib.sha256(json.dumps(hashed).encode()).hexdigest()


class CheckpointManager:
    """The checkpoints of one run: saves into `folder` and keeps the newest `save_total_limit` and the best. `identity`:
    of which model, data and settings this is the state, written into each (`RunPlan.checkpoint_identity`);
    `record_digests`: "records" and "evaluations" of state.json at the moment, called on rank 0."""

    def __init__(
        self,
        folder: Path,
        dist_context: "DistContext",
        *,
        save_total_limit: int,
        identity: Mapping[str, Any],
        record_digests: Callable[[], Mapping[str, Any]] = lambda: NO_RECORDS,
    ):
        self.folder, self.dist_context = folder, dist_context
        self.save_total_limit, self.identity, self.record_digests = save_total_limit, identity, record_digests

    def save(self, engine: "Engine", state: TrainState) -> None:
        """Write a checkpoint; all ranks must call. TrainingError on every rank where it cannot be written."""
        target, problem = self.folder / f"step-{state.step:06d}", None
        tensors = engine.state.iter_state_dict()
        if self.dist_context.rank == 0:
            try:
                _remove_temporary(self.folder)
                with new_folder(target) as folder:
                    size, digest = _write_safetensors(folder / STATE_FILE, engine, tensors)
                    metadata = {"format": FORMAT_VERSION, "bytes": size, "sha256": digest}
                    metadata["loss_scale"] = engine.state.loss_scale()
                    write_atomically(folder / METADATA_FILE, self._format_metadata(metadata, state))
                    if target.exists():
                        _delete_folder(target)
                best = best_checkpoint(checkpoints := list_checkpoints(self.folder))
                for checkpoint in checkpoints[: -self.save_total_limit]:
                    if checkpoint is not best:
                        _delete_folder(checkpoint.folder)
            except OSError as error:
                reason = error.strerror or error
                problem = f"checkpoint {target} not written: {reason}; the checkpoints before it are whole"
        for _ in tensors:  # the gathering needs everybody, to its end
            pass
        if problem := self.dist_context.all_gather_object(problem)[0]:
            raise TrainingError(problem)

    def update_train_state(self, state: TrainState) -> None:
        """Let the checkpoint of this step, which holds the same weights, say where the run stands; all must call."""
        path = self.folder / f"step-{state.step:06d}" / METADATA_FILE

        def update() -> None:
            try:
                write_atomically(path, self._format_metadata(read_json_object(path), state))
            except OSError as error:
                problem = f"{path} not written: {error.strerror or error}; the checkpoint is whole as it was"
                raise TrainingError(problem) from error

        self.dist_context.on_rank_zero(update)

    def _format_metadata(self, metadata: Mapping[str, Any], state: TrainState) -> str:
        metadata = {**metadata, **self.identity, "progress": state.as_dict(), **self.record_digests()}
        return json.dumps({**metadata, "self": _metadata_digest(metadata)}, indent=1)


def _write_safetensors(path: Path, engine: "Engine", tensors: Iterable[tuple[str, Tensor]]) -> tuple[int, str]:
    """Stream the safetensors file, one gathered tensor at a time; returns (bytes, sha256)."""
    header, offset = {}, 0
    for name, dtype, shape in engine.state.state_dict_layout():
        end = offset + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        _write_chunks(file, digest, struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors:
            assert header[name]["dtype"] == DTYPES[tensor.dtype], name
            data = tensor.detach().cpu().contiguous().view(-1).numpy()
            _write_chunks(file, digest, memoryview(data).cast("B"))
        return file.tell(), digest.hexdigest()


def _write_chunks(file: IO[bytes], digest: Any, data: Any) -> None:
    for start in range(0, len(data), _CHUNK_BYTES):
        digest.update(data[start : start + _CHUNK_BYTES])
        file.write(data[start : start + _CHUNK_BYTES])


def _delete_folder(folder: Path) -> None:
    # Renamed first: a folder that is half deleted must not look whole.
    trash = folder.rename(folder.parent / f".{folder.name}.deleted.tmp")
    shutil.rmtree(trash, ignore_errors=True)


def delete_checkpoints_after(folder: Path, step: int) -> None:
    """Delete the checkpoints after `step`, whole or damaged: a run that goes on from there takes another course, and
    they would pass for its newest. TrainingError where they cannot be deleted."""
    try:
        _remove_temporary(folder)
        for number, path in reversed(_numbered_folders(folder)):  # newest first: a kill leaves no gap
            if number > step:
                _delete_folder(path)
    except OSError as error:
        raise TrainingError(f"{folder}: cannot delete the checkpoints after step {step}: {error.strerror}") from error


def _remove_temporary(folder: Path) -> None:
    for path in folder.glob(".step-*.tmp"):  # of a save or a deletion that was killed
        shutil.rmtree(path, ignore_errors=True)


def load_weights(checkpoint: Checkpoint, module: nn.Module, context: "DistContext | None" = None) -> None:
    """Put a checkpoint's weights into the model, before the engine divides it. UserError where they are another's.
    `context`: of the ranks, which must all call; None: of a process alone."""
    layout, read_tensor = _open_tensors(checkpoint, torch.device("cpu"), context)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    expected: dict[str, TensorLayout] = {}
    for name, parameter in parameters.items():
        expected[f"weight/{name}"] = (shape := tuple(parameter.shape), torch.float32)
        for moment in optimizer.MOMENTS:
            is_8bit = layout.get(f"{moment}/{name}", (shape, torch.float32))[1] == torch.uint8
            expected[f"{moment}/{name}"] = (shape, torch.uint8 if is_8bit else torch.float32)
            if is_8bit:
                expected[f"{moment}.absmax/{name}"] = ((-(-parameter.numel() // SCALE_BLOCK),), torch.float32)
    for name in sorted(expected | layout):
        if expected.get(name) != (entry := layout.get(name)):
            is_what = "is missing" if entry is None else f"is {entry[1]} {list(entry[0])}"
            raise UserError(f"checkpoint {checkpoint.folder} is of another model or damaged: {name} {is_what}")
    for name, parameter in parameters.items():
        parameter.data = read_tensor(f"weight/{name}").to(parameter.device)


def load_optimizer(checkpoint: Checkpoint, engine: "Engine") -> None:
    """Put a checkpoint's moments and counts into an engine that was built around its weights; all ranks must call."""
    state = checkpoint.train_state
    _, reader = _open_tensors(checkpoint, engine.dist_context.device, engine.dist_context)
    engine.state.load_state_dict(reader, state.step - state.skipped_steps, checkpoint.metadata.get("loss_scale"))


def load_for_evaluation(checkpoint: Checkpoint, engine: "Engine") -> None:
    """Put a checkpoint's weights into an engine that trains no more; all ranks must call."""
    engine.state.load_weights(_open_tensors(checkpoint, engine.dist_context.device, engine.dist_context)[1])


def _open_tensors(
    checkpoint: Checkpoint, device: torch.device, context: "DistContext | None"
) -> tuple[dict[str, TensorLayout], Callable[[str], Tensor]]:
    """({name: shape and dtype}, a function from a name to its tensor); all ranks must read the same names in one order.
    Each rank opens the file where its host sees the lock that rank 0 holds in the run folder. To other hosts rank 0
    sends one tensor at a time: what may lie under that name on their disks is not looked at."""
    path = checkpoint.folder / STATE_FILE
    dtypes = {name: dtype for dtype, name in DTYPES.items()}

    def read_layout() -> dict[str, TensorLayout]:
        try:
            with safe_open(path, framework="pt") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
                return {n: (tuple(p.get_shape()), dtypes.get(p.get_dtype(), p.get_dtype())) for n, p in parts.items()}
        except (SafetensorError, OSError) as error:  # a run beside this program may have removed it
            raise UserError(f"checkpoint {checkpoint.folder}: {STATE_FILE} cannot be read ({error})") from None

    if context is None or context.num_nodes == 1:
        return read_layout(), safe_open(path, framework="pt", device=str(device)).get_tensor
    layout, lock = context.on_rank_zero(read_layout), lock_identity(checkpoint.folder.parents[1])
    sees_lock = context.all_gather_object(lock)[0] == lock is not None
    is_reader = sees_lock or context.hosts[context.rank] == context.hosts[0]
    read_from_disk = safe_open(path, framework="pt").get_tensor if is_reader else None
    receive = context.open_streams(is_reader)

    def read(name: str) -> Tensor:
        shape, dtype = layout[name]
        tensor = torch.empty(shape, dtype=dtype) if read_from_disk is None else read_from_disk(name)
        receive(tensor)
        return tensor.to(device)

    return layout, read
