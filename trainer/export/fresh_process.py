"""The export of a run at its end, in a process that has trained nothing: `python -m trainer.export.fresh_process`.

It exports the run's checkpoint with the code of `launch/export.py`, so the folder is what that command would write.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from trainer.config.errors import TrainingError, UserError, report_error
from trainer.distributed.launch_environment import set_library_environment, without_launcher


def export_in_fresh_process(request: dict[str, Any], hang_timeout_seconds: float) -> dict[str, Any]:
    """{"summary", "problems"} of `export_checkpoint(**request)`, run as nobody's rank. TrainingError where it fails,
    or neither computes nor reads nor writes for so many seconds. The process ends with this one: it reads from a pipe
    of which we hold the other end."""
    import torch  # not by the process that exports, before it watches its input

    from trainer.distributed.watch import TICK_SECONDS, WorkMeter

    environment = {name: value for name, value in without_launcher(os.environ).items() if not name.startswith("WANDB_")}
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), environment.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",  # a base of the hub is in its local cache: this process has just used it
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-m", "trainer.export.fresh_process", json.dumps(request)]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    (read_end, write_end), meter, still_seconds = os.pipe(), WorkMeter(), 0.0
    try:
        process, output = subprocess.Popen(command, stdin=read_end, env=environment, **options), None
        while output is None:
            try:
                output, errors = process.communicate(timeout=TICK_SECONDS)
            except subprocess.TimeoutExpired:
                still_seconds = 0 if meter.has_moved(TICK_SECONDS) else still_seconds + TICK_SECONDS
                if still_seconds > hang_timeout_seconds:
                    process.kill()
                    process.communicate()
                    problem = f"the export stood still for {hang_timeout_seconds:g} s (--hang-timeout)"
                    raise TrainingError(f"{request['output_dir']} not written: {problem}") from None
    finally:
        os.close(read_end)
        os.close(write_end)
    if process.returncode:
        reason = [f"exit code {process.returncode}", *errors.strip().splitlines()][-1][:300]
        if process.returncode < 0:  # its last line says nothing about this
            name = signal.Signals(-process.returncode).name
            reason = f"its process was killed by {name}{' (out of memory?)' * (name == 'SIGKILL')}"
        raise TrainingError(f"{request['output_dir']} not written: {reason.removeprefix('error: ')}")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


if __name__ == "__main__":
    # Our input ends, written by nobody, when the process that asked has ended: watched before slow imports.
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    from trainer.tracking.silence import silence_libraries

    silence_libraries()  # before the libraries it silences are imported
    set_library_environment()
    try:
        from trainer.export.export_cli import export_checkpoint

        print(json.dumps(export_checkpoint(**json.loads(sys.argv[1]))))
    except (UserError, TrainingError) as error:
        sys.exit(report_error(error))
