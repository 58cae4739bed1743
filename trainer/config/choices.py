"""The choices of a run that several files name, as types: flags, checks and annotations derive from them."""

import re
from typing import Literal, get_args

from trainer.config.files import expand_user_path

Mode = Literal["full", "lora"]
Preset = Literal["demo", "card", "gpt2", "finetune"]
Init = Literal["pretrained", "random"]
Objective = Literal["blocks", "completion"]
Adapter = Literal["lora", "dora", "rslora", "pissa"]
Optimizer = Literal["adamw_fused", "adamw", "adamw8bit", "paged_adamw8bit"]
Schedule = Literal["linear", "cosine", "constant"]
Precision = Literal["fp32", "bf16", "fp16"]
WandbMode = Literal["online", "offline", "disabled"]
ExportDtype = Literal["fp32", "bf16", "fp16"]

MODES: tuple[Mode, ...] = get_args(Mode)
PRESETS: tuple[Preset, ...] = get_args(Preset)
EIGHT_BIT_OPTIMIZERS: tuple[Optimizer, ...] = ("adamw8bit", "paged_adamw8bit")
DS_CONFIG_NAMES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")  # or a path of one's own

GPT2_NAMES = ("gpt2", "openai-community/gpt2")  # of the Hub
DEMO_MODEL = "demo-base"  # the small GPT-2 that this project ships, see trainer/model/demo/README.md
DEMO_DATA = "acled-demo"  # the synthetic events of trainer/data/demo/acled-demo.csv
LORA_LR_FACTOR = 10.0  # the best LoRA rate is about 10x the best full rate ("LoRA Without Regret", 2025)
MAX_HANG_TIMEOUT_SECONDS = 1800  # the process groups that DeepSpeed creates for itself give up then
MAX_NUM_SAMPLES = 32  # validation texts that prepared data keep
SCORER_NAMES = ("exact", "contains", "numeric", "json", "f1", "bleu", "chrf", "rougeL")  # beside regex: and .py:
SCORERS = f"{', '.join(SCORER_NAMES)}, regex:PATTERN or FILE.py:function"
WARN_SHARED_FRACTION = 0.01  # of validation records that are training records too, from which on a warning says so
LEAKAGE_FRACTION = 0.5  # of them from which on a run is refused without --allow-leakage
MAX_SHARED_FRACTION = 0.05  # of evaluation records that may equal training records before an answer is refused


def scorer_file(scorer: str) -> str:
    """FILE.py of a scorer FILE.py:function; "" of another. ValueError for `~name` of nobody."""
    match = re.fullmatch(r"(?!regex:)(.+\.py):[^\W\d]\w*", scorer, re.DOTALL)
    return expand_user_path(match[1]) if match else ""


def check_scorer(scorer: str) -> str:
    """The name of a scorer as it is; ValueError where there is none such."""
    if scorer not in SCORER_NAMES and not re.match("regex:.", scorer, re.DOTALL) and not scorer_file(scorer):
        raise ValueError(scorer)
    return scorer
