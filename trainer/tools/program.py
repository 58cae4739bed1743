"""What every program of `launch/` does around its own work."""

import functools
import os
import sys
from collections.abc import Callable, Sequence

from trainer.config.errors import TrainingError, UserError, permission_denied, report_error
from trainer.distributed.launch_environment import is_first_of_host, set_library_environment
from trainer.tracking.safe_stream import protect_standard_streams
from trainer.tracking.silence import silence_libraries


def program(main: Callable[[Sequence[str]], int]) -> Callable[..., int]:
    """`main` of a command line (default: that of the process); a mistake is one line on each host and an exit code."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        if argv is None:  # the process is this program
            protect_standard_streams()
        try:
            return main(sys.argv[1:] if argv is None else argv)
        except (UserError, TrainingError, PermissionError) as error:
            failure = permission_denied(error) if isinstance(error, PermissionError) else error
            return report_error(failure) if is_first_of_host(os.environ) else failure.exit_code

    return run


def prepare_libraries() -> None:
    """Set what torch, transformers and others read of the environment; call it before they are imported."""
    silence_libraries()
    set_library_environment()
