"""Settle what only a GPU can: `python launch/gpu_acceptance.py` runs tests, doctor, benchmark and a short card run.

Every part is a process of its own with a log; results.json and results.md name each part's exit code and time, and
results.md has the tables as they come. Exit code: 0 all parts passed, 1 one failed or was cut off, 2 a mistake.
"""

import sys

from trainer.config.errors import UserError, report_error


def main() -> int:
    """Run the parts in order; a mistake is one line on stderr."""
    from trainer.tools.bench.acceptance import run

    try:
        return run(sys.argv[1:])
    except UserError as error:
        return report_error(error)


if __name__ == "__main__":
    sys.exit(main())
