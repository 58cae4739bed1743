"""A checkpoint of a run as a checked folder, read back in one process without DeepSpeed: the one path of an export.

A run takes it at its end (`trainer.export.fresh_process`), `launch/export.py` whenever it is asked.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from trainer.config.choices import ExportDtype
from trainer.config.errors import TrainingError, UserError
from trainer.config.files import read_json_object
from trainer.config.run_metadata import read_run_metadata
from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset, load
from trainer.data.prepare import prepare
from trainer.data.tokenizer import resolve_model_path
from trainer.export import verify
from trainer.export.folder import (
    MODEL_CARD_FILE,
    base_model_ref,
    check_push,
    push_folder,
    save_adapter,
    save_plain_model,
    save_tokenizer,
    whole_folder,
)
from trainer.export.model_card import render_model_card
from trainer.model import quantization
from trainer.model.build import TrainableModel, build_model
from trainer.tracking import records
from trainer.training.checkpoint import (
    Checkpoint,
    best_checkpoint,
    list_checkpoints,
    load_weights,
    resolve_checkpoint,
)


def run_export_command(*, push: str | None, private: bool, **options: Any) -> int:
    """What `launch/export.py` does with its flags: export, say where and how it went, push; 0, or TrainingError where
    the folder is not the model that was trained: then nothing is pushed."""
    if push is None and private:
        raise UserError("--private: goes with --push NAMESPACE/NAME")
    if push is not None:
        check_push(push)
    result = export_checkpoint(**options)
    summary = f"{result['checkpoint']} of {options['run_folder']} -> {result['folder']}: {result['summary']}"
    if result["problems"]:
        raise TrainingError(summary + ("; nothing is pushed" if push else ""))
    print(summary, flush=True)
    if push is not None:
        print(f"pushed to {push_folder(Path(result['folder']), push, is_private=private)}")
    return 0


def export_checkpoint(
    run_folder: Path | str,
    *,
    checkpoint: str = "latest",
    merge: bool = False,
    dtype: ExportDtype = "fp32",
    output_dir: Path | str | None = None,
    answer: Path | None = None,
    data_folder: str | None = None,
    device: str | None = None,
    num_threads: int | None = None,
    measurements: Mapping[str, Any] | None = None,
    is_own_export: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint as a folder, load it again, and write what came out into its card.

    `merge`: fold the adapters into the weights; `answer`: answer.json, whose sentence the card repeats; `data_folder`:
    the run's prepared data, else they are looked for; `device`, `num_threads`: left out, a GPU where there is one, and
    torch's; `measurements`: of the run, for the card; `is_own_export`: the run's own, which replaces an earlier one.
    A folder that fails its check is kept, and its card says so: `problems` of the result, beside `checkpoint`,
    `folder` and `summary`. TrainingError where it cannot be written; an earlier folder of that name then stays.
    """
    run_folder = Path(run_folder)
    metadata = read_run_metadata(run_folder / "run.json")
    settings = Settings.from_dict(metadata.get("resumed", metadata)["settings"])  # those by which it last went on
    if merge and settings.mode != "lora":
        raise UserError(f"--merge: {run_folder} is a run of --mode {settings.mode}; it has no adapters to merge")
    answer_sentence = read_answer_sentence(answer) if answer else ""
    if dtype != "fp32" and settings.mode == "lora" and settings.lora.adapter == "pissa" and not merge:
        raise UserError(f"--dtype {dtype}: a pissa adapter holds its start twice, rounded apart; add --merge")
    source = resolve_checkpoint(run_folder / "checkpoints", checkpoint, flag="--checkpoint")
    suffix = "" if dtype == "fp32" else f"-{dtype}"
    default_name = f"{'merged' if merge else 'export'}-{source.folder.name}{suffix}"
    destination = Path(output_dir).absolute() if output_dir is not None else run_folder / default_name
    is_free = is_own_export or not destination.exists() or (destination.is_dir() and not any(destination.iterdir()))
    if output_dir is not None and not is_free:
        raise UserError(f"--output-dir {output_dir}: is there already and not empty; pass another folder")
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    model = load_model_at_checkpoint(run_folder, settings, source, metadata, dequantize=merge, device=device)
    data, loss_missing_reason = (load(Path(data_folder)), "") if data_folder else _prepare_data(settings)
    if data is not None and data.metadata["fingerprint"] != source.metadata["data"]:
        data, loss_missing_reason = None, f"the data were changed since {source.folder.name} was saved"
    input_ids = verify.fixed_input_ids(data, model.causal.config)
    model_device = next(model.module.parameters()).device
    logits = verify.compute_logits(model.module, input_ids, model_device)
    base = base_model_ref(metadata["model"]["name"], run_folder) if settings.mode == "lora" and not merge else None
    is_tied, module = model.has_tied_embeddings, model.module
    if merge:
        module = module.merge_and_unload(safe_merge=True)  # safe: refuses weights that are not finite
    state_dict = {n: p.detach() for n, p in module.named_parameters() if merge or p.requires_grad}
    causes = []  # of another validation loss than that of the trained weights, beyond rounding of its sums
    if merge and settings.model.quant:
        causes.append("merged onto the float32 base instead of the quantised one")
    if dtype != "fp32":
        causes.append(f"rounded to {dtype}")
        logits = _round_weights(module, state_dict, dtype, input_ids, logits)
    with whole_folder(destination) as folder:
        if base is None:
            save_plain_model(folder, module, state_dict, dtype)
        else:
            save_adapter(folder, model, state_dict, base, dtype)
        data_metadata = data.metadata if data is not None else metadata["data"]
        if data_metadata["tokenizer"] is not None:
            chat_template = data_metadata.get("chat_template")
            save_tokenizer(folder, settings.model.model, chat_template, module.generation_config)
        del model, module, state_dict  # their memory is for the one that is loaded now
        result = verify.verify_folder(
            folder,
            input_ids=input_ids,
            logits=logits,
            is_tied=is_tied,
            device=model_device,
            base_path=base.path if base else None,
            dtype=dtype,
            val=data.val if data is not None else None,
            eval_batch=settings.train.eval_batch,
            precision=source.metadata["precision"],
            recorded_loss=None if causes else source.val_loss,
            loss_missing_reason=loss_missing_reason or ("" if causes else "none was recorded"),
            is_cross_device=source.metadata["device"] != model_device.type,
        )
        loss_change = _describe_loss_change(causes, source.val_loss, result.loss)
        card = render_model_card(
            metadata,
            _read_records(run_folder),
            result,
            step=source.step,
            is_merged=merge,
            loss_change=loss_change,
            measurements=measurements,
            choice_reason=_describe_choice(run_folder, source) if settings.output.export == "best" else "",
            answer=answer_sentence,
        )
        (folder / MODEL_CARD_FILE).write_text(card, encoding="utf-8")
    summary = f"{result.summary()}{loss_change}"
    problems = list(result.problems)
    return {"checkpoint": source.folder.name, "folder": str(destination), "summary": summary, "problems": problems}


