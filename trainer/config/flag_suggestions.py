"""What to answer to a flag that does not exist here: ours for the spelling of another trainer, or for a typo."""

import difflib
from collections.abc import Mapping

#: Spellings elsewhere, with `_` for `-`, and ours. A flag alone takes the value over; a flag with a value stands as it
#: is, for switches there; any other text says why there is none.
SUGGESTIONS = {
    # transformers: TrainingArguments and its example scripts
    "learning_rate": "--lr",
    "per_device_train_batch_size": "--micro-batch",
    "per_gpu_train_batch_size": "--micro-batch",
    "per_device_eval_batch_size": "--eval-batch",
    "per_gpu_eval_batch_size": "--eval-batch",
    "train_batch_size": "--global-batch",
    "auto_find_batch_size": "--find-batch",
    "gradient_accumulation_steps": "derived here from --global-batch / (--micro-batch x ranks); leave it out",
    "num_train_epochs": "--epochs",
    "lr_scheduler_type": "--schedule",
    "adam_beta_1": "--adam-beta1",
    "adam_beta_2": "--adam-beta2",
    "eval_steps": "--eval-every",
    "eval_strategy": "--eval-every",
    "evaluation_strategy": "--eval-every",
    "save_steps": "--save-every",
    "save_strategy": "--save-every",
    "logging_steps": "every step is recorded here; leave it out",
    "logging_dir": "logs lie in the run folder; expected --output-dir",
    "load_best_model_at_end": "--export best",
    "metric_for_best_model": "the best checkpoint is the one with the lowest validation loss; expected --export best",
    "early_stopping_patience": "--early-stop",
    "bf16": "--precision bf16",
    "fp16": "--precision fp16",
    "torch_dtype": "--precision",
    "gradient_checkpointing": "--activation-checkpointing",
    "torch_compile": "--execution compile",
    "deepspeed": "--ds-config",
    "resume_from_checkpoint": "--resume",
    "overwrite_output_dir": "a run is never written over; expected --resume, or another --output-dir",
    "data_seed": "--seed",
    "do_train": "training is all that this program does; leave it out",
    "do_eval": "the validation set is evaluated every epoch; expected --eval-every to change that",
    "dataloader_num_workers": "data are tokenised once and then mapped; leave it out",
    "no_cuda": "a processor is used where no GPU is seen; expected CUDA_VISIBLE_DEVICES= before the command",
    "use_cpu": "a processor is used where no GPU is seen; expected CUDA_VISIBLE_DEVICES= before the command",
    "tf32": "fp32 is full float32 here; expected --precision bf16 for speed",
    "group_by_length": "completions of like length meet in a micro-batch here; leave it out",
    "hub_token": "expected the environment variable HF_TOKEN",
    "ddp_timeout": "--hang-timeout",
    "fsdp": "sharding is ZeRO's here; expected --ds-config zero3",
    "push_to_hub": "expected launch/export.py, after the run",
    "model_name_or_path": "--model",
    "train_file": "--data",
    "validation_file": "--val-data",
    "dataset_name": "--data",
    "dataset_config_name": "expected it behind the data set's id, as --data ID:CONFIG",
    "validation_split_percentage": "a share here, not a percentage; expected --val-fraction, for instance 0.05",
    "tokenizer_name": "the tokenizer is the model's; leave it out",
    "max_seq_length": "--block-size",
    "trust_remote_code": "code of a model is never run here; expected a model that transformers has itself",
    "attn_implementation": "chosen for the device, without a mask; leave it out",
    # TRL: SFTConfig, ModelConfig
    "max_length": "--block-size",
    "use_peft": "--mode lora",
    "completion_only_loss": "--objective completion",
    "assistant_only_loss": "of a chat only assistant turns are learnt here; leave it out",
    "dataset_text_field": "expected --completion with the column in braces, for instance --completion '{text}'",
    "load_in_4bit": "--quant nf4",
    "load_in_8bit": "--quant int8",
    "bnb_4bit_quant_type": "--quant",
    "use_bnb_nested_quant": "--quant-double",
    "dataset_config": "expected it behind the data set's id, as --data ID:CONFIG",
    # peft: LoraConfig
    "r": "--lora-rank",
    "lora_r": "--lora-rank",
    "target_modules": "--lora-target-modules",
    "lora_modules_to_save": "--modules-to-save",
    "use_dora": "--adapter dora",
    "use_rslora": "--adapter rslora",
    "init_lora_weights": "--adapter",
    # Axolotl
    "base_model": "--model",
    "datasets": "--data",
    "test_datasets": "--val-data",
    "val_set_size": "--val-fraction",
    "sequence_len": "--block-size",
    "micro_batch_size": "--micro-batch",
    "eval_batch_size": "--eval-batch",
    "num_epochs": "--epochs",
    "lr_scheduler": "--schedule",
    "optimizer": "--optim",
    "gradient_accumulation": "derived here from --global-batch / (--micro-batch x ranks); leave it out",
    "lora_target_linear": "--lora-target-modules all",
    "peft_use_dora": "--adapter dora",
    "peft_use_rslora": "--adapter rslora",
    "loraplus_lr_ratio": "--lora-plus-ratio",
    "evals_per_epoch": "expected --eval-every, in steps or `epoch`",
    "saves_per_epoch": "expected --save-every, in steps or `epoch`",
    "train_on_inputs": "the loss is on the completion only with --objective completion, on all tokens with blocks",
    "wandb_name": "--run-name",
    "wandb_mode": "--wandb",
    "wandb_run_id": "the run folder keeps it; expected --resume",
    "wandb_entity": "expected the environment variable WANDB_ENTITY",
    "auto_resume_from_checkpoints": "--resume",
    "dataset_prepared_path": "expected the environment variable TRAINER_CACHE",
    # LLaMA-Factory
    "finetuning_type": "--mode",
    "stage": "supervised fine-tuning is all that this program does; leave it out",
    "dataset": "--data",
    "eval_dataset": "--val-data",
    "dataset_dir": "--data",
    "val_size": "--val-fraction",
    "cutoff_len": "--block-size",
    "lora_target": "--lora-target-modules",
    "additional_target": "--modules-to-save",
    "quantization_bit": "expected --quant nf4 (4 bits) or --quant int8 (8 bits)",
    "double_quantization": "--quant-double",
    "pissa_init": "--adapter pissa",
    "compute_accuracy": "--score-samples",
    # nanoGPT
    "init_from": "--model",
    "batch_size": "--micro-batch",
    "max_iters": "--max-steps",
    "warmup_iters": "--warmup-steps",
    "lr_decay_iters": "the schedule ends with the run; expected --max-steps or --epochs",
    "decay_lr": "expected --schedule, for instance constant",
    "beta1": "--adam-beta1",
    "beta2": "--adam-beta2",
    "grad_clip": "--max-grad-norm",
    "eval_interval": "--eval-every",
    "log_interval": "every step is recorded here; leave it out",
    "eval_iters": "the whole validation set is evaluated each time; leave it out",
    "always_save_checkpoint": "expected --save-every",
    "out_dir": "--output-dir",
    "wandb_log": "expected --wandb online, offline or disabled",
    "wandb_run_name": "--run-name",
    "dtype": "--precision",
    "device": "GPUs are used where there are any; expected CUDA_VISIBLE_DEVICES to choose among them",
    "backend": "nccl on GPUs, gloo on CPUs; leave it out",
    # this program before
    "also": "--report-to",
    "clip": "--max-grad-norm",
    "train_also": "--modules-to-save",
    "lora_targets": "--lora-target-modules",
    "keep": "--save-total-limit",
    "out": "--output-dir",
    "compile": "--execution compile",
    "samples": "--num-samples",
    "metrics": "--score-samples",
    "ways": "--methods",
    "at_once": "--workers",
    "checkpoint_activations": "--activation-checkpointing",
}
_NEGATIVE = ("false", "no", "0", "off", "none")
#: Values elsewhere and ours, for flags that take the value over.
_VALUES = {
    "no": "never",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "torch.bfloat16": "bf16",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "warmup_stable_decay": "wsd",
}


