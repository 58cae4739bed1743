"""What launch/cluster.py writes: its options exist, it carries what a run needs, keys stay with their owner. The batch
script runs here with stand-ins for what SLURM and torch bring; tests/faults/test_hosts.py starts real runs."""

import os
import re
import runpy
import shlex
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import pytest
from helpers.process_groups import wait_until
from helpers.slurm import start_job

ROOT = Path(__file__).parents[3]
SLURM_OPTIONS = dict(
    line.split(": ", 1) for line in Path(__file__).with_name("slurm_options.txt").read_text().splitlines()[1:]
)
SLURM_FLAGS = ["--slurm", "--nodes", "2", "--ranks-per-node", "3", "--mode", "lora", "--global-batch", "6"]
GRACE = ["--grace", "90"]
SSH_FLAGS = ["--hosts", "a:1,b:2", "--mode", "lora", "--global-batch", "6"]
write_launch_files = runpy.run_path(str(ROOT / "launch" / "cluster.py"))["main"]


def write(folder: Path, *flags: str) -> int:
    return write_launch_files([*flags, "--folder", str(folder)])


def slurm_script(folder: Path, *flags: str) -> str:
    assert write(folder, *SLURM_FLAGS, *flags) == 0
    return (folder / "job.sbatch").read_text()


def test_the_commands_of_the_readme_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("events.csv").touch()
    commands = re.findall("^python launch/cluster.py (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [write(tmp_path, *shlex.split(command)) for command in commands] == [0, 0]


def test_every_option_is_in_the_manual_pages(tmp_path):
    script = slurm_script(tmp_path, "--grace", "99999", "--sbatch", "partition=p", "--sbatch", "cpus-per-task=4")
    options = dict(re.findall(r"^#SBATCH (--[a-z-]+)=?(.*)$", script, re.MULTILINE))
    assert set(options) <= set(SLURM_OPTIONS["sbatch"].split())
    assert options["--nodes"] == "2"
    assert options["--ntasks-per-node"] == "1"
    assert options["--gpus-per-node"] == "3"
    assert options["--signal"] == "USR1@65535", "the largest that sbatch takes"
    (srun,) = re.findall(r"^srun (.*) bash -c", script, re.MULTILINE)
    assert set(re.findall(r"--[a-z-]+", srun)) <= set(SLURM_OPTIONS["srun"].split())
    assert "--gpus-per-node=0" in slurm_script(tmp_path, "--sbatch", "gpus-per-node=0")
    more = ["--sbatch", "gres=gpu:h100:8", "--sbatch", "exclusive", "--sbatch", "time=5"]
    lines = slurm_script(tmp_path, *more).splitlines()
    assert {"#SBATCH --gres=gpu:h100:8", "#SBATCH --exclusive", "#SBATCH --time=5"} <= set(lines)
    assert not any("gpus-per-node" in line for line in lines), "the GPUs are asked for once"
    assert "#SBATCH --gpus-per-node=3" in slurm_script(tmp_path, "--sbatch", "gres=nvme:1", "--sbatch", "gpu-freq=low")


def test_lines_of_a_setup_file_run_before_the_ranks_under_slurm_and_over_ssh(tmp_path):
    (tmp_path / "setup.sh").write_text("export MODULE=loaded\n")
    script = slurm_script(tmp_path, "--setup", str(tmp_path / "setup.sh"), "--output-dir", str(tmp_path / "run"))
    rank = f"#!/bin/bash\necho $MODULE >>{tmp_path}/seen\n"
    job = start_job(tmp_path, script, rank=rank, torchrun=TORCHRUN)
    assert job.communicate(timeout=20)[0] == ""
    assert (tmp_path / "seen").read_text().split() == ["loaded", "loaded"]
    assert write(tmp_path, *SSH_FLAGS, "--setup", str(tmp_path / "setup.sh")) == 0
    shell = ["bash", "-c", f"source {tmp_path}/environment; echo $MODULE"]
    assert subprocess.run(shell, capture_output=True, text=True).stdout == "loaded\n"


def test_no_file_of_somebody_else_is_replaced(tmp_path, capsys):
    (tmp_path / "run.sh").write_text("echo mine\n")
    assert write(tmp_path, *SSH_FLAGS) == 2
    assert "run.sh there is not cluster.py's; expected another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run.sh"]
    assert (tmp_path / "run.sh").read_text() == "echo mine\n"


