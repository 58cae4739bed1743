"""GPT-2 configurations to measure, without weights; needs no torch until one is saved."""

from pathlib import Path

SHAPES = {  # width, layers, heads, vocabulary, longest row
    "tiny": (64, 2, 2, 512, 128),
    "gpt2": (768, 12, 12, 50_257, 1024),
    "gpt2-xl": (1600, 48, 25, 50_257, 1024),
}


def save_shape(folder: Path, name: str) -> str:
    """A folder with the configuration of a shape, made where it is not there."""
    width, num_layers, num_heads, vocab_size, max_length = SHAPES[name]
    return save_config(
        folder / name, n_embd=width, n_layer=num_layers, n_head=num_heads, vocab_size=vocab_size, n_positions=max_length
    )


def save_config(folder: Path, **fields: int) -> str:
    """A folder with GPT-2's configuration, some fields of it others; made where it is not there."""
    if not folder.exists():
        from transformers import GPT2Config

        end_token = GPT2Config().eos_token_id
        end_token = min(end_token, fields.get("vocab_size", end_token + 1) - 1)
        config = GPT2Config(**fields, bos_token_id=end_token, eos_token_id=end_token)
        config.architectures = ["GPT2LMHeadModel"]
        config.save_pretrained(folder)
    return str(folder)
