"""Save, list, load: whole or not at all, and the same file whatever the ZeRO stage and the number of ranks.

A checkpoint is a folder `step-NNNNNN` with `state.safetensors` (of each *trained* weight its float32 value and
AdamW's two moments: 12 bytes a parameter; with 8-bit moments 6, and a scale for each 256) and `state.json` (where the
run stood, and a checksum of the other file). It is written under another name, flushed and renamed, so a folder with
the right name is whole. Dropout, data order and learning rate are functions of seed and step, so nothing else has to
be kept: a frozen base, packed or reduced by pissa, is made again from its own weights.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from trainer.config.errors import RunFailed, UserError
from trainer.data.sampler import MicroBatch
from trainer.distributed.engine import Engine
from trainer.distributed.process_group import World

FORMAT = 1
STATE, ABOUT = "state.safetensors", "state.json"
_DTYPES = {torch.float32: "F32", torch.uint8: "U8"}  # as safetensors calls them
_PIECE = 2**24  # bytes hashed and written at a time


@dataclass(frozen=True, kw_only=True)
class Best:
    """The lowest validation loss so far and where it was."""

    step: int
    epoch: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: all that is not a function of its settings and its step."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    epoch_nll: float = 0.0  #: summed training loss of the epoch so far, nats
    epoch_counted: int = 0  #: targets it is the sum over
    seconds: float = 0.0  #: since the run began, pauses between stop and resume left out
    skipped: int = 0  #: steps whose update fp16 left out; AdamW has not counted them
    pending: bool = True  #: the evaluation and the epoch's row that may be due after this step are still to come
    val_loss: float | None = None  #: of the newest evaluation
    val_step: int = -1  #: the step of that evaluation
    best: Best | None = None
    mark: float | None = None  #: validation loss that an evaluation must beat, by --early-stop's MIN_DELTA
    stale: int = 0  #: evaluations in a row that did not


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One whole checkpoint on disk."""

    folder: Path
    about: dict[str, Any]
    passed_over: tuple[str, ...] = ()  #: why newer ones were not taken

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.about["progress"]["step"])

    @property
    def val_loss(self) -> float | None:
        """Validation loss of exactly these weights, where they were evaluated."""
        progress = self.about["progress"]
        return progress["val_loss"] if progress["val_step"] == progress["step"] else None

    @property
    def progress(self) -> Progress:
        """Where the run stood."""
        values = dict(self.about["progress"])
        best = values.pop("best")
        return Progress(**values, best=Best(**best) if best else None)

    def problem(self) -> str | None:
        """Which of its files is missing, cut off or changed since it was written; None where it is whole."""
        if self.about.get("self") != _own_digest(self.about):
            return f"checkpoint {self.folder}: {ABOUT} was changed since it was written (checksum)"
        path = self.folder / STATE
        try:
            size, digest = path.stat().st_size, _sha256(path)
        except OSError as error:
            return f"checkpoint {self.folder}: cannot read {STATE}: {error.strerror}"
        if size != self.about["bytes"]:
            return f"checkpoint {self.folder}: {STATE} has {size} bytes of {self.about['bytes']}"
        if digest != self.about["sha256"]:
            return f"checkpoint {self.folder}: {STATE} was changed since it was written (checksum)"
        return None

    def reader(self, device: torch.device) -> Callable[[str], Tensor]:
        """A function from a state's name to its tensor on `device`, read one at a time."""
        file = safe_open(self.folder / STATE, framework="pt", device=str(device))
        return file.get_tensor

    def names(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every trained weight in it."""
        with safe_open(self.folder / STATE, framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith("weight/")]  # noqa: SIM118  # not a mapping
            return {key.removeprefix("weight/"): tuple(file.get_slice(key).get_shape()) for key in keys}


def find(folder: Path) -> list[Checkpoint]:
    """The whole checkpoints under `folder`, oldest first. Half-written ones have other names and are not seen."""
    found = []
    for path in _folders(folder):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            about = json.loads((path / ABOUT).read_text())
            if about["format"] == FORMAT and f"step-{about['progress']['step']:06d}" == path.name:
                found.append(Checkpoint(folder=path, about=about))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]


def best_of(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest validation loss of its own weights; the earliest of equals."""
    evaluated = [c for c in checkpoints if c.val_loss is not None]
    return min(evaluated, key=lambda c: (c.val_loss, c.step)) if evaluated else None


def choose(folder: Path, which: str, *, flag: str = "--resume") -> Checkpoint:
    """The checkpoint that `flag` names as latest, best or step-N, its checksum verified.

    `latest` falls back to the newest one that is whole; the ones named are taken or refused.
    """
    checkpoints = find(folder)
    have = ", ".join(c.folder.name for c in checkpoints) or "none"
    if which == "latest":
        return _newest(folder, checkpoints, flag)
    if which == "best":
        chosen = best_of(checkpoints)
    else:
        number = re.fullmatch(r"step-(\d+)", which)
        chosen = next((c for c in checkpoints if number and c.step == int(number[1])), None)
    if chosen is None:
        damaged = "damaged" if (folder / which).is_dir() else "not"
        raise UserError(f"{flag} {which}: {damaged} in {folder}; whole checkpoints there: {have}")
    if problem := chosen.problem():
        raise UserError(f"{problem}; pass {flag} step-N to take another of {have}")
    return chosen


def _newest(folder: Path, checkpoints: list[Checkpoint], flag: str) -> Checkpoint:
    known = {checkpoint.folder.name: checkpoint for checkpoint in checkpoints}
    problems: list[str] = []
    for path in sorted(_folders(folder), key=lambda path: int(path.name.removeprefix("step-")), reverse=True):
        if path.name not in known:
            problems.append(f"checkpoint {path}: {ABOUT} is missing or damaged")
        elif problem := known[path.name].problem():
            problems.append(problem)
        else:
            return replace(known[path.name], passed_over=tuple(problems))
    why = f" ({problems[0]})" if problems else ""
    raise UserError(f"{flag}: no whole checkpoint in {folder}{why}; train anew, with another --out")


class Checkpoints:
    """The checkpoints of one run: saves into `folder` and keeps the newest `keep` and the best."""

    def __init__(self, folder: Path, world: World, *, keep: int, identity: Mapping[str, Any]):
        self.folder = folder
        self.world = world
        self.keep = keep
        self.identity = dict(identity)  # of which run and model this is the state, written into each

    def save(self, engine: Engine, progress: Progress) -> Path:
        """Write a checkpoint; all ranks must call. RunFailed on every rank where it cannot be written."""
        final = self.folder / f"step-{progress.step:06d}"
        problem = None
        if self.world.rank == 0:
            problem = self._write(engine, progress, final)
        else:
            for _ in engine.state.full():  # the gathering needs everybody
                pass
        problem = self.world.gather(problem)[0]
        if problem is not None:
            raise RunFailed(f"checkpoint {final} not written: {problem}; the checkpoints before it are whole")
        return final

    def amend(self, progress: Progress) -> None:
        """Let the checkpoint of this step, which holds the same weights, say where the run stands; all must call."""
        path, problem = self.folder / f"step-{progress.step:06d}" / ABOUT, None
        if self.world.rank == 0:
            try:
                temporary = path.with_name(f".{ABOUT}.tmp")
                write_text(temporary, _about_text(json.loads(path.read_text()), progress))
                temporary.replace(path)
            except OSError as error:
                problem = str(error.strerror or error)
        problem = self.world.gather(problem)[0]
        if problem is not None:
            raise RunFailed(f"{path} not written: {problem}; the checkpoint is whole as it was")

    def _write(self, engine: Engine, progress: Progress, final: Path) -> str | None:
        temporary = self.folder / f".{final.name}.{os.getpid()}.tmp"
        states = engine.state.full()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self.folder)
            temporary.mkdir()
            size, digest = _write_state(temporary / STATE, engine, states)
            about = {"format": FORMAT, **self.identity, "bytes": size, "sha256": digest}
            if (scale := engine.state.loss_scale()) is not None:
                about["loss_scale"] = scale
            write_text(temporary / ABOUT, _about_text(about, progress))
            _sync(temporary)
            if final.exists():
                _delete(final)
            temporary.rename(final)
            _sync(self.folder)
            self._delete_old()
            return None
        except OSError as error:
            for _ in states:  # the other ranks are still gathering
                pass
            shutil.rmtree(temporary, ignore_errors=True)
            return str(error.strerror or error)

    def _delete_old(self) -> None:
        checkpoints = find(self.folder)
        best = best_of(checkpoints)
        for checkpoint in checkpoints[: -self.keep]:
            if best is None or checkpoint.step != best.step:
                _delete(checkpoint.folder)

    def dump_batch(self, step: int, micros: list[MicroBatch]) -> str:
        """Keep this rank's rows of a step whose numbers were not finite, to reproduce it; returns the files' name.

        Of micro-batch n `input_ids_n`, `labels_n`, and the `index_n` that with seed and step draws its dropout masks.
        """
        name = f"not-finite-step-{step}-rank-*.npz"
        path = self.folder.parent / name.replace("*", str(self.world.rank))
        kinds = ("input_ids", "labels", "index")
        arrays = {f"{kind}_{n}": getattr(micro, kind) for n, micro in enumerate(micros) for kind in kinds}
        try:
            np.savez_compressed(path, **arrays)
        except OSError:  # a full disk must not hide the loss that was not finite
            return "no file, the disk is full"
        return name


