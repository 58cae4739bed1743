"""What becomes of the records of a run: logged on rank 0, and looked at on all ranks for what else is to be said."""

import shlex
import sys
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from trainer.config import reference
from trainer.config.errors import mask_credentials
from trainer.config.text import format_bytes, format_clock
from trainer.data.dataset import PreparedDataset
from trainer.distributed.engine import Engine
from trainer.tracking.console import LogLines, ProgressBar, printed_lines, show_lines, show_plan, show_summary
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, digest_evaluations, rewind_evaluations, write_evaluation
from trainer.tracking.records import (
    METRICS_FILE,
    EvalRecord,
    EventRecord,
    JsonlLogger,
    Record,
    RecordLogger,
    read_records,
    rewind,
)
from trainer.tracking.tensorboard_logger import TensorBoardLogger
from trainer.tracking.wandb_logger import OptionalLogger, start_wandb
from trainer.training.checkpoint import Checkpoint
from trainer.training.diagnostics import DiagnosticsMonitor
from trainer.training.generation import GenerationEvaluator
from trainer.training.run_folder import write_run_json
from trainer.training.run_plan import RunPlan
from trainer.training.schedule import TrainState


class Recorder:
    """Logs the records of the loop with the events that follow from each; changes no number of the run. All ranks have
    one and show it the same records; rank 0's go to metrics.jsonl, eval_records/, the terminal, W&B and other loggers.
    `metadata`: the content of run.json; a resumed run's rows after `state` are cut off."""

    def __init__(
        self, plan: RunPlan, data: PreparedDataset, engine: Engine, metadata: dict[str, Any], state: TrainState
    ):
        self.plan, self.engine, self.metadata = plan, engine, metadata
        self.folder = Path(plan.settings.run_folder)
        self.samples = GenerationEvaluator(engine, data, plan.settings)
        self.diagnostics = DiagnosticsMonitor({**metadata, "resolved": plan.resolved()})
        self.loggers: list[RecordLogger] = []
        self.num_truncated = 0  #: rows that were cut off
        if plan.dist_context.rank == 0:
            self._open_loggers(data, state, is_resumed="resumed" in metadata)
        previous_records = read_records(self.folder / METRICS_FILE) if self.loggers else ()
        #: what a process that was killed did not say
        self.unreported = self.diagnostics.replay(self.samples.replay(previous_records))
        self._num_graph_checks = self._num_plan_changes = 0  # of the engine's, that were reported

    def _open_loggers(self, data: PreparedDataset, state: TrainState, *, is_resumed: bool) -> None:
        schedule = self.plan.schedule
        rows_file, evaluations = self.folder / METRICS_FILE, self.folder / EVAL_RECORDS_FOLDER
        show_plan(self.plan.sections(), self.plan.set_by_user())
        if is_resumed:
            if rows_file.exists():
                self.num_truncated = rewind(rows_file, state.step or -1, eval_pending=state.eval_pending)
            rewind_evaluations(evaluations, state.step or -1, eval_pending=state.eval_pending)
        progress_bar = ProgressBar(schedule.total_steps, schedule.total_steps / schedule.steps_per_epoch)
        self._progress_bar, self._log_lines = progress_bar, LogLines(progress_bar)
        self._val_rows = data.row_info("val")
        self._rows = JsonlLogger(rows_file, resume=is_resumed)
        rows = read_records(rows_file) if is_resumed else None
        self.loggers = [
            self._rows,
            progress_bar,
            OptionalLogger("W&B", partial(start_wandb, self.metadata, self.folder, previous_records=rows), self.folder),
        ]
        if "tensorboard" in self.plan.settings.output.report_to:
            start = partial(TensorBoardLogger, self.folder, state.step if is_resumed else None)
            self.loggers.append(OptionalLogger("TensorBoard", start, self.folder))

    def log(self, record: Record) -> None:
        if self.loggers and isinstance(record, EvalRecord) and record.row_nll is not None:  # before the line says so
            place = self.folder / EVAL_RECORDS_FOLDER
            write_evaluation(place, self._val_rows, step=record.step, split="val", nll=record.row_nll)
        for logger in self.loggers:
            logger.log(record)

    def log_event(self, event: str, state: TrainState, message: str, facts: dict[str, Any] | None = None) -> None:
        time_now = state.elapsed_seconds
        self.log(EventRecord(event=event, step=state.step, message=message, time=time_now, facts=facts or {}))

    def begin(self, state: TrainState, source: Checkpoint | None) -> None:
        if "resumed" in self.metadata:
            origin, changes = source.folder.name if source else "the start", self.metadata["resumed"]["changed"]
            parts = [f"resumed from {origin}" + ": the run had no checkpoint" * (source is None)]
            parts[0] += f", {self.num_truncated} rows after it cut off" if self.num_truncated else ""
            parts += [f"passed over: {reason}" for reason in (source.skipped_reasons if source else ())]
            if set_aside := self.metadata["resumed"]["set_aside"]:
                parts.append(f"its rows are kept in {' and '.join(set_aside)}")
            parts += [f"{name} changed from {old} to {new}" for name, (old, new) in changes.items()]
            facts = {"checkpoint": origin, "rows_cut": self.num_truncated, "changed": changes}
            facts["resolved"] = self.plan.resolved()
            self.log_event("resumed", state, "; ".join(parts), facts)
        for diagnostic in self.unreported:
            self.log(diagnostic.to_record(state.step, state.elapsed_seconds))

    def follow(self, stream: Generator[Record, None, TrainState]) -> TrainState:
        """Log all records of the loop and what follows from each; returns where the loop ended."""
        while True:
            try:
                record = next(stream)
            except StopIteration as end:
                state: TrainState = end.value
                return state
            self.log(record)
            for event in self._events_after(record):
                self.log(event)

    def _events_after(self, record: Record) -> Iterator[EventRecord]:
        """What follows a record, in order; only rank 0's is written, but every rank must ask."""
        self.diagnostics.seconds["data"] = self.engine.data_wait_seconds
        diagnostics = self.diagnostics.on_record(record)
        if isinstance(record, EvalRecord) and (samples := self.samples.evaluate(record)):
            self.diagnostics.seconds["evaluation"] += samples.facts.get("seconds", 0.0)
            yield samples
        for diagnostic in diagnostics:
            yield diagnostic.to_record(record.step, record.time)
        step, now, checks, changes = record.step, record.time, self.engine.graph_checks, self.engine.plan_changes
        for check in checks[self._num_graph_checks :]:
            yield EventRecord(event="checked", step=step, message=check, time=now)
        for change in changes[self._num_plan_changes :]:
            yield EventRecord(event="execution", step=step, message=change["reason"], time=now, facts=change)
            self.metadata["execution"].append(change)  # run.json keeps every plan by which steps ran
            if self.loggers:
                write_run_json(self.folder, self.metadata)
        self._num_graph_checks, self._num_plan_changes = len(checks), len(changes)

    def digests(self) -> dict[str, Any]:
        return {"records": self._rows.digest(), "evaluations": digest_evaluations(self.folder / EVAL_RECORDS_FOLDER)}

    def close(self, exit_code: int) -> None:
        if not self.loggers:
            return
        self._progress_bar.close(exit_code)
        rows = list(read_records(self.folder / METRICS_FILE, with_steps=False)) if exit_code == 0 else []
        if error := sys.exc_info()[1]:
            printed_lines.append(mask_credentials(f"error: {error}"))  # the caller prints it, when W&B is closed
        if exit_code == 0:  # before W&B is closed, whose Logs have it too
            reasons = self.plan.incomparable_reasons if reference.is_worth_a_word(self.metadata) else []
            show_summary(rows, reasons, with_reference=reference.is_asked_for(self.plan.settings.preset, reasons))
        for logger in self.loggers:
            logger.close(exit_code)
        self._log_lines.close()
        if exit_code == 0:
            print(flush=True)
            show_lines(self._describe_end(rows[-1]), folds=False)

    def _describe_end(self, end: Record) -> list[tuple[str, str]]:
        assert isinstance(end, EventRecord), "a finished run's last row"
        facts, settings, folder = end.facts, self.plan.settings, shlex.quote(str(self.folder))
        took = f"{end.step:,} steps in {format_clock(facts['wall_seconds'])}, "
        if self._progress_bar.speeds:  # none where a resumed run had no step left
            took += f"{median(self._progress_bar.speeds):,.0f} tokens/s, "
        took += f"peak memory {format_bytes(facts['peak_memory_bytes'])}"
        lines = [("done", took), ("folder", str(self.folder))]
        if exported := facts["exported"]:
            step = f" (step {exported['step']:,}, the best)" * (exported["step"] != end.step)
            lines.append(("model", f"{self.folder / 'model'}{step}: {facts['export'].partition(':')[0]}"))
        data_name = settings.run_name.removeprefix(f"{settings.method}-")
        other = self.folder.parent / f"{'lora' if settings.mode == 'full' else 'full'}-{data_name}"
        command = f"python launch/generate.py {folder}"
        if (other / METRICS_FILE).exists():
            command = f"python launch/compare.py {' '.join(sorted((folder, shlex.quote(str(other)))))}"
        return [*lines, ("next", f"{command}\npython launch/export.py {folder} --push NAMESPACE/NAME")]
