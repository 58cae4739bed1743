"""What the plan says of a preset."""

from trainer.config.choices import DEMO_DATA, DEMO_MODEL
from trainer.config.settings import Settings


def preset_notes(settings: Settings) -> list[str]:
    """What a preset means for this model, where that is worth a line: where its learning rate comes from."""
    notes, rate = [], f"learning rate {settings.train.lr:g}"
    advice = "the same command with --find-lr suggests one for this model and data, launch/study.py compares several"
    if settings.preset == "finetune" and "--block-size" not in settings.overridden:
        notes.append(f"block size {settings.data.block_size}: from the lengths of the data; --block-size sets another")
    if settings.preset == "finetune" and "--lr" not in settings.overridden:
        notes.append(f"{rate}: a guess from the literature; {advice}")
    if settings.preset == "gpt2" and "--lr" not in settings.overridden:
        notes.append(f"{rate}: from a published fine-tuning of GPT-2 (LoRA: ten times that); {advice}")
    if settings.model.model == DEMO_MODEL and settings.data.data != DEMO_DATA and "--model" not in settings.overridden:
        notes.append(f"--preset demo trains {DEMO_MODEL}, the embedded toy, on your data; expected --model gpt2")
    if settings.preset == "demo" and settings.model.model != DEMO_MODEL and "--lr" not in settings.overridden:
        notes.append(f"{rate}: of --preset demo, made for {DEMO_MODEL}; {advice}")
    return notes
