"""Equal budgets and several claims at once: hand-computed numbers."""

import math

import numpy as np
import pandas as pd
import pytest

from trainer.report.interval import holm
from trainer.report.views import build_views, describe_views


def curve(losses: list[float], *, flops: float, seconds: float | None = None, memory: float = 1e9) -> pd.DataFrame:
    """Points at 100, 200, ... tokens; `flops` and `seconds` a token."""
    tokens = 100 * np.arange(1, len(losses) + 1)
    spent = {"tokens": tokens, "flops": tokens * flops, "seconds": seconds and tokens * seconds}
    return pd.DataFrame({"loss": losses, **spent, "peak_memory_bytes": memory})


def test_at_equal_flops_the_dearer_mode_is_read_off_its_curve_where_the_cheaper_ends() -> None:
    full, lora = curve([3.0, 2.0, 1.8], flops=3, memory=2e9), curve([3.1, 2.1, 1.9], flops=2)
    tokens, flops, seconds, memory = build_views([full], [lora], no_seconds="not timed in alternation")
    assert (tokens.budget, tokens.full_loss, tokens.lora_loss, tokens.favours) == (300, 1.8, 1.9, "full")
    assert (flops.budget, flops.full_loss, flops.lora_loss) == (600, 2.0, 1.9)  # full's second evaluation: 200 x 3
    assert flops.favours == "lora"
    assert seconds.describe() == "at equal seconds: not known (not timed in alternation)"
    assert memory.describe() == "at equal peak memory (1.00 GB): only LoRA fits, with loss 1.9000"
    assert build_views([full], [curve([1.9], flops=2, memory=1.99e9)])[3].full_loss == 1.8, "1 % less is no advantage"
    lines = describe_views([tokens, flops, seconds, memory])
    assert [line.removeprefix("Exploratory: ").split(" at ")[0] for line in lines[:2]] == ["LoRA is ahead"] * 2
    assert lines[0].startswith("Exploratory: LoRA is ahead at equal FLOPs (600): LoRA 1.9000, full 2.0000")
    assert lines[0].endswith("where at equal tokens full is ahead.")
    assert lines[2] == f"Exploratory: {seconds.describe()}."


def test_between_two_evaluations_the_loss_is_linear_in_the_logarithm_of_what_was_spent() -> None:
    full, lora = curve([3.0, 2.0], flops=1, seconds=1.0), curve([2.9], flops=1, seconds=math.sqrt(2))
    seconds = build_views([full], [lora])[2]
    assert seconds.budget == pytest.approx(100 * math.sqrt(2))  # half the way from 100 to 200 in its logarithm
    assert seconds.full_loss == pytest.approx(2.5)
    assert "141.4 s): LoRA 2.9000" in seconds.describe()


def test_with_two_seeds_a_view_favours_a_mode_by_its_interval_only() -> None:
    full = [curve([2.0], flops=1), curve([2.0], flops=1)]
    certain = build_views(full, [curve([2.1], flops=1), curve([2.1001], flops=1)])[0]
    unsure = build_views(full, [curve([2.1], flops=1), curve([1.95], flops=1)])[0]
    assert (certain.favours, unsure.favours) == ("full", "")
    assert "over seeds" in certain.describe()


def test_holm_multiplies_the_smallest_by_their_number_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
