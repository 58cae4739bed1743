"""What is done beside the loop at each of its records: samples, and what is wrong with the run. All ranks take part."""

from collections.abc import Iterable, Mapping
from typing import Any

from trainer.distributed.engine import Engine
from trainer.tracking.records import EvalRecord, EventRecord, Record
from trainer.training.diagnostics import DiagnosticsMonitor
from trainer.training.generation import GenerationEvaluator


class Callbacks:
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
        self._lora_b_names = engine.model.lora_b_names
        self._data_wait_seconds = 0.0  # of the engine's, up to the record before
        self._num_graph_checks = 0
        self._num_plan_changes = 0  # of the engine's, that were reported

    def on_train_begin(self, step: int, elapsed_seconds: float) -> list[EventRecord]:
        """What is to be said before the first record."""
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
