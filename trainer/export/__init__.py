"""A Hugging Face folder that was reloaded and checked, with its model card."""

from trainer.export.card import card_text
from trainer.export.check import Check, Expected, check_folder, check_logits, fixed_rows, judge
from trainer.export.command import model_at
from trainer.export.folder import base_of, export, gathered, save_folder

__all__ = [
    "Check",
    "Expected",
    "base_of",
    "card_text",
    "check_folder",
    "check_logits",
    "export",
    "fixed_rows",
    "gathered",
    "judge",
    "model_at",
    "save_folder",
]
