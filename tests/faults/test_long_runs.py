"""Long runs: memory stays, files grow by the row, and a step takes at the end what it took at the beginning."""

import os
import time
from pathlib import Path

import pytest
from helpers.process_groups import RankProcesses, read_events
from helpers.tiny_inputs import make_tiny_gpt2, tiny_argv, write_records

from trainer.config.files import folder_size

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
