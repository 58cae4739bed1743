"""The run itself in small, by the program itself: steps, saves, a reload and resume, evaluation, export.

`launch/train.py` is started with the user's flags on a sample of the user's data in a temporary folder: four steps,
saved after the second, then resumed from there. What the resumed part records must be what the first part did.
"""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.cli import Request, words
from trainer.data import sources
from trainer.data.dataset import Prepared
from trainer.tools.doctor.check_result import ERROR, WARNING, Check, fine, judged, size
from trainer.training.run_plan import Plan

LAUNCH = Path(__file__).parents[3] / "launch" / "train.py"
STEPS, SAVED = 4, 2
LARGE = 20  # times the tokens of the rehearsed steps: data beyond it are sampled
CHARACTERS = 12  # of text for a token, more than any tokenizer takes on the mean
SAME = 1e-5  # relative difference of losses after a resume, where sums may be taken in another order


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a rehearsal took: seconds of a step and of the evaluation of one counted token, bytes."""

    step: float
    around: float  #: seconds before the first step and after the last evaluation: imports, model, export
    eval_token: float
    checkpoint: int
    export: int
    peak: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """One start of the program: its exit code (None: it took too long), its rows and its last words."""

    code: int | None
    rows: list[dict[str, Any]]
    output: str
    seconds: float

    def of(self, kind: str, event: str = "") -> list[dict[str, Any]]:
        """The rows of a kind, of an event where one is named."""
        return [row for row in self.rows if row["kind"] == kind and (not event or row.get("event") == event)]

    @property
    def why(self) -> str:
        """The line that says why it failed, the last one where none does."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("error: ") or "Error" in line]
        return (said or lines or ["no output"])[-1].removeprefix("error: ")[:300]


