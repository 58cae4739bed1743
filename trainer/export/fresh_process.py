"""The export of a run at its end, in a process that has trained nothing: `python -m trainer.export.fresh_process`.

It exports the run's checkpoint with the code of `launch/export.py`, so the folder is what that command would write.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from trainer.config.errors import TrainingError, UserError, report_error
from trainer.distributed.launch_environment import set_library_environment, without_launcher


def export_in_fresh_process(request: dict[str, Any]) -> dict[str, Any]:
    """{"summary", "problems"} of `export_checkpoint(**request)`, run as nobody's rank. TrainingError where it fails.
    The process ends with this one: it reads from a pipe of which we hold the other end."""
    import torch  # not by the process that exports, before it watches its input

    environment = {name: value for name, value in without_launcher(os.environ).items() if not name.startswith("WANDB_")}
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), environment.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",  # a base of the hub is in its local cache: this process has just used it
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-m", "trainer.export.fresh_process", json.dumps(request)]
    options: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "env": environment}
    read_end, write_end = os.pipe()
    try:
        process = subprocess.run(command, stdin=read_end, **options)
    finally:
        os.close(read_end)
        os.close(write_end)
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1][:300]
        raise TrainingError(f"{request['output_dir']} not written: {reason.removeprefix('error: ')}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    # Our input ends, written by nobody, when the process that asked has ended: watched before slow imports.
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    from trainer.tracking.silence import silence_libraries

    silence_libraries()  # before the libraries it silences are imported
    set_library_environment()
    from trainer.export.export_cli import export_checkpoint

    try:
        print(json.dumps(export_checkpoint(**json.loads(sys.argv[1]))))
    except (UserError, TrainingError) as error:
        sys.exit(report_error(error))
