"""Measure what training costs: `python launch/bench.py steps|memory` (default: steps)."""

import sys

from trainer.config.errors import TrainingError, UserError, report_error
from trainer.tracking.safe_stream import protect_standard_streams


def main() -> int:
    """Measure and print; a mistake is one line on stderr and exit code 2, a measurement that failed is 1."""
    from trainer.tools.bench.bench_cli import run

    try:
        return run(sys.argv[1:])
    except (UserError, TrainingError) as error:
        return report_error(error)


if __name__ == "__main__":
    protect_standard_streams()
    sys.exit(main())
