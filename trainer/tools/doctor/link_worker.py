"""`python -m trainer.tools.doctor.link_worker SECONDS`: a rank a host; they measure every pair, rank 0 prints JSON."""

import json
import sys
from dataclasses import asdict


def main(join_seconds: float) -> int:
    """Join within so long, measure, leave; the exit code."""
    from trainer.tracking.silence import silence_libraries

    silence_libraries()  # before the libraries it silences are imported
    from trainer.config.errors import TrainingError, UserError, report_error
    from trainer.distributed.network_check import measure_pairs
    from trainer.distributed.process_group import destroy_process_group, init_distributed

    try:
        context = init_distributed(join_timeout_seconds=join_seconds)
    except (UserError, TrainingError) as error:
        return report_error(error)
    speeds = [asdict(speed) for speed in measure_pairs(context)]
    if context.rank == 0:
        print(json.dumps(speeds), flush=True)
    context.watchdog.close()
    destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
