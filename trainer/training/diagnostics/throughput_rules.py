"""Rules on where the time goes: functions of times, so they hold for the machine they were taken on."""

import math
from collections import defaultdict
from dataclasses import dataclass, field

from trainer.training.diagnostics.types import Diagnostic, RunInfo

MIN_RUN_SECONDS = 60.0  # seconds of a run; what is shorter need not be faster
MAX_DATA_SHARE, MAX_LOGGING_SHARE, MAX_EVALUATION_SHARE, MIN_DEVICE_SHARE = 0.2, 0.1, 0.4, 0.05


@dataclass
class ThroughputRules:
    """What the times of the rows so far show."""

    run_info: RunInfo
    #: by what they were spent on: `data`, `device` (waiting for the GPU), `logging`, `evaluation`
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    start_time: float | None = None  # time of the first row of this process
    elapsed_seconds: float = 0.0  # from there to the newest row
    num_steps: int = 0
    num_evaluations: int = 0  #: after the one before the first step

    def check(self, now: float) -> list[Diagnostic | None]:
        """What the shares of the time show, once a run is long enough for it to matter; `now`: a row's time."""
        if self.start_time is None:
            self.start_time = now
        self.elapsed_seconds = now - self.start_time
        if self.elapsed_seconds < MIN_RUN_SECONDS:
            return []
        is_online, is_each_epoch = self.run_info.wandb_mode == "online", self.run_info.eval_every == "epoch"
        # one evaluation is that of the last step, which every run has
        max_evaluation_share = MAX_EVALUATION_SHARE if self.num_evaluations > 1 else math.inf
        return [
            self._check_share(
                "waiting_for_data",
                "data",
                MAX_DATA_SHARE,
                "by waiting for training rows",
                cause="the prepared data are read from a slow disk",
                remedy="TRAINER_CACHE=FOLDER on a local disk",
            ),
            self._check_share(
                "slow_logging",
                "logging",
                MAX_LOGGING_SHARE,
                "by writing records",
                cause="the W&B server answers slowly" if is_online else "the disk of the run folder is slow",
                remedy="--wandb offline" if is_online else "--output-dir FOLDER on a local disk",
            ),
            self._check_share(
                "much_evaluation",
                "evaluation",
                max_evaluation_share,
                "into evaluations and their samples",
                cause=f"they are frequent (--eval-every {self.run_info.eval_every}) or their batches small",
                remedy=f"--eval-batch {2 * self.run_info.eval_batch_size}" if is_each_epoch else "--eval-every epoch",
            ),
            self._check_python_bound(),
            self._check_unused_ranks(),
        ]

    def _check_share(
        self, code: str, category: str, max_share: float, spent: str, *, cause: str, remedy: str
    ) -> Diagnostic | None:
        share = self.seconds[category] / self.elapsed_seconds
        if share < max_share:
            return None
        return Diagnostic(
            code=code,
            seen=f"{share:.0%} of {self.elapsed_seconds:.0f} s went {spent}",
            cause=cause,
            remedy=remedy,
            evidence={"share": share, "seconds": self.elapsed_seconds},
        )

    def _check_python_bound(self) -> Diagnostic | None:
        """The GPU had always finished when Python asked for the loss: it waits for Python, not Python for it."""
        training_seconds = self.elapsed_seconds - self.seconds["evaluation"]
        share = self.seconds["device"] / max(training_seconds, 1e-9)
        if self.run_info.device != "cuda" or share >= MIN_DEVICE_SHARE or not self.num_steps:
            return None
        return Diagnostic(
            code="python_bound",
            seen=f"the GPU was waited for in {share:.0%} of the time only: it idles while Python prepares its work",
            cause=f"a micro-batch of {self.run_info.micro_batch_size} is too little work for a GPU",
            remedy=f"--micro-batch {2 * self.run_info.micro_batch_size}",
            evidence={"share": share, "seconds": training_seconds},
        )

    def _check_unused_ranks(self) -> Diagnostic | None:
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
        evaluation_share = self.seconds["evaluation"] / self.elapsed_seconds
        if num_busy_ranks >= run_info.world_size or evaluation_share < MAX_LOGGING_SHARE:
            return None
        return Diagnostic(
            code="unused_ranks",
            seen=f"{run_info.num_val_examples} validation examples in batches of {run_info.eval_batch_size} keep "
            f"{num_busy_ranks} of {run_info.world_size} ranks busy in an evaluation",
            cause="the evaluation batch is too large",
            remedy=f"--eval-batch {max(1, run_info.num_val_examples // run_info.world_size)}",
            evidence={"busy": num_busy_ranks, "ranks": run_info.world_size},
        )
