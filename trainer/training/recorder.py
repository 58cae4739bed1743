"""What becomes of the records of a run: logged on rank 0, and looked at on all ranks for what else is to be said."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.config import reference
from trainer.data.dataset import PreparedDataset
from trainer.distributed.engine import Engine
from trainer.tracking import records
from trainer.tracking.console import LogLines, ProgressBar, show_plan, show_summary
from trainer.tracking.eval_records import (
    EVAL_RECORDS_FOLDER,
    EvalRecordsLogger,
    rewind_evaluations,
)
from trainer.tracking.jsonl import METRICS_FILE, JsonlLogger, rewind
from trainer.tracking.profiler import ProfileLogger
from trainer.tracking.records import EvalRecord, EventRecord, Record, RecordLogger
from trainer.tracking.tensorboard_logger import TensorBoardLogger
from trainer.tracking.wandb_logger import start_wandb
from trainer.training.diagnostics import DiagnosticsMonitor
from trainer.training.generation import GenerationEvaluator
from trainer.training.run_plan import RunPlan
from trainer.training.schedule import TrainState


class Recorder:
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
        self._evaluations = EvalRecordsLogger(folder, data.row_info("val"))
        self._rows = JsonlLogger(self.metrics_path, resume=is_resumed)
        self.loggers = [
            self._evaluations,  # before the line that says so
            self._rows,
            progress_bar,
            start_wandb(metadata, folder, is_resumed=is_resumed),
        ]
        if output.report_to:
            self.loggers.append(TensorBoardLogger(metadata, folder, resume_step=resume_step))
        if output.profile:
            self.loggers.append(ProfileLogger(folder, output.profile))

    def log(self, record: Record) -> None:
        for logger in self.loggers:
            logger.log(record)

    def record_digests(self) -> dict[str, Any]:
        """What a checkpoint keeps of the rows and the evaluations so far, on rank 0."""
        return {"records": self._rows.digest(), "evaluations": self._evaluations.digest()}

    def previous_records(self) -> Iterator[Record]:
        if self.loggers:
            yield from records.read_records(self.metrics_path)

    def close(self, exit_code: int) -> None:
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


class Observer:
    """Looks at each record of the loop and adds events. Changes no number: it draws nothing and trains nothing."""

    def __init__(
        self,
        engine: Engine,
        metadata: Mapping[str, Any],
        generation_evaluator: GenerationEvaluator,
        previous_records: Iterable[Record] = (),
    ):
        self.engine = engine
        self.diagnostics = DiagnosticsMonitor(metadata)
        self.generation_evaluator = generation_evaluator
        #: what a process that was killed did not say
        self.unreported = self.diagnostics.replay(generation_evaluator.replay(previous_records))
        self._lora_b_names = tuple(name for name in engine.trainable_params if ".lora_B." in name)
        self._data_wait_seconds = 0.0  # of the engine's, up to the record before
        self._num_graph_checks = 0
        self._num_plan_changes = 0  # of the engine's, that were reported

    def on_train_begin(self, step: int, elapsed_seconds: float) -> list[EventRecord]:
        events = [diagnostic.to_record(step, elapsed_seconds) for diagnostic in self.unreported]
        if self.generation_evaluator.disabled_reason:
            message = f"no samples: {self.generation_evaluator.disabled_reason}"
            events.append(EventRecord(event="samples_off", step=step, message=message, time=elapsed_seconds))
        return events

    def on_record(self, record: Record) -> list[EventRecord]:
        """What follows a record, in order; only rank 0's is written, but every rank must ask."""
        self.diagnostics.add_time("data", self.engine.data_wait_seconds - self._data_wait_seconds)
        self._data_wait_seconds = self.engine.data_wait_seconds
        diagnostics, events = self.diagnostics.on_record(record), []
        if isinstance(record, EvalRecord):
            if record.step and self._lora_b_names:
                diagnostics += self.diagnostics.check_adapter(self.engine.state.max_abs(self._lora_b_names))
                self._lora_b_names = ()  # what has moved once is not zero again
            if samples := self.generation_evaluator.evaluate(record):
                self.diagnostics.add_time("evaluation", samples.facts["seconds"])
                events.append(samples)
        events += [diagnostic.to_record(record.step, record.time) for diagnostic in diagnostics]
        checks, changes = self.engine.graph_checks, self.engine.plan_changes
        for check in checks[self._num_graph_checks :]:
            events.append(EventRecord(event="checked", step=record.step, message=check, time=record.time))
        for change in changes[self._num_plan_changes :]:
            events.append(
                EventRecord(
                    event="execution", step=record.step, message=change.reason, time=record.time, facts=change.as_dict()
                )
            )
        self._num_graph_checks, self._num_plan_changes = len(checks), len(changes)
        return events
