"""What is wrong with a run while it runs: records and a few times in, findings out. Pure: no torch, no file, no clock.

A finding is made once a run and kept as an event record, so a resumed run takes the rows it left (`replay`) and says
nothing twice.
"""

from collections.abc import Iterable

from trainer.tracking.records import EvalRecord, EventRecord, Record, StepRecord
from trainer.training.diagnostics.loss_rules import Learning
from trainer.training.diagnostics.throughput_rules import Speed
from trainer.training.diagnostics.types import Facts, Finding


class Diagnosis:
    """Takes the records of a run in order and gives back what is new to say."""

    def __init__(self, facts: Facts):
        self.learning = Learning(facts)
        self.speed = Speed(facts)
        self.said: set[str] = set()
        self._last: float | None = None  # time of the row before

    def replay(self, records: Iterable[Record]) -> list[Finding]:
        """Take the rows that an earlier process left; returns what it had no time to say. Their times do not count."""
        found: list[Finding] = []
        for record in records:
            if isinstance(record, EventRecord) and record.event == "diagnosis":
                self.said.add(record.facts["code"])
            else:
                found += filter(None, self._learning(record))
        return self._new(found)

    def take(self, record: Record) -> list[Finding]:
        """What one more record of the loop shows."""
        found = self._learning(record)
        if isinstance(record, EvalRecord) and self._last is not None:
            self.speed.spend("evaluation", record.time - self._last)
            self.speed.evaluations += 1
        self.speed.steps += isinstance(record, StepRecord)
        self._last = record.time
        return self._new([*found, *self.speed.look(record.time)])

    def adapter(self, largest: float) -> list[Finding]:
        """What the largest entry of the adapters' B, measured after a step, shows."""
        return self._new([self.learning.adapter(largest)])

    def spend(self, what: str, seconds: float) -> None:
        """Count seconds that the loop or the sinks spent on `data`, `device` or `logging`."""
        self.speed.spend(what, seconds)

    def _learning(self, record: Record) -> list[Finding | None]:
        if isinstance(record, StepRecord):
            return self.learning.step(record)
        if isinstance(record, EvalRecord):
            return self.learning.evaluation(record)
        if isinstance(record, EventRecord) and record.event == "skipped_step":
            return [self.learning.overflow(record.step)]
        if isinstance(record, EventRecord) and record.event == "not_finite":
            return [self.learning.not_finite(record.step, record.message)]
        return []

    def _new(self, found: Iterable[Finding | None]) -> list[Finding]:
        new = []
        for finding in found:
            if finding is not None and finding.code not in self.said:
                self.said.add(finding.code)
                new.append(finding)
        return new
