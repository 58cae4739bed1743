"""`launch/export.py`: a checkpoint of a run, read back in one process without DeepSpeed, as a checked folder."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.config.errors import TrainingError, UserError
from trainer.config.run_metadata import read_run_metadata
from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset, prepare
from trainer.export.folder import base_model_ref, export_folder
from trainer.export.model_card import render_model_card
from trainer.export.verify import ReferenceOutputs, VerificationResult, compute_logits, fixed_input_ids
from trainer.model import quantization
from trainer.model.build import TrainableModel, build_model, get_max_positions, merge_adapters, resolve_model_path
from trainer.tracking import records
from trainer.training import checkpoint
from trainer.training.checkpoint import Checkpoint

NUM_RANDOM_ROWS, RANDOM_ROW_LENGTH = 2, 64  # of made-up token ids, where the run's data are gone


def export_checkpoint(
    run_folder: Path, *, checkpoint_name: str = "latest", merge: bool = False, output_dir: Path | None = None,
    answer_file: Path | None = None,
) -> int:  # fmt: skip
    """Export, check, say where and how it went; 0, or TrainingError where the folder is not the model that was
    trained."""
    metadata = read_run_metadata(run_folder / "run.json")
    settings = Settings.from_dict(metadata["settings"])
    if merge and settings.mode != "lora":
        raise UserError(f"--merge: {run_folder} is a run of --mode {settings.mode}; it has no adapters to merge")
    answer = "" if answer_file is None else read_answer_sentence(answer_file)
    source_checkpoint = _select_checkpoint(run_folder, checkpoint_name)
    destination = _resolve_output_dir(run_folder, source_checkpoint, merge, output_dir)
    model = load_model_at_checkpoint(run_folder, settings, source_checkpoint, metadata, dequantize=merge)
    data, data_missing_reason = _prepare_data(settings, metadata)
    is_base_dequantized = merge and bool(
        settings.model.quant
    )  # onto weights other than those the adapters were trained on
    reference_outputs = _build_reference_outputs(
        model, settings, source_checkpoint, metadata, data, data_missing_reason, is_base_dequantized=is_base_dequantized
    )
    module = merge_adapters(model) if merge else model.module
    state_dict = {n: p.detach() for n, p in module.named_parameters() if merge or p.requires_grad}
    run_records = _read_records(run_folder)

    def render_card(verification: VerificationResult) -> str:
        return render_model_card(
            metadata, run_records, verification, step=source_checkpoint.step, is_merged=merge,
            loss_change=_describe_loss_change(verification, source_checkpoint, is_base_dequantized),
            measurements=_final_measurements(run_records), answer=answer,
        )  # fmt: skip

    verification = export_folder(
        destination, module, state_dict, base_model=None if merge else base_model_ref(model, run_folder),
        tokenizer=settings.model.model if metadata["data"]["tokenizer"] else None, reference_outputs=reference_outputs,
        render_card=render_card,
    )  # fmt: skip
    summary = (
        f"{source_checkpoint.folder.name} of {run_folder} -> {destination}: "
        f"{verification.summary()}{_describe_loss_change(verification, source_checkpoint, is_base_dequantized)}"
    )
    if verification.problems:
        raise TrainingError(summary)
    print(summary)
    return 0


def read_answer_sentence(path: Path) -> str:
    """The sentence of an answer.json of a study or a comparison; UserError where there is none."""
    try:
        sentence = json.loads(path.read_text(encoding="utf-8"))["sentence"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--answer {path}: cannot be read ({error}); expected answer.json of a study") from error
    if not isinstance(sentence, str) or not sentence:
        raise UserError(f"--answer {path}: its sentence is {sentence!r:.40}; expected answer.json of a study")
    return sentence


def _final_measurements(run_records: list[records.Record]) -> dict[str, Any]:
    """What the run measured at its end; {} where it has not ended."""
    finished_events = [
        record for record in run_records if isinstance(record, records.EventRecord) and record.event == "finished"
    ]
    return finished_events[-1].facts if finished_events else {}


def _describe_loss_change(
    verification: VerificationResult, source_checkpoint: Checkpoint, is_base_dequantized: bool
) -> str:
    """Half a sentence about what merging onto the float32 base did to the validation loss; "" where it is the same."""
    if not is_base_dequantized:
        return ""
    if verification.loss is None or source_checkpoint.val_loss is None:
        return "; merged onto the float32 base: how its validation loss changed by that is not known"
    change = (
        f"{source_checkpoint.val_loss:.6f} on the quantised base, {verification.loss:.6f} merged onto the float32 one"
    )
    return f"; validation loss {change} ({verification.loss - source_checkpoint.val_loss:+.6f})"


def _select_checkpoint(run_folder: Path, checkpoint_name: str) -> Checkpoint:
    """The checkpoint that was asked for, verified."""
    if checkpoint_name not in ("latest", "best") and not re.fullmatch(r"step-\d+", checkpoint_name):
        raise UserError(f"--checkpoint {checkpoint_name}: expected step-N, best or latest")
    return checkpoint.resolve_checkpoint(run_folder / "checkpoints", checkpoint_name, flag="--checkpoint")


def _resolve_output_dir(run_folder: Path, source_checkpoint: Checkpoint, merge: bool, output_dir: Path | None) -> Path:
    """Where the folder goes. A default one holds this checkpoint by its name, so only its like can stand there."""
    if output_dir is None:
        return run_folder / f"{'merged' if merge else 'export'}-{source_checkpoint.folder.name}"
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise UserError(f"--output-dir {output_dir}: is there already and not empty; pass another folder")
    return output_dir.absolute()


def load_model_at_checkpoint(
    run_folder: Path,
    settings: Settings,
    source_checkpoint: Checkpoint,
    metadata: dict[str, Any],
    *,
    dequantize: bool = False,
) -> TrainableModel:
    """The model as it stood at the checkpoint, on one device, in evaluation mode; `dequantize`: on the float32 base."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base_folder = run_folder / "base"
    model_settings = settings.model
    if settings.mode == "full":  # every weight is in the checkpoint: the base's own are not needed
        model_settings = dataclasses.replace(model_settings, init="random")
    elif base_folder.is_dir():
        model_settings = dataclasses.replace(model_settings, model=str(base_folder), init="pretrained")
    if dequantize:
        model_settings = dataclasses.replace(model_settings, quant=None, quant_double=False)
    model = build_model(
        dataclasses.replace(settings, model=model_settings), with_fingerprint=settings.mode == "lora", device=device
    )
    quantization.set_compute_dtype(
        model.module, torch.bfloat16 if metadata["resolved"]["precision"] == "bf16" else torch.float32
    )
    if settings.mode == "lora" and model.metadata["fingerprint"] != metadata["model"]["fingerprint"]:
        raise UserError(
            f"{run_folder}: its adapters were trained on another base model than "
            f"{resolve_model_path(model_settings.model)} is now "
            f"({metadata['model']['fingerprint']}, now {model.metadata['fingerprint']}); put that one back"
        )
    if source_checkpoint.metadata["base"] != metadata["model"]["fingerprint"]:
        raise UserError(
            f"checkpoint {source_checkpoint.folder} is of a run on another base model than {run_folder / 'run.json'} "
            "says"
        )
    checkpoint.load_weights(source_checkpoint, model.module)
    model.module.to(device).eval()
    return model