def read_answer_sentence(path: Path) -> str:
    sentence = read_json_object(path, f"--answer {path}").get("sentence")
    if not isinstance(sentence, str) or not sentence:
        raise UserError(f"--answer {path}: its sentence is {sentence!r:.40}; expected answer.json of a study")
    return sentence


def load_model_at_checkpoint(
    run_folder: Path,
    settings: Settings,
    source: Checkpoint,
    metadata: Mapping[str, Any],
    *,
    dequantize: bool = False,
    device: str | None = None,
) -> TrainableModel:
    """The model as it stood at the checkpoint, on one device, in evaluation mode; `dequantize`: on the float32 base;
    `device`: left out, a GPU where there is one."""
    torch_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model_settings, base_folder = settings.model, run_folder / "base"
    if settings.mode == "full":  # every weight is in the checkpoint: the base's own are not needed
        model_settings = dataclasses.replace(model_settings, init="random")
    elif base_folder.is_dir():
        model_settings = dataclasses.replace(model_settings, model=str(base_folder), init="pretrained")
    if dequantize:
        model_settings = dataclasses.replace(model_settings, quant=None, quant_double=False)
    settings = dataclasses.replace(settings, model=model_settings)
    model = build_model(settings, with_fingerprint=settings.mode == "lora", device=torch_device)
    if settings.mode == "full":  # how to generate is no weight: it is the base's, where that is still there
        with contextlib.suppress(OSError):
            model_path = resolve_model_path(settings.model.model)
            model.causal.generation_config = GenerationConfig.from_pretrained(model_path, local_files_only=True)
    is_bf16 = source.metadata["precision"] == "bf16"
    quantization.set_compute_dtype(model.module, torch.bfloat16 if is_bf16 else torch.float32)
    fingerprint = metadata["model"]["fingerprint"]
    if settings.mode == "lora" and model.metadata["fingerprint"] != fingerprint:
        raise UserError(
            f"{run_folder}: its adapters were trained on another base model than "
            f"{resolve_model_path(model_settings.model)} is now "
            f"({fingerprint}, now {model.metadata['fingerprint']}); restore that one"
        )
    if source.metadata["base"] != fingerprint:
        raise UserError(f"checkpoint {source.folder}: of another base model than {run_folder / 'run.json'} names")
    load_weights(source, model.module)
    model.module.to(torch_device).eval()
    return model


