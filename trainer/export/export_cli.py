"""`launch/export.py`: a checkpoint of a run, read back in one process without DeepSpeed, as a checked folder."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.config.choices import ExportDtype
from trainer.config.errors import TrainingError, UserError
from trainer.config.json_file import read_json_object
from trainer.config.run_metadata import read_run_metadata
from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset, prepare
from trainer.export import verify
from trainer.export.folder import FolderContent, base_model_ref, export_folder, training_tokenizer
from trainer.export.model_card import render_model_card
from trainer.export.push import check_push, push_folder
from trainer.export.verify import ReferenceOutputs, VerificationResult, compute_logits, fixed_input_ids
from trainer.model import quantization
from trainer.model.build import TrainableModel, build_model, get_max_positions, merge_adapters, resolve_model_path
from trainer.tracking import records
from trainer.training import checkpoint
from trainer.training.checkpoint import Checkpoint
from trainer.training.checkpoint_loading import load_weights

NUM_RANDOM_ROWS, RANDOM_ROW_LENGTH = 2, 64  # of made-up token ids, where the run's data are gone


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What is to be exported of a run, in which form, and where to: the flags of `launch/export.py`."""

    run_folder: Path
    checkpoint: str = "latest"
    merge: bool = False  #: fold the adapters into the weights
    dtype: ExportDtype = "fp32"
    output_dir: Path | None = None
    answer: Path | None = None  #: answer.json, whose sentence the card repeats
    push: str | None = None  #: repository of the hub, NAMESPACE/NAME
    private: bool = False


def export_checkpoint(request: ExportRequest) -> int:
    """Export, check, say where and how it went, push; 0, or TrainingError where the folder is not the model that was
    trained: then nothing is pushed.

    Long: what is refused before slow work, then the parts of the folder in the order in which they come about.
    """
    run_folder, merge = request.run_folder, request.merge
    metadata = read_run_metadata(run_folder / "run.json")
    settings = Settings.from_dict(metadata["settings"])
    if merge and settings.mode != "lora":
        raise UserError(f"--merge: {run_folder} is a run of --mode {settings.mode}; it has no adapters to merge")
    answer = read_answer_sentence(request.answer) if request.answer else ""
    if request.dtype != "fp32" and settings.mode == "lora" and settings.lora.adapter == "pissa" and not merge:
        raise UserError(f"--dtype {request.dtype}: a pissa adapter holds its start twice, rounded apart; add --merge")
    source_checkpoint = select_run_checkpoint(run_folder, request.checkpoint)
    destination = _resolve_output_dir(request, source_checkpoint)
    if request.push is not None:
        check_push(request.push)
    model = load_model_at_checkpoint(run_folder, settings, source_checkpoint, metadata, dequantize=merge)
    data, data_missing_reason = _prepare_data(settings, metadata)
    causes = [  # of another validation loss than that of the trained weights, beyond rounding of its sums
        *(["merged onto the float32 base instead of the quantised one"] if merge and settings.model.quant else []),
        *([f"rounded to {request.dtype}"] if request.dtype != "fp32" else []),
    ]
    loss_missing_reason = data_missing_reason or ("" if causes else "none was recorded")
    loss = None if causes else source_checkpoint.val_loss
    reference_outputs = _build_reference_outputs(model, settings, metadata, data, loss, loss_missing_reason)
    module = merge_adapters(model) if merge else model.module
    state_dict = {n: p.detach() for n, p in module.named_parameters() if merge or p.requires_grad}
    if request.dtype != "fp32":
        reference_outputs = _round_weights(module, state_dict, request.dtype, reference_outputs)
    run_records = _read_records(run_folder)
    describe_loss_change = partial(_describe_loss_change, causes, source_checkpoint.val_loss)

    def render_card(verification: VerificationResult) -> str:
        return render_model_card(
            metadata,
            run_records,
            verification,
            step=source_checkpoint.step,
            is_merged=merge,
            loss_change=describe_loss_change(verification.loss),
            answer=answer,
        )

    content = FolderContent(
        module=module,
        state_dict=state_dict,
        base_model=None if merge else base_model_ref(model, run_folder),
        tokenizer=training_tokenizer(settings.model.model, metadata["data"]),
        dtype=request.dtype,
    )
    verification = export_folder(destination, content, reference_outputs, render_card)
    outcome = f"{verification.summary()}{describe_loss_change(verification.loss)}"
    summary = f"{source_checkpoint.folder.name} of {run_folder} -> {destination}: {outcome}"
    if verification.problems:
        raise TrainingError(summary + ("; nothing is pushed" if request.push else ""))
    print(summary, flush=True)
    if request.push is not None:
        print(f"pushed to {push_folder(destination, request.push, is_private=request.private)}")
    return 0


def read_answer_sentence(path: Path) -> str:
    """The sentence of an answer.json of a study or a comparison; UserError where there is none."""
    sentence = read_json_object(path, f"--answer {path}").get("sentence")
    if not isinstance(sentence, str) or not sentence:
        raise UserError(f"--answer {path}: its sentence is {sentence!r:.40}; expected answer.json of a study")
    return sentence


