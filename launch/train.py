"""Fine-tune GPT-2: `deepspeed launch/train.py --mode full|lora`; --help lists the rest."""

import contextlib
import os
import sys
from collections.abc import Sequence

from trainer.config.cli import parse_args
from trainer.config.errors import UserError
from trainer.distributed.launch_environment import read_launch_environment, reporting_rank
from trainer.distributed.watch import SignalHandler
from trainer.tools.program import prepare_libraries, program


@program
def main(argv: Sequence[str]) -> int:
    num_ranks = 1
    with contextlib.suppress(UserError):  # the run itself says what is wrong
        num_ranks = read_launch_environment(os.environ).world_size
    cli_args = parse_args(argv, num_ranks=num_ranks)
    # before the imports that take seconds, in which a launcher may end
    signal_handler = SignalHandler(grace_seconds=cli_args.settings.engine.grace)
    if reporting_rank(os.environ) == 0:
        print("Loading PyTorch, transformers and DeepSpeed ...", flush=True)
    prepare_libraries()
    from trainer.run import run

    return run(cli_args, signal_handler)


if __name__ == "__main__":
    sys.exit(main())
