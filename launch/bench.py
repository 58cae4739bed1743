"""Measure what training costs: `python launch/bench.py steps|memory` (default: steps).

Exit code 0: measured; 1: a measurement failed; 2: a mistake in the flags.
"""

import sys

from trainer.tools.bench.bench_cli import run
from trainer.tools.program import program

main = program(run)

if __name__ == "__main__":
    sys.exit(main())
