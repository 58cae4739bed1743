"""Kill a tiny run at random moments, again and again: `python tests/kill_many.py --kills 200`.

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

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import TEMPLATES, make_tiny, write_records
from group import ENDS, Group, events, relatives, rows, science, steps_done
from ranks import free_port

STEPS = 24


def main() -> int:
    """Kill until the number is reached, then let the last run come to its end."""
    given = arguments()
    dice = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["TRAINER_CACHE"] = str(folder / "cache")
        words = flags(folder)
        expected, pace = uninterrupted(words, folder / "whole", given)
        print(f"a run that nobody kills: {len(expected)} rows; {pace}", flush=True)
        count: Counter[str] = Counter()
        while count["tried"] < given.kills:
            out = folder / f"run-{count['runs']}"
            one_run(words, out, given, dice, pace, count)
            count["runs"] += 1
            count["rows lost"] += difference(science(out), expected)
            count["rows again"] += sum(event["facts"]["rows_cut"] for event in events(out, "resumed"))
            count["from the start"] += sum("the start" in event["message"] for event in events(out, "resumed"))
            shutil.rmtree(out)
            print(dict(count), flush=True)
    print(
        f"kills tried {count['tried']} (in a save {count['in a save']}, of one rank {count['one']}, "
        f"of all {count['all']}, of the launcher {count['launcher']}), resumes that worked {count['resumed']}, "
        f"runs brought to their end {count['runs']}, rows lost {count['rows lost']}, "
        f"rows done again {count['rows again']}, longest end of a killed run {count['longest ms'] / 1000:.1f} s"
    )
    return 0 if count["resumed"] == count["tried"] and not count["rows lost"] else 1


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launcher", choices=("deepspeed", "torchrun"), help="left out: processes without a launcher")
    return parser.parse_args()


def flags(folder: Path) -> list[str]:
    """A model and a run so small that starting takes longer than all steps."""
    tiny = make_tiny(folder / "tiny", dropout=0.1)
    data = write_records(folder / "train.jsonl", rows=25, seed=1), write_records(folder / "val.jsonl", rows=9, seed=2)
    text = f"--mode full --model {tiny} --data {data[0]} --val-data {data[1]} --block-size 16 --global-batch 6"
    text += f" --micro-batch 1 --max-steps {STEPS} --eval-every 3 --save-every 2 --keep 2 --ds-config zero2"
    return [*text.split(), *TEMPLATES]


@dataclass(frozen=True)
class Pace:
    """Seconds of a run that nobody kills: until its first row, of one step, and from its last step to its end."""

    start: float
    step: float
    export: float


def uninterrupted(words: list[str], out: Path, given: argparse.Namespace) -> tuple[list[dict[str, Any]], Pace]:
    """(rows, pace) of the run that nobody kills; the second of two: the first prepares the data."""
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        began = time.monotonic()
        first, last = began, began
        start = started(words, out, given)
        while start.alive():
            time.sleep(0.01)
            done, now = steps_done(out), time.monotonic()
            first, last = (now if done < 0 else first), (now if done < STEPS else last)
        assert start.wait(300) == 0, start.output
    return science(out), Pace(first - began, (last - first) / STEPS, time.monotonic() - last)


def one_run(
    words: list[str], out: Path, given: argparse.Namespace, dice: random.Random, pace: Pace, count: Counter[str]
) -> None:
    """One run from its beginning to its end, killed at random moments in between."""
    unproven = 0  # kills since a start was last seen to go on
    while True:
        begun = (out / "run.json").exists()
        before, done = starts(out), max(0, steps_done(out))
        start = started([*words, "--resume"] if begun else words, out, given)
        spared = count["tried"] >= given.kills or (done == STEPS and dice.random() < 0.5)
        if spared:
            wait(start, 300, lambda: False)
        elif dice.random() < 1 / 8:
            wait(start, dice.uniform(0, pace.start), lambda: False)
        else:
            target = min(done + dice.randrange(6), STEPS)
            wait(start, 300, lambda: starts(out) > before and steps_done(out) >= target)  # noqa: B023  # called now
            if dice.random() < 1 / 2:
                wait(start, pace.export, lambda: any(out.glob("checkpoints/.*.tmp")))
                wait(start, dice.uniform(0, 0.004), lambda: False)
            else:
                wait(start, dice.uniform(0, pace.export if target == STEPS else pace.step), lambda: False)
        if not start.alive():
            code = start.wait(ENDS)
            assert code == 0, f"a run that was not killed ended with {code}:\n{start.output}"
            count["resumed"] += unproven
            return
        who = start.kill(dice)
        killed = time.monotonic()
        code = start.wait(ENDS)
        took = time.monotonic() - killed
        if "resumed from" in start.output or "eval  0/" in start.output:
            count["resumed"], unproven = count["resumed"] + unproven, 0
        if code == 0 and events(out, "finished"):
            return  # it was over before the signal came
        count["tried"] += 1
        count[who] += 1
        count["in a save"] += bool(list(out.glob("checkpoints/.*.tmp")))
        count["longest ms"] = max(count["longest ms"], int(1000 * took))
        assert code != 0, "a killed run must not look like one that ended well"
        assert "Traceback" not in start.output, start.output
        assert not relatives(str(out)), "something stays running"
        if (out / "metrics.jsonl").exists():
            rows(out)
        unproven += 1


def starts(out: Path) -> int:
    """How often the run has come to its first row so far."""
    return (steps_done(out) >= 0) + len(events(out, "resumed")) if (out / "metrics.jsonl").exists() else 0


def wait(start: Any, seconds: float, ready: Callable[[], bool]) -> None:
    """Until it is ready, the time is over, or one of the processes has ended."""
    end = time.monotonic() + seconds
    while start.alive() and time.monotonic() < end and not ready():
        time.sleep(0.0005)


class Ranks(Group):
    """Ranks without a launcher."""

    def alive(self) -> bool:
        """Whether all are running."""
        return all(process.is_alive() for process in self.processes)

    def kill(self, dice: random.Random) -> str:
        """Kill one or all; all while they are still meeting: without a launcher a dead rank is like a late one then."""
        ranks = range(len(self.processes))
        chosen = dice.choice([*([rank] for rank in ranks), list(ranks)]) if self.output else list(ranks)
        for rank in chosen:
            self.processes[rank].kill()
        return "one" if len(chosen) < len(ranks) else "all"

    def wait(self, seconds: float = ENDS) -> Any:
        """The largest exit code."""
        return max(abs(code) for code in super().wait(seconds)) if self.processes else 0


class Launched:
    """The same under a launcher."""

    def __init__(self, command: list[str], out: Path):
        self.out, self.log = out, out.parent / f"{out.name}.log"
        root = str(Path(__file__).parent.parent)
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

    def alive(self) -> bool:
        """Whether the launcher is running."""
        return self.process.poll() is None

    def kill(self, dice: random.Random) -> str:
        """Kill the launcher alone; the ranks are left to themselves."""
        self.process.send_signal(signal.SIGKILL)
        return "launcher"

    def wait(self, seconds: float = ENDS) -> int:
        """The launcher's exit code, once all that it started is gone too."""
        end = time.monotonic() + seconds
        code = self.process.wait(seconds)
        while relatives(str(self.out)):
            if time.monotonic() > end:
                for pid in relatives(str(self.out)):
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"ranks stay running:\n{self.output}")
            time.sleep(0.1)
        return abs(code)


def started(words: list[str], out: Path, given: argparse.Namespace) -> Any:
    """A run that has just been started."""
    if given.launcher is None:
        return Ranks(words, out=out, ranks=given.ranks)
    script = str(Path(__file__).parent.parent / "launch" / "train.py")
    count = "--num_gpus" if given.launcher == "deepspeed" else "--nproc_per_node"
    launcher = [str(Path(sys.executable).parent / given.launcher), count, str(given.ranks)]
    return Launched([*launcher, "--master_port", str(free_port()), script, *words, "--out", str(out)], out)


def difference(mine: list[dict[str, Any]], expected: list[dict[str, Any]]) -> int:
    """Rows that are missing, too many or different."""
    return abs(len(mine) - len(expected)) + sum(a != b for a, b in zip(mine, expected, strict=False))


if __name__ == "__main__":
    sys.exit(main())
