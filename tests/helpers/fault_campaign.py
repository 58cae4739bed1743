"""Kill a tiny run at random moments, again and again.

`PYTHONPATH=.:tests python tests/helpers/fault_campaign.py --kills 200`

Each start is killed (kill -9 of one rank or of all; with --launcher of the launcher alone) and then resumed, until it
has come to its end; then the next run begins. One in eight is killed while it starts; the others at any moment of one
of their next five steps, within an accumulation window, an evaluation or the export at the end too, and half of these
as soon as a checkpoint is being written. After each kill nothing of the run may be left running after 60 s, no
survivor may end with exit code 0, and metrics.jsonl must be whole rows; at the end of each run its rows must be those
of a run nobody killed. Prints kills tried, resumes that worked, rows lost (missing, doubled or different at the end;
must be 0), and rows done again because they came after the newest checkpoint. Exit code 1 where anything failed.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.launch_ranks import find_free_port
from helpers.process_groups import (
    EXIT_TIMEOUT_SECONDS,
    RankProcesses,
    find_processes,
    last_logged_step,
    read_events,
    read_records,
    read_reproducible_records,
)
from helpers.tiny_inputs import make_tiny_gpt2, tiny_argv, write_records

NUM_STEPS = 24


def main() -> int:
    """Kill until the number is reached, then let the last run come to its end."""
    args = parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temp_dir:
        folder = Path(temp_dir)
        os.environ["TRAINER_CACHE"] = str(folder / "cache")
        argv = make_argv(folder)
        expected_records, timings = run_uninterrupted(argv, folder / "whole", args)
        print(f"a run that nobody kills: {len(expected_records)} rows; {timings}", flush=True)
        counts: Counter[str] = Counter()
        while counts["tried"] < args.kills:
            out = folder / f"run-{counts['runs']}"
            run_with_kills(argv, out, args, rng, timings, counts)
            counts["runs"] += 1
            counts["rows lost"] += count_differences(read_reproducible_records(out), expected_records)
            counts["rows again"] += sum(event["facts"]["rows_cut"] for event in read_events(out, "resumed"))
            counts["from the start"] += sum("the start" in event["message"] for event in read_events(out, "resumed"))
            shutil.rmtree(out)
            print(dict(counts), flush=True)
    print(
        f"kills tried {counts['tried']} (in a save {counts['in a save']}, of one rank {counts['one']}, "
        f"of all {counts['all']}, of the launcher {counts['launcher']}), resumes that worked {counts['resumed']}, "
        f"runs brought to their end {counts['runs']}, rows lost {counts['rows lost']}, "
        f"rows done again {counts['rows again']}, longest end of a killed run {counts['longest ms'] / 1000:.1f} s"
    )
    return 0 if counts["resumed"] == counts["tried"] and not counts["rows lost"] else 1


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launcher", choices=("deepspeed", "torchrun"), help="left out: processes without a launcher")
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


@dataclass(frozen=True)
class RunTimings:
    """Seconds of a run that nobody kills: until its first row, of one step, and from its last step to its end."""

    start_seconds: float
    step_seconds: float
    export_seconds: float


def run_uninterrupted(argv: list[str], out: Path, args: argparse.Namespace) -> tuple[list[dict[str, Any]], RunTimings]:
    """(rows, pace) of the run that nobody kills; the second of two: the first prepares the data."""
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        start_time = time.monotonic()
        first_step_time, last_step_time = start_time, start_time
        run = start_run(argv, out, args)
        while run.is_alive():
            time.sleep(0.01)
            num_steps, now = last_logged_step(out), time.monotonic()
            first_step_time, last_step_time = (
                (now if num_steps < 0 else first_step_time),
                (now if num_steps < NUM_STEPS else last_step_time),
            )
        assert run.wait(300) == 0, run.output
    return read_reproducible_records(out), RunTimings(
        first_step_time - start_time, (last_step_time - first_step_time) / NUM_STEPS, time.monotonic() - last_step_time
    )


def run_with_kills(
    argv: list[str], out: Path, args: argparse.Namespace, rng: random.Random, timings: RunTimings, counts: Counter[str]
) -> None:
    """One run from its beginning to its end, killed at random moments in between."""
    unconfirmed_kills = 0  # kills since a start was last seen to go on
    while True:
        has_started = (out / "run.json").exists()
        starts_before, num_steps = count_starts(out), max(0, last_logged_step(out))
        run = start_run([*argv, "--resume"] if has_started else argv, out, args)
        is_spared = counts["tried"] >= args.kills or (num_steps == NUM_STEPS and rng.random() < 0.5)
        if is_spared:
            wait_for(run, 300, lambda: False)
        elif rng.random() < 1 / 8:
            wait_for(run, rng.uniform(0, timings.start_seconds), lambda: False)
        else:
            target_step = min(num_steps + rng.randrange(6), NUM_STEPS)
            wait_for(run, 300, lambda: count_starts(out) > starts_before and last_logged_step(out) >= target_step)  # noqa: B023  # called now
            if rng.random() < 1 / 2:
                wait_for(run, timings.export_seconds, lambda: any(out.glob("checkpoints/.*.tmp")))
                wait_for(run, rng.uniform(0, 0.004), lambda: False)
            else:
                wait_for(
                    run,
                    rng.uniform(0, timings.export_seconds if target_step == NUM_STEPS else timings.step_seconds),
                    lambda: False,
                )
        if not run.is_alive():
            exit_code = run.wait(EXIT_TIMEOUT_SECONDS)
            assert exit_code == 0, f"a run that was not killed ended with {exit_code}:\n{run.output}"
            counts["resumed"] += unconfirmed_kills
            return
        victim = run.kill(rng)
        kill_time = time.monotonic()
        exit_code = run.wait(EXIT_TIMEOUT_SECONDS)
        exit_seconds = time.monotonic() - kill_time
        if "resumed from" in run.output or "eval  0/" in run.output:
            counts["resumed"], unconfirmed_kills = counts["resumed"] + unconfirmed_kills, 0
        if exit_code == 0 and read_events(out, "finished"):
            return  # it was over before the signal came
        counts["tried"] += 1
        counts[victim] += 1
        counts["in a save"] += bool(list(out.glob("checkpoints/.*.tmp")))
        counts["longest ms"] = max(counts["longest ms"], int(1000 * exit_seconds))
        assert exit_code != 0, "a killed run must not look like one that ended well"
        assert "Traceback" not in run.output, run.output
        assert not find_processes(str(out)), "something stays running"
        if (out / "metrics.jsonl").exists():
            read_records(out)
        unconfirmed_kills += 1


def count_starts(out: Path) -> int:
    """How often the run has come to its first row so far."""
    return (last_logged_step(out) >= 0) + len(read_events(out, "resumed")) if (out / "metrics.jsonl").exists() else 0


def wait_for(run: Any, timeout_seconds: float, is_ready: Callable[[], bool]) -> None:
    """Until it is ready, the time is over, or one of the processes has ended."""
    deadline = time.monotonic() + timeout_seconds
    while run.is_alive() and time.monotonic() < deadline and not is_ready():
        time.sleep(0.0005)


class DirectRun(RankProcesses):
    """Ranks without a launcher."""

    def is_alive(self) -> bool:
        """Whether all are running."""
        return all(process.is_alive() for process in self.processes)

    def kill(self, rng: random.Random) -> str:
        """Kill one or all; all while they are still meeting: without a launcher a dead rank is like a late one then."""
        ranks = range(len(self.processes))
        victims = rng.choice([*([rank] for rank in ranks), list(ranks)]) if self.output else list(ranks)
        for rank in victims:
            self.processes[rank].kill()
        return "one" if len(victims) < len(ranks) else "all"

    def wait(self, timeout_seconds: float = EXIT_TIMEOUT_SECONDS) -> Any:
        """The largest exit code."""
        return max(abs(code) for code in super().wait(timeout_seconds)) if self.processes else 0


class LaunchedRun:
    """The same under a launcher."""

    def __init__(self, command: list[str], out: Path):
        self.out, self.log = out, out.parent / f"{out.name}.log"
        root = str(Path(__file__).parents[2])
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONPATH": root}
        environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environ, start_new_session=True
            )

    @property
    def output(self) -> str:
        """What was printed."""
        return self.log.read_text()

    def is_alive(self) -> bool:
        """Whether the launcher is running."""
        return self.process.poll() is None

    def kill(self, rng: random.Random) -> str:
        """Kill the launcher alone; the ranks are left to themselves."""
        self.process.send_signal(signal.SIGKILL)
        return "launcher"

    def wait(self, timeout_seconds: float = EXIT_TIMEOUT_SECONDS) -> int:
        """The launcher's exit code, once all that it started is gone too."""
        deadline = time.monotonic() + timeout_seconds
        exit_code = self.process.wait(timeout_seconds)
        while find_processes(str(self.out)):
            if time.monotonic() > deadline:
                for pid in find_processes(str(self.out)):
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"ranks stay running:\n{self.output}")
            time.sleep(0.1)
        return abs(exit_code)


def start_run(argv: list[str], out: Path, args: argparse.Namespace) -> Any:
    """A run that has just been started."""
    if args.launcher is None:
        return DirectRun(argv, out=out, world_size=args.ranks)
    script = str(Path(__file__).parents[2] / "launch" / "train.py")
    num_ranks_flag = "--num_gpus" if args.launcher == "deepspeed" else "--nproc_per_node"
    launcher = [str(Path(sys.executable).parent / args.launcher), num_ranks_flag, str(args.ranks)]
    return LaunchedRun(
        [*launcher, "--master_port", str(find_free_port()), script, *argv, "--output-dir", str(out)], out
    )


def count_differences(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> int:
    """Rows that are missing, too many or different."""
    return abs(len(actual) - len(expected)) + sum(a != b for a, b in zip(actual, expected, strict=False))


if __name__ == "__main__":
    sys.exit(main())
