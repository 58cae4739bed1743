"""Rules on where the time goes: functions of times, so they hold for the machine they were taken on."""

import math
from dataclasses import dataclass, field

from trainer.training.diagnostics.types import Facts, Finding

FROM = 60.0  # seconds of a run; what is shorter need not be faster
DATA, LOGGING, EVALUATION, DEVICE = 0.2, 0.1, 0.4, 0.05


@dataclass
class Speed:
    """Seconds by what they were spent on: `data`, `device` (waiting for the GPU), `logging`, `evaluation`."""

    facts: Facts
    spent: dict[str, float] = field(default_factory=dict)
    began: float | None = None  # time of the first row of this process
    steps: int = 0
    evaluations: int = 0  #: after the one before the first step

    def spend(self, what: str, seconds: float) -> None:
        """Count seconds that went by."""
        self.spent[what] = self.spent.get(what, 0.0) + seconds

    def look(self, now: float) -> list[Finding | None]:
        """What the shares of the time show, once a run is long enough for it to matter; `now`: a row's time."""
        if self.began is None:
            self.began = now
        whole = now - self.began
        if whole < FROM:
            return []
        shares = {what: seconds / whole for what, seconds in self.spent.items()}
        return [
            self._data(shares.get("data", 0.0), whole),
            self._logging(shares.get("logging", 0.0), whole),
            self._evaluation(shares.get("evaluation", 0.0), whole),
            self._python(whole),
            self._unused(shares.get("evaluation", 0.0)),
        ]

    def _data(self, share: float, whole: float) -> Finding | None:
        if share < DATA:
            return None
        return Finding(
            code="waiting_for_data",
            seen=f"{share:.0%} of {whole:.0f} s went by waiting for training rows",
            cause="the prepared data are read from a slow disk",
            remedy="TRAINER_CACHE=FOLDER on a local disk",
            evidence={"share": share, "seconds": whole},
        )

    def _logging(self, share: float, whole: float) -> Finding | None:
        if share < LOGGING:
            return None
        online = self.facts.wandb == "online"
        return Finding(
            code="slow_logging",
            seen=f"{share:.0%} of {whole:.0f} s went by writing records",
            cause="the W&B server answers slowly" if online else "the disk of the run folder is slow",
            remedy="--wandb offline" if online else "--out FOLDER on a local disk",
            evidence={"share": share, "seconds": whole},
        )

    def _evaluation(self, share: float, whole: float) -> Finding | None:
        if share < EVALUATION or self.evaluations < 2:  # one is that of the last step, which every run has
            return None
        return Finding(
            code="much_evaluation",
            seen=f"{share:.0%} of {whole:.0f} s went into evaluations and their samples",
            cause=f"they are frequent (--eval-every {self.facts.eval_every}) or their batches small",
            remedy=f"--eval-batch {2 * self.facts.eval_batch}"
            if self.facts.eval_every == "epoch"
            else "--eval-every epoch",
            evidence={"share": share, "seconds": whole},
        )  # fmt: skip

    def _python(self, whole: float) -> Finding | None:
        """The GPU had always finished when Python asked for the loss: it waits for Python, not Python for it."""
        training = whole - self.spent.get("evaluation", 0.0)
        share = self.spent.get("device", 0.0) / max(training, 1e-9)
        if self.facts.device != "cuda" or share >= DEVICE or not self.steps:
            return None
        return Finding(
            code="python_bound",
            seen=f"the GPU was waited for in {share:.0%} of the time only: it idles while Python prepares its work",
            cause=f"a micro-batch of {self.facts.micro_batch} is too little work for a GPU",
            remedy=f"--micro-batch {2 * self.facts.micro_batch}",
            evidence={"share": share, "seconds": training},
        )

    def _unused(self, evaluation: float) -> Finding | None:
        """GPUs that no rank uses, or ranks that have no rows where evaluation takes a tenth of the time or more."""
        facts = self.facts
        here = facts.ranks // facts.nodes
        if facts.device == "cuda" and facts.gpus_here > here:
            return Finding(
                code="unused_ranks",
                seen=f"{here} of the {facts.gpus_here} GPUs of this machine are used",
                cause="as many ranks were started",
                remedy=f"deepspeed --num_gpus {facts.gpus_here}",
                evidence={"ranks": here, "gpus": facts.gpus_here},
            )
        busy = math.ceil(facts.val_examples / facts.eval_batch)
        if busy >= facts.ranks or evaluation < LOGGING:
            return None
        return Finding(
            code="unused_ranks",
            seen=f"{facts.val_examples} validation examples in batches of {facts.eval_batch} keep {busy} of "
            f"{facts.ranks} ranks busy in an evaluation",
            cause="the evaluation batch is too large",
            remedy=f"--eval-batch {max(1, facts.val_examples // facts.ranks)}",
            evidence={"busy": busy, "ranks": facts.ranks},
        )
