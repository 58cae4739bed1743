"""One run on Weights & Biases, and what W&B's variables and files say of it: never a prompt, never a hang."""

import configparser
import contextlib
import json
import logging
import netrc
import os
import secrets
import shlex
import subprocess
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer.config.errors import TrainingError, UserError, first_line
from trainer.config.fields import RunId, WandbProject, what_is_expected
from trainer.config.files import data_name, path_from_environment
from trainer.config.run_metadata import read_run_metadata
from trainer.config.settings import OutputSettings
from trainer.tracking.console import printed_lines
from trainer.tracking.records import METRICS_FILE, EpochRecord, EventRecord, Record, RecordLogger, read_records
from trainer.tracking.run_lock import RunLock
from trainer.tracking.wandb_keys import AXES, METRICS, wandb_config, wandb_row, wandb_summary

logger = logging.getLogger(__name__)
INIT_TIMEOUT_SECONDS = 20.0  # a server that does not answer in this time is taken for dead
FINISH_TIMEOUT_SECONDS = 60.0  # the last upload may take this long; doctor.py --upload sends the rest
MODEL_TIMEOUT_SECONDS = 3600.0  # the same where the model is sent too
READ_TIMEOUT_SECONDS = 600.0  # reading one .wandb file may take this long
PUBLIC_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com", "forge.coreweave.com")  # old and new names of the server
DEFAULT_PROJECT = "gpt2-full-vs-lora"
TAG_LENGTH = 64  # a longer tag makes wandb.init raise
#: W&B's variables that name one run: a program that starts many must not hand them on.
RUN_VARIABLES = ("WANDB_RUN_ID", "WANDB_NAME", "WANDB_RESUME")
WANDB_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}


def wandb_block(output: OutputSettings, source: str) -> dict[str, str]:
    """The `wandb` block of run.json for a new run: flags, then W&B's own variables, then what we choose. UserError
    where a variable holds what is no id, no project or no folder."""
    run_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(6)
    project = output.wandb_project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT
    for name, annotation, value in (("WANDB_RUN_ID", RunId, run_id), ("WANDB_PROJECT", WandbProject, project)):
        if expected := what_is_expected(annotation, value):
            raise UserError(f"{name} {value}: expected {expected}")
    path_from_environment("WANDB_DIR", ".")  # used after the import of wandb, when a mistake would cost the run W&B
    group = output.wandb_group or os.environ.get("WANDB_RUN_GROUP") or f"full-vs-lora-{data_name(source)}"[:128]
    return {"id": run_id, "project": project, "group": group, "mode": wandb_mode(output.wandb)}


def wandb_mode(flag: str | None) -> str:
    """online, offline or disabled: the flag, else WANDB_MODE, else online where logged in, else offline. `--wandb
    online` without a login is a UserError, as wandb would ask for a key."""
    if flag == "online" and not is_logged_in():
        raise UserError("--wandb online: not logged in; run `wandb login`, set WANDB_API_KEY, or pass --wandb offline")
    if flag is not None:
        return flag
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):  # transformers' Trainer, up to 4
        return "disabled"
    names = (name.lower() for name in (os.environ.get("WANDB_MODE", ""), _settings_entry("mode"), "online"))
    mode = next(WANDB_MODES[name] for name in names if name in WANDB_MODES)
    return "offline" if mode == "online" and not is_logged_in() else mode


def check_loggers(output: OutputSettings) -> None:
    """UserError where a logger cannot work as was asked for."""
    if "tensorboard" in output.report_to and find_spec("tensorboard") is None:
        raise UserError("--report-to tensorboard: it is not installed; pip install -e '.[tensorboard]'")
    wandb_mode(output.wandb)
    should_send_model()


def should_send_model() -> bool:
    """Whether the exported model goes to W&B as an artifact: WANDB_LOG_MODEL, as Hugging Face's Trainer reads it."""
    value = os.environ.get("WANDB_LOG_MODEL", "").lower()
    if value not in ("", "false", "end"):
        raise UserError(f"WANDB_LOG_MODEL {value}: expected end (the exported model is sent) or false")
    return value == "end"


