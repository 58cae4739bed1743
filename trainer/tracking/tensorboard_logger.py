"""`--report-to tensorboard`: the rows that W&B gets, under the same names, as event files in the run folder."""

from pathlib import Path

from trainer.tracking.records import Record
from trainer.tracking.wandb_keys import wandb_row


class TensorBoardLogger:
    """Writes `tensorboard/` of the run folder. `resume_step`: the step that a resumed run continues from, None for a
    new one; TensorBoard itself hides what an earlier process logged after it."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step, flush_secs=5)

    def log(self, record: Record) -> None:
        for name, value in wandb_row(record).items():
            self._writer.add_scalar(name, value, record.step)  # float32: a resume takes back only scalars of this form

    def close(self, exit_code: int) -> None:
        self._writer.close()
