"""The files that start a run on several machines: a batch script for SLURM, or a host list and a command for ssh.

They carry the variables that a run needs. A key is in no command line, as DeepSpeed's own `.deepspeed_env` would put
it, and in no file that others can read.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.config.errors import UserError
from trainer.config.settings import Settings
from trainer.distributed.launch_environment import FORWARDED_PREFIXES

NOTICE_MARGIN_SECONDS = 30  # between a run's --grace and the end of the job: to start the next one
MAX_NOTICE_SECONDS = 65535  # sbatch(1)
MIN_STRAGGLER_SECONDS = 60  # that a host gets to end by itself when another has ended: to close W&B, to upload
MAX_ATTEMPTS = 3  # that a job is queued again without a new checkpoint
MARK = "# Written by launch/cluster.py, which writes it anew."  # in each file: no other one is replaced
SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=3"
#: The line of a shell script that puts this virtual environment in front.
PATH_EXPORT = f"export PATH={shlex.quote(f'{sys.prefix}/bin')}:$PATH"
#: {name: (content, mode)} of files to be written; the last one starts the run.
LaunchFiles = dict[str, tuple[str, int]]


def slurm_files(command: Sequence[str], settings: Settings, args: argparse.Namespace, folder: Path) -> LaunchFiles:
    """One batch script: a task on each node, torchrun in it, SLURM's notice handed on, and the job queued again after.

    `command`: launch/train.py and its flags, from this folder; `settings`: what they mean; `args`: cluster.py's own
    flags, None where the cluster's default holds; `folder`: where the file goes.
    Options are those of sbatch(1) and srun(1); since 22.05 srun does not inherit --cpus-per-task from sbatch.
    """
    names_gpus = any(name.startswith("gpus") or (name == "gres" and "gpu" in args.sbatch[name]) for name in args.sbatch)
    options = {
        "job-name": re.sub(r"[^\w.-]", "-", settings.run_name),
        "nodes": args.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": None if names_gpus else args.ranks_per_node,
        "output": "%x-%j.out",
        "open-mode": "append",
        "export": "ALL",
        "signal": f"USR1@{min(settings.engine.grace + NOTICE_MARGIN_SECONDS, MAX_NOTICE_SECONDS):.0f}",
        "requeue": "",
        **args.sbatch,
    }
    lines = [
        f"#SBATCH --{name}{f'={value}' if value != '' else ''}" for name, value in options.items() if value is not None
    ]
    max_seconds = max(MIN_STRAGGLER_SECONDS, round(settings.engine.hang_timeout))
    marker, checkpoints = (shlex.quote(f"{settings.run_folder}/{name}") for name in ("requeue", "checkpoints"))
    attempts = f"{shlex.quote(str(folder))}/attempts-$SLURM_JOB_ID"
    torchrun = (
        f"torchrun --nnodes=$SLURM_JOB_NUM_NODES --nproc-per-node={args.ranks_per_node} --node-rank=$SLURM_NODEID "
        "--master-addr=$MASTER_ADDR --master-port=$MASTER_PORT"
    )
    # Named, not copied: others may read this script.
    setup = ""
    if args.setup is not None:
        setup = f". {shlex.quote(str(args.setup.absolute()))} || {{ echo 'error: --setup failed' >&2; exit 1; }}\n"
    body = f"""
cd {shlex.quote(str(Path.cwd()))} || exit 1
{setup}{PATH_EXPORT}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((15000 + SLURM_JOB_ID % 17000))
NOTICE=$(mktemp) || exit 1
export NOTICE
rm -f {marker}

# A task hands SLURM's notice to its ranks, which save and end; torchrun itself would die of it. The first one keeps
# it on the node of this script: ranks that have not begun to train, or have ended to, leave no file.
task='(trap "" USR1; exec {torchrun} "$@") &
launcher=$!
trap "[ $SLURM_NODEID != 0 ] || echo SIGUSR1 >$NOTICE; pkill -USR1 -P $launcher" USR1
while kill -0 $launcher 2>/dev/null; do wait $launcher; done; wait $launcher'

cores=${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}}
srun --export=ALL --wait={max_seconds} $cores bash -c "$task" task \\
    {shlex.join(command)}
code=$?
# The ranks leave the marker when a signal has stopped them (torchrun turns every exit code into 1).
if [ $code -ne 0 ] && grep -qs SIGUSR1 {marker} "$NOTICE"; then
    # Not for ever: a job whose ranks never come to a new checkpoint ends.
    step=$(ls {checkpoints} 2>/dev/null | grep -E '^step-[0-9]+$' | sort -V | tail -n 1)
    {{ read -r last_step num_attempts <{attempts}; }} 2>/dev/null
    [ "$last_step" = "${{step:-none}}" ] || num_attempts=0
    if [ "$num_attempts" -lt {MAX_ATTEMPTS} ]; then
        echo "${{step:-none}} $((num_attempts + 1))" >{attempts}
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "error: queued again {MAX_ATTEMPTS} times without a new checkpoint (last: ${{step:-none}}); it ends" >&2
    fi
