"""Kill a tiny run at random moments, again and again.

`PYTHONPATH=.:tests python tests/helpers/fault_campaign.py --kills 200`

Each start is killed (kill -9 of one rank or of all) and resumed, until the run has come to its end; then the next run
begins, with a cache of its own. One kill in three comes within a call by which a file is written (half of the bytes
are), the others at any moment of what is left of a run: its start, its data, a step, a checkpoint, or the export. After
each kill nothing of the run may be left running after 60 s, no survivor may end with exit code 0, and metrics.jsonl
must be whole rows; at the end of each run its rows must be those of a run nobody killed, and no temporary file may be
left. Exit code 1 where a row was lost (missing, doubled or different) or a resume did not work.
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
from functools import partial
from pathlib import Path
from typing import Any

from helpers.process_groups import (
    EXIT_TIMEOUT_SECONDS,
    RankProcesses,
    find_processes,
    kill_self,
    read_events,
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
        while campaign.counts["kills"] < args.kills:
            campaign.run_with_kills(folder / f"run-{campaign.counts['runs']}")
            print(dict(campaign.counts), flush=True)
    return 1 if campaign.counts["rows lost"] else 0


class Campaign:
    """Runs of one command line, and how often what became of them."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        files = (("train", 25, 1), ("val", 9, 2))
        data_files = [write_records(folder / f"{name}.jsonl", num_records=n, seed=seed) for name, n, seed in files]
        text = f"--mode full --block-size 16 --global-batch 6 --micro-batch 1 --max-steps {NUM_STEPS} --eval-every 3"
        text += " --save-every 2 --save-total-limit 2 --ds-config zero2"
        self.argv = tiny_argv(make_tiny_gpt2(folder / "tiny", dropout=0.1), (data_files[0], data_files[1]), text)
        self.args, self.rng, self.counts = args, random.Random(args.seed), Counter[str]()
        for name in ("cold", "whole"):  # the second one counts
            start_time = time.monotonic()
            assert not any(self.start([], folder / name).wait(300)), "a run that nobody kills ends well"
            self.run_seconds = time.monotonic() - start_time
        self.expected_records = read_reproducible_records(folder / "whole")

    def start(self, flags: list[str], out: Path, fault: Any = None) -> RankProcesses:
        env = {"TRAINER_CACHE": str(out.with_name(f"cache-{out.name}"))}
        return RankProcesses([*self.argv, *flags], out=out, world_size=self.args.ranks, fault=fault, env=env)

    def run_with_kills(self, out: Path) -> None:
        """One run from its beginning to its end, killed at random moments in between; its folder is gone after."""
        while True:
            run, is_killed = self.start_and_kill(out)
            exit_code = max(map(abs, run.wait(EXIT_TIMEOUT_SECONDS if is_killed else 300)))
            assert "Traceback" not in run.output, run.output
            if not is_killed or ((out / "metrics.jsonl").exists() and read_events(out, "finished")):
                assert is_killed or exit_code == 0, f"a resume did not work:\n{run.output}"
                break
            assert exit_code != 0, "a killed run must not look like one that ended well"
            assert not find_processes(str(out)), "something stays running"
            self.counts["kills"] += 1
        actual, expected = read_reproducible_records(out), self.expected_records
        lost = abs(len(actual) - len(expected)) + sum(a != b for a, b in zip(actual, expected, strict=False))
        again = sum(event["facts"]["rows_cut"] for event in read_events(out, "resumed"))
        self.counts.update({"runs": 1, "rows lost": lost, "rows done again": again})
        assert not list(out.rglob(".*.tmp")), f"left in the folder: {list(out.rglob('.*.tmp'))}"
        for path in (out, out.with_name(f"cache-{out.name}")):
            shutil.rmtree(path)

    def start_and_kill(self, out: Path) -> tuple[RankProcesses, bool]:
        """(run, whether somebody of it was killed)."""
        rng, flags = self.rng, ["--resume"] if (out / "run.json").exists() else []
        if self.counts["kills"] >= self.args.kills:
            return self.start(flags, out), False
        if rng.random() < 1 / 3:
            name = rng.choice(list(WRITE_CALLS))
            fault = partial(kill_in_write, name=name, call_number=rng.randrange(1, WRITE_CALLS[name]))
            run = self.start(flags, out, fault)
            run.processes[0].join(300)
            return run, run.processes[0].exitcode == -signal.SIGKILL
        run, kill_time = self.start(flags, out), time.monotonic() + rng.uniform(0, 1.1 * self.run_seconds)
        while run.is_alive() and time.monotonic() < kill_time:
            time.sleep(0.0005)
        if not run.is_alive():
            return run, False
        everyone = list(range(len(run.processes)))  # while they are meeting, a dead one is like a late one
        for rank in rng.choice([*([rank] for rank in everyone), everyone]) if run.output else everyone:
            run.processes[rank].kill()
        return run, True


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


if __name__ == "__main__":
    sys.exit(main())
