"""Runs on several hosts: what differs between them is refused by name, a host that is gone is named, the rest go on.

The hosts are network namespaces (`helpers/hosts.py`); one set of three serves all tests.
Long: for that reason.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hosts import ENVIRON, ROOT, SSHD, Hosts, run_tool, started_hosts
from helpers.process_groups import last_logged_step, read_events, read_records, read_reproducible_records
from helpers.slurm import start_job
from helpers.tiny_inputs import TEMPLATE_FLAGS, write_records
from helpers.tolerances import LOSS_TOLERANCE, NORM_TOLERANCE

from trainer.training.checkpoint import resolve_checkpoint

pytestmark = pytest.mark.slow
needs_pdsh = pytest.mark.skipif(
    shutil.which("pdsh") is None or not Path(SSHD).exists(), reason="needs pdsh, ssh and sshd"
)


@pytest.fixture(scope="module")
def flags(tiny_model: str, data_files: tuple[str, str]) -> list[str]:
    text = f"--mode full --model {tiny_model} --val-data {data_files[1]} --block-size 16 --global-batch 6"
    return [*text.split(), "--preset", "demo", *TEMPLATE_FLAGS, "--num-samples", "0", "--eval-every", "never"]


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path under which each host sees a folder of its own."""
    return tmp_path_factory.mktemp("private")


