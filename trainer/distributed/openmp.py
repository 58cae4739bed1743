"""How long an idle OpenMP thread spins before it sleeps; to be set before torch is imported."""

import os

USER_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
SPIN_COUNT = "2000"  # turns; launch/README.md has its price and its gain


def limit_openmp_spin() -> None:
    """Let threads that wait for one another give their core away soon, unless the user has said how they wait.

    By default GNU's OpenMP, which torch links on Linux, spins for ever where it sees a core for each thread: beside
    one busy process a step then takes several times as long.
    """
    if not any(name in os.environ for name in USER_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
