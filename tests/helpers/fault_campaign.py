"""Kill a tiny run at random moments, again and again.

`PYTHONPATH=.:tests python tests/helpers/fault_campaign.py --kills 200`

Each start is killed (kill -9 of one rank or of all; with --launcher of the launcher alone; with --hosts on two network
namespaces) and then resumed, until it has come to its end; then the next run begins, with a cache of its own. One in
three dies within a call by which a file is written (half of the bytes are), one in twelve while it starts, of those
that begin anew two in three while the data are prepared; the others at any moment of one of their next five steps,
within an accumulation window, an evaluation or the export at the end too, and half of these as soon as a checkpoint is
being written. After each kill nothing of the run may be left running after 60 s, no survivor may end with exit code 0,
and metrics.jsonl must be whole rows; at the end of each run its rows must be those of a run nobody killed, and no
temporary file may be left. Exit code 1 where a row was lost (missing, doubled or different) or a resume did not work.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from helpers.hosts import Hosts, started_hosts
from helpers.process_groups import (
    EXIT_TIMEOUT_SECONDS,
    Fault,
    LaunchedRun,
    RankProcesses,
    Ranks,
    find_processes,
    kill_self,
    last_logged_step,
    read_events,
    read_records,
    read_reproducible_records,
)
from helpers.tiny_inputs import make_tiny_gpt2, tiny_argv, write_records

NUM_STEPS = 24
#: functions of os by which files reach the disk, and about how often a whole run calls each
WRITE_CALLS = {"write": 60, "fsync": 40, "replace": 20, "rename": 10}
#: what a kill leaves behind while something is being written, in the folder of all runs
LEFTOVERS = {
    "a checkpoint": "run-*/checkpoints/.*.tmp",
    "evaluation records": "run-*/eval_records/.*.tmp",
    "run.json": "run-*/.run.json.*.tmp",
    "prepared data": "cache-run-*/**/*.unfinished-*",
}


def main() -> int:
    """Kill until the number is reached, then let the last run come to its end."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as temp_dir, contextlib.ExitStack() as stack:
        folder = Path(temp_dir)
        os.environ["TRAINER_CACHE"] = str(folder / "cache")
        hosts = stack.enter_context(started_hosts(folder / "hosts")) if args.hosts else None
        campaign = Campaign(args, make_argv(folder), folder, hosts)
        campaign.run_uninterrupted()
        counts = campaign.counts
        while counts["tried"] < args.kills:
            campaign.run_with_kills(folder / f"run-{counts['runs']}")
            print(dict(counts), flush=True)
    writing = ", ".join(f"of {name} {counts[name]}" for name in LEFTOVERS)
    print(
        f"kills tried {counts['tried']} (of one rank {counts['one']}, of all {counts['all']}, of the launcher "
        f"{counts['launcher']}, within a call that writes {counts['write']}; in the export {counts['in the export']}, "
        f"in the writing {writing}), resumes that worked {counts['resumed']}, runs brought to their end "
        f"{counts['runs']}, rows lost {counts['rows lost']}, rows done again {counts['rows again']}, longest end of a "
        f"killed run {counts['longest ms'] / 1000:.1f} s"
    )
    return 0 if counts["resumed"] == counts["tried"] and not counts["rows lost"] else 1


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launcher", choices=("deepspeed", "torchrun"), help="left out: processes without a launcher")
    parser.add_argument("--hosts", action="store_true", help="a rank on each of two network namespaces")
    return parser.parse_args()


def make_argv(folder: Path) -> list[str]:
    """A model and a run so small that starting takes longer than all steps."""
    tiny_model = make_tiny_gpt2(folder / "tiny", dropout=0.1)
    data_files = (
        write_records(folder / "train.jsonl", num_records=25, seed=1),
        write_records(folder / "val.jsonl", num_records=9, seed=2),
    )
    text = f"--mode full --block-size 16 --global-batch 6 --micro-batch 1 --max-steps {NUM_STEPS} --eval-every 3"
    return tiny_argv(tiny_model, data_files, f"{text} --save-every 2 --save-total-limit 2 --ds-config zero2")


