"""What the plan says of a preset."""

from trainer.config.choices import DEMO_DATA, DEMO_MODEL
from trainer.config.settings import Settings


def preset_notes(settings: Settings, *, with_rate: bool = True) -> list[str]:
    """What a preset means for this model, where that is worth a line, and, `with_rate`, where its rate comes from."""
    notes, flags = [], settings.overridden
    origins = {"finetune": "a guess from the literature", "demo": f"of --preset demo, made for {DEMO_MODEL}"}
    origins["gpt2"] = "from a published fine-tuning of GPT-2 (LoRA: ten times that)"
    advice = "the same command with --find-lr suggests one for this model and data, launch/study.py compares several"
    if settings.preset == "finetune" and "--block-size" not in flags:
        notes.append(f"block size {settings.data.block_size}: from the lengths of the data; --block-size sets another")
    if settings.preset in origins and settings.model.model != DEMO_MODEL and "--lr" not in flags and with_rate:
        notes.append(f"learning rate {settings.train.lr:g}: {origins[settings.preset]}; {advice}")
    if settings.model.model == DEMO_MODEL and settings.data.data != DEMO_DATA and "--model" not in flags:
        notes.append(f"--preset demo trains {DEMO_MODEL}, the embedded toy, on your data; expected --model gpt2")
    if settings.mode == "full" and settings.train.weight_decay:
        notes.append("weight decay acts on every trained weight; transformers leaves biases and norms out")
    return notes
