"""The committed counts of operations and bytes of a step: what makes one longer shows here, without a GPU."""

import pytest

from trainer.tools.bench.operations import BYTES_PER_SECOND, StepCount, count_step, operations_table

#: (operations of forward and backward, GB of them, of norm and update, GB) by `python launch/bench.py operations`,
#: torch 2.13, where batch 16 takes 1,087 and 86.45. Before: 779 and 14.39, 1,198 and 12.72, 1,241 and 96.19.
COMMITTED = {("full", 2): (763, 13.16, 14, 2.49), ("lora", 2): (875, 11.94, 14, 0.02)}
MARGIN = 1.02  # other versions of torch write some formulas in an operation more or less


@pytest.mark.parametrize(("mode", "micro_batch_size"), COMMITTED)
def test_a_step_takes_no_more_operations_and_bytes_than_committed(mode, micro_batch_size):
    step = count_step(mode, micro_batch_size)
    counted = (
        step.pass_operations, step.pass_bytes / 1e9, step.update_operations, round(step.update_bytes / 1e9, 2),
    )  # fmt: skip
    limits = [MARGIN * limit for limit in COMMITTED[mode, micro_batch_size]]
    assert all(number <= limit for number, limit in zip(counted, limits, strict=True)), counted
    moved_seconds = (step.pass_bytes + step.update_bytes) / BYTES_PER_SECOND
    assert moved_seconds < step.seconds < 2 * moved_seconds


def test_the_table_of_operations_has_a_line_for_each_row():
    def count(mode: str, micro_batch_size: int) -> StepCount:
        num_operations = 1000 * micro_batch_size
        return StepCount(
            pass_operations=num_operations, pass_bytes=10**9, update_operations=2, update_bytes=10**8, seconds=0.0075
        )  # fmt: skip

    lines = operations_table(count).splitlines()
    assert lines[2] == "| full, batch 2 | 2,000 | 1.00 | 2 | 0.10 | 7.5 |"
    assert len(lines) == 5
