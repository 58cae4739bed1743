"""What to answer to a flag that does not exist here: ours for the spelling of another trainer, or for a typo."""

import difflib
from collections.abc import Iterable, Mapping

#: {our answer: the spellings it is for, with `_` for `-`}: those of transformers, TRL, peft, Axolotl, LLaMA-Factory,
#: nanoGPT and of this program before. A flag alone takes the value over; a flag with a value stands as it is, for
#: switches there; any other text says why there is none.
_SPELLINGS = {
    "--mode": "finetuning_type",
    "--mode lora": "use_peft",
    "--resume": "resume_from_checkpoint auto_resume_from_checkpoints",
    "--find-batch": "auto_find_batch_size",
    "--model": "model_name_or_path base_model init_from",
    "--quant": "bnb_4bit_quant_type",
    "--quant nf4": "load_in_4bit",
    "--quant int8": "load_in_8bit",
    "--quant-double": "use_bnb_nested_quant double_quantization",
    "--lora-rank": "r lora_r",
    "--lora-target-modules": "target_modules lora_target lora_targets",
    "--lora-target-modules all": "lora_target_linear",
    "--lora-plus-ratio": "loraplus_lr_ratio",
    "--modules-to-save": "lora_modules_to_save additional_target train_also",
    "--adapter": "init_lora_weights",
    "--adapter dora": "use_dora peft_use_dora",
    "--adapter rslora": "use_rslora peft_use_rslora",
    "--adapter pissa": "pissa_init",
    "--data": "train_file dataset_name datasets dataset dataset_dir",
    "--val-data": "validation_file test_datasets eval_dataset",
    "--val-fraction": "val_set_size val_size",
    "--objective completion": "completion_only_loss",
    "--block-size": "max_seq_length max_length sequence_len cutoff_len",
    "--epochs": "num_train_epochs num_epochs",
    "--max-steps": "max_iters",
    "--global-batch": "train_batch_size",
    "--micro-batch": "per_device_train_batch_size per_gpu_train_batch_size micro_batch_size batch_size",
    "--eval-batch": "per_device_eval_batch_size per_gpu_eval_batch_size eval_batch_size",
    "--lr": "learning_rate",
    "--warmup-steps": "warmup_iters",
    "--schedule": "lr_scheduler_type lr_scheduler",
    "--max-grad-norm": "grad_clip clip",
    "--seed": "data_seed",
    "--optim": "optimizer",
    "--adam-beta1": "beta1",
    "--adam-beta2": "beta2",
    "--early-stop": "early_stopping_patience",
    "--ds-config": "deepspeed",
    "--precision": "torch_dtype dtype",
    "--precision bf16": "bf16",
    "--precision fp16": "fp16",
    "--hang-timeout": "ddp_timeout",
    "--activation-checkpointing": "gradient_checkpointing checkpoint_activations",
    "--eval-every": "eval_steps eval_strategy evaluation_strategy eval_interval",
    "--save-every": "save_steps save_strategy",
    "--save-total-limit": "keep",
    "--output-dir": "out_dir out",
    "--wandb": "wandb_mode",
    "--run-name": "wandb_name wandb_run_name",
    "--report-to": "also",
    "--export best": "load_best_model_at_end",
    "--num-samples": "samples",
    "--score-samples": "compute_accuracy metrics",
    "--methods": "ways",
    "--workers": "at_once",
    "derived here from --global-batch / (--micro-batch x ranks); leave it out": (
        "gradient_accumulation_steps gradient_accumulation"
    ),
    "every step is recorded here; leave it out": "logging_steps log_interval",
    "logs lie in the run folder; expected --output-dir": "logging_dir",
    "the best checkpoint is the one with the lowest validation loss; expected --export best": "metric_for_best_model",
    "a run is never written over; expected --resume, or another --output-dir": "overwrite_output_dir",
    "training is all that this program does; leave it out": "do_train",
    "the validation set is evaluated every epoch; expected --eval-every to change that": "do_eval",
    "the whole validation set is evaluated each time; leave it out": "eval_iters",
    "data are tokenised once and then mapped; leave it out": "dataloader_num_workers",
    "a processor is used where no GPU is seen; expected CUDA_VISIBLE_DEVICES= before the command": "no_cuda use_cpu",
    "GPUs are used where there are any; expected CUDA_VISIBLE_DEVICES to choose among them": "device",
    "nccl on GPUs, gloo on CPUs; leave it out": "backend",
    "fp32 is full float32 here; expected --precision bf16 for speed": "tf32",
    "steps are not compiled here: a GPU runs them as CUDA graphs (--execution); leave it out": (
        "torch_compile compile torch_compile_backend torch_compile_mode"
    ),
    "completions of like length meet in a micro-batch here; leave it out": "group_by_length",
    "sharding is ZeRO's here; expected --ds-config zero3": "fsdp",
    "expected launch/export.py, after the run": "push_to_hub",
    "expected it behind the data set's id, as --data ID:CONFIG": "dataset_config_name dataset_config",
    "a share here, not a percentage; expected --val-fraction, for instance 0.05": "validation_split_percentage",
    "the tokenizer is the model's; leave it out": "tokenizer_name",
    "code of a model is never run here; expected a model that transformers has itself": "trust_remote_code",
    "chosen for the device, without a mask; leave it out": "attn_implementation",
    "of a chat only assistant turns are learnt here; leave it out": "assistant_only_loss",
    "expected --completion with the column in braces, for instance --completion '{text}'": "dataset_text_field",
    "the loss is on the completion only with --objective completion, on all tokens with blocks": "train_on_inputs",
    "supervised fine-tuning is all that this program does; leave it out": "stage",
    "expected --quant nf4 (4 bits) or --quant int8 (8 bits)": "quantization_bit",
    "the schedule ends with the run; expected --max-steps or --epochs": "lr_decay_iters",
    "expected --schedule, for instance constant": "decay_lr",
    "expected --eval-every, in steps or `epoch`": "evals_per_epoch",
    "expected --save-every, in steps or `epoch`": "saves_per_epoch",
    "expected --save-every": "always_save_checkpoint",
    "expected --wandb online, offline or disabled": "wandb_log",
    "the run folder keeps it; expected --resume": "wandb_run_id",
    "expected the environment variable HF_TOKEN": "hub_token",
    "expected the environment variable WANDB_ENTITY": "wandb_entity",
    "expected the environment variable TRAINER_CACHE": "dataset_prepared_path",
}
SUGGESTIONS = {spelling: answer for answer, spellings in _SPELLINGS.items() for spelling in spellings.split()}
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
        answer = (
            SUGGESTIONS.get(name)
            or _closest(answer, takes_value, cutoff=0.75)
            or SUGGESTIONS.get(_closest(name, SUGGESTIONS, cutoff=0.85), "")
        )
    if answer and not answer.startswith("--"):
        return f"{shown}: {answer}"
    suggested, _, fixed_value = answer.partition(" ")
    if suggested not in takes_value:
        return f"{shown}: unknown flag (--help lists the flags)"
    if fixed_value or not takes_value[suggested]:
        if (value or "").lower() in _NEGATIVE:
            return f"{shown}: leave it out; {answer} would turn it on"
        return f"{shown}: did you mean {answer}?"
    new_value = _VALUES.get(value, value) if value else value
    return f"{shown}: did you mean {suggested}{f' {new_value}' if new_value else ''}?"


def _closest(text: str, known: Iterable[str], cutoff: float) -> str:
    """What a typo most likely meant; empty where none is near."""
    return next(iter(difflib.get_close_matches(text, list(known), n=1, cutoff=cutoff)), "")
