"""What is wrong with a run while it runs: records and a few times in, findings out. Pure: no torch, no file, no clock.

A finding is made once a run and kept as an event record, so a resumed run takes the rows it left (`replay`) and says
nothing twice.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from trainer.tracking.records import EvalRecord, EventRecord, Record, StepRecord
from trainer.training.loss_rules import Diagnostic, LossRules

MIN_RUN_SECONDS = 60.0  # seconds of a run; what is shorter need not be faster
MAX_DATA_SHARE, MAX_LOGGING_SHARE, MAX_EVALUATION_SHARE = 0.2, 0.1, 0.4


class DiagnosticsMonitor:
    """Takes the records of a run in order and gives back what is new to say."""

    def __init__(self, metadata: Mapping[str, Any]):
        """`metadata`: the content of the run's run.json."""
        settings = metadata.get("resumed", metadata)["settings"]
        self.eval_every, self.eval_batch_size = settings["output"]["eval_every"], settings["train"]["eval_batch"]
        self.is_online = metadata["wandb"]["mode"] == "online"
        self.loss_rules = LossRules(metadata)
        self.reported_codes: set[str] = set()
        self._seconds: defaultdict[str, float] = defaultdict(float)  # by what they were spent on
        self._start_time: float | None = None  # time of the first row of this process
        self._previous_time: float | None = None  # time of the row before
        self._num_evaluations = 0  # after the one before the first step

    def replay(self, records: Iterable[Record]) -> list[Diagnostic]:
        """Take the rows that an earlier process left; returns what it had no time to say. Their times do not count."""
        first_of_code: dict[str, Diagnostic] = {}
        for record in records:
            if isinstance(record, EventRecord) and record.event == "diagnosis":
                self.reported_codes.add(record.facts["code"])
            else:
                for diagnostic in self._apply_loss_rules(record):
                    first_of_code.setdefault(diagnostic.code, diagnostic)
        return self._select_new(first_of_code.values())

    def on_record(self, record: Record) -> list[Diagnostic]:
        """What one more record of the loop shows."""
        diagnostics = self._apply_loss_rules(record)
        if isinstance(record, EvalRecord) and self._previous_time is not None:
            self.add_time("evaluation", record.time - self._previous_time)
            self._num_evaluations += 1
        self._previous_time = record.time
        if self._start_time is None:
            self._start_time = record.time
        if record.time - self._start_time >= MIN_RUN_SECONDS:
            diagnostics += self._find_slow_parts(record.time - self._start_time)
        return self._select_new(diagnostics)

    def check_adapter(self, max_abs_b: float) -> list[Diagnostic]:
        """What the largest entry of the adapters' B by size, measured after a step, shows."""
        return self._select_new(self.loss_rules.find_zero_adapter(max_abs_b))

    def add_time(self, category: str, seconds: float) -> None:
        """Count seconds that were spent on `data`, `logging` or `evaluation`."""
        self._seconds[category] += seconds

    def _apply_loss_rules(self, record: Record) -> list[Diagnostic]:
        if isinstance(record, StepRecord):
            return list(self.loss_rules.on_step(record))
        if isinstance(record, EvalRecord):
            return list(self.loss_rules.on_eval(record))
        if isinstance(record, EventRecord) and record.event == "skipped_step":
            return list(self.loss_rules.on_skipped_step(record.step))
        if isinstance(record, EventRecord) and record.event == "not_finite":
            return [self.loss_rules.on_non_finite(record.step, record.message)]
        return []

    def _find_slow_parts(self, elapsed_seconds: float) -> list[Diagnostic]:
        """Where the time goes: functions of times, so they hold for the machine they were taken on."""
        is_each_epoch = self.eval_every == "epoch"
        rules = (
            (
                "waiting_for_data",
                "data",
                MAX_DATA_SHARE,
                "by waiting for training rows",
                "the prepared data are read from a slow disk",
                "TRAINER_CACHE=FOLDER on a local disk",
            ),
            (
                "slow_logging",
                "logging",
                MAX_LOGGING_SHARE,
                "by writing records",
                "the W&B server answers slowly" if self.is_online else "the disk of the run folder is slow",
                "--wandb offline" if self.is_online else "--output-dir FOLDER on a local disk",
            ),
            (
                "much_evaluation",
                "evaluation",
                # one evaluation is that of the last step, which every run has
                MAX_EVALUATION_SHARE if self._num_evaluations > 1 else math.inf,
                "into evaluations and their samples",
                f"they are frequent (--eval-every {self.eval_every}) or their batches small",
                f"--eval-batch {2 * self.eval_batch_size}" if is_each_epoch else "--eval-every epoch",
            ),
        )
        diagnostics = []
        for code, category, max_share, spent, cause, remedy in rules:
            share = self._seconds[category] / elapsed_seconds
            if share >= max_share:
                seen = f"{share:.0%} of {elapsed_seconds:.0f} s went {spent}"
                evidence = {"share": share, "seconds": elapsed_seconds}
                diagnostics.append(Diagnostic(code=code, seen=seen, cause=cause, remedy=remedy, evidence=evidence))
        return diagnostics

    def _select_new(self, diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
        new_diagnostics = []
        for diagnostic in diagnostics:
            if diagnostic.code not in self.reported_codes:
                self.reported_codes.add(diagnostic.code)
                new_diagnostics.append(diagnostic)
        return new_diagnostics
