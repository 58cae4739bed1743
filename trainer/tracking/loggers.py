"""Records -> progress, metrics.jsonl, Weights & Biases and second loggers; rank 0 only.

A logger is anything with `log(record)` and `close(exit_code)`; the loop yields records and `run` hands each one
to every logger. Importing this package is cheap: wandb and rich are imported where they are first used.
"""

from typing import Protocol

from trainer.config.runtime_schema import OutputSettings
from trainer.tracking.extra_loggers import check_extra_loggers
from trainer.tracking.records import Record
from trainer.tracking.wandb_environment import wandb_mode


class RecordLogger(Protocol):
    """What takes the records of a run, in order."""

    def log(self, record: Record) -> None:
        """Take one record."""

    def close(self, exit_code: int) -> None:
        """The run is over; 0 is success."""


def check_loggers(output: OutputSettings) -> None:
    """UserError where a logger that was asked for cannot work: its package or, for W&B online, the login is missing."""
    check_extra_loggers(output.report_to)
    wandb_mode(output.wandb)
