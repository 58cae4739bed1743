"""The loggers of one run behind one door."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config import reference
from trainer.data.dataset import PreparedDataset
from trainer.tracking import records
from trainer.tracking.console import LogLines, ProgressBar
from trainer.tracking.eval_records import (
    EVAL_RECORDS_FOLDER,
    EvalRecordsLogger,
    digest_evaluations,
    rewind_evaluations,
)
from trainer.tracking.jsonl import METRICS_FILE, JsonlLogger, rewind
from trainer.tracking.profiler import ProfileLogger
from trainer.tracking.records import Record, RecordLogger
from trainer.tracking.summary import show_plan, show_summary
from trainer.tracking.tensorboard_logger import TensorBoardLogger
from trainer.tracking.wandb_logger import start_wandb
from trainer.training.run_plan import RunPlan
from trainer.training.train_state import TrainState


class MetricLogger:
    """Where the records go: on rank 0 to metrics.jsonl, the terminal and W&B; nowhere on the others."""

    def __init__(
        self, plan: RunPlan, data: PreparedDataset, metadata: dict[str, Any], state: TrainState, *, is_resumed: bool
    ):
        """`metadata`: the content of run.json; a resumed run's rows after `state` are cut off."""
        folder, output, schedule = Path(plan.settings.run_folder), plan.settings.output, plan.schedule
        self.plan = plan
        self.metrics_path, self.eval_records_folder = folder / METRICS_FILE, folder / EVAL_RECORDS_FOLDER
        self.loggers: list[RecordLogger] = []
        self.num_truncated = 0  #: rows that were cut off
        if plan.dist_context.rank != 0:
            return
        show_plan(plan.summary_lines())
        if is_resumed:
            last_step = state.step or -1
            if self.metrics_path.exists():
                self.num_truncated = rewind(self.metrics_path, last_step, eval_pending=state.eval_pending)
            rewind_evaluations(self.eval_records_folder, last_step, eval_pending=state.eval_pending)
        progress_bar = ProgressBar(schedule.total_steps, schedule.total_steps / schedule.steps_per_epoch)
        self._log_lines = LogLines(progress_bar)
        resume_step = state.step if is_resumed else -1
        self.loggers = [
            EvalRecordsLogger(folder, data.row_info("val")),  # before the line that says so
            JsonlLogger(self.metrics_path, resume=is_resumed),
            progress_bar,
            start_wandb(metadata, folder, is_resumed=is_resumed),
        ]
        if output.report_to:
            self.loggers.append(TensorBoardLogger(metadata, folder, resume_step=resume_step))
        if output.profile:
            self.loggers.append(ProfileLogger(folder, output.profile))

    def log(self, record: Record) -> None:
        """Hand a record to every logger."""
        for logger in self.loggers:
            logger.log(record)

    def record_digests(self) -> dict[str, Any]:
        """What a checkpoint keeps of the rows and the evaluations so far, on rank 0."""
        rows = next(logger.digest() for logger in self.loggers if isinstance(logger, JsonlLogger))
        return {"records": vars(rows), "evaluations": vars(digest_evaluations(self.eval_records_folder))}

    def previous_records(self) -> Iterator[Record]:
        """The rows that an earlier process left, on rank 0."""
        if self.loggers:
            yield from records.read_records(self.metrics_path)

    def close(self, exit_code: int) -> None:
        """Close every logger, then show the table of a run that ended well."""
        if not self.loggers:
            return
        for logger in self.loggers:
            logger.close(exit_code)
        self._log_lines.close()
        if exit_code == 0:
            reasons = self.plan.incomparable_reasons()
            with_reference = reference.is_asked_for(self.plan.settings.preset, reasons)
            rows = records.read_records(self.metrics_path, with_steps=False)
            show_summary(rows, reasons, with_reference=with_reference)