def _write_state(path: Path, engine: Engine, states: Any) -> tuple[int, str]:
    """Stream the safetensors file, one gathered tensor at a time; returns (bytes, sha256)."""
    header, offset = {}, 0
    for name, dtype, shape in engine.state.layout():
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        _put(file, digest, struct.pack("<Q", len(text)) + text)
        for name, tensor in states:
            assert header[name]["dtype"] == _DTYPES[tensor.dtype], name
            data = tensor.detach().cpu().contiguous().view(-1).numpy()
            _put(file, digest, memoryview(data).cast("B"))
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()


def _put(file: IO[bytes], digest: Any, data: Any) -> None:
    for start in range(0, len(data), _PIECE):
        digest.update(data[start : start + _PIECE])
        file.write(data[start : start + _PIECE])


def _about_text(about: Mapping[str, Any], progress: Progress) -> str:
    about = {**about, "progress": asdict(progress)}
    return json.dumps({**about, "self": _own_digest(about)}, indent=1)


def _own_digest(about: Mapping[str, Any]) -> str:
    rest = {key: about[key] for key in sorted(about) if key != "self"}
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file and hand it to the disk."""
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _delete(folder: Path) -> None:
    # Renamed first: a folder that is half deleted must not look whole.
    doomed = folder.rename(folder.parent / f".{folder.name}.deleted.tmp")
    shutil.rmtree(doomed, ignore_errors=True)


def drop_after(folder: Path, step: int) -> None:
    """Delete the checkpoints after `step`, whole or damaged: a run that goes on from there takes another course.

    Left there they would pass for the newest of the run, be kept in place of its own, and be resumed from.
    RunFailed where they cannot be deleted.
    """
    try:
        _remove_leftovers(folder)
        for path in sorted(folder.glob("step-*"), reverse=True):  # newest first: a kill leaves no gap
            if path.name.removeprefix("step-").isdigit() and int(path.name.removeprefix("step-")) > step:
                _delete(path)
    except OSError as problem:
        raise RunFailed(f"{folder}: cannot delete the checkpoints after step {step}: {problem.strerror}") from problem


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(".step-*.tmp"):  # of a save or a deletion that was killed
        shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(checkpoint: Checkpoint, module: torch.nn.Module) -> None:
    """Put a checkpoint's weights into the model, before the engine divides it. UserError where they are another's."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    kept = checkpoint.names()
    if {name: tuple(p.shape) for name, p in trained.items()} != kept:
        odd = sorted(set(trained) ^ set(kept)) or [n for n, p in trained.items() if tuple(p.shape) != kept[n]]
        raise UserError(f"checkpoint {checkpoint.folder} is of another model: {odd[0]} and {len(odd) - 1} more differ")
    read = checkpoint.reader(torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(read(f"weight/{name}"))
