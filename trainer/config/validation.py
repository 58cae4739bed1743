"""Settings that are right alone but not together; what depends on the ZeRO stage: `trainer.training.run_plan`."""

from typing import TYPE_CHECKING

from trainer.config.choices import EIGHT_BIT_OPTIMIZERS
from trainer.config.errors import UserError

if TYPE_CHECKING:
    from trainer.config.settings import Settings


def compile_blocker(settings: "Settings") -> str:
    """Why steps of these settings cannot be compiled; empty where they can."""
    if settings.data.objective == "completion":
        return "rows of many lengths would each be compiled; expected --objective blocks"
    return graph_blocker(settings)


def graph_blocker(settings: "Settings") -> str:
    """Why steps of these settings cannot be recorded as CUDA graphs; empty where they can."""
    if settings.model.quant:
        return "not with --quant"
    return "not with --activation-checkpointing" if settings.engine.activation_checkpointing else ""


def validate_combinations(settings: "Settings") -> None:
    """UserError for the first combination that cannot be trained."""
    execution = settings.engine.execution
    blockers = {"compile": compile_blocker, "graphs": graph_blocker}
    if execution in blockers and (blocker := blockers[execution](settings)):
        raise UserError(f"--execution {execution}: {blocker}")
    if settings.train.optim in EIGHT_BIT_OPTIMIZERS and settings.engine.precision == "fp16":
        raise UserError(f"--optim {settings.train.optim}: not with --precision fp16, which needs ZeRO 1 or more")
    if settings.train.early_stop and settings.output.eval_every == "never":
        raise UserError(
            f"--early-stop {settings.train.early_stop} with --eval-every never: there is no evaluation to stop at; "
            "pass --eval-every epoch or a number of steps"
        )
    if settings.mode == "full":
        _validate_full(settings)
    else:
        _validate_lora(settings)


def _validate_full(settings: "Settings") -> None:
    lora = settings.lora
    if settings.model.quant:
        raise UserError(f"--quant {settings.model.quant}: a quantised weight has no gradient; expected --mode lora")
    for flag, value, default in (
        ("--adapter", lora.adapter, "lora"), ("--lora-plus-ratio", lora.plus_ratio, 1.0),
        ("--modules-to-save", ",".join(lora.modules_to_save), ""),
    ):  # fmt: skip
        if value != default:
            raise UserError(f"{flag} {value}: is about adapters; expected --mode lora")


def _validate_lora(settings: "Settings") -> None:
    lora, quant = settings.lora, settings.model.quant
    if not quant:
        return
    if lora.adapter == "pissa":
        raise UserError(
            f"--quant {quant}: pissa changes the base by less than {quant} rounds; expected lora, dora or rslora"
        )
    if quant == "int8" and lora.adapter == "dora":
        raise UserError("--quant int8: dora takes the norms of its layers, by which peft loses their scales; use nf4")
    if "bias" in lora.modules_to_save:
        raise UserError(
            f"--modules-to-save bias: bitsandbytes rounds the biases of {quant} layers; leave one of them out"
        )
    if settings.engine.precision == "fp16":
        raise UserError(f"--precision fp16: rounds the packed weights of --quant {quant}; expected bf16 or fp32")
