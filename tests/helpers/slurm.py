"""Stand-ins for SLURM's commands: a batch script runs on this machine as if it were two nodes."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node SLURM_PROCID=$node "$@" & tasks="$tasks $!"; done
trap 'kill -USR1 $tasks; pkill -USR1 -f {folder}/bin/torchrun' USR1  # a step is signalled as a whole
code=0
for task in $tasks; do while kill -0 $task 2>/dev/null; do wait $task; done; wait $task; code=$((code | $?)); done
exit $code
"""
SCONTROL = """#!/bin/bash
[ "$1 $2" = "show hostnames" ] && echo localhost || echo "$@" >>{folder}/scontrol
"""


def start_job(
    folder: Path, script: str, *, env: Mapping[str, str] | None = None, **programs: str
) -> "subprocess.Popen[str]":
    """The batch script of two nodes, with these programs in front of all others; {folder} in their texts is known."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, **programs}.items():
        path = folder / "bin" / name
        path.write_text(text.format(folder=folder, marker=folder / "run" / "requeue"))
        path.chmod(0o755)
    (folder / "run").mkdir(exist_ok=True)
    script = script.replace("export PATH=", f"export PATH={folder}/bin:")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    environ = {"PATH": os.environ["PATH"], **slurm, **(env or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(["bash", "-c", script], env=environ, text=True, **pipes)  # type: ignore[call-overload]
