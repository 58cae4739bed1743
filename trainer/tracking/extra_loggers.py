"""Second loggers for the rows that W&B gets, under the same names: TensorBoard and Trackio, each behind an extra."""

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.config.runtime_schema import OutputSettings
from trainer.tracking.records import EventRecord, Record, RecordLogger
from trainer.tracking.wandb_environment import wandb_mode
from trainer.tracking.wandb_keys import wandb_config, wandb_row

logger = logging.getLogger(__name__)


def check_loggers(output: OutputSettings) -> None:
    """UserError where a logger that was asked for cannot work: its package or, for W&B online, the login is missing."""
    for name in output.report_to:
        if find_spec(name) is None:
            raise UserError(f"--report-to {name}: it is not installed; pip install -e '.[{name}]'")
    wandb_mode(output.wandb)


def start_extra_loggers(
    names: Sequence[str], metadata: Mapping[str, Any], folder: Path, *, resume_step: int
) -> list["FailSafeLogger"]:
    """A logger for each name. `resume_step`: the step that a resumed run goes on from, -1 where it begins."""
    logger_classes: dict[str, Callable[..., RecordLogger]] = {
        "tensorboard": TensorBoardLogger,
        "trackio": TrackioLogger,
    }
    return [FailSafeLogger(name, partial(logger_classes[name], metadata, folder, resume_step)) for name in names]


class FailSafeLogger:
    """Hands records to a writer; the first failure is logged and ends it, for training goes on without it."""

    def __init__(self, name: str, start: Callable[[], RecordLogger]) -> None:
        self._name = name
        self._logger: RecordLogger | None = None
        with self._guard():
            self._logger = start()

    def log(self, record: Record) -> None:
        """Log one record; never raises. Events are for people and stay in metrics.jsonl."""
        if self._logger is not None and not isinstance(record, EventRecord):
            with self._guard():
                self._logger.log(record)

    def close(self, exit_code: int) -> None:
        """Hand over what is still held; never raises, a second call does nothing."""
        target, self._logger = self._logger, None
        if target is not None:
            with self._guard():
                target.close(exit_code)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._logger = None
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            logger.warning(f"{self._name} stopped working ({reason}); going on without it, metrics.jsonl has every row")


class TensorBoardLogger:
    """Event files in OUT/tensorboard; the x axis is the step, and epoch, samples and tokens are curves of their own."""

    def __init__(self, metadata: Mapping[str, Any], folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        log_dir = folder / "tensorboard"
        # what an earlier process logged after the checkpoint is taken back by TensorBoard itself
        purge_step = resume_step + 1 if resume_step >= 0 else None
        self._writer = SummaryWriter(str(log_dir), purge_step=purge_step, flush_secs=5)
        if resume_step < 0:
            config = {name: value for name, value in wandb_config(metadata).items() if name != "run"}
            lines = "\n".join(f"| {name} | {value} |" for name, value in config.items())
            self._writer.add_text("config", f"| setting | value |\n|---|---|\n{lines}", 0)
        logger.info(f"TensorBoard: `tensorboard --logdir {os.path.relpath(log_dir)}`")

    def log(self, record: Record) -> None:
        """Every value of the row as a scalar at its step."""
        for name, value in wandb_row(record).items():
            self._writer.add_scalar(name, value, record.step)  # float32: only this form is taken back after a resume

    def close(self, exit_code: int) -> None:
        """Flush and close the file."""
        self._writer.close()


class TrackioLogger:
    """Trackio's own store on this machine (or where its own variables say), in the project that W&B would use."""

    def __init__(self, metadata: Mapping[str, Any], folder: Path, resume_step: int) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        project = metadata["wandb"]["project"]
        name = f"{metadata['name']}-{metadata['run_id']}"  # it finds a run by its name only
        self._last_logged_step = -1
        if resume_step >= 0:  # rows cannot be taken back; a resumed run repeats them number by number
            last_step = SQLiteStorage.get_max_step_for_run(project, name)
            self._last_logged_step = -1 if last_step is None else int(last_step)
        with contextlib.redirect_stdout(io.StringIO()):  # one voice: what matters is said by us
            self._run = trackio.init(
                project=project,
                name=name,
                group=metadata["wandb"]["group"],
                config=wandb_config(metadata),
                embed=False,
                resume="allow",
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        logger.info(f"Trackio: `trackio show --project {project}`")

    def log(self, record: Record) -> None:
        """The row at its step; one that an earlier process logged is left out."""
        if record.step > self._last_logged_step:
            self._run.log(wandb_row(record), step=record.step)

    def close(self, exit_code: int) -> None:
        """Write what is queued."""
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()  # not the run's own, after which it would end once more, aloud, with the process
