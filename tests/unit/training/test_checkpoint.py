"""Which checkpoints are kept; one whose content was edited, with every checksum made right again, is refused in one
line."""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers.engines import save_stub_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.config.errors import TrainingError, UserError
from trainer.training.checkpoint import (
    _metadata_digest,
    best_checkpoint,
    list_checkpoints,
    load_weights,
    resolve_checkpoint,
)
from trainer.training.run_folder import find_resume_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_stub_checkpoint(tmp_path, 3, loss=1.5)
    return tmp_path / "step-000003"


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path, monkeypatch):
    names_by_limit = {}

    def save(step: int, loss: float | None) -> None:
        save_stub_checkpoint(tmp_path, step, limit=2, loss=loss)
        names_by_limit[step] = sorted(int(path.name.removeprefix("step-")) for path in tmp_path.glob("step-*"))

    for step, loss in enumerate([3.0, 1.0, None, 2.0, 1.5, 1.0], start=1):
        save(step, loss)
    assert names_by_limit == {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 4, 5], 6: [2, 5, 6]}
    assert resolve_checkpoint(tmp_path, "best").step == 2, "the earlier of equals"
    assert resolve_checkpoint(tmp_path, "latest").step == 6
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(
        TrainingError, match="step-000007 not written: No space left; the checkpoints before it are whole"
    ):
        save(7, None)
    assert resolve_checkpoint(tmp_path, "latest").step == 6


def write_state_json(folder: Path, metadata: dict[str, Any]) -> None:
    """With its own checksum made right, so that only the content lies."""
    (folder / "state.json").write_text(json.dumps({**metadata, "self": _metadata_digest(metadata)}))


def test_no_edit_of_state_json_ends_in_a_traceback(folder):
    whole = json.loads((folder / "state.json").read_text())
    num_refused = 0
    for block in ("", "progress", "records", "evaluations"):
        for name in whole[block] if block else whole:
            for value in ("x", None, -1, 0.5, 2**70, math.nan, [], {"x": 1}):
                metadata = json.loads(json.dumps(whole))
                (metadata[block] if block else metadata)[name] = value
                write_state_json(folder, metadata)
                best_checkpoint(list_checkpoints(folder.parent))
                with contextlib.suppress(UserError):
                    assert resolve_checkpoint(folder.parent, "latest").train_state.step == 3
                    continue
                num_refused += 1
    assert num_refused > 100, "most of these values are of another type"


EDITS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "exp_avg/w is missing": lambda tensors: tensors.pop("exp_avg/w"),
    "exp_avg/v is torch.float32 [3]": lambda tensors: tensors.update({"exp_avg/v": tensors.pop("exp_avg/w")}),
    "exp_avg_sq/w is torch.float32 [3, 1]": lambda tensors: tensors.update({"exp_avg_sq/w": torch.ones(3, 1)}),
    "weight/w is BF16 [3]": lambda tensors: tensors.update({"weight/w": torch.ones(3, dtype=torch.bfloat16)}),
    "exp_avg.absmax/w is missing": lambda tensors: tensors.update({"exp_avg/w": torch.ones(3, dtype=torch.uint8)}),
}


@pytest.mark.parametrize("message", [*EDITS, "cannot be read"])
def test_tensors_of_another_name_shape_or_type_are_refused(message, folder):
    path = folder / "state.safetensors"
    if message in EDITS:
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        EDITS[message](tensors)
        save_file(tensors, path)
    else:
        path.write_bytes(b"\xff" * 40)
    content = path.read_bytes()
    metadata = json.loads((folder / "state.json").read_text())
    write_state_json(folder, metadata | {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    module = nn.Module()
    module.w = nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError) as caught:
        load_weights(resolve_checkpoint(folder.parent, "latest"), module)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert torch.equal(module.w, torch.zeros(3)), "nothing is loaded before all is checked"


def flip_bit(path: Path, after: bytes = b"") -> None:
    data = bytearray(path.read_bytes())
    data[data.index(after) + len(after) if after else -1] ^= 1  # of a number it is still a number
    path.write_bytes(data)


def replace_by(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


CHANGED = "was changed since it was written"
DAMAGE: list[tuple[str, str, Callable[[Path], object]]] = [  # of a file, and what is said of it
    ("state.safetensors", CHANGED, lambda path: os.truncate(path, 20)),
    ("state.safetensors", CHANGED, flip_bit),
    ("state.json", CHANGED, lambda path: flip_bit(path, b'"tokens_seen": ')),
    *(
        (name, message, lambda path, make=make: replace_by(path, make))
        for name, message in (("state.json", CHANGED), ("state.safetensors", "cannot be read"))
        for make in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero"))
    ),
]


@pytest.mark.parametrize(("name", "message", "damage"), DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name_and_passed_over_otherwise(name, message, damage, folder):
    """At once, also where the file is a pipe, a folder or a device without an end."""
    save_stub_checkpoint(folder.parent, 2)
    damage(folder / name)
    source = resolve_checkpoint(folder.parent, "latest")
    assert source.step == 2
    (reason,) = source.skipped_reasons
    assert re.search(f"step-000003: {name} .*{message}", reason), reason
    with pytest.raises(UserError, match=r"step-(00000)?3") as caught:
        resolve_checkpoint(folder.parent, "step-3")
    assert "\n" not in str(caught.value)


def test_the_checkpoint_of_another_model_is_refused(tmp_path):
    save_stub_checkpoint(tmp_path / "checkpoints", 4)
    with pytest.raises(UserError, match=r"step-000004 is of a run on another base model \(test, here other\)"):
        find_resume_source(tmp_path, "latest", base="other", allows_records=False)
