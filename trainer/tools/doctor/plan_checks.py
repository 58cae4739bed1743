"""What follows from settings, data and model: what trains, the batch sum, the steps."""

import math
from collections.abc import Iterator

from trainer.model.build import TrainableModel, get_max_positions, list_adapted_layers
from trainer.tools.doctor.check_result import WARNING, CheckResult, make_result, ok_result
from trainer.training.run_plan import RunPlan

MIN_STEPS = 20  # in all; fewer say nothing of a learning rate
MANY_ACCUMULATION_STEPS = 8  # micro-batches of one or two rows a step: the device is kept busy with little


def check_model(plan: RunPlan, model: TrainableModel) -> Iterator[CheckResult]:
    """Targets, tied weights, share of what trains, Conv1D."""
    model_metadata, config = plan.model_info, model.causal.config
    yield ok_result("model", f"{model_metadata['class']}, {model_metadata['parameters']:,} parameters")
    max_length = get_max_positions(config)
    block_size = plan.settings.data.block_size
    yield ok_result(
        "positions",
        f"rows of at most {block_size} tokens, the model takes {f'{max_length:,}' if max_length else 'any number'}",
    )
    config_says_tied = bool(getattr(config, "tie_word_embeddings", False))
    yield make_result(
        config_says_tied != model.has_tied_embeddings, WARNING, "tied weights",
        f"input and output embeddings are {'one' if model.has_tied_embeddings else 'two'}"
        + ("" if config_says_tied == model.has_tied_embeddings else f", its configuration says "
                                                                    f"{'one' if config_says_tied else 'two'}"),
        "see that its weights were saved as its configuration says",
    )  # fmt: skip
    lora_layers = list_adapted_layers(model)
    if lora_layers:
        num_conv1d = sum(is_transposed for _, is_transposed in lora_layers)
        yield ok_result("LoRA targets", f"{len(lora_layers)} layers: {', '.join(model_metadata['lora_targets'])}")
        yield make_result(
            0 < num_conv1d < len(lora_layers), WARNING, "Conv1D",
            f"{num_conv1d} of the {len(lora_layers)} adapted layers keep their weight as [in, out]"
            + (", as fan_in_fan_out tells peft" if num_conv1d else ""),
            "layers of both kinds: peft takes one setting and corrects it for each, look at its warnings",
        )  # fmt: skip
    trainable_share = model_metadata["trainable"] / model_metadata["parameters"]
    yield make_result(
        bool(lora_layers) and trainable_share > 0.5, WARNING, "trainable", f"{model_metadata['trainable']:,} weights "
                                                                           f"({trainable_share:.2%})",
        "adapters as large as the model save nothing: lower --lora-rank",
    )  # fmt: skip


def check_schedule(plan: RunPlan) -> Iterator[CheckResult]:
    """The batch sum, the number of steps, the ragged step at an epoch's end, warm-up."""
    schedule, settings = plan.schedule, plan.settings
    batch, num_examples = schedule.batch, plan.data_info["train"]["examples"]
    yield make_result(
        batch.micro_batch_size <= 2 and batch.gradient_accumulation_steps >= MANY_ACCUMULATION_STEPS, WARNING, "batch",
        str(batch),
        "a larger --micro-batch is faster where it fits: try --find-batch",
    )  # fmt: skip
    last_batch_size = num_examples % batch.global_batch
    tail = f"; the last of an epoch has {last_batch_size} examples" if last_batch_size else ""
    yield make_result(
        schedule.total_steps < MIN_STEPS, WARNING, "steps",
        f"{schedule.steps_per_epoch:,} an epoch, {schedule.total_steps:,} in all{tail}",
        "more --epochs, more data or a smaller --global-batch",
    )  # fmt: skip
    warmup_steps = settings.train.num_warmup_steps(schedule.total_steps)
    warmup_note = f" after {warmup_steps} warm-up steps of {schedule.total_steps}" if warmup_steps else ""
    yield make_result(
        warmup_steps >= schedule.total_steps, WARNING, "learning rate", f"{settings.train.lr:g} at its "
            f"peak{warmup_note}",
        "the peak is never reached: lower --warmup-steps or --warmup-ratio",
    )  # fmt: skip
    intervals = {"--eval-every": settings.output.eval_every, "--save-every": settings.output.save_every}
    for flag, interval in intervals.items():
        if not interval.isdigit() or int(interval) <= schedule.total_steps:
            continue
        yield CheckResult(
            level=WARNING, name=flag, message=f"{interval}, the run has {schedule.total_steps} steps: only at the end",
            remedy=f"{flag} {max(1, math.ceil(schedule.total_steps / 4))}, or epoch",
        )  # fmt: skip
    yield ok_result("ZeRO file", f"{plan.deepspeed_file.name}: {plan.deepspeed_file.reason}")
    yield ok_result("precision", plan.precision)