def _prepare_data(settings: Settings, metadata: dict[str, Any]) -> tuple[PreparedDataset | None, str]:
    """(the run's prepared data, why they are missing): from the cache, or made again where their source is there."""
    try:
        data = prepare(
            settings.data, model=settings.model.model, global_batch=settings.train.global_batch,
            log=lambda line: print(line, flush=True),
        )  # fmt: skip
    except UserError as error:
        print(f"note: the validation loss cannot be evaluated again: {error}", flush=True)
        return None, "the data of the run are not there any more"
    if data.metadata["fingerprint"] != metadata["data"]["fingerprint"]:
        return None, "the data were changed since the run"
    return data, ""


def _build_reference_outputs(
    model: TrainableModel, settings: Settings, source_checkpoint: Checkpoint, metadata: dict[str, Any],
    data: PreparedDataset | None, data_missing_reason: str,
    *, is_base_dequantized: bool,
) -> ReferenceOutputs:  # fmt: skip
    """Parameters: what the reference is computed from."""
    device = next(model.module.parameters()).device
    input_ids = fixed_input_ids(data) if data is not None else _random_input_ids(model)
    return ReferenceOutputs(
        input_ids=input_ids, logits=compute_logits(model.module, input_ids, device), is_tied=model.has_tied_embeddings,
        loss=None if is_base_dequantized else source_checkpoint.val_loss,
        data_folder=data.folder if data is not None else None, data_missing_reason=data_missing_reason,
        eval_batch=settings.train.eval_batch,
        device=device.type, precision=metadata["resolved"]["precision"], num_threads=torch.get_num_threads(),
        is_cross_device=metadata["resolved"]["device"] != device.type,
    )  # fmt: skip


def _random_input_ids(model: TrainableModel) -> np.ndarray:
    """int64 [NUM_RANDOM_ROWS, RANDOM_ROW_LENGTH or less]: token ids from a seed."""
    row_length = min(RANDOM_ROW_LENGTH, get_max_positions(model.causal.config) or RANDOM_ROW_LENGTH)
    return np.random.default_rng(0).integers(0, model.causal.config.vocab_size, (NUM_RANDOM_ROWS, row_length))


def _read_records(run_folder: Path) -> list[records.Record]:
    try:
        return list(records.read_records(run_folder / "metrics.jsonl"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{run_folder / 'metrics.jsonl'}: {error}") from error
