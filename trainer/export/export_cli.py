"""A checkpoint of a run as a checked folder, read back in one process without DeepSpeed: the one path of an export.

A run takes it at its end (`trainer.export.fresh_process`), `launch/export.py` whenever it is asked.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from trainer.config.choices import ExportDtype
from trainer.config.errors import TrainingError, UserError
from trainer.config.files import read_json_object
from trainer.config.run_metadata import read_run_metadata
from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset, load
from trainer.data.prepare import prepare
from trainer.data.tokenizer import find_model
from trainer.distributed.process_group import config_digest
from trainer.export import verify
from trainer.export.folder import (
    MODEL_CARD_FILE,
    find_base,
    refuse_lost_files,
    save_adapter,
    save_plain_model,
    save_tokenizer,
    whole_folder,
)
from trainer.export.model_card import read_license, render_model_card
from trainer.model import quantization
from trainer.model.build import TrainableModel, build_model, load_config
from trainer.tracking.records import METRICS_FILE, read_records
from trainer.training.checkpoint import Checkpoint, load_weights, resolve_checkpoint


def export_checkpoint(
    run_folder: Path | str,
    *,
    checkpoint: str = "latest",
    merge: bool = False,
    dtype: ExportDtype = "fp32",
    output_dir: Path | str | None = None,
    answer: Path | None = None,
    data_folder: str | None = None,
    is_own_export: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint as a folder, load it again, and write what came out into its card; {"checkpoint", "folder",
    "summary", "problems"}, of which a folder that fails its check has some: it is kept, and its card says so.

    `merge`: fold the adapters into the weights; `answer`: answer.json, whose sentence the card repeats; `data_folder`:
    the run's prepared data, else they are looked for; `is_own_export`: the run's own, which replaces an earlier one.
    TrainingError where it cannot be written; an earlier folder of that name then stays.
    """
    run_folder = Path(run_folder)
    metadata = read_run_metadata(run_folder / "run.json")
    if merge and metadata["mode"] != "lora":
        raise UserError(f"--merge: {run_folder} is a run of --mode {metadata['mode']}; it has no adapters to merge")
    sentence = read_json_object(answer, f"--answer {answer}").get("sentence") if answer else ""
    if not isinstance(sentence, str):
        raise UserError(f"--answer {answer}: its sentence is {sentence!r:.40}; expected answer.json of a study")
    source = resolve_checkpoint(run_folder / "checkpoints", checkpoint, flag="--checkpoint")
    settings = trained_settings(metadata, source)
    is_adapter = settings.mode == "lora" and not merge
    if dtype != "fp32" and is_adapter and settings.lora.adapter == "pissa":
        raise UserError(f"--dtype {dtype}: a pissa adapter holds its start twice, rounded apart; add --merge")
    name = f"{'merged' if merge else 'export'}-{source.folder.name}" + f"-{dtype}" * (dtype != "fp32")
    destination = run_folder / name if output_dir is None else Path(output_dir).absolute()
    is_empty = not destination.exists() or (destination.is_dir() and not any(destination.iterdir()))
    if output_dir is not None and not is_empty and not is_own_export:
        raise UserError(f"--output-dir {output_dir}: is there already and not empty; pass another folder")
    refuse_lost_files(destination)
    base = find_base(metadata["model"], run_folder, names_place=is_own_export) if is_adapter else None

    model = load_model_at_checkpoint(run_folder, settings, source, metadata, dequantize=merge)
    module, output_layer = model.module, model.causal.get_output_embeddings()
    is_tied = output_layer is not None and output_layer.weight is model.causal.get_input_embeddings().weight
    device = next(module.parameters()).device
    data, loss_missing_reason = _find_data(settings, source, data_folder)
    input_ids = verify.fixed_input_ids(data, model.causal.config)
    logits = verify.compute_logits(module, input_ids, device)
    if merge:
        module = module.merge_and_unload(safe_merge=True)  # safe: refuses weights that are not finite
    state_dict = {n: p.detach() for n, p in module.named_parameters() if merge or p.requires_grad}
    causes = []  # of another validation loss than that of the trained weights, beyond rounding of its sums
    if merge and settings.model.quant:
        causes = ["merged onto the float32 base instead of the quantised one"]
    if dtype != "fp32":  # what is stored is held against the rounded model, and that before against the trained one
        causes.append(f"rounded to {dtype}")
        if problem := verify.compare_logits(verify.compute_logits(module, input_ids, device), logits)[1]:
            raise TrainingError(f"{problem}, before they are rounded")
        for weight in state_dict.values():
            weight.copy_(weight.to(getattr(torch, verify.STORED_DTYPES[dtype][0])))
        logits = verify.compute_logits(module, input_ids, device)

    data_info = data.metadata if data is not None else metadata["data"]
    with whole_folder(destination) as folder:
        if base is None:
            save_plain_model(folder, module, state_dict, dtype)
        else:
            save_adapter(folder, model, state_dict, base, dtype)
        save_tokenizer(folder, settings.model.model, data_info.get("chat_template"), module.generation_config)
        del model, module, state_dict  # their memory is for the one that is loaded now
        result = verify.verify_folder(
            folder,
            source,
            input_ids=input_ids,
            logits=logits,
            is_tied=is_tied,
            device=device,
            base_path=base.path if base else None,
            dtype=dtype,
            val=data.val if data is not None else None,
            eval_batch=settings.train.eval_batch,
            loss_missing_reason=loss_missing_reason,
            loss_changes=causes,
        )
        path = run_folder / METRICS_FILE
        try:
            records = list(read_records(path, with_steps=False)) if path.exists() else []
        except ValueError as error:
            raise UserError(str(error)) from error
        card = render_model_card(
            {**metadata, "settings": settings.as_dict(), "data": data_info},
            records,
            result,
            step=source.step,
            is_merged=merge,
            answer=sentence,
            license=read_license(settings.model.model) if settings.model.init == "pretrained" else None,
        )
        (folder / MODEL_CARD_FILE).write_text(card, encoding="utf-8")
    result_facts = {"summary": result.summary, "problems": list(result.problems)}
    return {"checkpoint": source.folder.name, "folder": str(destination), **result_facts}


