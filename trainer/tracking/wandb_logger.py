"""One run on Weights & Biases: never a prompt, never a hang, and never the reason why training stops."""

import contextlib
import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from trainer.config.text import shorten
from trainer.tracking.records import EventRecord, Record
from trainer.tracking.wandb_file import WandbFile
from trainer.tracking.wandb_keys import AXES, METRICS, run_tags, sample_row, wandb_config, wandb_row, wandb_summary

logger = logging.getLogger(__name__)
INIT_TIMEOUT_SECONDS = 20.0  # a server that does not answer in this time is taken for dead
FINISH_TIMEOUT_SECONDS = 60.0  # the last upload may take this long; the rest stays on disk for `wandb sync`


def prepare_environment(folder: Path, mode: str) -> None:
    """Set what wandb reads from the environment when it is imported; everything it writes goes into the run folder.

    WANDB_MODE must be set before the import: given to init alone, an offline run still looks up a host name.
    """
    home = folder.resolve() / "wandb" / "home"
    os.environ["WANDB_MODE"] = mode
    os.environ.pop("WANDB_SERVICE", None)  # the service of a parent process would keep our rows to itself
    os.environ.setdefault("WANDB_SILENT", "true")  # one voice: what matters is said by us
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_CACHE_DIR", str(home / "cache"))
    os.environ.setdefault("WANDB_DATA_DIR", str(home / "data"))
    if mode == "offline":  # online it holds the user's own server and entity
        os.environ.setdefault("WANDB_CONFIG_DIR", str(home / "config"))


def start_wandb(
    metadata: Mapping[str, Any],
    folder: Path,
    *,
    is_resumed: bool = False,
    init_seconds: float = INIT_TIMEOUT_SECONDS,
    finish_seconds: float = FINISH_TIMEOUT_SECONDS,
) -> "WandbLogger":
    """The logger of the run that `metadata` (run.json) describes, in the mode that it names.

    A server that does not answer makes the run an offline one; any other trouble is logged once and leaves a
    logger that takes records and does nothing.
    """
    mode = metadata["wandb"]["mode"]
    if mode == "disabled":
        return WandbLogger(None)
    timeouts = {"init_timeout": init_seconds, "finish_timeout": finish_seconds, "finish_timeout_raises": True}
    try:
        prepare_environment(folder, mode)
        import wandb

        init = partial(_init, wandb, metadata, folder, is_resumed=is_resumed, timeouts=timeouts)
        if is_resumed:
            _say_what_a_resume_overrides(metadata["run_id"])
        try:
            wandb_run = init(mode)
        except Exception as error:
            if mode != "online":
                raise
            logger.warning(f"W&B: no connection ({_one_line(error)}); going on offline")
            _teardown()  # the failed start still holds the id
            prepare_environment(folder, mode := "offline")
            wandb_run = init(mode)
        for axis in AXES:
            wandb_run.define_metric(axis, hidden=True)
        for pattern, axis, summary in METRICS:
            wandb_run.define_metric(pattern, step_metric=axis, summary=summary)
        place = wandb_run.url if mode == "online" else f"offline, send it later with {_sync_command(wandb_run)}"
        logger.info(f"W&B: {place}")
        last_step = _last_step(_wandb_dir(folder), metadata["run_id"]) if is_resumed else -1
        return WandbLogger(wandb_run, last_logged_step=last_step)
    except Exception as error:  # whatever happens in there, it must not cost the run
        logger.warning(f"W&B: not available ({_one_line(error)}); going on without it, metrics.jsonl has every row")
        return WandbLogger(None)


