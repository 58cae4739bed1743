"""Fine-tune GPT-2: `deepspeed launch/train.py --mode full|lora`; --help lists the rest."""

import os
import sys


def main() -> int:
    """Parse, run, and turn a mistake into one line: exit code 2 for the user's, 1 for a run that failed."""
    from trainer.config.cli import read
    from trainer.config.errors import RunFailed, UserError

    try:
        request = read()
        from trainer.tracking.silence import quiet

        quiet()  # before the libraries it silences are imported
        from trainer.run import run

        return run(request)
    except (UserError, RunFailed) as problem:
        told = problem.told if problem.told is not None else os.environ.get("RANK", "0") != "0"
        if not told:
            print(f"error: {problem}", file=sys.stderr)
        return 2 if isinstance(problem, UserError) else 1


if __name__ == "__main__":
    sys.exit(main())
