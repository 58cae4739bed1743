"""Fine-tune GPT-2 with DeepSpeed ZeRO, every weight or LoRA, and leave records that can be compared."""
