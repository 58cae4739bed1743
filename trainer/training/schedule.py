"""How far a run goes, and what is due after which step."""

from dataclasses import dataclass
from typing import Any

from trainer.config.batch_config import BatchConfig
from trainer.config.settings import Settings
from trainer.data.dataset import TokenDataset
from trainer.data.sampler import TrainBatches
from trainer.training.lr_schedule import learning_rate
from trainer.training.train_state import TrainState


@dataclass(frozen=True, kw_only=True)
class TrainSchedule:
    """Steps, learning rate, and when to evaluate, save and end."""

    settings: Settings
    batch: BatchConfig
    num_examples: int  #: of the training set
    total_steps: int
    steps_per_epoch: int

    def lr(self, step: int) -> float:
        """The learning rate of the update after `step` others."""
        train = self.settings.train
        return learning_rate(
            step,
            peak_lr=train.lr,
            warmup_steps=self.num_warmup_steps,
            total_steps=self.total_steps,
            schedule=train.schedule,
            min_lr=train.min_lr,
        )

    @property
    def num_warmup_steps(self) -> int:
        """Steps over which the learning rate rises from 0."""
        return self.settings.train.num_warmup_steps(self.total_steps)

    def batches(self, dataset: TokenDataset, rank: int) -> TrainBatches:
        """The global batches of the run, with this rank's share of each."""
        return TrainBatches(
            dataset=dataset,
            batch_config=self.batch,
            seed=self.settings.train.seed,
            rank=rank,
            shuffle=self.settings.data.shuffle,
            by_length=self.settings.data.objective == "completion" and not self.settings.data.packing,
        )

    def next_boundary(self, step: int) -> int:
        """The first step after `step` after which something is due: evaluation, checkpoint, end of an epoch or run."""
        output = self.settings.output
        strides = [self.steps_per_epoch, *map(self._stride, (output.eval_every, output.save_every))]
        return min([self.total_steps, *((step // stride + 1) * stride for stride in strides)])

    def is_epoch_end(self, step: int) -> bool:
        """Whether a pass over the training set is complete after `step`."""
        return step % self.steps_per_epoch == 0

    def is_eval_due(self, step: int) -> bool:
        """Whether the validation set is evaluated after `step`; always at the end."""
        return self._is_due(self.settings.output.eval_every, step)

    def is_save_due(self, state: TrainState) -> bool:
        """Whether a checkpoint is saved: asked for, a new best where that is exported, the end, or a stop."""
        output = self.settings.output
        is_best = output.export == "best" and state.best is not None and state.best.step == state.step
        return state.stop_requested or is_best or self.is_done(state) or self._is_due(output.save_every, state.step)

    def is_stopped_early(self, state: TrainState) -> bool:
        """Whether the validation loss has not fallen for as many evaluations as --early-stop allows."""
        patience = self.settings.train.patience
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

    def _is_due(self, every: str, step: int) -> bool:
        return step == self.total_steps or step % self._stride(every) == 0
