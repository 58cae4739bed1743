"""`launch/export.py`: a checkpoint of a run, read back in one process without DeepSpeed, as a checked folder."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.config.errors import RunFailed, UserError
from trainer.config.schema import Settings
from trainer.data.dataset import Prepared, prepare
from trainer.export.folder import base_of, export
from trainer.export.model_card import card_text
from trainer.export.verify import Check, Expected, check_logits, fixed_rows
from trainer.model import quantization
from trainer.model.build import Model, build, location, merge_adapters, positions
from trainer.tracking import records
from trainer.training import checkpoint
from trainer.training.checkpoint import Checkpoint

ROWS, WIDTH = 2, 64  # of made-up token ids, where the run's data are gone


def run(folder: Path, *, which: str = "latest", merge: bool = False, out: Path | None = None) -> int:
    """Export, check, say where and how it went; 0, or RunFailed where the folder is not the model that was trained."""
    about = read_run(folder)
    settings = Settings.from_dict(about["settings"])
    if merge and settings.mode != "lora":
        raise UserError(f"--merge: {folder} is a run of --mode {settings.mode}; it has no adapters to merge")
    point = _checkpoint(folder, which)
    final = _place(folder, point, merge, out)
    model = model_at(folder, settings, point, about, unpacked=merge)
    data, no_data = _data(settings, about)
    moved = merge and bool(settings.model.quant)  # onto weights other than those the adapters were trained on
    expected = _expected(model, settings, point, about, data, no_data, moved=moved)
    module = merge_adapters(model) if merge else model.module
    trained = {n: p.detach() for n, p in module.named_parameters() if merge or p.requires_grad}
    rows = _records(folder)

    def card(check: Check) -> str:
        return card_text(
            about, rows, check, step=point.step, merged=merge, change=_change(check, point, moved),
            measured=_measured(rows),
        )  # fmt: skip

    check = export(
        final, module, trained, base=None if merge else base_of(model, folder),
        tokenizer=settings.model.model if about["data"]["tokenizer"] else None, expected=expected, card=card,
    )  # fmt: skip
    line = f"{point.folder.name} of {folder} -> {final}: {check.line()}{_change(check, point, moved)}"
    if check.problems:
        raise RunFailed(line)
    print(line)
    return 0


def _measured(rows: list[records.Record]) -> dict[str, Any]:
    """What the run measured at its end; {} where it has not ended."""
    ends = [row for row in rows if isinstance(row, records.EventRecord) and row.event == "finished"]
    return ends[-1].facts if ends else {}


def _change(check: Check, point: Checkpoint, moved: bool) -> str:
    """Half a sentence about what merging onto the float32 base did to the validation loss; "" where it is the same."""
    if not moved:
        return ""
    if check.loss is None or point.val_loss is None:
        return "; merged onto the float32 base: how its validation loss changed by that is not known"
    change = f"{point.val_loss:.6f} on the quantised base, {check.loss:.6f} merged onto the float32 one"
    return f"; validation loss {change} ({check.loss - point.val_loss:+.6f})"


def read_run(folder: Path) -> dict[str, Any]:
    """The content of a run folder's run.json; UserError where there is none or it is no run's."""
    path = folder / "run.json"
    try:
        about = json.loads(path.read_text())
        for key in ("settings", "resolved", "data", "model", "versions", "not_comparable_with_card"):
            about[key]
        return dict(about)
    except FileNotFoundError:
        raise UserError(f"{folder}: no run.json there; pass a run folder, for instance runs/<run name>") from None
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{path}: cannot be read as a run's ({type(problem).__name__}: {problem})") from None


def _checkpoint(folder: Path, which: str) -> Checkpoint:
    """The checkpoint that was asked for, verified."""
    if which not in ("latest", "best") and not re.fullmatch(r"step-\d+", which):
        raise UserError(f"--checkpoint {which}: expected step-N, best or latest")
    return checkpoint.choose(folder / "checkpoints", which, flag="--checkpoint")


def _place(folder: Path, point: Checkpoint, merge: bool, out: Path | None) -> Path:
    """Where the folder goes. A default one holds this checkpoint by its name, so only its like can stand there."""
    if out is None:
        return folder / f"{'merged' if merge else 'export'}-{point.folder.name}"
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out}: is there already and not empty; pass another folder")
    return out.absolute()


def model_at(
    folder: Path, settings: Settings, point: Checkpoint, about: dict[str, Any], *, unpacked: bool = False
) -> Model:
    """The model as it stood at the checkpoint, on one device, in evaluation mode; `unpacked`: on the float32 base."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kept = folder / "base"
    source = settings.model
    if settings.mode == "full":  # every weight is in the checkpoint: the base's own are not needed
        source = dataclasses.replace(source, init="random")
    elif kept.is_dir():
        source = dataclasses.replace(source, model=str(kept), init="pretrained")
    if unpacked:
        source = dataclasses.replace(source, quant=None, quant_double=False)
    model = build(dataclasses.replace(settings, model=source), hashed=settings.mode == "lora", device=device)
    quantization.compute_in(model.module, torch.bfloat16 if about["resolved"]["precision"] == "bf16" else torch.float32)
    if settings.mode == "lora" and model.facts["fingerprint"] != about["model"]["fingerprint"]:
        raise UserError(
            f"{folder}: its adapters were trained on another base model than {location(source.model)} is now "
            f"({about['model']['fingerprint']}, now {model.facts['fingerprint']}); put that one back"
        )
    if point.about["base"] != about["model"]["fingerprint"]:
        raise UserError(f"checkpoint {point.folder} is of a run on another base model than {folder / 'run.json'} says")
    checkpoint.load_weights(point, model.module)
    model.module.to(device).eval()
    return model


def _data(settings: Settings, about: dict[str, Any]) -> tuple[Prepared | None, str]:
    """(the run's prepared data, why they are missing): from the cache, or made again where their source is there."""
    try:
        data = prepare(
            settings.data, model=settings.model.model, global_batch=settings.train.global_batch,
            say=lambda line: print(line, flush=True),
        )  # fmt: skip
    except UserError as problem:
        print(f"note: the validation loss cannot be evaluated again: {problem}", flush=True)
        return None, "the data of the run are not there any more"
    if data.facts["fingerprint"] != about["data"]["fingerprint"]:
        return None, "the data were changed since the run"
    return data, ""


def _expected(
    model: Model, settings: Settings, point: Checkpoint, about: dict[str, Any], data: Prepared | None, no_data: str,
    *, moved: bool,
) -> Expected:  # fmt: skip
    device = next(model.module.parameters()).device
    ids = fixed_rows(data) if data is not None else _made_up_rows(model)
    return Expected(
        input_ids=ids, logits=check_logits(model.module, ids, device), tied=model.tied,
        loss=None if moved else point.val_loss,
        data=data.folder if data is not None else None, no_data=no_data, eval_batch=settings.train.eval_batch,
        device=device.type, precision=about["resolved"]["precision"], threads=torch.get_num_threads(),
        elsewhere=about["resolved"]["device"] != device.type,
    )  # fmt: skip


def _made_up_rows(model: Model) -> np.ndarray:
    """int64 [ROWS, WIDTH or less]: token ids from a seed."""
    width = min(WIDTH, positions(model.causal.config) or WIDTH)
    return np.random.default_rng(0).integers(0, model.causal.config.vocab_size, (ROWS, width))


def _records(folder: Path) -> list[records.Record]:
    try:
        return list(records.read(folder / "metrics.jsonl"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as problem:
        raise UserError(f"{folder / 'metrics.jsonl'}: {problem}") from problem
