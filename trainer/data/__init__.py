"""Sources -> text -> token ids -> one rank's micro-batches. Importing this loads neither torch nor a tokenizer."""

from trainer.data.batches import MicroBatch, epoch_order, eval_batches, step_batches, step_counts
from trainer.data.prepared import Prepared, load, prepare
from trainer.data.rows import Rows
from trainer.data.tokens import load_tokenizer

__all__ = [
    "MicroBatch",
    "Prepared",
    "Rows",
    "epoch_order",
    "eval_batches",
    "load",
    "load_tokenizer",
    "prepare",
    "step_batches",
    "step_counts",
]
