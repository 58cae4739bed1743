"""Rules on where the time goes: functions of times, so they hold for the machine they were taken on."""

import math
from dataclasses import dataclass, field

from trainer.training.diagnostics.types import Diagnostic, RunInfo

MIN_RUN_SECONDS = 60.0  # seconds of a run; what is shorter need not be faster
MAX_DATA_SHARE, MAX_LOGGING_SHARE, MAX_EVALUATION_SHARE, MIN_DEVICE_SHARE = 0.2, 0.1, 0.4, 0.05


@dataclass
class ThroughputRules:
    """Seconds by what they were spent on: `data`, `device` (waiting for the GPU), `logging`, `evaluation`."""

    run_info: RunInfo
    seconds_by_category: dict[str, float] = field(default_factory=dict)
    start_time: float | None = None  # time of the first row of this process
    num_steps: int = 0
    num_evaluations: int = 0  #: after the one before the first step

    def add_time(self, category: str, seconds: float) -> None:
        """Count seconds that went by."""
        self.seconds_by_category[category] = self.seconds_by_category.get(category, 0.0) + seconds

    def check(self, now: float) -> list[Diagnostic | None]:
        """What the shares of the time show, once a run is long enough for it to matter; `now`: a row's time."""
        if self.start_time is None:
            self.start_time = now
        elapsed_seconds = now - self.start_time
        if elapsed_seconds < MIN_RUN_SECONDS:
            return []
        shares = {category: seconds / elapsed_seconds for category, seconds in self.seconds_by_category.items()}
        return [
            self._check_data(shares.get("data", 0.0), elapsed_seconds),
            self._check_logging(shares.get("logging", 0.0), elapsed_seconds),
            self._check_evaluation(shares.get("evaluation", 0.0), elapsed_seconds),
            self._check_python_bound(elapsed_seconds),
            self._check_unused_ranks(shares.get("evaluation", 0.0)),
        ]

    def _check_data(self, share: float, elapsed_seconds: float) -> Diagnostic | None:
        if share < MAX_DATA_SHARE:
            return None
        return Diagnostic(
            code="waiting_for_data",
            seen=f"{share:.0%} of {elapsed_seconds:.0f} s went by waiting for training rows",
            cause="the prepared data are read from a slow disk",
            remedy="TRAINER_CACHE=FOLDER on a local disk",
            evidence={"share": share, "seconds": elapsed_seconds},
        )

    def _check_logging(self, share: float, elapsed_seconds: float) -> Diagnostic | None:
        if share < MAX_LOGGING_SHARE:
            return None
        is_online = self.run_info.wandb_mode == "online"
        return Diagnostic(
            code="slow_logging",
            seen=f"{share:.0%} of {elapsed_seconds:.0f} s went by writing records",
            cause="the W&B server answers slowly" if is_online else "the disk of the run folder is slow",
            remedy="--wandb offline" if is_online else "--output-dir FOLDER on a local disk",
            evidence={"share": share, "seconds": elapsed_seconds},
        )

    def _check_evaluation(self, share: float, elapsed_seconds: float) -> Diagnostic | None:
        if (
            share < MAX_EVALUATION_SHARE or self.num_evaluations < 2
        ):  # one is that of the last step, which every run has
            return None
        return Diagnostic(
            code="much_evaluation",
            seen=f"{share:.0%} of {elapsed_seconds:.0f} s went into evaluations and their samples",
            cause=f"they are frequent (--eval-every {self.run_info.eval_every}) or their batches small",
            remedy=f"--eval-batch {2 * self.run_info.eval_batch_size}"
            if self.run_info.eval_every == "epoch"
            else "--eval-every epoch",
            evidence={"share": share, "seconds": elapsed_seconds},
        )  # fmt: skip

    def _check_python_bound(self, elapsed_seconds: float) -> Diagnostic | None:
        """The GPU had always finished when Python asked for the loss: it waits for Python, not Python for it."""
        training_seconds = elapsed_seconds - self.seconds_by_category.get("evaluation", 0.0)
        share = self.seconds_by_category.get("device", 0.0) / max(training_seconds, 1e-9)
        if self.run_info.device != "cuda" or share >= MIN_DEVICE_SHARE or not self.num_steps:
            return None
        return Diagnostic(
            code="python_bound",
            seen=f"the GPU was waited for in {share:.0%} of the time only: it idles while Python prepares its work",
            cause=f"a micro-batch of {self.run_info.micro_batch_size} is too little work for a GPU",
            remedy=f"--micro-batch {2 * self.run_info.micro_batch_size}",
            evidence={"share": share, "seconds": training_seconds},
        )

    def _check_unused_ranks(self, evaluation_share: float) -> Diagnostic | None:
        """GPUs that no rank uses, or ranks that have no rows where evaluation takes a tenth of the time or more."""
        run_info = self.run_info
        num_local_ranks = run_info.world_size // run_info.num_nodes
        if run_info.device == "cuda" and run_info.num_local_gpus > num_local_ranks:
            return Diagnostic(
                code="unused_ranks",
                seen=f"{num_local_ranks} of the {run_info.num_local_gpus} GPUs of this machine are used",
                cause="as many ranks were started",
                remedy=f"deepspeed --num_gpus {run_info.num_local_gpus}",
                evidence={"ranks": num_local_ranks, "gpus": run_info.num_local_gpus},
            )
        num_busy_ranks = math.ceil(run_info.num_val_examples / run_info.eval_batch_size)
        if num_busy_ranks >= run_info.world_size or evaluation_share < MAX_LOGGING_SHARE:
            return None
        return Diagnostic(
            code="unused_ranks",
            seen=f"{run_info.num_val_examples} validation examples in batches of {run_info.eval_batch_size} keep "
            f"{num_busy_ranks} of "
            f"{run_info.world_size} ranks busy in an evaluation",
            cause="the evaluation batch is too large",
            remedy=f"--eval-batch {max(1, run_info.num_val_examples // run_info.world_size)}",
            evidence={"busy": num_busy_ranks, "ranks": run_info.world_size},
        )
