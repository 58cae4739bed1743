"""What can be refused before data and weights are touched."""

import tempfile
from pathlib import Path

from trainer.config.errors import UserError
from trainer.config.settings import Settings
from trainer.distributed.deepspeed_config import DeepSpeedFile, read_deepspeed_file
from trainer.distributed.process_group import DistContext
from trainer.model import optimizer
from trainer.model.build import build_model, get_max_positions, load_config
from trainer.training.text_metrics import check_installed


def validate_early(settings: Settings, dist_context: DistContext) -> None:
    """Refuse what is wrong with batch sum, ZeRO file, device, targets or output."""
    settings.train.batch(dist_context.world_size)
    _check_writable(Path(settings.run_folder))
    optimizer.check_8bit_supported(settings.train, zero_stage=None, on_cpu=dist_context.device.type == "cpu")
    if settings.output.score_samples:
        check_installed("--score-samples")
    if settings.engine.execution == "graphs" and dist_context.device.type == "cpu":
        raise UserError("--execution graphs: CUDA graphs need a GPU; expected auto or eager")
    if settings.engine.precision == "fp16" and dist_context.device.type == "cpu":
        raise UserError("--precision fp16: processors do not compute in it; use fp32 or bf16")
    if settings.engine.ds_config is not None:
        validate_stage(settings, read_deepspeed_file(settings.engine.ds_config))
    max_positions = get_max_positions(load_config(settings.model))
    if max_positions is not None and settings.data.block_size > max_positions:
        raise UserError(
            f"--block-size {settings.data.block_size}: {settings.model.model} takes at most {max_positions} tokens"
        )
    build_model(settings, on_meta=True)  # what cannot be built, and targets and ranks, without reading weights


def _check_writable(folder: Path) -> None:
    """UserError where nothing can be written to the run folder, or to the nearest folder above it that is there."""
    existing_folder = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryDirectory(prefix=".writable-", dir=existing_folder).cleanup()
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write there: {error.strerror}; name another folder with --output-dir"
        ) from error


def validate_stage(settings: Settings, deepspeed_file: DeepSpeedFile) -> None:
    """UserError where what is trained gives wrong numbers, or none, under this ZeRO stage."""
    optimizer.check_8bit_supported(settings.train, zero_stage=deepspeed_file.stage, on_cpu=False)
    if deepspeed_file.stage == 0 and settings.engine.precision == "fp16":
        raise UserError("--precision fp16 needs ZeRO 1 or more for its loss scale; use --ds-config zero1, or bf16")
    if settings.engine.execution == "graphs" and deepspeed_file.stage:
        raise UserError(
            f"--execution graphs: steps of ZeRO {deepspeed_file.stage} are eager; expected --ds-config zero0, or "
            "--execution auto or eager"
        )
    if deepspeed_file.stage == 3 and (problem := zero_3_problem(settings)):
        raise UserError(problem)


def zero_3_problem(settings: Settings) -> str:
    """Why these settings cannot be trained under ZeRO 3; empty where they can."""
    if settings.model.quant and settings.lora.adapter == "dora":
        return (
            f"--quant {settings.model.quant}: dora reads whole packed weights, which ZeRO 3 has divided; expected "
            "--ds-config zero0, zero1 or zero2, or another --adapter"
        )
    if settings.model.quant == "int8":
        return (
            "--quant int8: not under ZeRO 3: bitsandbytes keeps a whole copy of each weight beside what ZeRO divides; "
            "expected --ds-config zero0, zero1 or zero2, or --quant nf4"
        )
    return ""