def is_logged_in() -> bool:
    """Whether wandb would find a key without asking: in the environment or in the netrc file. Opens no connection."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _settings_entry("base_url")).netloc
    paths = [path_from_environment("NETRC", name) for name in ("~/.netrc", "~/_netrc")]
    try:
        logins = next((netrc.netrc(path).hosts for path in paths if path.exists()), {})
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return False
    return any(logins.get(name, ("", "", ""))[2] for name in ([host] if host else PUBLIC_HOSTS))


def _settings_entry(name: str) -> str:
    """An entry of wandb's settings files (`wandb offline` and `wandb login --host` write them), '' without one."""
    config_dir = path_from_environment("WANDB_CONFIG_DIR", "~/.config/wandb")
    parser = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, UnicodeDecodeError):  # what was read before that counts
        parser.read([config_dir / "settings", Path("wandb") / "settings"])
    return parser.get("default", name, fallback="")


def start_wandb(
    metadata: Mapping[str, Any], folder: Path, *, previous_records: Iterable[Record] | None = None
) -> "WandbLogger | None":
    """The logger of the run that `metadata` (run.json) describes, in the mode that it names; None where disabled. Any
    trouble is raised, whatever it is. W&B's variables count, except where a flag says otherwise. `previous_records`: of
    a run that is resumed; those that W&B does not have are logged first."""
    mode, run_id, is_resumed = metadata["wandb"]["mode"], metadata["run_id"], previous_records is not None
    if mode == "disabled":
        return None
    if is_resumed and (ignored := os.environ.get("WANDB_RUN_ID", run_id)) != run_id:
        logger.warning(f"W&B: WANDB_RUN_ID {ignored} is ignored: --resume continues {run_id}")
    run = _init_run(metadata, folder, mode, is_resumed=is_resumed)
    offline = f"offline, send it later with `wandb sync {os.path.relpath(run.settings.sync_dir)}`"
    logger.info(f"W&B: {run.url if mode == 'online' else offline}")
    last_step = run.starting_step - 1  # of the server
    if mode == "offline" and is_resumed:
        last_step = _last_step(path_from_environment("WANDB_DIR", str(folder)), run_id)
    wandb_logger = WandbLogger(run, last_step, folder / "model" if should_send_model() else None)
    for record in previous_records or ():
        wandb_logger.log(record, is_new=False)
    return wandb_logger


def upload_run(folder: Path) -> str:
    """Log the rows of metrics.jsonl that W&B's server lacks; returns one line on what is there now. UserError where
    nobody is logged in or a process writes into the folder, TrainingError where W&B does not take the rows."""
    metadata = read_run_metadata(folder / "run.json")
    if not is_logged_in():
        raise UserError(f"--upload {folder}: not logged in to W&B; run `wandb login` or set WANDB_API_KEY")
    lock, record = RunLock(folder), None
    lock.acquire()
    try:
        run = _init_run(metadata, folder, "online", is_resumed=True)
        wandb_logger = WandbLogger(run, run.starting_step - 1)
        for record in read_records(folder / METRICS_FILE):
            wandb_logger.log(record, is_new=False)
        has_finished = isinstance(record, EventRecord) and record.event == "finished"
        wandb_logger.close(int(not has_finished))
        unsent = wandb_logger.unsent
        missing = f" but that of step {unsent[0].step}, which a resume sends," if unsent else ""
        return f"all rows of {folder}{missing} are on W&B: {run.url}"
    except Exception as error:
        _teardown()
        raise TrainingError(f"{folder}: the rows are not all on W&B ({first_line(error)}); try again later") from error
    finally:
        lock.release()