def test_torchrun_and_deepspeed_take_the_commands(tmp_path):
    from deepspeed.launcher import multinode_runner, runner
    from torch.distributed.run import get_args_parser

    run_flags = ["--data", "events/*.csv", "--prompt", 'it\'s 5 %n of "{a}"\n`x` $HOME é', "--completion", "", *GRACE]
    script = slurm_script(tmp_path, *run_flags)
    command = re.search(r"exec torchrun (.*) \"\$@\"", script)[1]  # type: ignore[index]
    command = command.replace("$SLURM_JOB_NUM_NODES", "2").replace("$SLURM_NODEID", "1").replace("$MASTER_PORT", "9")
    train_command = shlex.split(re.search(r"task \\\n    (.*)\ncode=", script, re.DOTALL)[1])  # type: ignore[index]
    args = get_args_parser().parse_args([*shlex.split(command), *train_command])
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "3", 1)
    assert args.training_script_args[-4:] == ["--grace", "90", "--resume", "auto"]

    assert write(tmp_path, *SSH_FLAGS, *run_flags) == 0
    command = (tmp_path / "run.sh").read_text().partition("\ndeepspeed ")[2].partition(" </dev/null")[0]
    command = command.replace("$port", "1")
    deepspeed_args = runner.parse_args(shlex.split(command.replace("\\\n", "")))
    deepspeed_args.user_script = "script"
    command = " ".join(multinode_runner.PDSHRunner(deepspeed_args, "").user_arguments)
    assert "%" not in command, "pdsh puts something else there"
    shell = ["bash", "-c", f'printf "%s\\0" {command}']
    argv = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True).stdout.split("\0")[:-1]
    assert argv == train_command[1:], "as the shell of another host reads it"
    assert write(tmp_path, "--hosts", "a:3", *SSH_FLAGS[2:], *run_flags) == 0
    command = (tmp_path / "run.sh").read_text().rpartition("--master_port=$port ")[2].partition(" </dev/null")[0]
    assert shlex.split(command) == train_command, "no shell reads them again"
    assert deepspeed_args.hostfile == str(tmp_path / "hostfile")
    assert deepspeed_args.venv_script == str(tmp_path / "environment")
    assert runner.fetch_hostfile(str(tmp_path / "hostfile")) == {"a": 3}


def test_keys_are_in_a_file_of_their_owner_only_and_nowhere_else(tmp_path, monkeypatch, capsys):
    values = {"WANDB_API_KEY": "k'ey \n$HOME", "HF_TOKEN": "hf_of-the-test"}
    values |= {"TRAINER_CACHE": "/cache-of-the-test", "https_proxy": "http://u:pw@p"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("EDITOR", "vi")
    umask = os.umask(0)
    try:
        assert write(tmp_path, *SSH_FLAGS) == 0
        assert write(tmp_path, *SSH_FLAGS) == 0, "again over its own files"
        assert write(tmp_path / "slurm", *SLURM_FLAGS) == 0
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "environment").stat().st_mode) == 0o600
    shell = ["bash", "-c", f"source {tmp_path}/environment; python3 -c 'import os; print(dict(os.environ))'"]
    environ = eval(subprocess.run(shell, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True).stdout)
    assert {name: environ.get(name) for name in values} == values
    assert "EDITOR" not in environ
    texts = [path.read_text() for path in tmp_path.rglob("*") if path.is_file() and path.name != "environment"]
    texts.append(capsys.readouterr().out)
    assert not [(value, text) for value in values.values() for text in texts if value in text]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], ["--slurm", "--hosts"]),
        (["--slurm", "--nodes", "2", "--mode", "lora"], ["--slurm: expected --nodes N and --ranks-per-node N"]),
        ([*SLURM_FLAGS, "--nodes", "5"], ["--global-batch 6: expected a multiple of 15 (micro-batch 1 x 15 ranks)"]),
        ([*SSH_FLAGS, "--sbatch", "qos=high"], ["--sbatch: only with --slurm"]),
        (["--hosts", "a;reboot:1", "--mode", "lora"], ["--hosts a;reboot:1", "NAME:RANKS"]),
        ([*SLURM_FLAGS, "--sbatch", "nodes=3"], ["--sbatch: nodes=3", "cluster.py sets nodes itself"]),
        ([*SLURM_FLAGS, "--sbatch", "exp=NONE"], ["--sbatch: exp=NONE", "cluster.py sets exp itself"]),
        ([*SLURM_FLAGS, "--sbatch", "comment=a b"], ["--sbatch comment=a b", "without blanks"]),
        ([*SSH_FLAGS, "--setup", "missing"], ["--setup missing: cannot be read", "shell lines"]),
        ([*SLURM_FLAGS, "--resume", "step-5"], ["--resume step-5", "--resume auto"]),
        ([*SSH_FLAGS, "--find-batch"], ["--find-batch", "launch/train.py itself"]),
        ([*SSH_FLAGS, "--data", "missing.csv"], ["--data missing.csv: no such file or folder; expected"]),
        ([*SLURM_FLAGS, "--ds-config", "missing.json"], ["--ds-config missing.json: cannot be read"]),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(flags, message, tmp_path, capsys):
    assert write(tmp_path / "new", *flags) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert all(word in captured.err for word in message), captured.err
    assert not (tmp_path / "new").exists()


