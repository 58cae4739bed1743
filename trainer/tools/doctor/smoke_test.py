"""The run itself in small, by the program itself: steps, saves, a reload and resume, evaluation, export.

`launch/train.py` is started with the user's flags on a sample of the user's data in a temporary folder: four steps
(where steps are recorded as many more as come before that), saved half way, then resumed from there. What the resumed
part records must be what the first part did.
"""

import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.cli import CliArgs, to_argv
from trainer.data import readers, sources
from trainer.data.dataset import PreparedDataset
from trainer.distributed.cuda_graphs import MAX_DIFFERENCE, NUM_WARMUP_CALLS
from trainer.report.formats import format_duration
from trainer.tools.doctor.check_result import ERROR, WARNING, CheckResult, format_bytes, make_result, ok_result
from trainer.tools.worker_processes import worker_environ
from trainer.training.run_plan import RunPlan

TRAIN_SCRIPT = Path(__file__).parents[3] / "launch" / "train.py"
NUM_STEPS = 2  # before the checkpoint and after it, beside those that come before steps are recorded
CPU_RESUME_TOLERANCE = 1e-5  # relative difference of losses after a resume, where sums may be taken in another order

LARGE_DATA_FACTOR = 20  # times the tokens of the rehearsed steps: data beyond it are sampled
CHARACTERS_PER_TOKEN = 12  # of text for a token, more than any tokenizer takes on the mean


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a rehearsal took: seconds of a step and of the evaluation of one counted token, bytes."""

    step_seconds: float
    overhead_seconds: float  #: seconds before the first step and after the last evaluation: imports, model, export
    eval_seconds_per_token: float
    checkpoint_bytes: int
    export_bytes: int
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """One start of the program: its exit code (None: it took too long), its rows and its last words."""

    exit_code: int | None
    records: list[dict[str, Any]]
    output: str
    elapsed_seconds: float

    def select_records(self, kind: str, event: str | None = None) -> list[dict[str, Any]]:
        """The rows of a kind, of an event where one is named."""
        return [row for row in self.records if row["kind"] == kind and event in (None, row.get("event"))]

    def losses(self, kind: str) -> list[float]:
        """Of the rows of a kind."""
        return [row["loss"] for row in self.select_records(kind)]

    @property
    def finished(self) -> dict[str, Any]:
        """The last row of a run that came to its end."""
        return self.select_records("event", "finished")[-1]

    @property
    def failure_reason(self) -> str:
        """The line that says why it failed, the last one where none does."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        error_lines = [line for line in lines if line.startswith("error: ") or "Error" in line]
        return (error_lines or lines or ["no output"])[-1].removeprefix("error: ")[:300]