def _init_run(metadata: Mapping[str, Any], folder: Path, mode: Any, *, is_resumed: bool) -> Any:
    """The run of wandb with its metrics defined; everything that wandb writes goes into the run folder. WANDB_MODE must
    be set before the import: given to init alone, an offline run still looks up a host name."""
    name = None if "--run-name" in metadata["overridden"] else os.environ.get("WANDB_NAME")
    tags = [metadata["mode"], data_name(metadata["model"]["name"]), data_name(metadata["data"]["source"])]
    tags += metadata["settings"]["output"]["wandb_tags"]
    tags += [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag.strip()]
    settings = {
        "init_timeout": INIT_TIMEOUT_SECONDS,
        "finish_timeout": MODEL_TIMEOUT_SECONDS if should_send_model() else FINISH_TIMEOUT_SECONDS,
        "finish_timeout_raises": True,
        "console": "off",  # it would take every frame of the bar; the lines go there from here
        "disable_git": True,  # a remote's URL may hold a token, which it would send; run.json has the commit
        **({} if os.environ.get("WANDB_SAVE_CODE") else {"disable_code": True}),
        "x_transaction_log_flush_interval": 1.0,  # seconds: what a killed run loses at most
    }
    settings = {name: value for name, value in settings.items() if f"WANDB_{name.upper()}" not in os.environ}
    home = folder.resolve() / "wandb" / "home"
    os.environ["WANDB_MODE"] = mode
    os.environ.pop("WANDB_SERVICE", None)  # the service of a parent process would keep our rows to itself
    defaults = {"SILENT": "true", "ERROR_REPORTING": "false", "CACHE_DIR": str(home / "cache"), "DATA_DIR": str(home)}
    if mode == "offline":  # online it holds the user's own server and entity
        defaults["CONFIG_DIR"] = str(home / "config")
    for variable, value in defaults.items():
        os.environ.setdefault(f"WANDB_{variable}", value)
    import wandb

    run = wandb.init(
        project=metadata["wandb"]["project"],
        id=metadata["run_id"],
        resume="allow" if is_resumed else None,
        name=name or metadata["name"],
        group=metadata["wandb"]["group"],
        job_type=os.environ.get("WANDB_JOB_TYPE") or "train",
        tags=list(dict.fromkeys(tag[:TAG_LENGTH] for tag in tags)),
        config=wandb_config(metadata),
        dir=str(path_from_environment("WANDB_DIR", str(folder)).resolve()),
        mode=mode,
        settings=wandb.Settings(**settings),
    )
    define_metrics(run)
    return run


def define_metrics(run: Any) -> None:
    """Tell W&B the x axes of a run's metrics, and which of their values its summary keeps."""
    for axis in AXES:
        run.define_metric(axis, hidden=True)
    for pattern, summary in METRICS.items():
        run.define_metric(pattern, step_metric=next(iter(AXES)), summary=summary)


class OptionalLogger:
    """The logger that `start` makes (None: nothing to do). Its first failure is one line: it gets no more records, and
    the exit code 1 at the end of the run."""

    def __init__(self, name: str, start: Callable[[], RecordLogger | None], folder: Path) -> None:
        self._name, self._folder, self._has_failed = name, folder, False
        self._logger: RecordLogger | None = self._attempt(start, is_edge=True)

    def log(self, record: Record) -> None:
        if (active := self._logger) is not None and not self._has_failed:
            self._attempt(lambda: active.log(record))

    def close(self, exit_code: int) -> None:
        """A second call does nothing."""
        closing, self._logger = self._logger, None
        if closing is not None:
            self._attempt(lambda: closing.close(1 if self._has_failed else exit_code), is_edge=True)

    def _attempt(self, call: Callable[[], Any], *, is_edge: bool = False) -> Any:
        try:
            return call()
        except Exception as error:  # whatever happens in there, it must not cost the run
            is_wandb = self._name == "W&B"
            if is_edge and is_wandb:
                _teardown()
            if not self._has_failed:
                self._has_failed = True
                problem = f"{self._name} failed ({first_line(error)}); going on without it: metrics.jsonl has every row"
                command = f"python launch/doctor.py --upload {shlex.quote(str(self._folder))}"
                logger.warning(problem + f"; send them later with `{command}`" * is_wandb)


