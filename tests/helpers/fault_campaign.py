"""Kill a tiny run at random moments, again and again.

`PYTHONPATH=.:tests python tests/helpers/fault_campaign.py --kills 200`

Each start is killed (kill -9 of one rank or of all) and resumed, until the run has come to its end; then the next run
begins, with a cache of its own. One kill in three comes within a call by which a file is written (half of the bytes
are), some while the run starts or prepares its data, the others at any moment of one of the next five steps, of a
checkpoint, or of the export. After each kill nothing of the run may be left running after 60 s, no survivor may end
with exit code 0, and metrics.jsonl must be whole rows; at the end of each run its rows must be those of a run nobody
killed, and no temporary file may be left. Exit code 1 where a row was lost (missing, doubled or different) or a resume
did not work.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from helpers.process_groups import (
    EXIT_TIMEOUT_SECONDS,
    RankProcesses,
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


def main() -> int:
    """Kill until the number is reached, then let the last run come to its end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp_dir:
        folder = Path(temp_dir)
        os.environ["TRAINER_CACHE"] = str(folder / "cache")
        campaign = Campaign(args, folder)
        counts = campaign.counts
        while counts["tried"] < args.kills:
            campaign.run_with_kills(folder / f"run-{counts['runs']}")
            print(dict(counts), flush=True)
    print(f"longest end of a killed run {campaign.longest_seconds:.1f} s")
    return 0 if counts["resumed"] == counts["tried"] and not counts["rows lost"] else 1


class Campaign:
    """Runs of one command line, and how often what became of them; times are those of a run that nobody kills."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        files = (("train", 25, 1), ("val", 9, 2))
        data_files = [write_records(folder / f"{name}.jsonl", num_records=n, seed=seed) for name, n, seed in files]
        text = f"--mode full --block-size 16 --global-batch 6 --micro-batch 1 --max-steps {NUM_STEPS} --eval-every 3"
        text += " --save-every 2 --save-total-limit 2 --ds-config zero2"
        self.argv = tiny_argv(make_tiny_gpt2(folder / "tiny", dropout=0.1), (data_files[0], data_files[1]), text)
        self.args, self.folder, self.rng = args, folder, random.Random(args.seed)
        self.counts: Counter[str] = Counter()
        self.longest_seconds = 0.0
        whole = folder / "whole"
        for _ in range(2):  # the second one counts: the first prepares the data
            shutil.rmtree(whole, ignore_errors=True)
            run, times = self.start([], whole), [time.monotonic()]
            for step in (0, NUM_STEPS):  # its first row, its last step
                wait_for(run, 300, lambda step=step: last_logged_step(whole) >= step)
                times.append(time.monotonic())
            assert not any(run.wait(300)), run.output
            self.start_seconds, self.step_seconds = times[1] - times[0], (times[2] - times[1]) / NUM_STEPS
            self.export_seconds = time.monotonic() - times[2]
        self.expected_records = read_reproducible_records(whole)

    def start(self, flags: list[str], out: Path, fault: Callable[[int], None] | None = None) -> RankProcesses:
        """A run that has just been started."""
        env = {"TRAINER_CACHE": str(out.with_name(f"cache-{out.name}"))}
        return RankProcesses([*self.argv, *flags], out=out, world_size=self.args.ranks, fault=fault, env=env)

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
            assert exit_code != 0, "a killed run must not look like one that ended well"
            assert "Traceback" not in run.output, run.output
            assert not find_processes(str(out)), "something stays running"
            self.longest_seconds = max(self.longest_seconds, exit_seconds)
            unconfirmed_kills += 1
            is_exporting = last_logged_step(out) == NUM_STEPS and not read_events(out, "finished")
            self.counts.update(["tried", victim, *(["in the export"] if is_exporting else [])])
        actual, expected = read_reproducible_records(out), self.expected_records
        lost = abs(len(actual) - len(expected)) + sum(a != b for a, b in zip(actual, expected, strict=False))
        again = sum(event["facts"]["rows_cut"] for event in read_events(out, "resumed"))
        self.counts.update({"runs": 1, "rows lost": lost, "rows done again": again})
        assert not list(out.rglob(".*.tmp")), f"left in the folder: {list(out.rglob('.*.tmp'))}"
        for path in (out, out.with_name(f"cache-{out.name}")):
            shutil.rmtree(path)

    def start_and_kill(self, out: Path) -> tuple[RankProcesses, str | None]:
        """(run, who of it was killed); None where it has come to its end before that, or was spared."""
        rng, is_new = self.rng, not (out / "run.json").exists()
        starts_before, num_steps = count_starts(out), max(0, last_logged_step(out))
        is_spared = self.counts["tried"] >= self.args.kills or (num_steps == NUM_STEPS and rng.random() < 0.5)
        fault = None
        if not is_spared and rng.random() < 1 / 3:
            name = rng.choice(list(WRITE_CALLS))
            fault = partial(kill_in_write, name=name, call_number=rng.randrange(1, WRITE_CALLS[name]))
        old_files = set(self.folder.rglob(".*.tmp"))  # of earlier kills
        run = self.start([] if is_new else ["--resume"], out, fault)
        if is_spared:
            wait_for(run, 300, lambda: False)
            return run, None
        if fault is not None:
            run.processes[0].join(300)
            return run, "in a write" if run.processes[0].exitcode == -signal.SIGKILL else None

        def is_writing(pattern: str) -> bool:
            return bool(set(self.folder.glob(pattern)) - old_files)

        if is_new and rng.random() < 2 / 3:  # nothing is prepared yet
            wait_for(run, 300, lambda: is_writing("cache-run-*/**/.*.tmp"))
            pause_seconds = 0.01
        elif rng.random() < 1 / 8:
            pause_seconds = self.start_seconds
        else:
            target_step = min(num_steps + rng.randrange(6), NUM_STEPS)
            wait_for(run, 300, lambda: count_starts(out) > starts_before and last_logged_step(out) >= target_step)
            pause_seconds = self.export_seconds if target_step == NUM_STEPS else self.step_seconds
            if rng.random() < 1 / 2:
                wait_for(run, self.export_seconds, lambda: is_writing("run-*/checkpoints/.*.tmp"))
                pause_seconds = 0.004
        wait_for(run, rng.uniform(0, pause_seconds), lambda: False)
        if not run.is_alive():
            return run, None
        everyone = list(range(len(run.processes)))  # while they are meeting, a dead one is like a late one
        victims = rng.choice([*([rank] for rank in everyone), everyone]) if run.output else everyone
        for rank in victims:
            run.processes[rank].kill()
        return run, "one rank" if len(victims) < len(everyone) else "all ranks"


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


def count_starts(out: Path) -> int:
    """How often the run has come to its first row so far; fails where metrics.jsonl is not whole rows."""
    records = read_records(out) if (out / "metrics.jsonl").exists() else []
    return bool(records) + sum(record.get("event") == "resumed" for record in records)


def wait_for(run: RankProcesses, timeout_seconds: float, is_ready: Callable[[], bool]) -> None:
    """Until it is ready, the time is over, or one of the processes has ended."""
    deadline = time.monotonic() + timeout_seconds
    while run.is_alive() and time.monotonic() < deadline and not is_ready():
        time.sleep(0.0005)


if __name__ == "__main__":
    sys.exit(main())
