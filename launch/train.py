"""Fine-tune GPT-2: `deepspeed launch/train.py --mode full|lora`; --help lists the rest."""

import contextlib
import os
import sys

from trainer.config.cli import parse_args
from trainer.config.errors import TrainingError, UserError, permission_denied, report_error
from trainer.distributed.launch_environment import is_first_of_host, read_launch_environment, reporting_rank
from trainer.distributed.watch import SignalHandler
from trainer.tools.program import prepare_libraries
from trainer.tracking.safe_stream import protect_standard_streams


def main() -> int:
    """Parse, run, and turn a mistake into one line: exit code 2 for the user's, 1 for a run that failed."""
    try:
        num_ranks = 1
        with contextlib.suppress(UserError):  # the run itself says what is wrong
            num_ranks = read_launch_environment(os.environ).world_size
        cli_args = parse_args(num_ranks=num_ranks)
        # before the imports that take seconds, in which a launcher may end
        signal_handler = SignalHandler(grace_seconds=cli_args.settings.engine.grace)
        if reporting_rank(os.environ) == 0:
            print("Loading PyTorch, transformers and DeepSpeed ...", flush=True)
        prepare_libraries()
        from trainer.run import run

        return run(cli_args, signal_handler)
    except (UserError, TrainingError, PermissionError) as error:  # before the ranks know one another
        failure = permission_denied(error) if isinstance(error, PermissionError) else error
        return report_error(failure) if is_first_of_host(os.environ) else failure.exit_code


if __name__ == "__main__":
    protect_standard_streams()
    sys.exit(main())
