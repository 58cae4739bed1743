"""Records -> progress, metrics.jsonl, Weights & Biases and second sinks; rank 0 only.

A sink is anything with `write(record)` and `close(exit_code)`; the loop yields records and `run` hands each one
to every sink. Importing this package is cheap: wandb and rich are imported where they are first used.
"""

from typing import Protocol

from trainer.log.also import check_also, start_also
from trainer.log.jsonl import JsonlSink, rewind
from trainer.log.names import AXES, COLUMNS, METRICS, card_row, run_group, run_tags, wandb_config, wandb_row
from trainer.log.profile import ProfileSink
from trainer.log.progress import Progress
from trainer.log.quiet import quiet
from trainer.log.tables import EndRow, end_rows, show_end, show_plan
from trainer.log.wandb_sink import WandbSink, start_wandb, wandb_mode
from trainer.records import Record
from trainer.settings import OutputSettings


class Sink(Protocol):
    """What takes the records of a run, in order."""

    def write(self, record: Record) -> None:
        """Take one record."""

    def close(self, exit_code: int) -> None:
        """The run is over; 0 is success."""


def check(output: OutputSettings) -> None:
    """UserError where a sink that was asked for cannot work: its package or, for W&B online, the login is missing."""
    check_also(output.also)
    wandb_mode(output.wandb)


__all__ = [
    "AXES",
    "COLUMNS",
    "METRICS",
    "EndRow",
    "JsonlSink",
    "ProfileSink",
    "Progress",
    "Sink",
    "WandbSink",
    "card_row",
    "check",
    "check_also",
    "end_rows",
    "quiet",
    "rewind",
    "run_group",
    "run_tags",
    "show_end",
    "show_plan",
    "start_also",
    "start_wandb",
    "wandb_config",
    "wandb_mode",
    "wandb_row",
]