@pytest.fixture(scope="module")
def hosts(private: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """h1 to h3; their own names lead to a loopback, as Debian writes it, and the ranks meet all the same."""
    with started_hosts(
        tmp_path_factory.mktemp("hosts"), 3, private=(private,), etc_hosts="127.0.1.1 {name}\n"
    ) as hosts:
        yield hosts


def own_folder(hosts: Hosts, name: str) -> Path:
    """What the host sees under the private path."""
    return hosts.folder / name / "private-0"


def test_other_data_and_another_base_on_the_second_host_are_refused_by_name(
    flags, tiny_model, hosts, private, tmp_path
):
    for number in (1, 2):
        write_records(own_folder(hosts, f"h{number}") / "d.jsonl", num_records=25, seed=number)
        shutil.copytree(tiny_model, own_folder(hosts, f"h{number}") / "base")
    weights = own_folder(hosts, "h2") / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    argv = [*flags, "--model", str(private / "base"), "--data", str(private / "d.jsonl"), "--max-steps", "4"]
    argv += ["--output-dir", str(tmp_path / "run")]
    run = hosts.train(argv, tmp_path / "logs", with_srun=True)  # two tasks of a step are two ranks of one run
    assert run.wait() == [2, 2]
    (line,) = run.error_lines()
    assert re.fullmatch(
        r"error: the data is \S+ on h1 \(rank 0\) and \S+ on h2 \(rank 1\); "
        r"the base model is \S+ on h1 \(rank 0\) and \S+ on h2 \(rank 1\): all ranks must have the same",
        line,
    )
    assert not (tmp_path / "run").exists()


def test_only_rank_0s_host_needs_the_run_folder(flags, data_files, hosts, private, tmp_path):
    """It sends a checkpoint to the others, at a resume and for the test of the best weights; all numbers stay."""
    argv = [*flags, "--data", data_files[0], "--test-data", data_files[1], "--output-dir", str(private / "run")]
    more_flags = "--ds-config zero1 --max-steps 4 --save-every 2 --eval-every 2 --lr 0.5 --schedule constant"
    argv += [*more_flags.split(), "--export", "best"]
    h1, h2 = own_folder(hosts, "h1") / "run", own_folder(hosts, "h2") / "run"
    run = hosts.train(argv, tmp_path / "first")
    assert run.wait() == [0, 0], run.output()
    plan = " ".join(run.output(0).split())
    assert "hosts h1: rank 0; h2: rank 1; gloo over eth0 (10.77.0.1)" in plan
    assert "the slowest link: a step sends 0.0" in plan
    assert "environment W&B disabled; cache " in plan
    assert f"{private}/run of h1 is not seen on h2: only h1 holds the checkpoints" in plan
    assert not h2.exists()
    rows = read_reproducible_records(h1)
    evaluations = {row["step"]: row["loss"] for row in rows if row["kind"] == "eval"}
    (tested,) = [row["facts"] for row in read_events(h1, "test_evaluation") if row["step"]]
    assert tested["step"] == 2
    assert tested["loss"] == evaluations[2] < evaluations[4]

    shutil.copytree(h1, h2)  # another run's, with the same shapes
    for file in h2.glob("checkpoints/*/state.safetensors"):
        file.write_bytes(file.read_bytes()[:-400] + bytes(400))
    run = hosts.train([*argv, "--resume", "step-2"], tmp_path / "second")
    assert run.wait() == [0, 0], run.output()
    assert [row for row in read_reproducible_records(h1) if row.get("event") != "resumed"] == rows

    shutil.rmtree(h1)
    run = hosts.train([*argv, "--resume", "auto"], tmp_path / "third")
    assert run.wait() == [2, 2]
    (line,) = run.error_lines()
    assert line.endswith(f"the run in {private}/run is on h2, and rank 0 on h1 has none there; name its host first, or "
                         "another --output-dir")  # fmt: skip


FAULTS = {
    "host killed": (lambda hosts, run: hosts.power_off("h3", run), "rank 2 on h3 "),
    "cable cut": (lambda hosts, run: hosts.cut_cable("h3"), "rank 2 on h3 does not answer"),
    "rank stopped": (lambda hosts, run: os.kill(run.pid(2), signal.SIGSTOP), "rank 2 on h3 does not answer"),
    "rank killed": (lambda hosts, run: os.kill(run.pid(2), signal.SIGKILL), "rank 2 on h3 of this run ended without"),
}


@pytest.mark.parametrize("rate", [None, pytest.param(100, marks=pytest.mark.sweep)])
@pytest.mark.parametrize(
    "fault", ["cable cut", *(pytest.param(f, marks=pytest.mark.sweep) for f in list(FAULTS) if f != "cable cut")]
)
def test_a_host_that_is_gone_is_named_and_the_others_go_on(fault, rate, flags, data_files, hosts, tmp_path):
    inject, command_line = FAULTS[fault]
    out = tmp_path / "run"
    argv = [*flags, "--data", data_files[0], "--output-dir", str(out), "--hang-timeout", "8", "--resume", "auto"]
    hosts.shape_links(rate)
    try:
        run = hosts.train(
            [*argv, "--max-steps", "5000", "--save-every", "3"], tmp_path / "logs", ranks=("h1", "h2", "h3")
        )
        run.wait_for_step(out, 4)
        start_time = time.monotonic()
        inject(hosts, run)
        for process in run.processes[:2]:
            process.join(40)
        seconds = time.monotonic() - start_time
        assert [process.exitcode for process in run.processes[:2]] == [1, 1], run.output()
    finally:
        hosts.plug_in("h3")
        hosts.shape_links(None)
    if fault == "rank stopped":
        os.kill(run.pid(2), signal.SIGKILL)
    hosts.wait_until_idle(list(hosts.pids))
    run.processes[2].join(10)
    assert run.processes[2].exitcode not in (0, None)
    lines = [line for line in run.error_lines() if command_line in line]
    assert len(lines) == 1, run.output()
    assert fault == "rank killed" or lines[0] in run.output(0), "the lowest rank says it, or who first lost the other"
    assert resolve_checkpoint(out / "checkpoints", "latest").find_damage() is None
    print(f"{fault}, {rate or 'unlimited'} Mbit/s: {seconds:.0f} s; {lines[0]}")
    if fault == "cable cut" and not rate:  # of the plain tests, which resume elsewhere
        return
    step = resolve_checkpoint(out / "checkpoints", "latest").step
    again = hosts.train([*argv, "--max-steps", "5000"], tmp_path / "again", ranks=("h1", "h2"))
    again.stop_after_step(out, step + 10)
    assert read_events(out, "resumed")[0]["step"] == step


@needs_pdsh
@pytest.mark.sweep
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("launcher", ["cluster.py --hosts", "torchrun"])
def test_a_launcher_ends_where_a_host_is_gone(launcher, fault, flags, data_files, hosts, tmp_path):
    """Nothing is left running: of a frozen rank either, where the launch files are used."""
    out = tmp_path / "run"
    argv = [*flags, "--data", data_files[0], "--output-dir", str(out), "--hang-timeout", "8", "--max-steps", "5000"]
    argv += ["--save-every", "3", "--export", "none"]
    env = {**ENVIRON, "HOME": str(tmp_path), "PATH": os.environ["PATH"], "TRAINER_CACHE": os.environ["TRAINER_CACHE"]}
    if launcher == "torchrun":
        place = ["--nnodes=3", "--nproc-per-node=1", "--master-addr=10.77.0.1", "--master-port=29511"]
        commands = {
            name: ["torchrun", *place, f"--node-rank={rank}", "launch/train.py", *argv]
            for rank, name in enumerate(hosts.pids)
        }
    else:
        commands = {"h1": ["bash", str(write_launch_files(tmp_path / "cluster", "h1:1,h2:1,h3:1", argv))]}
    processes = [
        hosts.start(name, ["bash", "-c", f"cd {ROOT}; exec {shlex.join(command)}"], tmp_path / f"{name}.log", env)
        for name, command in commands.items()
    ]
    deadline = time.monotonic() + 240
    while last_logged_step(out) < 4:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), (tmp_path / "h1.log").read_text()
        time.sleep(0.1)
    is_rank = re.compile(r"^\S+ -u launch/train\.py ").match
    (rank_pid,) = [pid for pid, line in hosts.processes_of("h3").items() if is_rank(line)]
    start_time = time.monotonic()
    try:
        if fault in ("host killed", "cable cut"):
            hosts.cut_cable("h3")
        for pid in hosts.processes_of("h3") if fault == "host killed" else ():
            os.kill(pid, signal.SIGKILL)
        if fault in ("rank stopped", "rank killed"):
            os.kill(rank_pid, signal.SIGSTOP if fault == "rank stopped" else signal.SIGKILL)
        if fault == "rank stopped" and launcher == "torchrun":  # on its own host nobody knows; SLURM ends it by --wait
            processes[2].kill()
            os.kill(rank_pid, signal.SIGKILL)
        for process in processes:
            assert process.wait(150) != 0
        seconds = time.monotonic() - start_time
        hosts.wait_until_idle(list(hosts.pids))
    finally:
        hosts.plug_in("h3")
    output = "".join((tmp_path / f"{name}.log").read_text() for name in commands)
    (line,) = {line.split("error: ")[1] for line in output.splitlines() if "error: " in line and "rank 2 on h3" in line}
    assert resolve_checkpoint(out / "checkpoints", "latest").find_damage() is None
    print(f"{launcher}, {fault}: all gone after {seconds:.0f} s; {line}")