@dataclass
class Campaign:
    """Runs of one command line, and what became of them; times are those of a run that nobody kills."""

    args: argparse.Namespace
    argv: list[str]
    folder: Path
    hosts: Hosts | None
    counts: Counter[str] = field(default_factory=Counter)
    expected_records: list[dict[str, Any]] = field(default_factory=list)
    leftovers: set[Path] = field(default_factory=set)  #: of earlier kills
    start_seconds: float = 0.0  #: until its first row
    step_seconds: float = 0.0
    export_seconds: float = 0.0  #: from its last step to its end

    def __post_init__(self) -> None:
        self.rng = random.Random(self.args.seed)

    def start(self, flags: list[str], out: Path, fault: Fault | None = None) -> Ranks | LaunchedRun:
        """A run that has just been started."""
        argv, env = [*self.argv, *flags], {"TRAINER_CACHE": str(out.with_name(f"cache-{out.name}"))}
        if self.hosts is not None:
            logs = self.folder / f"logs-{time.monotonic_ns()}"
            return self.hosts.train([*argv, "--output-dir", str(out)], logs, env={**env, "GROUP_OUT": str(out)})
        if self.args.launcher is None:
            return RankProcesses(argv, out=out, world_size=self.args.ranks, fault=fault, env=env)
        env |= {"WANDB_MODE": "disabled", "PYTHONPATH": str(Path(__file__).parents[2])}
        return LaunchedRun(self.args.launcher, argv, out=out, num_ranks=self.args.ranks, env=env)

    def run_uninterrupted(self) -> None:
        """The run that nobody kills; the second of two counts: the first prepares the data."""
        out = self.folder / "whole"
        for _ in range(2):
            shutil.rmtree(out, ignore_errors=True)
            start_time = first_step_time = last_step_time = time.monotonic()
            run = self.start([], out)
            while run.is_alive():
                time.sleep(0.01)
                num_steps, now = last_logged_step(out), time.monotonic()
                first_step_time = now if num_steps < 0 else first_step_time
                last_step_time = now if num_steps < NUM_STEPS else last_step_time
            assert not any(run.wait(300)), run.output
        self.expected_records = read_reproducible_records(out)
        self.start_seconds = first_step_time - start_time
        self.step_seconds = (last_step_time - first_step_time) / NUM_STEPS
        self.export_seconds = time.monotonic() - last_step_time
        print(
            f"a run that nobody kills: {len(self.expected_records)} rows; start {self.start_seconds:.1f} s, step "
            f"{self.step_seconds:.3f} s, export {self.export_seconds:.1f} s",
            flush=True,
        )

    def run_with_kills(self, out: Path) -> None:
        """One run from its beginning to its end, killed at random moments in between; its folder is gone after."""
        unconfirmed_kills = 0  # kills since a start was last seen to go on
        while True:
            run, victim = self.start_and_kill(out)
            kill_time = time.monotonic()
            exit_code = max(map(abs, run.wait(EXIT_TIMEOUT_SECONDS)))
            exit_seconds = time.monotonic() - kill_time
            if "resumed from" in run.output or "eval  0/" in run.output:
                self.counts["resumed"], unconfirmed_kills = self.counts["resumed"] + unconfirmed_kills, 0
            if victim is None:
                assert exit_code == 0, f"a run that was not killed ended with {exit_code}:\n{run.output}"
                self.counts["resumed"] += unconfirmed_kills
                break
            if exit_code == 0 and read_events(out, "finished"):
                break  # it was over before the signal came
            self.count_kill(out, victim, exit_seconds)
            assert exit_code != 0, "a killed run must not look like one that ended well"
            assert "Traceback" not in run.output, run.output
            assert not find_processes(str(out)), "something stays running"
            if (out / "metrics.jsonl").exists():
                read_records(out)
            unconfirmed_kills += 1
        self.counts["runs"] += 1
        self.counts["rows lost"] += count_differences(read_reproducible_records(out), self.expected_records)
        self.counts["rows again"] += sum(event["facts"]["rows_cut"] for event in read_events(out, "resumed"))
        assert not list(out.rglob(".*.tmp")), f"left in the folder: {list(out.rglob('.*.tmp'))}"
        for path in (out, out.with_name(f"cache-{out.name}")):
            shutil.rmtree(path)

    def start_and_kill(self, out: Path) -> tuple[Ranks | LaunchedRun, str | None]:
        """(run, who of it was killed); None where it has come to its end before that, or was spared."""
        rng = self.rng
        starts_before, num_steps = count_starts(out), max(0, last_logged_step(out))
        is_spared = self.counts["tried"] >= self.args.kills or (num_steps == NUM_STEPS and rng.random() < 0.5)
        fault = None
        if not is_spared and self.hosts is None and self.args.launcher is None and rng.random() < 1 / 3:
            name = rng.choice(list(WRITE_CALLS))
            fault = partial(kill_in_write, name=name, call_number=rng.randrange(1, WRITE_CALLS[name]))
        run = self.start(["--resume"] if (out / "run.json").exists() else [], out, fault)
        if is_spared or fault is not None:
            wait_for(run, 300, lambda: False)
            return run, "write" if fault is not None and has_killed_itself(run) else None
        if not (out / "run.json").exists() and rng.random() < 2 / 3:  # nothing is prepared yet
            wait_for(run, 300, lambda: bool(set(self.folder.glob(LEFTOVERS["prepared data"])) - self.leftovers))
            wait_for(run, rng.uniform(0, 0.01), lambda: False)
        elif rng.random() < 1 / 8:
            wait_for(run, rng.uniform(0, self.start_seconds), lambda: False)
        else:
            target_step = min(num_steps + rng.randrange(6), NUM_STEPS)
            wait_for(run, 300, lambda: count_starts(out) > starts_before and last_logged_step(out) >= target_step)
            if rng.random() < 1 / 2:
                wait_for(run, self.export_seconds, lambda: any(self.folder.glob(LEFTOVERS["a checkpoint"])))
                wait_for(run, rng.uniform(0, 0.004), lambda: False)
            else:
                is_last = target_step == NUM_STEPS
                wait_for(run, rng.uniform(0, self.export_seconds if is_last else self.step_seconds), lambda: False)
        return run, kill_some(run, rng) if run.is_alive() else None

    def count_kill(self, out: Path, victim: str, exit_seconds: float) -> None:
        """Of whom, and what was being done."""
        counts = self.counts
        counts["tried"] += 1
        counts[victim] += 1
        counts["in the export"] += last_logged_step(out) == NUM_STEPS and not read_events(out, "finished")
        for name, pattern in LEFTOVERS.items():
            new = set(self.folder.glob(pattern)) - self.leftovers
            counts[name] += bool(new)
            self.leftovers |= new
        counts["longest ms"] = max(counts["longest ms"], int(1000 * exit_seconds))