class SmokeTest:
    """Both parts of a rehearsal, in a temporary folder; `limit_seconds`: for all of it."""

    def __init__(
        self, cli_args: CliArgs, plan: RunPlan, data: PreparedDataset, *, limit_seconds: float, parent_folder: Path
    ):
        self.cli_args, self.plan, self.data = cli_args, plan, data
        # Before a shape is recorded, and the step in which it is.
        self.num_warmup_steps = NUM_WARMUP_CALLS + 1 if self.plan.execution.cuda_graphs else 0
        self.save_step = self.num_warmup_steps + NUM_STEPS
        self.num_steps = 2 * self.save_step
        self.deadline = time.monotonic() + limit_seconds
        self.limit_seconds = limit_seconds
        self.parent_folder = parent_folder
        self.cost: Cost | None = None

    def run_checks(self) -> Iterator[CheckResult]:
        """Do it all; stops at the first part that fails."""
        with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=self.parent_folder) as temporary_folder:
            folder = Path(temporary_folder)
            sample = sample_overrides(self.plan, self.data, self.num_steps, folder)
            first_run = self._run_training(folder / "run", sample)
            yield from self._check_first_run(first_run, " on a sample of the data" * bool(sample))
            if first_run.exit_code != 0:
                return
            self.cost = _measure_cost(first_run, self.num_warmup_steps)
            resumed_run = self._run_training(folder / "run", sample, "--resume", f"step-{self.save_step}")
            yield self._check_resumed_run(first_run, resumed_run)

    def _run_training(self, run_folder: Path, sample: Mapping[str, str], *extra_argv: str) -> RunOutcome:
        world_size = self.plan.dist_context.world_size
        launcher_argv = ["-m", "torch.distributed.run", f"--nproc_per_node={world_size}"] if world_size > 1 else []
        argv = to_argv(
            self.cli_args,
            data=sample,
            train={"max_steps": self.num_steps, "warmup_steps": 0, "warmup_ratio": 0.0},
            output={
                "output_dir": str(run_folder),
                "eval_every": "never",
                "save_every": str(self.save_step),
                "save_total_limit": 3,
                "wandb": "disabled",
                "run_name": "rehearsal",
            },
        )
        start_time = time.monotonic()
        log = run_folder.parent / "output"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, *launcher_argv, str(TRAIN_SCRIPT), *argv, *extra_argv],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=worker_environ(),
            )
            try:
                exit_code: int | None = process.wait(max(1.0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                exit_code = None
            finally:
                _terminate(process)
        return RunOutcome(
            exit_code=exit_code,
            records=_read_records(run_folder / "metrics.jsonl"),
            output=log.read_text(encoding="utf-8", errors="replace"),
            elapsed_seconds=time.monotonic() - start_time,
        )

    def _check_first_run(self, outcome: RunOutcome, sample_note: str) -> Iterator[CheckResult]:
        losses = outcome.losses("step")
        if outcome.exit_code is None:
            done = f"{len(losses)} of {self.num_steps} steps in {self.limit_seconds:.0f} s"
            remedy = "give it more with --limit SECONDS, or rehearse with fewer examples a step (--global-batch)"
            yield CheckResult(WARNING, "rehearsal", f"{done}, given up{sample_note}", remedy)
            return
        if outcome.exit_code != 0:
            message = f"failed after {len(losses)} steps: {outcome.failure_reason}"
            yield CheckResult(ERROR, "rehearsal", message, "the run itself would fail like this")
            return
        done = f"{self.num_steps} steps{sample_note} in {outcome.elapsed_seconds:.0f} s"
        yield ok_result("train", f"{done}, loss {losses[0]:.4f} to {losses[-1]:.4f}")
        if self.plan.execution.path != "eager":
            yield self._check_execution(outcome)
        val_losses = outcome.losses("eval")
        yield ok_result("evaluate", f"validation loss {val_losses[0]:.4f} before, {val_losses[-1]:.4f} after")
        finished = outcome.finished
        yield ok_result("save", f"checkpoint of {format_bytes(finished['checkpoint_bytes'])}")
        yield ok_result("export", f"{format_bytes(finished['export_bytes'])}, {finished['export']}")

    def _check_execution(self, outcome: RunOutcome) -> CheckResult:
        """What steps really ran by, what was verified, and why something was not."""
        fallbacks = outcome.select_records("event", "execution")
        checks = [record["message"] for record in outcome.select_records("event", "checked")]
        path = fallbacks[-1]["path"] if fallbacks else self.plan.execution.path
        message = "; ".join([f"{path}, attention by {self.plan.attention_kernel}", *checks])
        if not fallbacks:
            return ok_result("execution", message)
        remedy = f"the numbers are right; --execution {'eager' if path == 'eager' else 'auto'} asks for nothing else"
        return CheckResult(WARNING, "execution", f"{message}; {fallbacks[-1]['message']}", remedy)

    def _check_resumed_run(self, first_run: RunOutcome, resumed_run: RunOutcome) -> CheckResult:
        if resumed_run.exit_code is None:
            return CheckResult(WARNING, "resume", f"not done within {self.limit_seconds:.0f} s", "--limit SECONDS")
        if resumed_run.exit_code != 0:
            message = f"failed: {resumed_run.failure_reason}"
            return CheckResult(ERROR, "resume", message, "a stopped run could not go on")
        expected, resumed = (
            [*outcome.losses("step")[self.save_step :], *outcome.losses("eval")[-1:]]
            for outcome in (first_run, resumed_run)
        )
        max_difference = max(abs(a / b - 1) for a, b in zip(resumed, expected, strict=True))
        agreement = "bit for bit the same" if expected == resumed else f"the same within {max_difference:.0e}"
        # A GPU's attention adds its gradients in any order, and the steps after a resume are eager at first.
        is_gpu = self.plan.dist_context.device.type == "cuda"
        return make_result(
            max_difference > (MAX_DIFFERENCE[self.plan.precision] if is_gpu else CPU_RESUME_TOLERANCE),
            ERROR,
            "resume",
            f"from step {self.save_step}: losses {agreement}",
            "a resumed run would not be the run that was stopped; report this with the flags",
        )


def sample_overrides(plan: RunPlan, data: PreparedDataset, num_steps: int, folder: Path) -> dict[str, str]:
    """The data settings that put a sample in place of large data; {} where they are small enough as they are."""
    settings = plan.settings
    num_tokens_needed = num_steps * plan.schedule.batch.global_batch * settings.data.block_size
    num_tokens = data.metadata["train"]["tokens"] + data.metadata["val"]["tokens"]
    record_format = data.metadata["form"]
    if num_tokens <= LARGE_DATA_FACTOR * num_tokens_needed or record_format == "input_ids":
        return {}
    max_characters = {
        "train": 2 * CHARACTERS_PER_TOKEN * num_tokens_needed,
        "val": CHARACTERS_PER_TOKEN * num_tokens_needed // num_steps,
    }
    overrides = {}
    for split, name, argument in (("train", "data", settings.data.data), ("val", "val_data", settings.data.val_data)):
        path = folder / f"{split}.jsonl"
        source = sources.find(argument or settings.data.data, "--data" if split == "train" else "--val-data")
        characters_left = max_characters[split]
        if argument is None:
            characters_left += max_characters["train"]  # the validation sample is what follows that of training
        with open(path, "w", encoding="utf-8") as file:
            for sourced_record in readers.records(source):
                line = json.dumps(sourced_record.record, default=str)
                if argument is not None or characters_left < max_characters["val"]:
                    file.write(line + "\n")
                characters_left -= len(line)
                if characters_left < 0:
                    break
        overrides[name] = str(path)
    return overrides


def _terminate(process: "subprocess.Popen[bytes]") -> None:
    """End the program and its ranks: asked first, so that launchers take their ranks with them."""
    for signal_number, timeout_seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, signal_number)
            process.wait(timeout_seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Its whole rows, the facts of events among their other fields."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [{**record, **(record.get("facts") or {})} for record in records]


def _measure_cost(outcome: RunOutcome, num_warmup_steps: int) -> Cost:
    steps, evals, finished = outcome.select_records("step"), outcome.select_records("eval"), outcome.finished
    # The first step warms up, too; the time of the first evaluation is all that was before it.
    step_times = [(b["tokens"] - a["tokens"]) / b["tokens_per_second"] for a, b in itertools.pairwise(steps)]
    return Cost(
        step_seconds=statistics.fmean(step_times[num_warmup_steps:]),
        overhead_seconds=outcome.elapsed_seconds - evals[-1]["time"],
        eval_seconds_per_token=evals[0]["time"] / evals[0]["eval_tokens"],
        checkpoint_bytes=finished["checkpoint_bytes"],
        export_bytes=finished["export_bytes"],
        peak_memory_bytes=finished["peak_memory_bytes"],
    )


def estimate_costs(plan: RunPlan, data: PreparedDataset, cost: Cost, estimated_bytes: float) -> Iterator[CheckResult]:
    """Time and disk of the whole run, from what the rehearsal took; its memory beside `estimated_bytes`."""
    total_steps = plan.schedule.total_steps
    num_evaluations = sum(plan.schedule.is_eval_due(step) for step in range(total_steps + 1))
    evaluation_seconds = cost.eval_seconds_per_token * data.metadata["val"]["counted_tokens"]
    total_seconds = total_steps * cost.step_seconds + num_evaluations * evaluation_seconds + cost.overhead_seconds
    yield ok_result(
        "time",
        f"about {format_duration(total_seconds)}: {total_steps:,} steps of {cost.step_seconds:.2f} s, "
        f"{num_evaluations} evaluations of {evaluation_seconds:.1f} s, {cost.overhead_seconds:.0f} s around them",
    )
    measured, counted = format_bytes(cost.peak_memory_bytes), format_bytes(estimated_bytes)
    yield ok_result("memory", f"{measured} at most on a rank in the rehearsal, {counted} as counted")
    yield check_disk_space(Path(plan.settings.run_folder), cost, plan.settings.output.save_total_limit)


def check_disk_space(folder: Path, cost: Cost, save_total_limit: int) -> CheckResult:
    """Whether the disk has room for the checkpoints that are kept, one being written, and the export."""
    num_checkpoints = save_total_limit + 2  # with the best one and the one that is being written
    needed_bytes = num_checkpoints * cost.checkpoint_bytes + 2 * cost.export_bytes
    nearest_folder = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(nearest_folder).free
    parts = f"{num_checkpoints} checkpoints of {format_bytes(cost.checkpoint_bytes)}, "
    parts += f"export {format_bytes(cost.export_bytes)}"
    return make_result(
        free_bytes < needed_bytes,
        ERROR,
        "disk",
        f"{format_bytes(needed_bytes)} at most ({parts}), {format_bytes(free_bytes)} free",
        "--save-total-limit fewer, or --output-dir on another disk",
    )
