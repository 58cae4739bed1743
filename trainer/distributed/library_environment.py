"""What libraries read from the environment while they are imported; to be set before torch and Arrow are."""

import os


def set_library_environment() -> None:
    """Let waiting threads give their core away soon, and Arrow its memory back, unless the user has said otherwise.

    By default GNU's OpenMP, which torch links on Linux, spins for ever where it sees a core for each thread: beside
    one busy process a step then takes several times as long. Arrow's own pool keeps what passes through it: a run of
    1,000 evaluations, whose file is read and written each time, grew by 28 MiB with it and by 8 with the system's
    (tests/faults/test_long_runs.py).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # turns; launch/README.md has their price and their gain
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
