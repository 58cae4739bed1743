"""The trials of a study in Optuna's journal: who runs which, and what came of it; for workers on one or many machines.

A journal is one file to which every change is appended under a lock, so all workers see one order of changes. Two rules
follow from it. A trial that two workers enqueue counts once, as the first of its name. A claim is an attribute of
its own, `claim/ATTEMPT/WORKER`, whose value changes with each renewal: of an attempt's claims the first one in the
order of changes holds the trial, and the next attempt begins only when a worker has seen that value unchanged for
`LEASE_SECONDS` of its own clock. So the clocks of two machines need not agree.
"""

import contextlib
import fcntl
import math
import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from trainer.config.errors import UserError, first_line
from trainer.tools.study.search import TrialSpec

JOURNAL_FILE = "journal.log"
STUDY_NAME = "trials"
LEASE_SECONDS = 120.0  # a worker that has not renewed its claim for so long is taken for dead
_STOPPED, _FAILED = 0.0, 1.0  # values of a claim that say why it was given up; those of a lease are above


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A worker's hold on a trial, from `TrialQueue.claim`."""

    trial_id: int
    attempt: int  #: from 1
    num_failures: int  #: of the attempts before it those that failed, or whose workers died
    key: str


@dataclass(frozen=True, kw_only=True)
class QueuedTrial:
    """A trial as the journal has it."""

    name: str
    trial_id: int
    is_finished: bool  #: whether there is a result, a failure among them
    loss: float  #: validation loss where it is complete, infinity where it diverged, else NaN
    failure: str | None  #: why it failed
    worker: str | None  #: who holds it now