def _prepare_data(settings: Settings) -> tuple[PreparedDataset | None, str]:
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
    return data, ""


def _round_weights(
    module: Any, state_dict: Mapping[str, Tensor], dtype: ExportDtype, input_ids: np.ndarray, logits: np.ndarray
) -> np.ndarray:
    """Round the weights in place, as they will be stored; returns what the rounded model answers.

    Before that the model, merged or not, is held against the answers of the trained one. TrainingError where it
    differs, UserError where a weight has no finite number in `dtype`.
    """
    device = next(module.parameters()).device
    difference = float(np.abs(verify.compute_logits(module, input_ids, device) - logits).max())
    bound = verify.LOGITS_BOUND * max(1.0, float(np.abs(logits).max()))
    if not difference <= bound:
        raise TrainingError(f"logits differ by {difference:.1e} before rounding, more than {bound:.1e}")
    for name, weight in state_dict.items():
        rounded = weight.to(getattr(torch, verify.STORED_DTYPES[dtype][0]))
        if not rounded.isfinite().all():
            raise UserError(f"--dtype {dtype}: {name} holds {float(weight.abs().max()):.3g}; expected bf16 or fp32")
        weight.copy_(rounded)
    return verify.compute_logits(module, input_ids, device)


def _describe_loss_change(causes: list[str], recorded: float | None, exported: float | None) -> str:
    """Half a sentence on what the form of the export does to the validation loss; "" where it does nothing."""
    if not causes:
        return ""
    cause = " and ".join(causes)
    if exported is None or recorded is None:
        return f"; {cause}: how its validation loss changed by that is not known"
    return f"; {cause}: validation loss {exported:.6f}, before {recorded:.6f} ({exported - recorded:+.6f})"


def _describe_choice(run_folder: Path, source: Checkpoint) -> str:
    """What the card of a run with --export best says of the choice of its weights; "" for others than the best."""
    whole = list_checkpoints(run_folder / "checkpoints")
    best = best_checkpoint(whole)
    if best is None or best.step != source.step:
        return ""
    return (
        f"These are the weights with the lowest validation loss ({source.val_loss:.4f}) of those that were saved; "
        f"training went on to step {whole[-1].step:,}."
    )


def _read_records(run_folder: Path) -> list[records.Record]:
    try:
        return list(records.read_records(run_folder / "metrics.jsonl", with_steps=False))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{run_folder / 'metrics.jsonl'}: {error}") from error