PLACES = {
    "2 ranks of one host": ("h1", "h1"),
    "2 hosts": ("h1", "h2"),
    "3 hosts": ("h1", "h2", "h3"),
    "1 and 2 ranks": ("h1", "h2", "h2"),
}


@pytest.mark.sweep
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_ranks_on_any_hosts_have_the_same_numbers(mode, flags, data_files, hosts, tmp_path):
    argv = [*flags, "--data", data_files[0], "--max-steps", "6", "--mode", mode, "--eval-every", "epoch"]

    def numbers(name: str, places: tuple[str, ...], zero: str) -> list[tuple[float, float]]:
        out = tmp_path / name
        run = hosts.train([*argv, "--output-dir", str(out), "--ds-config", zero], tmp_path / "logs", ranks=places)
        assert run.wait() == [0] * len(places), run.output()
        rows = [row for row in read_records(out) if row["kind"] in ("step", "eval")]
        return [(row["loss"], row.get("grad_norm", 1.0)) for row in rows]

    alone = numbers("alone", ("h1",), "zero0")
    assert len(alone) > 6
    for zero in ("zero0", "zero1", "zero2", "zero3"):
        for name, places in PLACES.items():
            rows = numbers(f"{name} {zero}".replace(" ", "-"), places, zero)
            loss, norm = (max(abs(a[i] / b[i] - 1) for a, b in zip(rows, alone, strict=True)) for i in (0, 1))
            print(f"{mode}, {zero}, {name}: losses within {loss:.1e}, gradient norms {norm:.1e}")
            assert loss < LOSS_TOLERANCE
            assert norm < NORM_TOLERANCE


