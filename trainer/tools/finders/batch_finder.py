"""`--find-batch`: the fastest micro-batch that fits, for the same global batch, by real steps of the longest rows.

Each rank starts a process of its own for the trials (`trainer.tools.finders.batch_size_worker`) and watches it. One rank's process that runs
out of memory leaves the others waiting in a collective: the parents tell one another through their own group, and end
all of them.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config.errors import RunFailed, UserError
from trainer.data.dataset import Prepared
from trainer.distributed.process_group import free_port
from trainer.tools.finders.batch_size_worker import OUT_OF_MEMORY
from trainer.tools.finders.batch_sizes import EQUAL, Tried, candidates, fastest, next_sizes
from trainer.training.checkpoint import write_text
from trainer.training.memory_check import estimate, free_host, load_of, needed
from trainer.training.run_plan import Plan

BUDGET = 0.8  # of the memory that is free; on a processor what is beyond is taken from other programs, not refused
TICK = 0.2  # seconds between two looks at the process
GRACE = 3.0  # seconds that the other ranks' processes get to say why they ended
COMMAND = (sys.executable, "-m", "trainer.tools.finders.batch_size_worker")
KILLED = (-9, 137)  # by the system, which is how a processor's memory runs out


def find_batch(plan: Plan, data: Prepared) -> int:
    """Try, say, and leave find-batch.json in the run folder; 0, or RunFailed where no micro-batch fits."""
    width = int(data.train.lengths().max())
    sizes = candidates(plan.course.batch.global_batch, plan.world.size)
    sizes, budget = within_budget(plan, sizes, width)
    tried: dict[int, Tried] = {}
    while todo := next_sizes(sizes, {micro: one.fits for micro, one in tried.items()}):
        if plan.world.rank == 0:
            print(f"trying micro-batch {', '.join(map(str, todo))} ...", flush=True)
        tried |= {one.micro: one for one in try_sizes(plan, data.folder, todo)}
    result = sorted(tried.values(), key=lambda one: one.micro)
    plan.world.once(lambda: _tell(plan, result, width, budget))
    return 0


def within_budget(plan: Plan, sizes: Sequence[int], width: int) -> tuple[list[int], str]:
    """(sizes that may be tried, what was left out and why): on a processor by the formula, on a GPU all of them."""
    if plan.world.device.type == "cuda":
        return list(sizes), ""
    limit = min(plan.world.gather(BUDGET * free_host(plan)))
    wanted = {micro: needed(plan, estimate(plan, plan.zero, load_of(plan, width, micro)))[0] for micro in sizes}
    good = [micro for micro in sizes if wanted[micro] <= limit]
    said = f"budget {limit / 2**30:.1f} GiB a rank ({BUDGET:.0%} of the free memory)"
    if len(good) < len(sizes):
        over = next(micro for micro in sizes if wanted[micro] > limit)
        said += f"; not tried: {over} and above, {wanted[over] / 2**30:.1f} GiB by formula"
    return good, said


def try_sizes(plan: Plan, data: Path, sizes: Sequence[int]) -> list[Tried]:
    """Run one group of processes over the sizes, ascending, up to the first that does not fit; the same on all ranks.

    RunFailed where it ends for another reason than memory.
    """
    world = plan.world
    port = world.once(free_port)
    folder = Path(tempfile.mkdtemp(prefix="find-batch-"))
    try:
        job = {
            "settings": plan.settings.as_dict(), "data": str(data),
            "deepspeed": plan.deepspeed, "precision": plan.precision, "sizes": list(sizes),
            "answer": str(folder / "answer"),
        }  # fmt: skip
        write_text(folder / "job.json", json.dumps(job))
        code, output = _watch(plan, folder, port)
        ends = world.gather(code)
        answers = world.gather(_answers(folder / f"answer-{world.rank}"))
        outputs = world.gather(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    done = [_merge(plan, micro, [answer[micro] for answer in answers])
            for micro in sizes if all(micro in answer for answer in answers)]  # fmt: skip
    if len(done) == len(sizes):
        return done
    short = [rank for rank, end in enumerate(ends) if end == OUT_OF_MEMORY or end in KILLED]
    if not short:
        rank = next((rank for rank, end in enumerate(ends) if end), 0)  # None: ended here, because of another
        raise RunFailed(f"--find-batch: micro-batch {sizes[len(done)]} failed on rank {rank}: {outputs[rank]}")
    micro = sizes[len(done)]
    why = "out of memory" if ends[short[0]] == OUT_OF_MEMORY else "killed by the system, most likely for its memory"
    accumulation = plan.course.batch.global_batch // (micro * world.size)
    return [*done, Tried(micro=micro, accumulation=accumulation, fits=False, why=f"{why} on rank {short[0]}")]


def _watch(plan: Plan, folder: Path, port: int) -> tuple[int | None, str]:
    """(exit code of this rank's process, None where it was ended here; its last line). All ranks return together."""
    root = str(Path(__file__).parents[3])
    environ = {
        **os.environ,
        "MASTER_PORT": str(port),
        "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # the processes meet on a port of their own
    with open(folder / "output", "w+") as said:
        process = subprocess.Popen(
            [*COMMAND, str(folder / "job.json")],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environ,
        )
        failed_at: float | None = None
        size, moved = -1, time.monotonic()
        try:
            while True:
                plan.world.board.beat()
                codes = plan.world.gather(process.poll())
                if all(code is not None for code in codes):
                    break
                if any(code not in (None, 0) for code in codes):
                    failed_at = failed_at or time.monotonic()
                if (now := _size(folder, plan.world.rank)) != size:
                    size, moved = now, time.monotonic()
                late = time.monotonic() - moved > plan.settings.engine.hang_timeout
                over = failed_at is not None and time.monotonic() - failed_at > GRACE
                if any(plan.world.gather(late or over)):  # all at once, or one would leave while another still asks
                    break
                time.sleep(TICK)
            code = process.poll()
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        lines = [line.strip() for line in said.read().splitlines() if line.strip()]
    return code, (lines or ["no output"])[-1][:300]


def _size(folder: Path, rank: int) -> int:
    answer = folder / f"answer-{rank}"
    return answer.stat().st_size if answer.exists() else 0


def _answers(path: Path) -> dict[int, dict[str, Any]]:
    try:
        lines = path.read_text().splitlines(keepends=True)
    except OSError:
        return {}
    return {row["micro"]: row for row in (json.loads(line) for line in lines if line.endswith("\n"))}


def _merge(plan: Plan, micro: int, rows: list[dict[str, Any]]) -> Tried:
    """One size on all ranks: the slowest one's seconds, the largest one's bytes."""
    seconds = max(row["seconds"] for row in rows)
    return Tried(
        micro=micro, accumulation=plan.course.batch.global_batch // (micro * plan.world.size), fits=True,
        seconds=seconds, tokens_per_second=rows[0]["tokens"] / seconds, peak=max(row["peak"] for row in rows),
    )  # fmt: skip


def _tell(plan: Plan, tried: list[Tried], width: int, budget: str) -> None:
    best = fastest(tried)
    folder = Path(plan.settings.run_folder)
    content = {
        "format": 1, "mode": plan.settings.mode, "global_batch": plan.course.batch.global_batch, "width": width,
        "tried": [vars(one) for one in tried], "suggestion": best.micro if best else None, "budget": budget,
        "settings": plan.settings.as_dict(), "resolved": plan.resolved(), "data": plan.data["fingerprint"],
    }  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "find-batch.json", json.dumps(content, indent=1) + "\n")
    except OSError as problem:
        raise UserError(
            f"{folder}: cannot write there: {problem.strerror}; name another folder with --out"
        ) from problem
    for line in lines(plan, tried, best, budget):
        print(line, flush=True)
    if best is None:
        raise RunFailed(
            "--find-batch: not even the smallest micro-batch fits; --ds-config zero3 or zero2_offload, --mode lora "
            "or a shorter --block-size need less"
        )
    print(f"numbers        {folder / 'find-batch.json'}; nothing was trained", flush=True)


def lines(plan: Plan, tried: Sequence[Tried], best: Tried | None, budget: str) -> list[str]:
    """The table and the suggestion for people."""
    told = ["", "micro-batch  accumulation  ms per step    tokens/s  memory of a rank"]
    for one in tried:
        row = f"{one.micro:>11}  {one.accumulation:>12}  "
        told.append(
            row + f"{1000 * one.seconds:>11,.0f}  {one.tokens_per_second:>10,.0f}  {one.peak / 2**30:.2f} GiB"
            if one.fits
            else row + f"does not fit: {one.why}"
        )
    if budget:
        told.append(budget)
    if best is not None:
        largest = max((one for one in tried if one.fits), key=lambda one: one.micro)
        gain = best.tokens_per_second / largest.tokens_per_second - 1
        than = f"{gain:+.0%} against" if abs(gain) > EQUAL else "in less memory and as fast as"
        beside = f", {than} {largest.micro}, the largest that fits" if largest is not best else ""
        told.append(f"suggestion     --micro-batch {best.micro}: {best.tokens_per_second:,.0f} tokens/s{beside}")
        if plan.dropout:
            told.append("note           another micro-batch draws other dropout masks; all else stays the same run")
    return told