fi
rm -f "$NOTICE"
exit $code
"""
    return {"job.sbatch": ("\n".join(["#!/bin/bash", MARK, *lines]) + "\n" + body, 0o644)}


def ssh_files(
    command: Sequence[str],
    settings: Settings,
    ranks_of_hosts: Mapping[str, int],
    folder: Path,
    environ: Mapping[str, str],
    setup: str,
) -> LaunchFiles:
    """The host list and the command for `deepspeed --hostfile`, and a file with the variables, for its owner only.
    `command`, `settings`: as for `slurm_files`; `folder`: where the files go, under the same path on all hosts;
    `setup`: shell lines that come first."""
    environment, hostfile = (shlex.quote(str(folder / name)) for name in ("environment", "hostfile"))

    def quote(word: str) -> str:
        if re.fullmatch(r"[\w@+=:,./-]+", word, re.ASCII):
            return word
        escaped = re.sub(rb"[^A-Za-z0-9]", lambda match: b"\\x%02x" % match[0][0], os.fsencode(word))
        return f"$'{escaped.decode()}'"

    if len(ranks_of_hosts) > 1:  # deepspeed passes flags on unquoted and changes blanks, pdsh changes any %;
        command = [quote(word) for word in command]  # the ranks of one host are started without pdsh
    hosts = shlex.join(ranks_of_hosts)
    max_seconds = max(MIN_STRAGGLER_SECONDS, round(settings.engine.hang_timeout))
    names = sorted(name for name in environ if name.startswith(FORWARDED_PREFIXES) and name.isidentifier())
    exports = [MARK, setup + PATH_EXPORT, *(f"export {name}={shlex.quote(environ[name])}" for name in names)]
    hosts_text = ",".join(f"{host}:{number}" for host, number in ranks_of_hosts.items())
    exports.append(f"export TRAINER_HOSTS={shlex.quote(hosts_text)}")  # by which a rank that does not come is named
    script = f"""#!/bin/bash
{MARK}
cd {shlex.quote(str(Path.cwd()))} || exit 1
{PATH_EXPORT}
# Without these deepspeed waits for ever for a host that is gone.
export PDSH_SSH_ARGS_APPEND="{SSH_OPTIONS}"
# Hosts that do not share this folder get the variables too.
for host in {hosts}; do
    ssh {SSH_OPTIONS} "$host" cmp -s - {environment} <{environment} && continue
    ssh {SSH_OPTIONS} "$host" mkdir -p {shlex.quote(str(folder))} &&
        scp -pq {SSH_OPTIONS} {environment} "$host":{environment} || exit 1
done
port=$((20000 + RANDOM % 10000))
launchers="^[^ ]+ -u -m deepspeed[.]launcher[.]launch .*--master_port=$port "
signal_ranks() {{  # deepspeed itself reaches none where a script is sourced before its launcher
    for host in {hosts}; do
        ssh -n {SSH_OPTIONS} "$host" \\
            "pkill -$1 -P \\$(pgrep -d, -f '$launchers') || pkill -f '$launchers'" &  # it has no ranks yet
    done
}}
set -m  # a signal comes to this script alone
deepspeed --quiet --hostfile={hostfile} --venv_script={environment} --master_addr={next(iter(ranks_of_hosts))} \\
    --master_port=$port {shlex.join(command)} </dev/null &
launcher=$!
trap "pgrep -P $launcher >/dev/null && signal_ranks TERM || kill $launcher" INT TERM
trap "signal_ranks USR1" USR1
# When one host has ended, the others have {max_seconds} s: deepspeed waits for ever for a frozen rank.
seconds=0
while kill -0 $launcher 2>/dev/null; do
    sleep 5 &
    wait -n $launcher $!
    num_hosts=$(pgrep -c -x ssh -P "$(pgrep pdsh -P $launcher)" 2>/dev/null)
    [ "${{num_hosts:-{len(ranks_of_hosts)}}}" -lt {len(ranks_of_hosts)} ] && seconds=$((seconds + 5)) || seconds=0
    [ $seconds -lt {max_seconds} ] || signal_ranks KILL
done
kill %sleep 2>/dev/null
wait $launcher
"""
    hostfile_content = f"{MARK}\n" + "".join(f"{host} slots={n}\n" for host, n in ranks_of_hosts.items())
    return {
        "hostfile": (hostfile_content, 0o644),
        "environment": ("\n".join(exports) + "\n", 0o600),
        "run.sh": (script, 0o755),
    }


def parse_hosts(text: str) -> dict[str, int]:
    """{host: ranks} of `NAME:RANKS,NAME:RANKS`; UserError for anything else."""
    ranks_of_hosts: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"([A-Za-z0-9][\w.-]*):([1-9]\d*)", part.strip())
        if match is None or match[1] in ranks_of_hosts:
            raise UserError(f"--hosts {text}: expected each host once as NAME:RANKS, for instance a:8,b:8")
        ranks_of_hosts[match[1]] = int(match[2])
    return ranks_of_hosts


def write_files(folder: Path, files: LaunchFiles) -> None:
    """Write them; each is made with its mode, so that a key is never readable for a moment. OSError; UserError for
    a file there that this program did not write."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / name for name in files):
        if os.path.lexists(path) and not (path.is_file() and MARK in path.read_text("utf-8", errors="replace")):
            raise UserError(f"--folder {folder}: {path.name} there is not cluster.py's; expected another folder")
    for name, (content, mode) in files.items():
        path = folder / name
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        with open(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(content)
