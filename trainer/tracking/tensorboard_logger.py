"""`--report-to tensorboard`: the rows that W&B gets, under the same names, as TensorBoard's event files."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError, first_line
from trainer.config.settings import OutputSettings
from trainer.tracking.records import Record
from trainer.tracking.wandb_keys import wandb_config, wandb_row
from trainer.tracking.wandb_logger import wandb_mode

logger = logging.getLogger(__name__)


def check_loggers(output: OutputSettings) -> None:
    """UserError where a logger cannot work: its package is not installed or, for W&B online, the login is missing."""
    for name in output.report_to:
        if find_spec(name) is None:
            raise UserError(f"--report-to {name}: it is not installed; pip install -e '.[{name}]'")
    wandb_mode(output.wandb)


class TensorBoardLogger:
    """Event files in the run folder's `tensorboard/`, each value at its step. The first failure is logged once and
    ends the logger; training goes on without it.

    `resume_step`: the step that a resumed run continues from, -1 for a new run.
    """

    def __init__(self, metadata: Mapping[str, Any], folder: Path, *, resume_step: int) -> None:
        self._writer: Any = None
        log_dir = folder / "tensorboard"
        with self._guard():
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard itself hides what an earlier process logged after the checkpoint
            purge_step = resume_step + 1 if resume_step >= 0 else None
            self._writer = SummaryWriter(str(log_dir), purge_step=purge_step, flush_secs=5)
            if resume_step < 0:
                config = {name: value for name, value in wandb_config(metadata).items() if name != "run"}
                lines = "\n".join(f"| {name} | {value} |" for name, value in config.items())
                self._writer.add_text("config", f"| setting | value |\n|---|---|\n{lines}", 0)
            logger.info(f"TensorBoard: `tensorboard --logdir {os.path.relpath(log_dir)}`")

    def log(self, record: Record) -> None:
        if self._writer is not None:
            with self._guard():
                for name, value in wandb_row(record).items():
                    # float32: a resume takes back only scalars of this form
                    self._writer.add_scalar(name, value, record.step)

    def close(self, exit_code: int) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._guard():
                writer.close()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._writer = None
            logger.warning(
                f"tensorboard stopped working ({first_line(error)}); going on without it, metrics.jsonl has every row"
            )
