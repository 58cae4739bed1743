"""How a run is executed and what it leaves: settings on which no loss depends beyond rounding."""

import math
import re
from dataclasses import dataclass

from trainer.config.choices import (
    DS_CONFIG_NAMES,
    EXTRA_LOGGERS,
    MAX_HANG_TIMEOUT_SECONDS,
    MAX_NUM_SAMPLES,
    Execution,
    ExportChoice,
    ExtraLogger,
    Precision,
    WandbMode,
)
from trainer.config.options import INTERVAL, NOT_EMPTY, WANDB_PROJECT, Accepted, at_least, check_fields, option


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How the work is divided over ranks and in which number format it is done."""

    ds_config: str | None = option(
        None, help=f"ZeRO file: {', '.join(DS_CONFIG_NAMES)}, or a path; left out: chosen, and the plan says why"
    )
    precision: Precision | None = option(
        None, help="arithmetic of forward and backward; left out: bf16 on a GPU that has it, else fp32"
    )
    hang_timeout: float = option(
        600.0,
        help="end the run where no rank moves for so long, and name who hangs",
        unit="seconds",
        accepts=Accepted(
            lambda value: 5 <= value <= MAX_HANG_TIMEOUT_SECONDS, f"seconds from 5 to {MAX_HANG_TIMEOUT_SECONDS}"
        ),
    )
    grace: float = option(
        60.0,
        help="end the run where it has not saved and ended so long after a signal",
        unit="seconds",
        accepts=Accepted(lambda value: 1 <= value < math.inf, "seconds from 1"),
    )
    execution: Execution = option(
        "auto",
        help="eager: one operation at a time; graphs: CUDA graphs, each compared once with the eager step; auto: CUDA "
        "graphs on a GPU under ZeRO 0, eager elsewhere",
    )
    activation_checkpointing: bool = option(
        False, help="keep each block's input only and compute it again in backward: less memory, a third more work"
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What a run leaves and where."""

    eval_every: str = option(
        "epoch", help="evaluate every so many steps, every `epoch`, or `never` in between", accepts=INTERVAL
    )
    save_every: str = option(
        "epoch", help="save a checkpoint every so many steps, every `epoch`, or `never` in between", accepts=INTERVAL
    )
    save_total_limit: int = option(2, help="newest checkpoints to keep, beside the best one", accepts=at_least(1))
    output_dir: str | None = option(None, help="run folder; left out: runs/<run name>", accepts=NOT_EMPTY)
    wandb: WandbMode | None = option(None, help="left out: online where logged in, else offline")
    wandb_project: str | None = option(
        None, help="project that runs to be compared share; left out: WANDB_PROJECT, or ours", accepts=WANDB_PROJECT
    )
    run_name: str | None = option(
        None,
        help="left out: <mode or adapter>-<data>",
        accepts=Accepted(
            lambda value: re.fullmatch(r"(?!\.+$)[\w.+-]{1,128}", value) is not None,
            "up to 128 letters, digits and . _ + -, not dots alone",
        ),
    )
    report_to: tuple[ExtraLogger, ...] = option(
        (), help=f"where the rows go beside metrics.jsonl and W&B, comma separated: {', '.join(EXTRA_LOGGERS)}"
    )
    profile: int | None = option(
        None, help="profile so many steps of rank 0 into the run folder's profile/", unit="steps", accepts=at_least(1)
    )
    export: ExportChoice = option(
        "last",
        help="weights that go into the exported folder: of the last step, or of the checkpoint with the lowest "
        "validation loss (then one is saved at each evaluation that is the lowest so far); none: nothing is exported, "
        "and test records stay unseen",
    )
    num_samples: int = option(
        2,
        help=f"validation prompts completed at each evaluation, at most {MAX_NUM_SAMPLES}; 0: none",
        accepts=Accepted(lambda value: 0 <= value <= MAX_NUM_SAMPLES, f"a whole number from 0 to {MAX_NUM_SAMPLES}"),
    )
    score_samples: bool = option(
        False,
        help="score completions of validation prompts at each evaluation: exact match, BLEU, chrF, ROUGE-L; of ACLED "
        "data also date, place and fatalities",
    )

    def __post_init__(self) -> None:
        check_fields(self)
