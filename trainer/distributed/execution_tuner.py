"""Which way to run steps is fastest on the hardware at hand: each is timed over a few of the run's own steps."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.distributed.cuda_graphs import NUM_WARMUP_CALLS
from trainer.distributed.execution import ExecutionPlan

NUM_TIMED_STEPS = 5
PATH_NAMES = {
    "eager": "eager",
    "graphs": "recorded steps",
    "compile": "compiled steps",
    "compile+graphs": "compiled and recorded steps",
}


@dataclass(kw_only=True)
class Candidate:
    """A plan while it is timed."""

    plan: ExecutionPlan
    first_step: int = -1  #: of all that ran by it; -1: none has yet
    num_launched: int = 0
    checked_to: float = 0.0  #: relative difference from eager calls
    failure: str = ""
    seconds_per_position: dict[int, float] = field(default_factory=dict)  #: {step: seconds}

    @property
    def num_steps(self) -> int:
        """Steps that it gets: those that warm it up and those that are timed."""
        warmup = 2 + (NUM_WARMUP_CALLS + 1) * self.plan.cuda_graphs
        return warmup + NUM_TIMED_STEPS

    @property
    def seconds(self) -> float:
        """Median over the timed steps, seconds a position; infinity where it failed."""
        timed = sorted(self.seconds_per_position.items())[-NUM_TIMED_STEPS:]
        return math.inf if self.failure else statistics.median(seconds for _, seconds in timed)


class ExecutionTuner:
    """Gives each plan some steps in turn; every step is done once, by one plan, and its result is the run's.

    All ranks switch at the same steps: a plan that fails on one keeps its steps, which are eager there.
    """

    def __init__(
        self,
        plans: Sequence[ExecutionPlan],
        *,
        positions_per_step: int,
        settle: Callable[[dict[str, Any]], dict[str, Any]],
    ):
        """`plans`: the first of them is in force already. `positions_per_step`: of one rank in a full step.

        `settle`: takes a choice (`path`, `message`) and returns the one that holds, an earlier one where there is one;
        all ranks call it.
        """
        self.candidates = [Candidate(plan=plan) for plan in plans]
        self.positions_per_step = positions_per_step
        self._settle = settle
        self._current = 0

    def next_plan(self, step: int) -> ExecutionPlan | None:
        """Count the step that is about to be launched; the plan to switch to before it, None where none is."""
        switched = None
        if self._candidate.num_launched >= self._candidate.num_steps and self._current + 1 < len(self.candidates):
            self._current += 1
            switched = self._candidate.plan
        if self._candidate.num_launched == 0:
            self._candidate.first_step = step
        self._candidate.num_launched += 1
        return switched

    @property
    def _candidate(self) -> Candidate:
        return self.candidates[self._current]

    def add(self, step: int, seconds_per_position: float) -> None:
        """A step is done."""
        by = next(c for c in reversed(self.candidates) if 0 <= c.first_step <= step)
        by.seconds_per_position[step] = seconds_per_position

    def note_check(self, checked_to: float) -> None:
        """The plan in force was verified so far."""
        self._candidate.checked_to = max(self._candidate.checked_to, checked_to)

    def note_failure(self, reason: str) -> None:
        """The plan in force has failed; its steps go on eagerly."""
        self._candidate.failure = self._candidate.failure or reason

    @property
    def is_complete(self) -> bool:
        """Whether every plan's steps are done."""
        return all(len(candidate.seconds_per_position) >= candidate.num_steps for candidate in self.candidates)

    def decide(
        self, all_gather: Callable[[list[float]], list[list[float]]]
    ) -> tuple[ExecutionPlan, str, list[dict[str, Any]]]:
        """(the fastest plan, one line that says so, the timings as JSON); the slowest rank's time counts."""
        by_rank = all_gather([candidate.seconds for candidate in self.candidates])
        seconds = [max(rank_seconds) for rank_seconds in zip(*by_rank, strict=True)]
        milliseconds = [1000 * value * self.positions_per_step for value in seconds]
        fastest = min(range(len(seconds)), key=seconds.__getitem__)
        if math.isinf(seconds[fastest]):
            fastest = 0
        best = self.candidates[fastest]
        parts = [f"{PATH_NAMES[best.plan.path]}: {milliseconds[fastest]:.1f} ms"]
        for candidate, value in zip(self.candidates, milliseconds, strict=True):
            if candidate is not best:
                name = PATH_NAMES[candidate.plan.path]
                parts.append(f"{name} {'failed' if math.isinf(value) else f'{value:.1f}'}")
        if best.plan.path != "eager":
            parts.append(f"checked to {best.checked_to:.0e}")
        choice = self._settle({"path": best.plan.path, "message": ", ".join(parts)})
        plan = next((c.plan for c in self.candidates if c.plan.path == choice["path"]), best.plan)
        timings = [
            {
                "path": candidate.plan.path,
                "first_step": candidate.first_step,
                "steps": len(candidate.seconds_per_position),
                "checked_to": candidate.checked_to,
                "ms": None if math.isinf(value) else value,
                "failure": candidate.failure,
            }
            for candidate, value in zip(self.candidates, milliseconds, strict=True)
        ]
        return plan, choice["message"], timings