def _find_data(settings: Settings, source: Checkpoint, data_folder: str | None) -> tuple[PreparedDataset | None, str]:
    try:
        data = load(Path(data_folder)) if data_folder else None
        if data is None:
            batch = settings.train.global_batch
            data = prepare(settings.data, model=settings.model.model, global_batch=batch, log=print)
    except UserError as error:
        print(f"note: the validation loss cannot be evaluated again: {error}", flush=True)
        return None, "the data of the run are not there any more"
    if data.metadata["fingerprint"] != source.metadata["data"]:
        return None, f"the data were changed since {source.folder.name} was saved"
    return data, ""


def trained_settings(metadata: Mapping[str, Any], source: Checkpoint) -> Settings:
    """Those by which the run last went on, but as the checkpoint was trained with what no resume may change unasked."""
    return Settings(**metadata.get("resumed", metadata)["settings"]).as_trained(source.metadata["fixed"])


def load_model_at_checkpoint(
    run_folder: Path, settings: Settings, source: Checkpoint, metadata: Mapping[str, Any], *, dequantize: bool = False
) -> TrainableModel:
    """The model as it stood at the checkpoint, in evaluation mode, on a GPU where the run had one and there is one
    here; `dequantize`: on the float32 base."""
    has_gpu = source.metadata["device"] == "cuda" and torch.cuda.is_available()
    device, base_folder = torch.device("cuda" if has_gpu else "cpu"), run_folder / "base"
    changes: dict[str, Any] = {"quant": None, "quant_double": False} if dequantize else {}
    if settings.mode == "full":  # every weight is in the checkpoint: the base's own are not needed
        changes["init"] = "random"
    elif base_folder.is_dir():
        changes |= {"model": str(base_folder), "init": "pretrained"}
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, **changes))
    model = build_model(settings, with_fingerprint=settings.mode == "lora", device=device)
    model_path = find_model(settings.model.model).path
    if settings.mode == "full":  # how to generate is no weight: it is the base's, where that is still there
        with contextlib.suppress(OSError):
            model.causal.generation_config = GenerationConfig.from_pretrained(model_path, local_files_only=True)
    elif model.metadata["fingerprint"] != source.metadata["base"]:
        raise UserError(
            f"{run_folder}: its adapters were trained on another base model than {model_path} is now; restore that one"
        )
    config = config_digest(load_config(dataclasses.replace(settings.model, dropout=None)))
    is_same_library = metadata["versions"].get("transformers") == transformers.__version__
    if is_same_library and config != source.metadata["fixed"].get("model_config"):
        raise UserError(f"{run_folder}: the config.json of {model_path} was changed since the run; restore it")
    is_bf16 = source.metadata["precision"] == "bf16"
    quantization.set_compute_dtype(model.module, torch.bfloat16 if is_bf16 else torch.float32)
    load_weights(source, model.module)
    model.module.to(device).eval()
    return model
