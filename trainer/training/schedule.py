"""How far a run goes, what is due after which step at which learning rate, and where it stands."""

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from trainer.config.batch_config import BatchConfig
from trainer.config.choices import Schedule
from trainer.config.fields import Float, NonNegativeFloat, NonNegativeInt, Switch
from trainer.config.settings import Settings
from trainer.data.dataset import TokenDataset
from trainer.data.sampler import GlobalBatch, TrainBatches

if TYPE_CHECKING:
    from trainer.distributed.engine import StepResult


@dataclass(frozen=True, kw_only=True)
class BestCheckpoint:
    """The lowest validation loss so far and where it was."""

    step: NonNegativeInt
    epoch: Float
    loss: Float


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a checkpoint keeps of the run beside weights and optimizer state: what no setting and no step decides."""

    step: NonNegativeInt = 0  #: optimizer steps done
    examples_seen: NonNegativeInt = 0
    tokens_seen: NonNegativeInt = 0  #: padding left out
    epoch_loss_sum: Float = 0.0  #: summed training loss of the epoch so far, nats
    epoch_target_tokens: NonNegativeInt = 0  #: target tokens it is the sum over
    elapsed_seconds: NonNegativeFloat = 0.0  #: since the run began, pauses between stop and resume left out
    skipped_steps: NonNegativeInt = 0  #: steps whose update fp16 left out; AdamW has not counted them
    eval_pending: Switch = True  #: the evaluation and the epoch's row that may be due after this step are still to come
    val_loss: Float | None = None  #: of these weights, where they were evaluated
    best: BestCheckpoint | None = None
    evals_without_improvement: NonNegativeInt = 0  #: evaluations in a row since the best one
    stop_requested: bool = False  #: a rank wants the run to stop; of this process only, not kept

    def after(self, batch: GlobalBatch, result: "StepResult", elapsed_seconds: float) -> "TrainState":
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
            val_loss=None,
            stop_requested=self.stop_requested or result.stop_requested,
        )

    def after_evaluation(self, loss: float, *, epoch: float) -> "TrainState":
        best, num_stale = self.best, self.evals_without_improvement + 1
        if best is None or loss < best.loss:
            best, num_stale = BestCheckpoint(step=self.step, epoch=epoch, loss=loss), 0
        return replace(self, val_loss=loss, best=best, evals_without_improvement=num_stale)

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "stop_requested"}


@dataclass(frozen=True, kw_only=True)
class TrainSchedule:
    """Steps, learning rate, and when to evaluate, save and end."""

    settings: Settings
    batch: BatchConfig
    num_examples: int  #: of the training set
    total_steps: int
    steps_per_epoch: int

    def lr(self, step: int) -> float:
        """The rate of the update number `step` (counted from 0), a function of the step alone.

        The formulas of transformers' `get_linear_schedule_with_warmup`, `get_cosine_with_min_lr_schedule_with_warmup`
        and `get_constant_schedule_with_warmup`: the first update without warm-up has the full rate, and the rate after
        the last one would be --min-lr.
        """
        train, warmup_steps, total_steps = self.settings.train, self.num_warmup_steps, self.total_steps
        if step < warmup_steps:
            return train.lr * (step / warmup_steps)
        if train.schedule == "constant":
            return train.lr
        if step >= total_steps:
            return train.min_lr
        if train.schedule == "linear":
            factor = (total_steps - step) / (total_steps - warmup_steps)
        else:
            factor = 0.5 * (1.0 + math.cos(math.pi * ((step - warmup_steps) / (total_steps - warmup_steps))))
        min_ratio = train.min_lr / train.lr
        return train.lr * (factor * (1.0 - min_ratio) + min_ratio)

    @property
    def num_warmup_steps(self) -> int:
        return self.settings.train.num_warmup_steps(self.total_steps)

    def batches(self, dataset: TokenDataset, rank: int) -> TrainBatches:
        return TrainBatches(
            dataset=dataset,
            batch_config=self.batch,
            seed=self.settings.train.seed,
            rank=rank,
            by_length=self.settings.data.objective == "completion" and not self.settings.data.packing,
        )

    def next_boundary(self, step: int) -> int:
        """The first step after `step` after which something is due: evaluation, checkpoint, end of an epoch or run."""
        output = self.settings.output
        strides = [self.steps_per_epoch, self._stride(output.eval_every), self._stride(output.save_every)]
        return min([self.total_steps, *((step // stride + 1) * stride for stride in strides)])

    def is_epoch_end(self, step: int) -> bool:
        return step % self.steps_per_epoch == 0

    def is_eval_due(self, step: int) -> bool:
        return step == self.total_steps or step % self._stride(self.settings.output.eval_every) == 0

    def is_save_due(self, state: TrainState) -> bool:
        """Whether a checkpoint is saved: asked for, a new best where that is exported, the end, or a stop."""
        output = self.settings.output
        is_best = output.export == "best" and state.best is not None and state.best.step == state.step
        is_asked_for = state.step == self.total_steps or state.step % self._stride(output.save_every) == 0
        return state.stop_requested or is_best or self.is_done(state) or is_asked_for

    def is_stopped_early(self, state: TrainState) -> bool:
        patience = self.settings.train.early_stop
        return patience is not None and state.evals_without_improvement >= patience

    def is_done(self, state: TrainState) -> bool:
        """Whether this was the last step, and nothing that is due after it is still to come."""
        return not state.eval_pending and (state.step >= self.total_steps or self.is_stopped_early(state))

    def record_axes(self, state: TrainState) -> dict[str, Any]:
        """The columns that every record shares; `epoch` is the number of passes done, as a fraction."""
        epochs, steps = divmod(state.step, self.steps_per_epoch)
        fraction = min(steps * self.batch.global_batch, self.num_examples) / self.num_examples
        return {
            "step": state.step,
            "epoch": epochs + fraction,
            "samples": state.examples_seen,
            "tokens": state.tokens_seen,
            "time": state.elapsed_seconds,
        }

    def _stride(self, every: str) -> int:
        return {"epoch": self.steps_per_epoch, "never": self.total_steps}.get(every) or int(every)


def describe_schedule(schedule: Schedule, *, min_lr: float, warmup_steps: int) -> str:
    shape = schedule if schedule == "constant" else f"{schedule} to {min_lr:g}"
    return f"{shape}, {warmup_steps:,} warm-up steps"