RANK = """#!/usr/bin/env python3
import os, signal, sys, time  # as a rank does it: Python may handle a signal that torchrun ignores
def stop(*_):
    if {leaves_marker}:
        open("{marker}", "w").write("SIGUSR1\\n")
    sys.exit(138)
signal.signal(signal.SIGUSR1, stop)
open("{folder}/ready-" + os.environ["SLURM_NODEID"], "w")
time.sleep(10)
"""
TORCHRUN = """#!/bin/bash
echo "$@" >>{folder}/torchrun
{folder}/bin/rank & wait $! || exit 1
"""
# The launcher has ended when the notice has been handed on: its code must not be taken for the signal's.
SLOW_PKILL = f"""#!/bin/bash
{shutil.which("pkill")} "$@"
sleep 0.5
"""


@pytest.mark.parametrize("leaves_marker", [True, False], ids=["while it trains", "before or after"])
def test_a_job_that_gets_slurms_notice_saves_and_is_queued_again(leaves_marker, tmp_path):
    (tmp_path / "my events.csv").touch()
    script = slurm_script(tmp_path, "--output-dir", str(tmp_path / "run"), "--data", str(tmp_path / "my events.csv"))
    rank = RANK.replace("{leaves_marker}", str(leaves_marker))
    programs = {"rank": rank, "torchrun": TORCHRUN, "pkill": SLOW_PKILL}
    job = start_job(tmp_path, script, env={"TMPDIR": str(tmp_path)}, **programs)
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, 20)
    srun = int(subprocess.run(["pgrep", "-P", str(job.pid), "srun"], capture_output=True, text=True).stdout)
    os.kill(srun, signal.SIGUSR1)
    output, _ = job.communicate(timeout=20)
    assert job.returncode == 1, output
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    assert not list(tmp_path.glob("tmp.*"))
    first, second = sorted((tmp_path / "torchrun").read_text().splitlines())
    assert first.startswith("--nnodes=2 --nproc-per-node=3 --node-rank=0 --master-addr=localhost --master-port=15007 ")
    assert f"--data {tmp_path}/my events.csv --resume auto" in first
    assert "--node-rank=1 --master-addr=localhost" in second


def test_a_job_that_fails_ends_and_a_stopped_one_is_queued_again_thrice_without_a_new_checkpoint(tmp_path, capfd):
    """Then it ends; a new checkpoint begins the count anew."""
    script = slurm_script(tmp_path, "--output-dir", str(tmp_path / "run"))
    rank = "#!/bin/bash\necho SIGUSR1 >{marker}; [ $SLURM_NODEID != 0 ] && sleep 0.3; exit 138\n"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "requeue").write_text("SIGUSR1\n")  # of a run before
    job = start_job(tmp_path, script, rank="#!/bin/bash\nexit 3\n", torchrun=TORCHRUN)
    assert (job.communicate(timeout=20)[0], job.returncode) == ("", 1)
    assert not (tmp_path / "scontrol").exists(), "one that fails is not queued again"
    num_requeues, outputs = [], []
    for new_step in (0, 0, 7, 7, 7, 7):
        if new_step:
            (tmp_path / f"run/checkpoints/step-{new_step:06d}").mkdir(parents=True, exist_ok=True)
        job = start_job(tmp_path, script, rank=rank, torchrun=TORCHRUN)
        outputs.append(job.communicate(timeout=20)[0])
        num_requeues.append((tmp_path / "scontrol").read_text().count("requeue 7"))
    assert num_requeues == [1, 2, 3, 4, 5, 5]
    assert "error: queued again 3 times without a new checkpoint (last: step-000007); it ends" in outputs[-1]
