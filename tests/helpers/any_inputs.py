"""Property tests of what reads a file: a hundred inputs or so in plain pytest, 10,000 with `-m sweep`."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

#: What stands for any value in a JSON file, numbers that no float holds and texts that are no UTF-8 included.
JSON_VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.sampled_from(["\ud800", 10**400])
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def many_inputs(num_examples: int) -> Any:
    """Parametrises a test by `num_inputs`, which it hands to `check_inputs`."""
    return pytest.mark.parametrize("num_inputs", [num_examples, pytest.param(10_000, marks=pytest.mark.sweep)])


def check_inputs(num_inputs: int, check: Callable[..., None], *strategies: st.SearchStrategy[Any]) -> None:
    """Call `check` with so many inputs of these strategies; what it raises is shown with the smallest that does."""
    run = given(*strategies)(check)
    settings(max_examples=num_inputs, deadline=None, suppress_health_check=list(HealthCheck))(run)()