def suggest_flag(flag: str, value: str | None, takes_value: Mapping[str, bool]) -> str:
    """One line that answers an unknown flag, the value carried over.

    `takes_value`: the flags that exist, and whether each is followed by a value; only those are suggested.
    """
    shown = " ".join(part if part.isprintable() else repr(part) for part in (flag, value) if part)
    name = flag.lstrip("-").lower().replace("-", "_")
    answer = f"--{name.replace('_', '-')}"
    if answer not in takes_value:
        answer = SUGGESTIONS.get(name) or _closest_flag(answer, takes_value) or _closest_suggestion(name)
    if not answer.startswith("--"):
        return f"{shown}: {answer}" if answer else f"{shown}: unknown flag (--help lists the flags)"
    suggested, _, fixed_value = answer.partition(" ")
    if suggested not in takes_value:
        return f"{shown}: unknown flag (--help lists the flags)"
    if fixed_value or not takes_value[suggested]:
        if (value or "").lower() in _NEGATIVE:
            return f"{shown}: leave it out; {answer} would turn it on"
        return f"{shown}: did you mean {answer}?"
    new_value = _VALUES.get(value, value) if value else value
    return f"{shown}: did you mean {suggested}{f' {new_value}' if new_value else ''}?"


def _closest_flag(flag: str, takes_value: Mapping[str, bool]) -> str:
    """The flag that a typo most likely meant; empty where none is near."""
    return next(iter(difflib.get_close_matches(flag, takes_value, n=1, cutoff=0.75)), "")


def _closest_suggestion(name: str) -> str:
    """What answers the foreign flag that a typo most likely meant; empty where none is near."""
    return SUGGESTIONS.get(next(iter(difflib.get_close_matches(name, SUGGESTIONS, n=1, cutoff=0.85)), ""), "")
