"""Keeps what libraries say to their developers from the user of this program."""

import logging
import os
import warnings

ENVIRONMENT = {
    **{f"{library}_VERBOSITY": "error" for library in ("TRANSFORMERS", "DATASETS", "HF_HUB")},
    **{f"{library}_DISABLE_PROGRESS_BARS": "1" for library in ("HF_HUB", "HF_DATASETS")},
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TQDM_DISABLE": "1",  # the bar over the weights that transformers loads asks none of the above
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # gloo and the process groups, from C++
}
NOISY_LOGGERS = (
    "DeepSpeed",
    "bitsandbytes.backends.cpu.ops",
    "bitsandbytes.autograd._functions",
    "torch.distributed.run",
)
IGNORED_WARNINGS = (  # starts of messages, as patterns
    r".*(all_gather_into_tensor|reduce_scatter_tensor).* is deprecated",  # torch 2.13, from within DeepSpeed
    r".*is_gradient_checkpointing.* is deprecated",  # transformers 5, from within peft and DeepSpeed
    r".*gradient_checkpointing_enable.* is deprecated",  # its new name is not in the older ones that we allow
    r"MatMul8bitLt: inputs will be cast",  # bitsandbytes 0.49, at every layer
    r"_check_is_size will be removed",  # torch, from within bitsandbytes
    r"Paged optimizers are not supported on CPU",  # bitsandbytes; the plan says so
    r"fan_in_fan_out is set to False but the target module is `Conv1D`",  # peft, which then sets it itself
    r"Using non-full backward hooks|.*backward hook.*will be missing some grad_input",  # torch, from DeepSpeed's hooks
)


def silence_libraries() -> None:
    """Silence the noise that is known; call it before torch, deepspeed, transformers or peft are imported. Warnings
    that are not listed are still shown, and a variable that the user has set is left as it is
    (TRANSFORMERS_VERBOSITY=info brings its messages back)."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in NOISY_LOGGERS:
        logger = logging.getLogger(name)
        if _errors_only not in logger.filters:
            logger.addFilter(_errors_only)  # a level would be set back when the library is imported
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