def _round_weights(
    module: Any, state_dict: Mapping[str, Tensor], dtype: ExportDtype, reference_outputs: ReferenceOutputs
) -> ReferenceOutputs:
    """Round the weights in place, as they will be stored; returns what the rounded model answers.

    Before that the model, merged or not, is held against the answers of the trained one. TrainingError where it
    differs, UserError where a weight has no finite number in `dtype`.
    """
    device = next(module.parameters()).device
    exact = compute_logits(module, reference_outputs.input_ids, device)
    difference = float(np.abs(exact - reference_outputs.logits).max())
    bound = verify.LOGITS_BOUND * max(1.0, float(np.abs(reference_outputs.logits).max()))
    if not difference <= bound:
        raise TrainingError(f"logits differ by {difference:.1e} before rounding, more than {bound:.1e}")
    for name, weight in state_dict.items():
        rounded = weight.to(getattr(torch, verify.STORED_DTYPES[dtype][0]))
        if not rounded.isfinite().all():
            raise UserError(f"--dtype {dtype}: {name} holds {float(weight.abs().max()):.3g}; expected bf16 or fp32")
        weight.copy_(rounded)
    logits = compute_logits(module, reference_outputs.input_ids, device)
    return dataclasses.replace(reference_outputs, logits=logits, stored_dtype=dtype)


def _describe_loss_change(causes: list[str], recorded: float | None, exported: float | None) -> str:
    """Half a sentence on what the form of the export does to the validation loss; "" where it does nothing."""
    if not causes:
        return ""
    cause = " and ".join(causes)
    if exported is None or recorded is None:
        return f"; {cause}: how its validation loss changed by that is not known"
    return f"; {cause}: validation loss {exported:.6f}, before {recorded:.6f} ({exported - recorded:+.6f})"


def select_run_checkpoint(run_folder: Path, checkpoint_name: str) -> Checkpoint:
    """The checkpoint that was asked for, verified."""
    if checkpoint_name not in ("latest", "best") and not re.fullmatch(r"step-\d+", checkpoint_name):
        raise UserError(f"--checkpoint {checkpoint_name}: expected step-N, best or latest")
    return checkpoint.resolve_checkpoint(run_folder / "checkpoints", checkpoint_name, flag="--checkpoint")


def _resolve_output_dir(request: ExportRequest, source_checkpoint: Checkpoint) -> Path:
    """Where the folder goes. A default one holds this checkpoint by its name, so only its like can stand there."""
    output_dir = request.output_dir
    if output_dir is None:
        suffix = "" if request.dtype == "fp32" else f"-{request.dtype}"
        kind = "merged" if request.merge else "export"
        return request.run_folder / f"{kind}-{source_checkpoint.folder.name}{suffix}"
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
    settings = dataclasses.replace(settings, model=model_settings)
    model = build_model(settings, with_fingerprint=settings.mode == "lora", device=device)
    is_bf16 = metadata["resolved"]["precision"] == "bf16"
    quantization.set_compute_dtype(model.module, torch.bfloat16 if is_bf16 else torch.float32)
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
    load_weights(source_checkpoint, model.module)
    model.module.to(device).eval()
    return model


def _prepare_data(settings: Settings, metadata: dict[str, Any]) -> tuple[PreparedDataset | None, str]:
    """(the run's prepared data, why they are missing): from the cache, or made again where their source is there."""
    try:
        data = prepare(
            settings.data,
            model=settings.model.model,
            global_batch=settings.train.global_batch,
            log=lambda line: print(line, flush=True),
        )
    except UserError as error:
        print(f"note: the validation loss cannot be evaluated again: {error}", flush=True)
        return None, "the data of the run are not there any more"
    if data.metadata["fingerprint"] != metadata["data"]["fingerprint"]:
        return None, "the data were changed since the run"
    return data, ""


def _build_reference_outputs(
    model: TrainableModel,
    settings: Settings,
    metadata: dict[str, Any],
    data: PreparedDataset | None,
    loss: float | None,
    loss_missing_reason: str,
) -> ReferenceOutputs:
    """The model's answers on validation rows, on made-up ones where the data are gone."""
    device, vocab_size = next(model.module.parameters()).device, model.causal.config.vocab_size
    if data is not None:
        input_ids = fixed_input_ids(data)
    else:
        row_length = min(RANDOM_ROW_LENGTH, get_max_positions(model.causal.config) or RANDOM_ROW_LENGTH)
        input_ids = np.random.default_rng(0).integers(0, vocab_size, (NUM_RANDOM_ROWS, row_length))
    return ReferenceOutputs(
        input_ids=input_ids,
        logits=compute_logits(model.module, input_ids, device),
        is_tied=model.has_tied_embeddings,
        loss=loss,
        loss_missing_reason=loss_missing_reason,
        data_folder=data.folder if data is not None else None,
        eval_batch=settings.train.eval_batch,
        device=device.type,
        precision=metadata["resolved"]["precision"],
        num_threads=torch.get_num_threads(),
        is_cross_device=metadata["resolved"]["device"] != device.type,
    )


def _read_records(run_folder: Path) -> list[records.Record]:
    try:
        return list(records.read_records(run_folder / "metrics.jsonl", with_steps=False))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{run_folder / 'metrics.jsonl'}: {error}") from error
