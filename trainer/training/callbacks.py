"""What is done beside the loop at each of its records: samples, and what is wrong with the run. All ranks take part."""

import time
from collections.abc import Iterable, Iterator

from trainer.distributed.engine import Engine
from trainer.tracking.records import EvalRecord, EventRecord, Record
from trainer.training.diagnostics.monitor import Diagnosis
from trainer.training.diagnostics.types import Facts
from trainer.training.generation import Sampler


class Observer:
    """Looks at each record of the loop and adds events. Changes no number: it draws nothing and trains nothing."""

    def __init__(self, engine: Engine, facts: Facts, sampler: Sampler | None = None, earlier: Iterable[Record] = ()):
        self.engine = engine
        self.diagnosis = Diagnosis(facts)
        self.sampler = sampler
        self._earlier = 0.0  # seconds that an earlier process took for samples
        self.untold = self.diagnosis.replay(self._counted(earlier))  # what a process that was killed did not say
        self._adapters = engine.model.starting_at_zero
        self._device = 0.0
        self._told = 0  # of the engine's notices

    def begin(self, step: int, seconds: float) -> list[EventRecord]:
        """What is to be said before the first record."""
        events = [finding.record(step, seconds) for finding in self.untold]
        if self.sampler and self.sampler.why_not:
            message = f"no samples: {self.sampler.why_not}"
            events.append(EventRecord(event="samples_off", step=step, message=message, time=seconds))
        return events

    @property
    def sample_seconds(self) -> float:
        """What the samples of the whole run took."""
        return self._earlier + (self.sampler.seconds if self.sampler else 0.0)

    def _counted(self, earlier: Iterable[Record]) -> Iterator[Record]:
        for record in earlier:
            if isinstance(record, EventRecord) and record.event == "samples":
                self._earlier += record.facts["seconds"]
            yield record

    def after(self, record: Record) -> list[EventRecord]:
        """What follows a record, in order; only rank 0's is written, but every rank must ask."""
        waited, self._device = self.engine.waited - self._device, self.engine.waited
        self.diagnosis.spend("device", waited)
        found = self.diagnosis.take(record)
        if isinstance(record, EvalRecord) and record.step and self._adapters:
            found += self.diagnosis.adapter(self.engine.largest(self._adapters))
            self._adapters = ()  # what has moved once is not zero again
        sample = self.sampler.take(record) if self.sampler and isinstance(record, EvalRecord) else None
        self.diagnosis.spend("evaluation", sample.facts["seconds"] if sample else 0.0)
        events = [finding.record(record.step, record.time) for finding in found]
        notices, self._told = self.engine.notices[self._told :], len(self.engine.notices)
        events += [EventRecord(event="eager", step=record.step, message=n, time=record.time) for n in notices]
        return [*([sample] if sample else []), *events]

    def drew(self, seconds: float) -> None:
        """The loop waited so long for its rows."""
        self.diagnosis.spend("data", seconds)

    def wrote(self, began: float) -> None:
        """Records were written since `began`, a reading of `time.perf_counter`."""
        self.diagnosis.spend("logging", time.perf_counter() - began)