class Rehearsal:
    """Both parts of a rehearsal, in a temporary folder; `limit`: seconds for all of it."""

    def __init__(self, request: Request, plan: Plan, data: Prepared, *, limit: float, near: Path):
        self.request, self.plan, self.data = request, plan, data
        self.end = time.monotonic() + limit
        self.limit = limit
        self.near = near
        self.measured: Measured | None = None

    def check(self) -> Iterator[Check]:
        """Do it all; stops at the first part that fails."""
        self.near.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=self.near) as place:
            folder = Path(place)
            given = _sample(self.request, self.plan, self.data, folder)
            out = folder / "run"
            first = self._start(out, given)
            yield from self._judge_first(first, sampled="data" in given)
            if first.code != 0:
                return
            self.measured = _measure(first)
            again = self._start(out, given, "--resume", f"step-{SAVED}")
            yield from self._judge_again(first, again)

    def _start(self, out: Path, given: Mapping[str, Mapping[str, Any]], *more: str) -> Part:
        ranks = self.plan.world.size
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        train = {**given.get("train", {}), "max_steps": STEPS, "warmup_steps": 0}
        output = {
            "out": str(out), "eval_every": "never", "save_every": str(SAVED), "keep": 3, "wandb": "disabled",
            "run_name": "rehearsal",
        }  # fmt: skip
        line = words(self.request, data=given.get("data", {}), train=train, output=output)
        began = time.monotonic()
        with open(out.parent / "output", "w+") as said:
            process = subprocess.Popen(
                [sys.executable, *launcher, str(LAUNCH), *line, *more], stdout=said, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, "PYTHONPATH": f"{LAUNCH.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
            )  # fmt: skip
            try:
                code: int | None = process.wait(max(1.0, self.end - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
            said.seek(0)
            text = said.read()
        return Part(code=code, rows=_rows(out / "metrics.jsonl"), output=text, seconds=time.monotonic() - began)

    def _judge_first(self, part: Part, *, sampled: bool) -> Iterator[Check]:
        done = len(part.of("step"))
        on = " on a sample of the data" if sampled else ""
        if part.code is None:
            yield Check(
                level=WARNING, what="rehearsal", found=f"{done} of {STEPS} steps in {self.limit:.0f} s, given up{on}",
                remedy="give it more with --limit SECONDS, or rehearse with fewer examples a step (--global-batch)",
            )  # fmt: skip
            return
        if part.code != 0:
            yield Check(
                level=ERROR, what="rehearsal", found=f"failed after {done} steps: {part.why}",
                remedy="the run itself would fail like this",
            )  # fmt: skip
            return
        losses = [row["loss"] for row in part.of("step")]
        told = f"{STEPS} steps{on} in {part.seconds:.0f} s, loss {losses[0]:.4f} to {losses[-1]:.4f}"
        yield fine("train", told)
        evals = part.of("eval")
        yield fine("evaluate", f"validation loss {evals[0]['loss']:.4f} before, {evals[-1]['loss']:.4f} after")
        finished = part.of("event", "finished")[-1]
        yield fine("save", f"checkpoint of {size(finished['checkpoint_bytes'])}")
        yield fine("export", f"{size(finished['export_bytes'])}, {finished['export']}")

    def _judge_again(self, first: Part, again: Part) -> Iterator[Check]:
        if again.code is None:
            yield Check(
                level=WARNING, what="resume", found=f"not done within {self.limit:.0f} s", remedy="--limit SECONDS"
            )
            return
        if again.code != 0:
            yield Check(
                level=ERROR, what="resume", found=f"failed: {again.why}", remedy="a stopped run could not go on"
            )
            return
        before, after = (
            [row["loss"] for row in part.of("step")[SAVED:]] + [row["loss"] for row in part.of("eval")[-1:]]
            for part in (first, again)
        )
        worst = max((abs(a / b - 1) for a, b in zip(after, before, strict=True)), default=1.0)
        same = "bit for bit the same" if before == after else f"the same within {worst:.0e}"
        yield judged(
            worst > SAME, ERROR, "resume", f"from step {SAVED}: losses {same}",
            "a resumed run would not be the run that was stopped; report this with the flags",
        )  # fmt: skip


def _sample(request: Request, plan: Plan, data: Prepared, folder: Path) -> dict[str, dict[str, Any]]:
    """The settings that put a sample in place of large data; {} where they are small enough as they are."""
    settings = plan.settings
    need = STEPS * plan.course.batch.global_batch * settings.data.block_size
    tokens = data.facts["train"]["tokens"] + data.facts["val"]["tokens"]
    form = data.facts["form"]
    if tokens <= LARGE * need or form == "input_ids":
        return {}
    most = {"train": 2 * CHARACTERS * need, "val": CHARACTERS * need // STEPS}
    given = {}
    for side, typed, flag in (("train", settings.data.data, "--data"), ("val", settings.data.val_data, "--val-data")):
        path = folder / f"{side}.jsonl"
        source = sources.find(typed or settings.data.data, flag)
        left = most[side]
        if typed is None:
            left += most["train"]  # the validation sample is what follows that of training
        with open(path, "w") as file:
            for located in sources.records(source):
                line = json.dumps(located.record, default=str)
                if typed is not None or left < most["val"]:
                    file.write(line + "\n")
                left -= len(line)
                if left < 0:
                    break
        given["data" if side == "train" else "val_data"] = str(path)
    return {"data": given}


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the program and its ranks: asked first, so that launchers take their ranks with them."""
    for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_bytes()
    except OSError:
        return []
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith(b"\n")]
    return [{**row, **(row.get("facts") or {})} for row in rows]


def _measure(part: Part) -> Measured:
    steps, evals, finished = part.of("step"), part.of("eval"), part.of("event", "finished")[-1]
    # The first step warms up; the time of the first evaluation is all that was before it.
    spans = [(b["tokens"] - a["tokens"]) / b["tokens_per_second"] for a, b in itertools.pairwise(steps)]
    return Measured(
        step=sum(spans) / len(spans), around=part.seconds - evals[-1]["time"],
        eval_token=evals[0]["time"] / evals[0]["eval_tokens"], checkpoint=finished["checkpoint_bytes"],
        export=finished["export_bytes"], peak=finished["peak_memory_bytes"],
    )  # fmt: skip


def costs(plan: Plan, data: Prepared, measured: Measured, expected: float) -> Iterator[Check]:
    """Time and disk of the whole run, from what the rehearsal took; its memory beside the `expected` bytes."""
    course, output = plan.course, plan.settings.output
    evaluations = 1 + sum(course.due(output.eval_every, n) for n in range(1, course.total_steps + 1))
    evaluation = measured.eval_token * data.facts["val"]["counted_tokens"]
    seconds = course.total_steps * measured.step + evaluations * evaluation + measured.around
    yield fine(
        "time", f"about {span(seconds)}: {course.total_steps:,} steps of {measured.step:.2f} s, "
        f"{evaluations} evaluations of {evaluation:.1f} s, {measured.around:.0f} s around them",
    )  # fmt: skip
    yield fine("memory", f"{size(measured.peak)} at most on a rank in the rehearsal, {size(expected)} by formula")
    yield room(Path(plan.settings.run_folder), measured, output.keep)


def room(folder: Path, measured: Measured, keep: int) -> Check:
    """Whether the disk has room for the checkpoints that are kept, one being written, and the export."""
    need = (keep + 2) * measured.checkpoint + 2 * measured.export  # the best one and the one that is being written
    free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
    return judged(
        free < need, ERROR, "disk", f"{size(need)} at most ({keep + 2} checkpoints of {size(measured.checkpoint)}, "
        f"export {size(measured.export)}), {size(free)} free", "--keep fewer, or --out on another disk",
    )  # fmt: skip


def span(seconds: float) -> str:
    """Seconds for people: 40 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
