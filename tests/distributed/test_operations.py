"""The committed counts of operations and bytes of a step: what makes one longer shows here, without a GPU."""

import pytest

from trainer.tools.bench import shapes
from trainer.tools.bench.operations import BYTES_PER_SECOND, Operations, StepCount, count_step, operations_table

#: (operations of forward and backward, GB of them, of norm and update, GB) of GPT-2 124M by `python launch/bench.py
#: operations`, torch 2.13, once 779 and 14.39, 1,198 and 12.72; compiled: of two layers and in one mode, for time.
COMMITTED = {
    ("full", False): (763, 13.16, 14, 2.49),
    ("lora", False): (827, 11.93, 14, 0.02),
    ("lora", True): (164, 3.23, 14, 0.00),
}
MARGIN = 1.02  # other versions of torch write some formulas in an operation more or less


@pytest.mark.parametrize(("mode", "is_compiled"), COMMITTED)
def test_a_step_takes_no_more_operations_and_bytes_than_committed(mode, is_compiled, tmp_path):
    model = shapes.save_config(tmp_path / "two", n_layer=2) if is_compiled else "gpt2"
    step = count_step(mode, 2, is_compiled=is_compiled, model=model)
    parts = (step.in_pass, step.in_update)
    counted = [number for part in parts for number in (part.number, round(part.num_bytes / 1e9, 2))]
    limits = [MARGIN * limit for limit in COMMITTED[mode, is_compiled]]
    assert all(number <= limit for number, limit in zip(counted, limits, strict=True)), counted
    moved_seconds = sum(part.num_bytes for part in parts) / BYTES_PER_SECOND
    assert moved_seconds < step.seconds < 2 * moved_seconds


def test_the_table_of_operations_has_two_lines_for_each_row():
    def count(mode: str, micro_batch_size: int, *, is_compiled: bool) -> StepCount:
        number = 1000 * micro_batch_size - is_compiled
        in_pass = Operations(number=number, num_bytes=10**9, seconds=0.007)
        return StepCount(in_pass=in_pass, in_update=Operations(number=2, num_bytes=10**8, seconds=0.0005))

    lines = operations_table(count).splitlines()
    assert lines[2:4] == [
        "| full, batch 2, recorded | 2,000 | 1.00 | 2 | 0.10 | 7.5 |",
        "| full, batch 2, compiled | 1,999 | 1.00 | 2 | 0.10 | 7.5 |",
    ]
    assert len(lines) == 8