def write_launch_files(folder: Path, ranks_of_hosts: str, flags: list[str]) -> Path:
    """Through launch/cluster.py, with keys and settings in the environment; the command to start."""
    env = {
        **os.environ,
        "WANDB_API_KEY": "secret-key",
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    argv = ["python3", "launch/cluster.py", "--hosts", ranks_of_hosts, "--folder", str(folder), *flags]
    subprocess.run(argv, cwd=ROOT, env=env, check=True, capture_output=True, timeout=60)
    return folder / "run.sh"


@needs_pdsh
def test_the_files_for_ssh_start_two_hosts_with_their_variables(flags, data_files, hosts, tmp_path):
    out = tmp_path / "run"
    argv = [*flags, "--data", data_files[0], "--output-dir", str(out), "--export", "none", "--max-steps", "2"]
    script = write_launch_files(
        tmp_path / "cluster", "h1:1,h2:1", [*argv, "--prompt", 'it\'s 5 %n of "$HOME" * {prompt}']
    )
    with hosts.fast_python() as prefix:
        for file in (script, script.with_name("environment")):
            file.write_text(file.read_text().replace(f"{sys.prefix}/bin", f"{prefix}/bin"))
        with open(script.with_name("environment"), "a") as file:
            file.write(f"export TEST_PYTHON={prefix}/python\n")
        env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "TEST_PYTHON": f"{prefix}/python"}
        process = hosts.start("h1", ["bash", str(script)], tmp_path / "log", env)
        commands = ""
        while process.poll() is None:
            commands += run_tool("ps", "axww", "-o", "args").stdout
            time.sleep(0.2)
    output = " ".join((tmp_path / "log").read_text().split())
    assert process.returncode == 0, output
    assert "h1: rank 0; h2: rank 1; gloo over eth0 (10.77.0.1)" in output
    assert f"environment W&B disabled; cache {os.environ['TRAINER_CACHE']}" in output, "exported on h1 only"
    assert "pdsh" in commands
    assert "secret-key" not in commands
    assert read_records(out)[-1]["event"] == "finished"
    assert 'it\'s 5 %n of \\"$HOME\\" *' in (out / "run.json").read_text()


@needs_pdsh
@pytest.mark.sweep
def test_a_run_of_two_hosts_is_resumed_on_three_over_ssh(flags, data_files, hosts, tmp_path):
    """With fresh interpreters: each launcher is looked for among the parents that sshd gives a rank."""
    out = tmp_path / "run"
    argv = [*flags, "--data", data_files[0], "--output-dir", str(out), "--save-every", "2", "--export", "none"]
    script = write_launch_files(tmp_path / "cluster", "h1:1,h2:2", [*argv, "--max-steps", "4"])
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    assert hosts.start("h1", ["bash", str(script)], tmp_path / "log", env).wait(240) == 0, (
        tmp_path / "log"
    ).read_text()
    assert "h1: rank 0; h2: ranks 1, 2; gloo over eth0" in (tmp_path / "log").read_text()
    more_flags = [*argv, "--max-steps", "6", "--allow-change", "max_steps"]
    script = write_launch_files(tmp_path / "cluster", "h1:1,h2:1,h3:1", more_flags)
    assert hosts.start("h1", ["bash", str(script)], tmp_path / "log", env).wait(240) == 0, (
        tmp_path / "log"
    ).read_text()
    assert read_events(out, "resumed")[0]["step"] == 4
    assert "h3: rank 2" in (tmp_path / "log").read_text()


@pytest.mark.sweep
def test_the_batch_script_with_real_torchrun_goes_on_after_slurms_notice(flags, data_files, tmp_path):
    """Two nodes that are this machine, SLURM's own commands by stand-ins."""
    out = tmp_path / "run"
    argv = [
        "--nodes",
        "2",
        "--ranks-per-node",
        "1",
        "--cpu",
        "--folder",
        str(tmp_path),
        *flags,
        "--data",
        data_files[0],
    ]
    argv += ["--output-dir", str(out), "--max-steps", "40", "--save-every", "never"]
    subprocess.run(
        ["python3", "launch/cluster.py", "--slurm", *argv], cwd=ROOT, check=True, capture_output=True, timeout=60
    )
    script = (tmp_path / "job.sbatch").read_text()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = start_job(tmp_path, script, env=env)
    deadline = time.monotonic() + 240
    while last_logged_step(out) < 2:
        assert time.monotonic() < deadline
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.02)
    srun = run_tool("pgrep", "-P", str(job.pid), "srun").stdout
    os.kill(int(srun), signal.SIGUSR1)
    output, _ = job.communicate(timeout=240)
    assert job.returncode == 1, output
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n", output
    stopped = read_events(out, "interrupted")[0]["step"]
    assert stopped < 40
    output, _ = start_job(tmp_path, script, env=env).communicate(timeout=240)
    assert read_events(out, "resumed")[0]["step"] == stopped
    assert read_records(out)[-1]["event"] == "finished", output
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