def kill_in_write(rank: int, name: str, call_number: int) -> None:
    """A fault: rank 0 dies in the so-maniest call of a function of os; a write has then written half."""
    if rank:
        return
    original, num_calls = getattr(os, name), 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == call_number:
            if name == "write":
                original(args[0], memoryview(args[1])[: len(args[1]) // 2])
            kill_self()
        return original(*args, **kwargs)

    setattr(os, name, faulty)


def has_killed_itself(run: Any) -> bool:
    """Whether rank 0 has died of the fault that was put into it."""
    run.processes[0].join(EXIT_TIMEOUT_SECONDS)
    return run.processes[0].exitcode == -signal.SIGKILL


def count_starts(out: Path) -> int:
    """How often the run has come to its first row so far."""
    return (last_logged_step(out) >= 0) + len(read_events(out, "resumed")) if (out / "metrics.jsonl").exists() else 0


def wait_for(run: Ranks | LaunchedRun, timeout_seconds: float, is_ready: Callable[[], bool]) -> None:
    """Until it is ready, the time is over, or one of the processes has ended."""
    deadline = time.monotonic() + timeout_seconds
    while run.is_alive() and time.monotonic() < deadline and not is_ready():
        time.sleep(0.0005)


def kill_some(run: Ranks | LaunchedRun, rng: random.Random) -> str:
    """Kill the launcher alone, one rank or all; all while they are meeting: a dead one is like a late one then."""
    if isinstance(run, LaunchedRun):
        run.process.kill()
        return "launcher"
    everyone = list(range(len(run.processes)))
    victims = rng.choice([*([rank] for rank in everyone), everyone]) if run.output else everyone
    for rank in victims:
        run.processes[rank].kill()
    return "one" if len(victims) < len(everyone) else "all"


def count_differences(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> int:
    """Rows that are missing, too many or different."""
    return abs(len(actual) - len(expected)) + sum(a != b for a, b in zip(actual, expected, strict=False))


if __name__ == "__main__":
    sys.exit(main())
