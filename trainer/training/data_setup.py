"""The data of a run, prepared once on each host and seen by all of its ranks; and several examples in one row."""

import sys
from dataclasses import replace
from pathlib import Path

from trainer.config.batch_config import BatchConfig
from trainer.config.errors import UserError
from trainer.config.schema import DataSettings
from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset, TokenDataset, load
from trainer.data.prepare import prepare
from trainer.data.sampler import TrainBatches, padding_share
from trainer.data.tokenizer import load_tokenizer, show_examples
from trainer.distributed.process_group import DistContext
from trainer.model.build import get_max_positions, load_config

#: Families whose packed rows are proven equal to single ones, in loss and gradient (tests/unit/data/test_packing.py).
PACKABLE_MODELS = ("gpt2", "llama", "qwen2", "qwen3")
NUM_STEPS_COUNTED = 50  # of an epoch, for the share of padding


def prepare_data(settings: Settings, context: DistContext) -> PreparedDataset:
    """Tokenised once by one rank of each node, then mapped by all."""

    def log(line: str) -> None:
        if context.rank == 0:
            print(line, flush=True)

    def prepare_folder() -> Path:
        return prepare(
            settings.data,
            model=settings.model.model,
            global_batch=settings.train.global_batch,
            max_positions=get_max_positions(load_config(settings.model)),
            log=log,
        ).folder

    return load(context.on_rank_zero(prepare_folder, per_node=True))


def print_examples(settings: Settings, data: PreparedDataset, number: int) -> None:
    """The tokens of the first training examples, as the loss sees them."""
    if data.metadata["tokenizer"] is None:
        raise UserError("--show-example: the data are token ids; expected data with text")
    tokenizer = load_tokenizer(settings.model.model)
    for line in show_examples(data.train, tokenizer, number, is_coloured=sys.stdout.isatty()):
        print(line)


def plan_packing(settings: DataSettings, batch: BatchConfig, model_type: str) -> BatchConfig:
    """The batch with packed rows where --packing asks for them; UserError where they are of no use or not proven."""
    if not settings.packing:
        return batch
    if settings.objective != "completion":
        raise UserError("--packing: blocks are full already; expected --objective completion, or chat")
    if model_type not in PACKABLE_MODELS:
        raise UserError(f"--packing: not proven for models of type {model_type}; expected {', '.join(PACKABLE_MODELS)}")
    return replace(batch, packed_width=settings.block_size)


def describe_padding(dataset: TokenDataset, batches: TrainBatches) -> str:
    """The share of padding in the first steps; of packed rows also what it would be one example a row."""
    num_steps = min(NUM_STEPS_COUNTED, -(-len(dataset) // batches.batch_config.global_batch))
    share = padding_share(batches, num_steps)
    if not batches.batch_config.packed_width:
        return f"{share:.1%} of the positions"
    plain = replace(batches, batch_config=replace(batches.batch_config, packed_width=None))
    by_length = replace(plain, by_length=True)
    return (
        f"{share:.1%} of the positions; one example a row: {padding_share(plain, num_steps):.1%}, "
        f"rows of like length together: {padding_share(by_length, num_steps):.1%}"
    )
