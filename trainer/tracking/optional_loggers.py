"""W&B is a logger that a run can do without: its failures do not cost the run."""

import contextlib
import logging
from collections.abc import Callable, Iterator

from trainer.config.errors import first_line
from trainer.config.settings import OutputSettings
from trainer.tracking.records import Record, RecordLogger
from trainer.tracking.wandb_logger import should_send_model, wandb_mode

logger = logging.getLogger(__name__)


def check_loggers(output: OutputSettings) -> None:
    """UserError where W&B cannot be logged to as was asked for."""
    wandb_mode(output.wandb)
    should_send_model()


class OptionalLogger:
    """The logger that `start` makes (None: nothing to do). Its first failure is one line: it gets no more records, and
    the exit code 1 at the end of the run."""

    def __init__(self, name: str, start: Callable[[], RecordLogger | None]) -> None:
        self._name, self._has_failed = name, False
        self._logger: RecordLogger | None = None
        with self._report_failure():
            self._logger = start()

    def log(self, record: Record) -> None:
        if self._logger is not None and not self._has_failed:
            with self._report_failure():
                self._logger.log(record)

    def close(self, exit_code: int) -> None:
        """A second call does nothing."""
        closing, self._logger = self._logger, None
        if closing is not None:
            with self._report_failure():
                closing.close(1 if self._has_failed else exit_code)

    @contextlib.contextmanager
    def _report_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever happens in there, it must not cost the run
            if not self._has_failed:
                self._has_failed = True
                reason = f"{self._name} failed ({first_line(error)})"
                logger.warning(f"{reason}; going on without it, metrics.jsonl has every row")