class WandbLogger:
    """Hands records to a wandb run, and raises what goes wrong with their numbers.

    A table of samples, an alert, the model or the printed lines that fail cost themselves: one line, and no more of
    the kind. `last_logged_step`: the last step that an earlier process already logged under this id. W&B cannot go
    back, so rows up to it are left out; a resumed run repeats them number by number anyway. For the same reason the
    records of a step are sent in one row, once a later step or the epoch's mean shows that no evaluation is missing.
    `model_folder`: what is sent as an artifact when the run is finished.
    """

    def __init__(self, run: Any, last_logged_step: int = -1, model_folder: Path | None = None) -> None:
        self._run, self._last_logged_step, self._model_folder = run, last_logged_step, model_folder
        self._failed_extras: set[str] = set()
        self.unsent: list[Record] = []  #: of the newest step

    def log(self, record: Record, *, is_new: bool = True) -> None:
        """`is_new`: False for a record of the past, of which nobody is alerted."""
        self._log_extra("the console", self._log_console)
        if self.unsent and record.step > self.unsent[0].step:
            self._send_row()
        if isinstance(record, EventRecord) and record.event != "samples":
            self._run.summary.update(wandb_summary(record))
            if record.event == "diagnosis" and is_new:
                title, text = f"{record.facts['topic']} (step {record.step})", record.message
                self._log_extra("an alert", lambda: self._run.alert(title=title, text=text, level="WARN"))
            if record.event == "finished" and is_new and self._model_folder and record.facts["exported"]:
                self._log_extra("the model", lambda: self._log_model(record))
        elif record.step > self._last_logged_step:
            self.unsent.append(record)

    def close(self, exit_code: int) -> None:
        if any(isinstance(record, EpochRecord) for record in self.unsent):  # behind the evaluations of its step
            self._send_row()
        self._log_extra("the console", self._log_console)
        self._run.finish(exit_code=exit_code)
        _check_upload(self._run)

    def _send_row(self) -> None:
        records, self.unsent = self.unsent, []
        row: dict[str, float] = {}
        for record in records:
            row |= wandb_row(record)
            if isinstance(record, EventRecord):
                self._log_extra("the table of samples", partial(self._log_samples, record))
        self._run.log(row, step=records[0].step, commit=True)

    def _log_samples(self, record: EventRecord) -> None:
        import wandb

        columns = ["prompt", "reference", "base", "completion"]
        rows = [[record.step, record.facts["epoch"], *map(text.get, columns)] for text in record.facts["texts"]]
        table = wandb.Table(columns=["step", "epoch", *columns], data=rows)
        self._run.log({"sample/texts": table}, step=record.step)

    def _log_console(self) -> None:
        """Send the lines that were printed since; where WANDB_CONSOLE is set, wandb does that itself."""
        if printed_lines and self._run.settings.console == "off":
            self._run.write_logs("\n".join(printed_lines))
        printed_lines.clear()

    def _log_model(self, record: EventRecord) -> None:
        import wandb

        artifact = wandb.Artifact(f"model-{self._run.id}", type="model", metadata=record.facts["exported"])
        artifact.add_dir(str(self._model_folder), policy="immutable", skip_cache=True)  # no second copy on the disk
        self._run.log_artifact(artifact)

    def _log_extra(self, name: str, call: Callable[[], None]) -> None:
        if name not in self._failed_extras:
            try:
                call()
            except Exception as error:
                self._failed_extras.add(name)
                logger.warning(f"W&B: {name} failed ({first_line(error)}); no more of its kind, the numbers go on")


def _check_upload(run: Any) -> None:
    """RuntimeError where the server has refused rows: the client sends no more then, and tells nobody but its log."""
    with contextlib.suppress(OSError):
        if "filestream: fatal error" in Path(run.settings.log_internal).read_text("utf-8", errors="replace"):
            raise RuntimeError("its server refused the rows")


def _teardown() -> None:
    """End wandb's service process now: at exit it would print a traceback where that process is already dead."""
    with contextlib.suppress(Exception):
        import wandb

        wandb.teardown()


def _last_step(folder: Path, run_id: str) -> int:
    """The last step that earlier processes logged under this id, read from their files; -1 without any."""
    from wandb.util import get_core_path

    last_step = -1
    inspect = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--summary", "--run-file"]
    for path in filter(Path.is_file, folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb")):
        process = subprocess.run([*inspect, path, path.parent], capture_output=True, timeout=READ_TIMEOUT_SECONDS)
        if process.returncode == 0 and (step := json.loads(process.stdout)["step"]) is not None:
            last_step = max(last_step, step)
    return last_step
