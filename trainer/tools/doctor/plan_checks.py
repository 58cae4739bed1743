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
    model_info, config = plan.model_info, model.causal.config
    yield ok_result("model", f"{model_info['class']}, {model_info['parameters']:,} parameters")
    max_length = get_max_positions(config)
    limit = f"{max_length:,}" if max_length else "any number"
    yield ok_result("positions", f"rows of at most {plan.settings.data.block_size} tokens, the model takes {limit}")
    is_tied, should_be_tied = model.has_tied_embeddings, bool(getattr(config, "tie_word_embeddings", False))
    message = f"input and output embeddings are {'one' if is_tied else 'two'}"
    if is_tied != should_be_tied:
        message += f", its configuration says {'one' if should_be_tied else 'two'}"
    remedy = "see that its weights were saved as its configuration says"
    yield make_result(is_tied != should_be_tied, WARNING, "tied weights", message, remedy)
    lora_layers = list_adapted_layers(model)
    if lora_layers:
        num_layers, num_conv1d = len(lora_layers), sum(is_transposed for _, is_transposed in lora_layers)
        yield ok_result("LoRA targets", f"{num_layers} layers: {', '.join(model_info['lora_targets'])}")
        yield make_result(
            0 < num_conv1d < num_layers,
            WARNING,
            "Conv1D",
            f"{num_conv1d} of the {num_layers} adapted layers keep their weight as [in, out]"
            + ", as fan_in_fan_out tells peft" * bool(num_conv1d),
            "layers of both kinds: peft takes one setting and corrects it for each, look at its warnings",
        )
    trainable_share = model_info["trainable"] / model_info["parameters"]
    yield make_result(
        bool(lora_layers) and trainable_share > 0.5,
        WARNING,
        "trainable",
        f"{model_info['trainable']:,} weights ({trainable_share:.2%})",
        "adapters as large as the model save nothing: lower --lora-rank",
    )


def check_schedule(plan: RunPlan) -> Iterator[CheckResult]:
    """The batch sum, the number of steps, the ragged step at an epoch's end, warm-up."""
    schedule, settings, batch = plan.schedule, plan.settings, plan.schedule.batch
    total_steps = schedule.total_steps
    yield make_result(
        batch.micro_batch_size <= 2 and batch.gradient_accumulation_steps >= MANY_ACCUMULATION_STEPS,
        WARNING,
        "batch",
        str(batch),
        "a larger --micro-batch is faster where it fits: try --find-batch",
    )
    last_batch_size = plan.data_info["train"]["examples"] % batch.global_batch
    tail = f"; the last of an epoch has {last_batch_size} examples" if last_batch_size else ""
    message = f"{schedule.steps_per_epoch:,} an epoch, {total_steps:,} in all{tail}"
    remedy = "more --epochs, more data or a smaller --global-batch"
    yield make_result(total_steps < MIN_STEPS, WARNING, "steps", message, remedy)
    warmup_steps = settings.train.num_warmup_steps(total_steps)
    warmup_note = f" after {warmup_steps} warm-up steps of {total_steps}" if warmup_steps else ""
    yield make_result(
        warmup_steps >= total_steps,
        WARNING,
        "learning rate",
        f"{settings.train.lr:g} at its peak{warmup_note}",
        "the peak is never reached: lower --warmup-steps or --warmup-ratio",
    )
    for flag, interval in (("--eval-every", settings.output.eval_every), ("--save-every", settings.output.save_every)):
        if interval.isdigit() and int(interval) > total_steps:
            message = f"{interval}, the run has {total_steps} steps: only at the end"
            yield CheckResult(WARNING, flag, message, f"{flag} {math.ceil(total_steps / 4)}, or epoch")
    yield ok_result("ZeRO file", f"{plan.deepspeed_file.name}: {plan.deepspeed_file.reason}")
    yield ok_result("precision", plan.precision)
