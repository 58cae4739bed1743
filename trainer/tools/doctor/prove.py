"""`launch/doctor.py --prove`: the user's model and rows under every ZeRO stage, number of ranks and way to run steps,
each held against a plain PyTorch loop on this machine.

A group of processes for each number of ranks works its rows off one after the other; where one dies, the row is said
to have failed and a new group goes on with the next. Dropout is off: its masks depend on the micro-batch.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainer.config.choices import EIGHT_BIT_OPTIMIZERS
from trainer.config.errors import UserError
from trainer.config.files import write_atomically
from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset
from trainer.distributed.cuda_graphs import MAX_DIFFERENCE, NUM_WARMUP_CALLS
from trainer.distributed.deepspeed_config import read_deepspeed_file
from trainer.distributed.execution import find_eager_reason
from trainer.model.loss import uses_gpu_form
from trainer.tools.doctor.check_result import ERROR, WARNING, CheckResult, format_bytes, ok_result
from trainer.tools.worker_processes import last_line, run_ranks
from trainer.training.run_plan import RunPlan

STAGES = ("zero0", "zero1", "zero2", "zero3")
NUM_STEPS = 3  # that are compared and timed, after those before which nothing is recorded
#: What a weight may be off, as a share of what its steps may move it (the learning rate each): AdamW divides a gradient
#: by its own size, so its relative rounding becomes one of the step. Weights whose gradient is nearly nothing in the
#: plain loop, where the rounding is all of it, are left out: below the second number times the tensor's mean size.
WEIGHT_BOUNDS = {"fp32": (0.05, 1e-3), "bf16": (0.25, 0.1)}
PLAIN = "plain PyTorch"
WORKER_COMMAND = ("-m", "trainer.tools.doctor.prove_worker")


@dataclass(frozen=True, kw_only=True)
class ProofRow:
    """One row of the table; differences are relative, of weights a share of what the steps may move them."""

    ds_config: str
    world_size: int
    execution: str
    path: str = ""  #: what steps really ran by
    loss_difference: float | None = None
    norm_difference: float | None = None
    weight_difference: float | None = None
    step_ms: float | None = None
    device_wait_share: float | None = None  #: of the timed steps' time, for numbers of the device
    peak_memory_bytes: int | None = None
    problem: str = ""  #: why there are no numbers, or why others ran than were asked for

    def verdict(self, precision: str) -> str:
        """equal, fell back, differs, or failed."""
        if self.loss_difference is None or self.norm_difference is None or self.weight_difference is None:
            return "failed"
        bound = MAX_DIFFERENCE[precision]
        is_equal = max(self.loss_difference, self.norm_difference) <= bound
        is_equal = is_equal and self.weight_difference <= WEIGHT_BOUNDS[precision][0]
        return ("fell back" if self.problem else "equal") if is_equal else "differs"


def proof_settings(settings: Settings) -> Settings:
    """The settings of a proof: without dropout, by an AdamW that a plain loop has."""
    optim = "adamw_fused" if settings.train.optim in EIGHT_BIT_OPTIMIZERS else settings.train.optim
    return replace(
        settings,
        model=replace(settings.model, dropout=0.0),
        lora=replace(settings.lora, dropout=0.0),
        train=replace(settings.train, optim=optim),
    )


def list_rows(plan: RunPlan, world_size: int) -> list[ProofRow]:
    """All that can run here."""
    if plan.schedule.batch.global_batch % world_size:
        return []
    rows = []
    settings = proof_settings(plan.settings)
    is_gpu = uses_gpu_form(plan.dist_context.device)
    for name in dict.fromkeys([*STAGES, settings.engine.ds_config or plan.deepspeed_file.name]):
        stage = read_deepspeed_file(name).stage
        has_graphs = not find_eager_reason(settings, is_gpu=is_gpu, stage=stage)
        executions = ["eager", "graphs"] if has_graphs else ["eager"]
        rows += [ProofRow(ds_config=name, world_size=world_size, execution=execution) for execution in executions]
    return rows


class Proof:
    """Works the rows off and judges them; `limit_seconds`: for all of them."""

    def __init__(self, plan: RunPlan, data: PreparedDataset, *, limit_seconds: float):
        if plan.precision not in WEIGHT_BOUNDS:
            raise UserError(
                f"--precision {plan.precision} with --prove: its loss scale has no plain counterpart; use fp32 or bf16"
            )
        self.plan, self.data = plan, data
        self.deadline = time.monotonic() + limit_seconds
        records = 0 if plan.dist_context.device.type == "cpu" else NUM_WARMUP_CALLS + 1
        self.num_steps = min(records + NUM_STEPS, plan.schedule.total_steps)
        self.rows: list[ProofRow] = []

    def run_checks(self, world_sizes: Sequence[int]) -> Iterator[CheckResult]:
        """One check a row, as it is done."""
        with tempfile.TemporaryDirectory(prefix="prove-") as scratch:
            folder = Path(scratch)
            plain_row = ProofRow(ds_config=PLAIN, world_size=1, execution="eager")
            reference = next(self._run_group(folder, [plain_row], 1))
            if reference.problem:
                yield CheckResult(ERROR, PLAIN, reference.problem, "nothing to compare with: see above")
                return
            yield ok_result(PLAIN, _describe(reference))
            for world_size in world_sizes:
                for row in self._run_group(folder, list_rows(self.plan, world_size), world_size):
                    self.rows.append(row)
                    yield self._judge(row)

    def _judge(self, row: ProofRow) -> CheckResult:
        name = f"{row.ds_config} x {row.world_size}"
        verdict = row.verdict(self.plan.precision)
        message = f"{row.execution:<8} {verdict}: {_describe(row) if verdict != 'failed' else row.problem}"
        if verdict == "equal":
            return ok_result(name, message)
        if verdict == "fell back":
            return CheckResult(WARNING, name, f"{message}; {row.problem}", "the numbers are right: none")
        remedy = f"do not train with --ds-config {row.ds_config} --execution {row.execution} here; report this row"
        return CheckResult(ERROR, name, message, remedy)

    def _run_group(self, folder: Path, rows: list[ProofRow], world_size: int) -> Iterator[ProofRow]:
        """The rows with their numbers, by as many groups of processes as it takes."""
        answer = folder / f"answer-{world_size}"
        while rows:
            answer.write_text("")
            job = {
                "settings": proof_settings(self.plan.settings).as_dict(),
                "data": str(self.data.folder),
                "rows": [[row.ds_config, row.execution] for row in rows],
                "num_steps": self.num_steps,
                "precision": self.plan.precision,
                "device": self.plan.dist_context.device.type,
                "min_gradient": WEIGHT_BOUNDS[self.plan.precision][1],
                "reference": str(folder / "reference.pt"),
                "answer": str(answer),
            }
            (folder / "job.json").write_text(json.dumps(job))
            problem = self._run_processes(folder, world_size)
            lines = answer.read_text().splitlines()
            for row, line in zip(rows, lines, strict=False):
                yield replace(row, **json.loads(line))
            rows = rows[len(lines) :]
            if rows and problem:  # the one that it died at
                yield replace(rows[0], problem=problem)
                rows = rows[1:]

    def _run_processes(self, folder: Path, world_size: int) -> str:
        """Why the group ended early; empty where it did its work."""
        timeout_seconds = self.deadline - time.monotonic()
        if timeout_seconds <= 0:
            return "not begun: the time was used up (--limit SECONDS)"
        argv = [*WORKER_COMMAND, str(folder / "job.json")]
        exit_codes = run_ranks(argv, world_size, folder / "log", timeout_seconds=timeout_seconds)
        if exit_codes is None:
            return "given up: the time was used up (--limit SECONDS)"
        return last_line((folder / "log").read_text(encoding="utf-8", errors="replace")) if any(exit_codes) else ""

    def write(self, path: Path) -> None:
        """The table as JSON."""
        rows = [{**asdict(row), "verdict": row.verdict(self.plan.precision)} for row in self.rows]
        content: dict[str, Any] = {
            "format": 1,
            "precision": self.plan.precision,
            "steps": self.num_steps,
            "bounds": {"loss": MAX_DIFFERENCE[self.plan.precision], "weights": WEIGHT_BOUNDS[self.plan.precision][0]},
            "settings": proof_settings(self.plan.settings).as_dict(),
            "data": self.data.metadata["fingerprint"],
            "rows": rows,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content, indent=1) + "\n")


def _describe(row: ProofRow) -> str:
    parts = [] if row.path in ("", row.execution) else [row.path]
    if row.loss_difference is not None:
        parts.append(
            f"loss {row.loss_difference:.0e}, gradient norm {row.norm_difference:.0e}, weights "
            f"{row.weight_difference:.1%} of their steps"
        )
    parts.append(f"{row.step_ms:.1f} ms, {row.device_wait_share or 0:.0%} of it waiting for the device")
    parts.append(f"peak {format_bytes(row.peak_memory_bytes or 0)}")
    return ", ".join(parts)