def _init(
    wandb: Any,
    metadata: Mapping[str, Any],
    folder: Path,
    mode: str,
    *,
    is_resumed: bool,
    timeouts: Mapping[str, float],
) -> Any:
    """wandb.init for this run; what a variable of W&B's says goes before ours, except where a flag says it."""
    settings: dict[str, Any] = {
        **timeouts,
        "console": "off",
        "disable_git": True,  # a remote's URL may hold a token, which it would send; run.json has the commit
        **({} if os.environ.get("WANDB_SAVE_CODE") else {"disable_code": True}),
        "x_transaction_log_flush_interval": 1.0,  # seconds: what a killed run loses at most
    }
    settings = {name: value for name, value in settings.items() if f"WANDB_{name.upper()}" not in os.environ}
    name = None if "--run-name" in metadata["overridden"] else os.environ.get("WANDB_NAME")
    tags = [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag.strip()]
    return wandb.init(
        project=metadata["wandb"]["project"],
        id=metadata["run_id"],
        resume="allow" if is_resumed else None,
        name=name or metadata["name"],
        group=metadata["wandb"]["group"],
        job_type=os.environ.get("WANDB_JOB_TYPE") or "train",
        tags=[*run_tags(metadata["mode"], metadata["model"]["name"], metadata["data"]["source"]), *tags],
        config=wandb_config(metadata),
        dir=str(_wandb_dir(folder)),
        mode=mode,
        settings=wandb.Settings(**settings),
    )


def _wandb_dir(folder: Path) -> Path:
    """Where wandb's own files go: into the run folder, unless WANDB_DIR says otherwise."""
    return Path(os.environ.get("WANDB_DIR") or folder).resolve()


def _say_what_a_resume_overrides(run_id: str) -> None:
    """A run that goes on is the run that it was, whatever the variables say."""
    for name, kept in (("WANDB_RUN_ID", run_id), ("WANDB_RESUME", "allow")):
        if (value := os.environ.get(name)) and value != kept:
            logger.warning(f"W&B: {name} is {value}, of no effect: --resume goes on with {kept}")


class WandbLogger:
    """Hands records to a wandb run (None: takes them and does nothing); the first failure is logged and ends it.

    `last_logged_step`: the last step that an earlier process already logged under this id. W&B cannot go back, so rows
    up to it are left out; a resumed run repeats them number by number anyway.
    """

    def __init__(self, run: Any, last_logged_step: int = -1) -> None:
        self._run, self._last_logged_step = run, last_logged_step

    def log(self, record: Record) -> None:
        """Log one record; never raises."""
        if self._run is None:
            return
        try:
            if isinstance(record, EventRecord) and record.event != "samples":
                self._run.summary.update(wandb_summary(record))
            elif record.step > self._last_logged_step:
                self._run.log(_history_row(record), step=record.step)
        except Exception as error:
            self._give_up(error)

    def close(self, exit_code: int) -> None:
        """Finish the run within the finish timeout; never raises, a second call does nothing."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError:
            logger.warning(f"W&B: the server did not take everything in time; send the rest with {_sync_command(run)}")
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        _teardown()
        logger.warning(f"W&B stopped working ({_one_line(error)}); going on without it, metrics.jsonl has every row")


def _history_row(record: Record) -> dict[str, Any]:
    """The row of a record; of an evaluation's samples their scores, and the texts as a table of W&B."""
    if not isinstance(record, EventRecord):
        return wandb_row(record)
    import wandb

    columns = ["prompt", "reference", "base", "completion"]
    place = [record.step, record.facts["epoch"]]
    rows = [place + [text.get(name) for name in columns] for text in record.facts["texts"]]
    return {**sample_row(record), "sample/texts": wandb.Table(columns=["step", "epoch", *columns], data=rows)}


def _teardown() -> None:
    """End wandb's service process now: at exit it would print a traceback where that process is already dead."""
    with contextlib.suppress(Exception):
        import wandb

        wandb.teardown()


def _sync_command(run: Any) -> str:
    """The command that sends what lies on disk."""
    return f"`wandb sync {os.path.relpath(run.settings.sync_dir)}`"


def _last_step(folder: Path, run_id: str) -> int:
    """The last step that earlier processes logged under this id, read from their files; -1 without any."""
    last_step = -1
    for path in sorted(folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb")):
        try:
            for record in WandbFile(path):
                last_step = max(last_step, record.get("history", {}).get("item", {}).get("_step", -1))
        except (OSError, ValueError, AttributeError, TypeError):
            continue  # of a foreign file what could be read counts
    return last_step


def _one_line(error: Exception) -> str:
    return shorten(str(error), 120) or type(error).__name__
