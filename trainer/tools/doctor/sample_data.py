"""A sample of the user's data for the rehearsal, in their own format."""

import json
from pathlib import Path

from trainer.data import readers, sources
from trainer.data.dataset import PreparedDataset
from trainer.training.run_plan import RunPlan

LARGE_DATA_FACTOR = 20  # times the tokens of the rehearsed steps: data beyond it are sampled
CHARACTERS_PER_TOKEN = 12  # of text for a token, more than any tokenizer takes on the mean


def sample_overrides(plan: RunPlan, data: PreparedDataset, num_steps: int, folder: Path) -> dict[str, str]:
    """The data settings that put a sample in place of large data; {} where they are small enough as they are."""
    settings = plan.settings
    num_tokens_needed = num_steps * plan.schedule.batch.global_batch * settings.data.block_size
    num_tokens = data.metadata["train"]["tokens"] + data.metadata["val"]["tokens"]
    record_format = data.metadata["form"]
    if num_tokens <= LARGE_DATA_FACTOR * num_tokens_needed or record_format == "input_ids":
        return {}
    max_characters = {
        "train": 2 * CHARACTERS_PER_TOKEN * num_tokens_needed,
        "val": CHARACTERS_PER_TOKEN * num_tokens_needed // num_steps,
    }
    overrides = {}
    for split, name, argument in (("train", "data", settings.data.data), ("val", "val_data", settings.data.val_data)):
        path = folder / f"{split}.jsonl"
        source = sources.find(argument or settings.data.data, "--data" if split == "train" else "--val-data")
        characters_left = max_characters[split]
        if argument is None:
            characters_left += max_characters["train"]  # the validation sample is what follows that of training
        with open(path, "w", encoding="utf-8") as file:
            for sourced_record in readers.records(source):
                line = json.dumps(sourced_record.record, default=str)
                if argument is not None or characters_left < max_characters["val"]:
                    file.write(line + "\n")
                characters_left -= len(line)
                if characters_left < 0:
                    break
        overrides[name] = str(path)
    return overrides
