"""What follows from settings, data and model: what trains, the batch sum, the steps."""

import math
from collections.abc import Iterator

from trainer.model.build import Model, adapted_layers, positions
from trainer.tools.doctor.check_result import WARNING, Check, fine, judged
from trainer.training.run_plan import Plan

FEW_STEPS = 20  # in all; fewer say nothing of a learning rate
MANY_PASSES = 8  # micro-batches of one or two rows a step: the device is kept busy with little


def check_model(plan: Plan, model: Model) -> Iterator[Check]:
    """Targets, tied weights, share of what trains, Conv1D."""
    facts, config = plan.model, model.causal.config
    yield fine("model", f"{facts['class']}, {facts['parameters']:,} parameters")
    limit = positions(config)
    width = plan.settings.data.block_size
    yield fine(
        "positions", f"rows of at most {width} tokens, the model takes {f'{limit:,}' if limit else 'any number'}"
    )
    told = bool(getattr(config, "tie_word_embeddings", False))
    yield judged(
        told != model.tied, WARNING, "tied weights",
        f"{'input and output embeddings are one' if model.tied else 'input and output embeddings are two'}"
        + ("" if told == model.tied else f", its configuration says {'one' if told else 'two'}"),
        "see that its weights were saved as its configuration says",
    )  # fmt: skip
    layers = adapted_layers(model)
    if layers:
        conv = sum(transposed for _, transposed in layers)
        yield fine("LoRA targets", f"{len(layers)} layers: {', '.join(facts['lora_targets'])}")
        yield judged(
            0 < conv < len(layers), WARNING, "Conv1D",
            f"{conv} of the {len(layers)} adapted layers keep their weight as [in, out]"
            + (", as fan_in_fan_out tells peft" if conv else ""),
            "layers of both kinds: peft takes one setting and corrects it for each, look at its warnings",
        )  # fmt: skip
    share = facts["trainable"] / facts["parameters"]
    yield judged(
        bool(layers) and share > 0.5, WARNING, "trainable", f"{facts['trainable']:,} weights ({share:.2%})",
        "adapters as large as the model save nothing: lower --lora-rank",
    )  # fmt: skip


def check_course(plan: Plan) -> Iterator[Check]:
    """The batch sum, the number of steps, the ragged step at an epoch's end, warm-up."""
    course, settings = plan.course, plan.settings
    batch, examples = course.batch, plan.data["train"]["examples"]
    yield judged(
        batch.micro <= 2 and batch.accumulation >= MANY_PASSES, WARNING, "batch", str(batch),
        "a larger --micro-batch is faster where it fits: try --find-batch",
    )  # fmt: skip
    ragged = examples % batch.global_batch
    tail = f"; the last of an epoch has {ragged} examples" if ragged else ""
    yield judged(
        course.total_steps < FEW_STEPS, WARNING, "steps",
        f"{course.steps_per_epoch:,} an epoch, {course.total_steps:,} in all{tail}",
        "more --epochs, more data or a smaller --global-batch",
    )  # fmt: skip
    warmup = settings.train.warmup_steps
    after = f" after {warmup} warm-up steps of {course.total_steps}" if warmup else ""
    yield judged(
        warmup >= course.total_steps, WARNING, "learning rate", f"{settings.train.lr:g} at its peak{after}",
        "the peak is never reached: lower --warmup-steps",
    )  # fmt: skip
    strides = {"--eval-every": settings.output.eval_every, "--save-every": settings.output.save_every}
    for flag, every in strides.items():
        if not every.isdigit() or int(every) <= course.total_steps:
            continue
        yield Check(
            level=WARNING, what=flag, found=f"{every}, the run has {course.total_steps} steps: only at the end",
            remedy=f"{flag} {max(1, math.ceil(course.total_steps / 4))}, or epoch",
        )  # fmt: skip
    yield fine("ZeRO file", f"{plan.zero.name}: {plan.zero.reason}")
    yield fine("precision", plan.precision)
