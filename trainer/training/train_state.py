"""Where a run stands: all that is not a function of its settings and its step."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.data.sampler import GlobalBatch
    from trainer.distributed.engine import StepResult


@dataclass(frozen=True, kw_only=True)
class BestCheckpoint:
    """The lowest validation loss so far and where it was."""

    step: int
    epoch: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a checkpoint keeps of the run beside weights and optimizer state."""

    step: int = 0  #: optimizer steps done
    examples_seen: int = 0
    tokens_seen: int = 0  #: padding left out
    epoch_loss_sum: float = 0.0  #: summed training loss of the epoch so far, nats
    epoch_target_tokens: int = 0  #: targets it is the sum over
    elapsed_seconds: float = 0.0  #: since the run began, pauses between stop and resume left out
    skipped_steps: int = 0  #: steps whose update fp16 left out; AdamW has not counted them
    eval_pending: bool = True  #: the evaluation and the epoch's row that may be due after this step are still to come
    val_loss: float | None = None  #: of the newest evaluation
    val_step: int = -1  #: the step of that evaluation
    best: BestCheckpoint | None = None
    best_for_patience: float | None = None  #: validation loss to beat, by --early-stop's MIN_DELTA
    evals_without_improvement: int = 0  #: evaluations in a row that did not
    stop_requested: bool = False  #: a rank wants the run to stop; of this process only, not kept

    def after(self, batch: "GlobalBatch", result: "StepResult", elapsed_seconds: float) -> "TrainState":
        """The state after one more step."""
        return replace(
            self,
            step=self.step + 1,
            examples_seen=self.examples_seen + len(batch.example_ids),
            tokens_seen=self.tokens_seen + batch.num_tokens,
            epoch_loss_sum=self.epoch_loss_sum + result.loss_sum,
            epoch_target_tokens=self.epoch_target_tokens + batch.num_target_tokens,
            elapsed_seconds=elapsed_seconds,
            skipped_steps=self.skipped_steps + result.is_skipped,
            eval_pending=True,
            stop_requested=self.stop_requested or result.stop_requested,
        )

    def after_evaluation(self, loss: float, *, epoch: float, min_delta: float) -> "TrainState":
        """The state with one more validation loss; `min_delta`: nats by which it must fall to count as lower."""
        best = self.best
        if best is None or loss < best.loss:
            best = BestCheckpoint(step=self.step, epoch=epoch, loss=loss)
        has_improved = self.best_for_patience is None or loss < self.best_for_patience - min_delta
        return replace(
            self,
            val_loss=loss,
            val_step=self.step,
            best=best,
            best_for_patience=loss if has_improved else self.best_for_patience,
            evals_without_improvement=0 if has_improved else self.evals_without_improvement + 1,
        )

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint; `from_dict` reads it back."""
        values = asdict(self)
        del values["stop_requested"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        """The state that `as_dict` wrote."""
        best = values["best"]
        return cls(**{**values, "best": BestCheckpoint(**best) if best else None})
