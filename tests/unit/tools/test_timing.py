"""The finalists of a study take turns on one machine; what other work there adds is left out, or the ratio withheld."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from trainer.tools.study import trials as trials_module
from trainer.tools.study.trials import NUM_ROUNDS, NUM_STEPS, Timing, read_timing, time_finalists

FIELDS = {"peak_memory_bytes": {"full": 4, "lora": 3}, "machine": "a machine"}


def make_timing(full: list[list[float]], lora: list[list[float]]) -> Timing:
    return Timing(step_seconds={"full": full, "lora": lora}, **FIELDS)


def test_of_each_step_the_least_over_the_rounds_counts_and_times_of_a_busy_machine_are_not_divided():
    """Steps of two lengths, other work stretches one in each round; then one seen beside a real study's other work."""
    timing = make_timing([[1, 2], [3, 2], [1, 5]], [[0.5, 4], [0.5, 1], [0.5, 1]])
    assert (timing.cost.ratio, timing.cost.full, timing.cost.lora) == (0.5, 1.5, 0.75)
    assert timing.describe() == (
        "LoRA's time of a step: 0.50x full's (0.50 to 0.50 without one round, in alternation on a machine); its peak "
        "memory: 0.75x full's"
    )
    busy = make_timing([[1.0]] * 3, [[0.72], [0.81], [1.24]])
    assert busy.cost.ratio is None
    assert busy.cost.reason.startswith("the machine was busy: LoRA's steps took 0.72x to 0.81x full's, by which round")
    assert busy.describe().endswith("its peak memory: 0.75x full's")


@pytest.mark.parametrize(("fails_at", "ratio"), [(None, 0.5), (4, None)])
def test_finalists_take_turns_and_a_run_that_fails_leaves_no_ratio(monkeypatch, tmp_path, fails_at, ratio):
    methods: list[str] = []

    def start(slot, argv, folder):
        methods.append(folder.name)
        return SimpleNamespace(exitcode=int(len(methods) == fails_at))

    def read(folder):
        times = np.arange(NUM_STEPS) * (1.0 if folder.parent.name == "full" else 0.5)
        return SimpleNamespace(steps={"time": times}, summary={"peak_memory_bytes": 7}, get=lambda _: "a machine")

    monkeypatch.setattr(trials_module, "start_run", start)
    monkeypatch.setattr(trials_module, "read_folder", read)
    monkeypatch.setattr(trials_module, "method_argv", lambda *_: [])
    timing = time_finalists(tmp_path, None, {"full": None, "lora": None}, None, threading.Event())
    assert methods == ["full", "lora", "lora", "full"] * (1 if fails_at else NUM_ROUNDS // 2)
    assert timing.cost.ratio == ratio
    assert timing.reason == ("full failed: no output" if fails_at else "")
    assert read_timing(tmp_path) == timing
