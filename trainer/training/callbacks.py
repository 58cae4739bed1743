"""What is done beside the loop at each of its records: samples, and what is wrong with the run. All ranks take part."""

import time
from collections.abc import Iterable, Iterator

from trainer.distributed.engine import Engine
from trainer.tracking.records import EvalRecord, EventRecord, Record
from trainer.training.diagnostics.monitor import DiagnosticsMonitor
from trainer.training.diagnostics.types import RunInfo
from trainer.training.generation import GenerationEvaluator


class Callbacks:
    """Looks at each record of the loop and adds events. Changes no number: it draws nothing and trains nothing."""

    def __init__(
        self,
        engine: Engine,
        run_info: RunInfo,
        generation_evaluator: GenerationEvaluator | None = None,
        previous_records: Iterable[Record] = (),
    ):
        self.engine = engine
        self.diagnostics = DiagnosticsMonitor(run_info)
        self.generation_evaluator = generation_evaluator
        self._previous_sample_seconds = 0.0  # seconds that an earlier process took for samples
        self.unreported = self.diagnostics.replay(
            self._count_sample_seconds(previous_records)
        )  # what a process that was killed did not say
        self._lora_b_names = engine.model.lora_b_names
        self._waited_seconds = {"device": 0.0, "data": 0.0}  # of the engine's counts, up to the record before
        self._num_graph_checks = 0
        self._num_plan_changes = 0  # of the engine's, that were reported

    def on_train_begin(self, step: int, elapsed_seconds: float) -> list[EventRecord]:
        """What is to be said before the first record."""
        events = [diagnostic.to_record(step, elapsed_seconds) for diagnostic in self.unreported]
        if self.generation_evaluator and self.generation_evaluator.disabled_reason:
            message = f"no samples: {self.generation_evaluator.disabled_reason}"
            events.append(EventRecord(event="samples_off", step=step, message=message, time=elapsed_seconds))
        return events

    @property
    def sample_seconds(self) -> float:
        """What the samples of the whole run took."""
        return self._previous_sample_seconds + (
            self.generation_evaluator.elapsed_seconds if self.generation_evaluator else 0.0
        )

    def _count_sample_seconds(self, previous_records: Iterable[Record]) -> Iterator[Record]:
        for record in previous_records:
            if isinstance(record, EventRecord) and record.event == "samples":
                self._previous_sample_seconds += record.facts["seconds"]
                if record.step == 0 and self.generation_evaluator:
                    self.generation_evaluator.base_completions = [text["completion"] for text in record.facts["texts"]]
            yield record

    def on_record(self, record: Record) -> list[EventRecord]:
        """What follows a record, in order; only rank 0's is written, but every rank must ask."""
        for what, seconds in (("device", self.engine.device_wait_seconds), ("data", self.engine.data_wait_seconds)):
            self.diagnostics.add_time(what, seconds - self._waited_seconds[what])
            self._waited_seconds[what] = seconds
        diagnostics = self.diagnostics.on_record(record)
        if isinstance(record, EvalRecord) and record.step and self._lora_b_names:
            diagnostics += self.diagnostics.check_adapter(self.engine.state.max_abs(self._lora_b_names))
            self._lora_b_names = ()  # what has moved once is not zero again
        sample_event = (
            self.generation_evaluator.evaluate(record)
            if self.generation_evaluator and isinstance(record, EvalRecord)
            else None
        )
        self.diagnostics.add_time("evaluation", sample_event.facts["seconds"] if sample_event else 0.0)
        events = [diagnostic.to_record(record.step, record.time) for diagnostic in diagnostics]
        for check in self.engine.execution.checks[self._num_graph_checks :]:
            self._num_graph_checks += 1
            events.append(EventRecord(event="checked", step=record.step, message=check, time=record.time))
        for change in self.engine.execution.changes[self._num_plan_changes :]:
            self._num_plan_changes += 1
            events.append(
                EventRecord(
                    event="execution", step=record.step, message=change.reason, time=record.time, facts=change.as_dict()
                )
            )
        return [*([sample_event] if sample_event else []), *events]

    def add_logging_time(self, start_time: float) -> None:
        """Records were written since `start_time`, a reading of `time.perf_counter`."""
        self.diagnostics.add_time("logging", time.perf_counter() - start_time)
