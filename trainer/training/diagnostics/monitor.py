"""What is wrong with a run while it runs: records and a few times in, findings out. Pure: no torch, no file, no clock.

A finding is made once a run and kept as an event record, so a resumed run takes the rows it left (`replay`) and says
nothing twice.
"""

from collections.abc import Iterable

from trainer.tracking.records import EvalRecord, EventRecord, Record, StepRecord
from trainer.training.diagnostics.loss_rules import LossRules
from trainer.training.diagnostics.throughput_rules import ThroughputRules
from trainer.training.diagnostics.types import Diagnostic, RunInfo


class DiagnosticsMonitor:
    """Takes the records of a run in order and gives back what is new to say."""

    def __init__(self, run_info: RunInfo):
        self.loss_rules = LossRules(run_info)
        self.throughput_rules = ThroughputRules(run_info)
        self.reported_codes: set[str] = set()
        self._previous_time: float | None = None  # time of the row before

    def replay(self, records: Iterable[Record]) -> list[Diagnostic]:
        """Take the rows that an earlier process left; returns what it had no time to say. Their times do not count."""
        first_of_code: dict[str, Diagnostic] = {}
        for record in records:
            if isinstance(record, EventRecord) and record.event == "diagnosis":
                self.reported_codes.add(record.facts["code"])
            else:
                for diagnostic in filter(None, self._apply_loss_rules(record)):
                    first_of_code.setdefault(diagnostic.code, diagnostic)
        return self._select_new(first_of_code.values())

    def on_record(self, record: Record) -> list[Diagnostic]:
        """What one more record of the loop shows."""
        diagnostics = self._apply_loss_rules(record)
        if isinstance(record, EvalRecord) and self._previous_time is not None:
            self.add_time("evaluation", record.time - self._previous_time)
            self.throughput_rules.num_evaluations += 1
        self.throughput_rules.num_steps += isinstance(record, StepRecord)
        self._previous_time = record.time
        return self._select_new([*diagnostics, *self.throughput_rules.check(record.time)])

    def check_adapter(self, max_abs_b: float) -> list[Diagnostic]:
        """What the largest entry of the adapters' B, measured after a step, shows."""
        return self._select_new([self.loss_rules.check_adapter(max_abs_b)])

    def add_time(self, category: str, seconds: float) -> None:
        """Count seconds that were spent on `data`, `device`, `logging` or `evaluation`."""
        self.throughput_rules.seconds[category] += seconds

    def _apply_loss_rules(self, record: Record) -> list[Diagnostic | None]:
        if isinstance(record, StepRecord):
            return self.loss_rules.on_step(record)
        if isinstance(record, EvalRecord):
            return self.loss_rules.on_eval(record)
        if isinstance(record, EventRecord) and record.event == "skipped_step":
            return [self.loss_rules.on_skipped_step(record.step)]
        if isinstance(record, EventRecord) and record.event == "not_finite":
            return [self.loss_rules.on_non_finite(record.step, record.message)]
        return []

    def _select_new(self, diagnostics: Iterable[Diagnostic | None]) -> list[Diagnostic]:
        new_diagnostics = []
        for diagnostic in diagnostics:
            if diagnostic is not None and diagnostic.code not in self.reported_codes:
                self.reported_codes.add(diagnostic.code)
                new_diagnostics.append(diagnostic)
        return new_diagnostics
