"""Long runs: memory stays, files grow by the row, and a step takes at the end what it took at the beginning."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from helpers.process_groups import FORWARD, RankProcesses, fault_at, kill_self, read_events
from helpers.tiny_inputs import make_tiny_gpt2, tiny_argv, write_records

from trainer.config.files import folder_size
from trainer.training.checkpoint import _metadata_digest

pytestmark = [pytest.mark.sweep, pytest.mark.timeout(7200)]
NUM_STEPS, NUM_EVALUATIONS, NUM_PARTS = 200_000, 1_000, 20


def last_step(metrics: Path) -> int:
    """Of the last whole row, without reading the others."""
    with open(metrics, "rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4096))
        lines = [line for line in file.read().splitlines(keepends=True)[1:] if line.endswith(b"\n")]
    return int(lines[-1].split(b'"step": ')[1].split(b",")[0]) if lines else 0


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_200_000_steps_and_1_000_evaluations_take_no_more_at_the_end_than_at_the_beginning(session_dir, tmp_path):
    model = make_tiny_gpt2(session_dir / "long", dropout=0.0, hidden_size=8)
    data = (
        write_records(tmp_path / "train.jsonl", num_records=1000, seed=1),
        write_records(tmp_path / "val.jsonl", num_records=20, seed=2),
    )
    text = f"--mode full --block-size 16 --global-batch 1 --micro-batch 1 --max-steps {NUM_STEPS} --num-samples 0"
    text += f" --eval-every {NUM_STEPS // NUM_EVALUATIONS} --save-every {NUM_STEPS // 10} --ds-config zero0"
    out = tmp_path / "run"
    run = RankProcesses(tiny_argv(model, data, text), out=out, world_size=1)
    pid, metrics, evaluations = run.processes[0].pid, out / "metrics.jsonl", out / "eval_records"
    assert pid is not None
    run.wait_until(lambda: metrics.exists() and last_step(metrics) > 0)
    parts = []  # at each twentieth of the run: (step, resident bytes, CPU seconds, bytes of the two files)
    while run.processes[0].is_alive() and len(parts) < NUM_PARTS:
        if (step := last_step(metrics)) >= (len(parts) + 1) * NUM_STEPS // NUM_PARTS:
            parts.append(
                (step, resident_bytes(pid), cpu_seconds(pid), metrics.stat().st_size, folder_size(evaluations))
            )
            print(*parts[-1], sep="\t", flush=True)
        time.sleep(0.02)
    assert run.wait(600) == [0], run.output
    assert read_events(out, "finished")[0]["step"] == NUM_STEPS
    steps, memory, seconds, rows_size, evaluations_size = zip(*parts, strict=True)
    growth = max(memory[2:]) - memory[1]
    early, late = ((seconds[i + 4] - seconds[i]) / (steps[i + 4] - steps[i]) for i in (1, NUM_PARTS - 5))
    print(f"memory grew by {growth / 2**20:.1f} MiB; a step took {1e3 * early:.3f}, at the end {1e3 * late:.3f} ms")
    assert growth < 20e6
    assert late < 1.1 * early
    half = NUM_PARTS // 2 - 1
    for size in (rows_size, evaluations_size):
        assert size[-1] - size[half] < 1.1 * (size[half] - size[0]) * (steps[-1] - steps[half]) / (
            steps[half] - steps[0]
        )


NUM_LONG_STEPS = 4_400_000  # rows of a gigabyte
MAX_GROWTH_BYTES = 300e6


def lengthen(out: Path, step: int, num_steps: int) -> int:
    """Make the checkpoint of `step` that of `num_steps`, with the rows of as many before it; the bytes of the rows."""
    checkpoint, metrics = out / "checkpoints" / f"step-{step:06d}", out / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    first_row = next(line for line in lines if line.startswith(b'{"kind": "step"')).decode()
    before, after = (part.replace("{", "{{").replace("}", "}}") for part in first_row.split('"step": 1,'))
    digest, num_rows = hashlib.sha256(), 0
    with open(metrics, "wb") as file:
        for start in range(1, num_steps + 1, 10_000):
            steps = range(start, min(start + 10_000, num_steps + 1))
            chunk = "".join(f'{before}"step": {n},{after}' for n in steps).replace("{{", "{").replace("}}", "}")
            file.write(chunk.encode())
            digest.update(chunk.encode())
            num_rows += len(steps)
    metadata = json.loads((checkpoint / "state.json").read_text())
    metadata["progress"]["step"] = num_steps
    metadata["records"] = {"num_rows": num_rows, "sha256": digest.hexdigest()}
    (checkpoint / "state.json").write_text(json.dumps({**metadata, "self": _metadata_digest(metadata)}))
    checkpoint.rename(checkpoint.with_name(f"step-{num_steps:06d}"))
    return metrics.stat().st_size


def run_and_measure(*argv: str) -> tuple[int, float]:
    """(largest resident bytes, CPU seconds) of a script that must end well."""
    process = subprocess.Popen(
        [sys.executable, *argv],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def test_a_metrics_file_of_a_gigabyte_is_compared_and_resumed_in_bounded_memory(tiny_model, data_files, tmp_path):
    text = f"--mode full --block-size 16 --global-batch 1 --max-steps {NUM_LONG_STEPS + 10} --num-samples 0"
    argv = tiny_argv(tiny_model, data_files, f"{text} --eval-every never --save-every never --ds-config zero0")
    stop = fault_at(FORWARD, 5, partial(kill_self, signal.SIGTERM))
    assert RankProcesses(argv, out=tmp_path / "long", world_size=1, fault=stop).wait() == [143]
    step = int(next((tmp_path / "long" / "checkpoints").iterdir()).name.split("-")[1])
    shutil.copytree(tmp_path / "long", tmp_path / "short")
    num_bytes = {name: lengthen(tmp_path / name, step, num) for name, num in (("short", 100), ("long", NUM_LONG_STEPS))}
    assert num_bytes["long"] > 1e9
    results = {}
    for name in ("short", "long"):
        limits = [] if name == "long" else ["--max-steps", "110", "--allow-change", "max_steps"]
        out = str(tmp_path / name)
        results["compare", name] = run_and_measure("launch/compare.py", out, "--output-dir", f"{out}-compared")
        results["resume", name] = run_and_measure("launch/train.py", *argv, "--output-dir", out, "--resume", *limits)
    for what in ("compare", "resume"):
        (short, short_seconds), (long, long_seconds) = results[what, "short"], results[what, "long"]
        print(
            f"{what} {num_bytes['long'] / 1e9:.2f} GB: {(long - short) / 1e6:.0f} MB above {short / 1e6:.0f} MB, "
            f"{long_seconds - short_seconds:.0f} CPU seconds above {short_seconds:.0f}"
        )
        assert long - short < MAX_GROWTH_BYTES
