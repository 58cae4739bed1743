"""Loggers that a run can do without: TensorBoard, the profiler, and what keeps their failures from costing the run."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError, first_line
from trainer.config.settings import OutputSettings
from trainer.tracking.records import Record, RecordLogger, StepRecord
from trainer.tracking.wandb_keys import wandb_config, wandb_row
from trainer.tracking.wandb_logger import should_send_model, wandb_mode

logger = logging.getLogger(__name__)
NUM_WARMUP_STEPS = 3  # steps before a profile begins: the first ones allocate and compile
NUM_TOP_OPERATIONS = 10


def check_loggers(output: OutputSettings) -> None:
    """UserError where a logger cannot work: its package is not installed or, for W&B online, the login is missing."""
    for name in output.report_to:
        if find_spec(name) is None:
            raise UserError(f"--report-to {name}: it is not installed; pip install -e '.[{name}]'")
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


class TensorBoardLogger:
    """`--report-to tensorboard`: the rows that W&B gets, under the same names, as event files in `tensorboard/` of the
    run folder, each value at its step.

    `resume_step`: the step that a resumed run continues from, -1 for a new run.
    """

    def __init__(self, metadata: Mapping[str, Any], folder: Path, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        log_dir = folder / "tensorboard"
        # TensorBoard itself hides what an earlier process logged after the checkpoint
        purge_step = resume_step + 1 if resume_step >= 0 else None
        self._writer = SummaryWriter(str(log_dir), purge_step=purge_step, flush_secs=5)
        if resume_step < 0:
            config = {name: value for name, value in wandb_config(metadata).items() if name != "run"}
            lines = "\n".join(f"| {name} | {value} |" for name, value in config.items())
            self._writer.add_text("config", f"| setting | value |\n|---|---|\n{lines}", 0)
        logger.info(f"TensorBoard: `tensorboard --logdir {os.path.relpath(log_dir)}`")

    def log(self, record: Record) -> None:
        for name, value in wandb_row(record).items():
            self._writer.add_scalar(name, value, record.step)  # float32: a resume takes back only scalars of this form

    def close(self, exit_code: int) -> None:
        self._writer.close()


class ProfileLogger:
    """`--profile STEPS`: torch's profiler over rank 0 from step 4 of this start on, written to `profile/` of the run
    folder.

    trace.json.gz opens in Perfetto or chrome://tracing; top.txt holds the operations that took the most time of
    their own. It changes no number, but the profiled steps take longer.
    """

    def __init__(self, folder: Path, num_steps: int) -> None:
        self._folder, self._num_steps = folder / "profile", num_steps
        self._num_profiled = -NUM_WARMUP_STEPS  # below 0: the steps until it begins
        self._profiler: Any = None

    def log(self, record: Record) -> None:
        """Begin or end after a step."""
        if isinstance(record, StepRecord):
            self._num_profiled += 1
            if self._num_profiled == 0:
                from torch.profiler import profile

                self._profiler = profile(acc_events=True)  # of the processor, and of the GPU where there is one
                self._profiler.start()
            elif self._num_profiled == self._num_steps:
                self.close(0)

    def close(self, exit_code: int) -> None:
        """End; also where the run was shorter than what was asked for."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()
        if self._num_profiled <= 0:
            logger.info(f"--profile: the run ended before its step {NUM_WARMUP_STEPS + 1}, nothing was profiled")
        elif profiler is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._folder / "trace.json.gz"))
            rows = profiler.key_averages()
            device = "device" if any(row.self_device_time_total > 0 for row in rows) else "cpu"
            table = rows.table(sort_by=f"self_{device}_time_total", row_limit=NUM_TOP_OPERATIONS)
            (self._folder / "top.txt").write_text(table, encoding="utf-8")
            logger.info(f"profile of {self._num_profiled} steps in {self._folder}")
