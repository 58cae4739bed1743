"""The choices of a run as types, each stated once: flags, checks and annotations derive from them."""

from typing import Literal, get_args

Mode = Literal["full", "lora"]
Preset = Literal["demo", "card", "finetune"]
Init = Literal["pretrained", "random"]
Quantization = Literal["nf4", "fp4", "int8"]
Adapter = Literal["lora", "dora", "rslora", "pissa"]
ModuleToSave = Literal["wte", "lm_head", "layernorm", "bias"]  # what may be trained beside the adapters
Objective = Literal["blocks", "completion"]
DataFormat = Literal["messages", "conversations", "prompt-completion", "alpaca", "text", "acled", "input_ids"]
UnusableRecords = Literal["refuse", "drop"]
Optimizer = Literal["adamw_fused", "adamw", "adamw8bit", "paged_adamw8bit"]
Schedule = Literal["linear", "cosine", "constant", "wsd"]
Precision = Literal["fp32", "bf16", "fp16"]
Execution = Literal["auto", "eager", "graphs"]
WandbMode = Literal["online", "offline", "disabled"]
ExtraLogger = Literal["tensorboard"]  # behind an extra of its name
ExportChoice = Literal["last", "best", "none"]
ExportDtype = Literal["fp32", "bf16", "fp16"]

MODES: tuple[Mode, ...] = get_args(Mode)
PRESETS: tuple[Preset, ...] = get_args(Preset)
ADAPTERS: tuple[Adapter, ...] = get_args(Adapter)
MODULES_TO_SAVE: tuple[ModuleToSave, ...] = get_args(ModuleToSave)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
EXECUTIONS: tuple[Execution, ...] = get_args(Execution)
EXTRA_LOGGERS: tuple[ExtraLogger, ...] = get_args(ExtraLogger)
EIGHT_BIT_OPTIMIZERS: tuple[Optimizer, ...] = ("adamw8bit", "paged_adamw8bit")
DS_CONFIG_NAMES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")  # or a path of one's own

DEMO_MODEL = "demo-base"  # the small GPT-2 that this project ships, see trainer/model/demo/README.md
DEMO_DATA = "acled-demo"  # the synthetic events of trainer/data/demo/acled-demo.csv
LORA_LR_FACTOR = 10.0  # the best LoRA rate is about 10x the best full rate ("LoRA Without Regret", 2025)
MAX_HANG_TIMEOUT_SECONDS = 1800  # the process groups that DeepSpeed creates for itself give up then
MAX_NUM_SAMPLES = 32  # validation texts that prepared data keep, and that --score-samples scores
MAX_SHARED_FRACTION = 0.05  # of evaluation records that may equal training records before an answer is refused