class FileLock:
    """The journal's lock: held by an open file, so it ends with the process; a half-written last line is cut off."""

    def __init__(self, journal: Path) -> None:
        self._journal, self._path = journal, journal.with_name(journal.name + ".lock")

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError), open(self._journal, "rb+") as journal:
            size = journal.seek(0, os.SEEK_END)
            start = max(0, size - 2**16)
            journal.seek(start)
            tail = journal.read()
            if tail and not tail.endswith(b"\n"):  # its writer was killed
                journal.truncate(start + tail.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Let the next one write."""
        os.close(self._file)


class TrialQueue:
    """The trials of the study in `folder`; UserError where the journal cannot be read or written."""

    def __init__(self, folder: Path, worker: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.worker, self._clock = worker, clock
        self._last_seen: dict[tuple[int, str], tuple[float, float]] = {}  # of each claim: its value, since when
        path = folder / JOURNAL_FILE
        try:
            backend: BaseJournalBackend = JournalFileBackend(str(path), lock_obj=FileLock(path))
            self._storage = JournalStorage(backend)
            try:
                self._study_id = self._storage.get_study_id_from_name(STUDY_NAME)
            except KeyError:
                with contextlib.suppress(optuna.exceptions.DuplicatedStudyError):  # another worker was first
                    self._storage.create_new_study([StudyDirection.MINIMIZE], STUDY_NAME)
                self._study_id = self._storage.get_study_id_from_name(STUDY_NAME)
        except Exception as error:  # Optuna replays whatever a line holds: as many kinds as there are damages
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"{path}: cannot be used as the study's journal ({reason}); check the folder") from error

    def bind(self, rule_sha256: str) -> None:
        """Note the hash of the study's rule; UserError where the journal has that of another one."""
        attributes = self._storage.get_study_user_attrs(self._study_id)
        if "rule" not in attributes:
            self._storage.set_study_user_attr(self._study_id, "rule", rule_sha256)
        elif attributes["rule"] != rule_sha256:
            raise UserError(
                f"the journal's trials were run by the rule {attributes['rule'][:12]}, rule.json is "
                f"{rule_sha256[:12]}: it was changed after the fact; put it back, or start another study"
            )

    def trials(self) -> dict[str, QueuedTrial]:
        """{name: trial}, in the order in which they were enqueued."""
        trials: dict[str, QueuedTrial] = {}
        for frozen in sorted(self._storage.get_all_trials(self._study_id), key=lambda trial: trial.number):
            trials.setdefault(frozen.user_attrs["name"], self._read(frozen))
        return trials

    def results(self) -> dict[str, float]:
        """{name: `QueuedTrial.loss`} of the trials with a result."""
        return {name: trial.loss for name, trial in self.trials().items() if trial.is_finished}

    def enqueue(self, specs: Iterable[TrialSpec]) -> None:
        """Add the trials that are not there yet."""
        names = set(self.trials())
        for spec in specs:
            if spec.name not in names:
                template = optuna.trial.create_trial(state=TrialState.WAITING, user_attrs={"name": spec.name})
                self._storage.create_new_trial(self._study_id, template_trial=template)

    def claim(self, specs: Iterable[TrialSpec]) -> tuple[Claim, TrialSpec] | None:
        """Take the first of these trials that nobody holds, a dead worker's too; None where all are held."""
        trials = self.trials()
        for spec in specs:
            trial = trials.get(spec.name)
            if trial is not None and not trial.is_finished and (claim := self._try_claim(trial.trial_id)):
                return claim, spec
        return None

    def renew(self, claim: Claim) -> bool:
        """Extend the lease; False where the trial is no longer this worker's, which must then stop running it."""
        frozen = self._storage.get_trial(claim.trial_id)
        if frozen.state.is_finished() or _last_claim(frozen)[1] != claim.key:
            return False
        self._write_lease(claim)
        return True

    def release(self, claim: Claim, *, has_failed: bool = False) -> None:
        """Let the trial go unfinished: the next worker may take it up at once."""
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(claim.trial_id, claim.key, _FAILED if has_failed else _STOPPED)

    def finish(
        self, claim: Claim, *, loss: float | None, failure: str | None = None, has_diverged: bool = False
    ) -> bool:
        """Write the result of a trial; False where it is no longer this worker's, and nothing was written."""
        if not self.renew(claim):
            return False
        for name, value in {"has_diverged": has_diverged, "failure": failure}.items():
            self._storage.set_trial_user_attr(claim.trial_id, name, value)
        is_complete = loss is not None and math.isfinite(loss)
        state = TrialState.COMPLETE if is_complete else TrialState.FAIL
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._storage.set_trial_state_values(claim.trial_id, state, [loss] if is_complete else None)
        return True

    def _try_claim(self, trial_id: int) -> Claim | None:
        """Claim the next attempt where the last one's lease is over, and see in the journal whether we were first."""
        frozen = self._storage.get_trial(trial_id)
        attempt, key, value = _last_claim(frozen)
        if self._is_held(trial_id, key, value):
            return None
        claim = Claim(
            trial_id=trial_id,
            attempt=attempt + 1,
            key=f"claim/{attempt + 1}/{self.worker}",
            num_failures=sum(value != _STOPPED for _, value in _claims(frozen).values()),
        )
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._write_lease(claim)
            frozen = self._storage.get_trial(trial_id)
            if not frozen.state.is_finished() and _last_claim(frozen)[1] == claim.key:
                self._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
                return claim
        return None

    def _is_held(self, trial_id: int, key: str, value: float) -> bool:
        """Whether a claim's worker lives, as far as can be told: it renews its lease, and on this machine its process
        is there."""
        if value in (_STOPPED, _FAILED) or _is_gone(key.split("/", 2)[-1]):
            return False
        last_value, since = self._last_seen.get((trial_id, key), (_STOPPED, 0.0))
        if value != last_value:
            self._last_seen[trial_id, key] = (value, self._clock())
            return True
        return self._clock() - since < LEASE_SECONDS

    def _write_lease(self, claim: Claim) -> None:
        value = self._storage.get_trial(claim.trial_id).user_attrs.get(claim.key, _FAILED) + 1
        self._storage.set_trial_user_attr(claim.trial_id, claim.key, value)

    def _read(self, frozen: FrozenTrial) -> QueuedTrial:
        attributes, is_finished = frozen.user_attrs, frozen.state.is_finished()
        _, key, value = _last_claim(frozen)
        is_held = not is_finished and self._is_held(frozen._trial_id, key, value)
        failed_loss = math.inf if attributes.get("has_diverged") else math.nan
        return QueuedTrial(
            name=attributes["name"],
            trial_id=frozen._trial_id,
            is_finished=is_finished,
            loss=failed_loss if frozen.state != TrialState.COMPLETE or frozen.value is None else float(frozen.value),
            failure=attributes.get("failure"),
            worker=key.split("/", 2)[2] if is_held else None,
        )


def worker_name(number: int) -> str:
    """The name of this process's worker number `number`: machine, process and number."""
    return f"{_machine()}:{os.getpid()}:{number}"


def _machine() -> str:
    """What tells the processes of one machine, or of one container, from those of others."""
    return f"{socket.gethostname()}~{os.stat('/proc/self/ns/pid').st_ino}"


def _is_gone(worker: str) -> bool:
    """Whether a worker is certain to be dead: its process was on this machine and is no more."""
    machine, _, rest = worker.partition(":")
    process_id = rest.partition(":")[0]
    return machine == _machine() and process_id.isdecimal() and not Path(f"/proc/{process_id}").exists()


def _claims(frozen: FrozenTrial) -> dict[int, tuple[str, float]]:
    """{attempt: (key, value) of the claim that holds it, the first one written}."""
    claims: dict[int, tuple[str, float]] = {}
    for key, value in frozen.user_attrs.items():
        if key.startswith("claim/"):
            claims.setdefault(int(key.split("/")[1]), (key, float(value)))
    return claims


def _last_claim(frozen: FrozenTrial) -> tuple[int, str, float]:
    """(number, key, value) of the newest attempt; 0 and given up where there was none."""
    return max(((attempt, *claim) for attempt, claim in _claims(frozen).items()), default=(0, "", _STOPPED))
