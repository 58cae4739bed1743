"""The data of a run, prepared once on each host and seen by all of its ranks."""

import sys
from pathlib import Path

from trainer.config.errors import UserError
from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset, load
from trainer.data.prepare import prepare
from trainer.data.tokenizer import load_tokenizer, show_examples
from trainer.distributed.process_group import DistContext
from trainer.model.build import get_max_positions, load_config


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
