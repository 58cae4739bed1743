"""Runs on several hosts: what differs between them is refused by name, a host that is gone is named, the rest go on.
The hosts are network namespaces (`helpers/hosts.py`); one set of three serves all tests."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hosts import ROOT, SSHD, Hosts, RanksOnHosts, run_tool, started_hosts
from helpers.launch_ranks import train
from helpers.process_groups import last_logged_step, read_events, read_records, read_reproducible_records, wait_until
from helpers.tiny_inputs import tiny_argv, write_records

from trainer.config.choices import DS_CONFIG_NAMES
from trainer.training.checkpoint import resolve_checkpoint

pytestmark = pytest.mark.slow
needs_pdsh = pytest.mark.skipif(
    shutil.which("pdsh") is None or not Path(SSHD).exists(), reason="needs pdsh, ssh and sshd"
)


@pytest.fixture(scope="module")
def flags(tiny_model: str, data_files: tuple[str, str]) -> list[str]:
    text = "--mode full --block-size 16 --global-batch 6 --num-samples 0 --eval-every never"
    return tiny_argv(tiny_model, data_files, text)


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path under which each host sees a folder of its own."""
    return tmp_path_factory.mktemp("private")


@pytest.fixture(scope="module")
def hosts(private: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """h1 to h3; their own names lead to a loopback, as Debian writes it, and the ranks meet all the same."""
    folder = tmp_path_factory.mktemp("hosts")
    with started_hosts(folder, 3, private=private, etc_hosts="127.0.1.1 {name}\n") as hosts:
        yield hosts


@pytest.mark.parametrize("other", ["the data", "the base model"])
def test_other_data_and_another_base_on_the_second_host_are_refused_by_name(
    other, flags, tiny_model, hosts, private, tmp_path
):
    for number in (1, 2):
        seed = 10 * number if other == "the data" else 10
        write_records(hosts.own_folder(f"h{number}") / "d.jsonl", num_records=25, seed=seed)
        shutil.copytree(tiny_model, hosts.own_folder(f"h{number}") / "base", dirs_exist_ok=True)
    weights = hosts.own_folder("h2") / "base" / "model.safetensors"
    if other == "the base model":
        weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    argv = [*flags, "--model", str(private / "base"), "--max-steps", "4"]
    argv[argv.index("--data") + 1] = str(private / "d.jsonl")
    argv += ["--output-dir", str(tmp_path / "run")]
    run = hosts.train(argv, tmp_path / "logs", with_srun=True)  # two tasks of a step are two ranks of one run
    assert run.wait() == [2, 2]
    assert re.fullmatch(
        rf"error: {other} is \S+ on h1 \(rank 0\) and \S+ on h2 \(rank 1\): all ranks must have the same",
        run.error_line,
    )
    assert not (tmp_path / "run").exists()


def test_only_rank_0s_host_needs_the_run_folder(flags, hosts, private, tmp_path):
    """It sends a checkpoint to the others, at a resume and for the test of the best weights; all numbers stay."""
    val, test = (  # of the same tokens
        write_records(tmp_path / f"{name}.jsonl", num_records=9, seed=2, unknown_word=name) for name in ("val", "test")
    )
    argv = [*flags, "--test-data", test, "--output-dir", str(private / "run")]
    argv[argv.index("--val-data") + 1] = val
    more_flags = "--ds-config zero1 --max-steps 4 --save-every 2 --eval-every 2 --lr 1 --schedule constant"
    argv += [*more_flags.split(), "--export", "best"]
    h1, h2 = hosts.own_folder("h1") / "run", hosts.own_folder("h2") / "run"
    run = hosts.train(argv, tmp_path / "first")
    assert run.wait() == [0, 0], run.output
    plan = " ".join(run.logs[0].read_text().split())
    assert "hosts h1: rank 0; h2: rank 1; gloo over eth0 (10.77.0.1)" in plan
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
    assert run.wait() == [0, 0], run.output
    assert [row for row in read_reproducible_records(h1) if row.get("event") != "resumed"] == rows

    shutil.rmtree(h1)
    run = hosts.train([*argv, "--resume", "auto"], tmp_path / "third")
    assert run.wait() == [2, 2]
    place = f"the run in {private}/run is on h2, and rank 0 on h1 has none there"
    assert run.error_line.endswith(f"{place}; name its host first, or another --output-dir")


@pytest.mark.sweep
@pytest.mark.parametrize("zero", DS_CONFIG_NAMES)
def test_ranks_on_any_hosts_have_the_same_numbers(zero, flags, hosts, tmp_path):
    argv = [*flags, "--ds-config", zero, "--max-steps", "3", "--export", "none"]
    train(argv, out=tmp_path / "here", world_size=3)
    for ranks in (("h1", "h2", "h3"), ("h1", "h1", "h2")):
        out = tmp_path / "-".join(ranks)
        run = hosts.train([*argv, "--output-dir", str(out)], tmp_path / f"logs-{ranks[-1]}", ranks=ranks)
        assert run.wait() == [0] * 3, run.output
        assert read_reproducible_records(out) == read_reproducible_records(tmp_path / "here")


def power_off(hosts: Hosts, run: RanksOnHosts) -> None:
    """The host is gone at once: its cable and its rank."""
    hosts.cut_cable("h3")
    run.send_signal(signal.SIGKILL, 2)


FAULTS = {
    "host killed": (power_off, "rank 2 on h3 "),
    "cable cut": (lambda hosts, run: hosts.cut_cable("h3"), "rank 2 on h3 does not answer"),
    "rank stopped": (lambda hosts, run: run.send_signal(signal.SIGSTOP, 2), "rank 2 on h3 does not answer"),
    "rank killed": (lambda hosts, run: run.send_signal(signal.SIGKILL, 2), "rank 2 on h3 of this run ended without"),
}


@pytest.mark.parametrize(
    "fault", ["cable cut", *(pytest.param(f, marks=pytest.mark.sweep) for f in list(FAULTS) if f != "cable cut")]
)
def test_a_host_that_is_gone_is_named_and_the_others_go_on(fault, flags, hosts, out, tmp_path):
    inject, message = FAULTS[fault]
    argv = [*flags, "--output-dir", str(out), "--hang-timeout", "8", "--resume", "auto"]
    argv += ["--max-steps", "5000"]
    try:
        run = hosts.train([*argv, "--save-every", "3"], tmp_path / "logs", ranks=("h1", "h2", "h3"))
        run.wait_until(lambda: last_logged_step(out) >= 4, 240)
        start_time = time.monotonic()
        inject(hosts, run)
        for process in run.processes[:2]:
            process.join(40)
        seconds = time.monotonic() - start_time
        assert [process.exitcode for process in run.processes[:2]] == [1, 1], run.output
    finally:
        hosts.plug_in("h3")
    if fault == "rank stopped":
        run.send_signal(signal.SIGKILL, 2)
    wait_until(lambda: not hosts.running(), 20, hosts.running)
    run.processes[2].join(10)
    assert run.processes[2].exitcode not in (0, None)
    lines = [line for line in run.error_lines if message in line]
    assert len(lines) == 1, run.output
    if fault != "rank killed":  # which is said by who first lost the other
        assert lines[0] in run.logs[0].read_text(), "the lowest rank says it"
    checkpoint = resolve_checkpoint(out / "checkpoints", "latest")
    assert checkpoint.find_damage() is None
    print(f"{fault}: {seconds:.0f} s; {lines[0]}")
    if fault == "cable cut":  # of the plain tests, which resume elsewhere
        return
    for ranks in (("h1", "h2"), ("h1", "h2", "h3")):  # on fewer hosts, then on more
        again = hosts.train(argv, tmp_path / f"on-{len(ranks)}", ranks=ranks)
        step = checkpoint.step + 10
        again.wait_until(lambda step=step: last_logged_step(out) >= step, 240)
        again.send_signal(signal.SIGTERM, 0)  # an export would take longer than all the rest
        assert set(again.wait()) == {128 + signal.SIGTERM}, again.output
        assert read_events(out, "resumed")[-1]["step"] == checkpoint.step
        checkpoint = resolve_checkpoint(out / "checkpoints", "latest")


@needs_pdsh
def test_the_files_for_ssh_start_two_hosts_with_their_variables(flags, hosts, out, tmp_path):
    argv = [*flags, "--output-dir", str(out), "--export", "none", "--max-steps", "2"]
    argv += ["--prompt", 'it\'s 5 %n of "$HOME" * {prompt}']
    settings = {"WANDB_API_KEY": "secret-key", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    write = [sys.executable, "launch/cluster.py", "--hosts", "h1:1,h2:1", "--folder", str(tmp_path / "cluster"), *argv]
    subprocess.run(write, cwd=ROOT, env={**os.environ, **settings}, check=True, capture_output=True, timeout=60)
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    process = hosts.start("h1", ["bash", str(tmp_path / "cluster" / "run.sh")], tmp_path / "log", env)
    commands = ""
    while process.poll() is None:
        commands += run_tool("ps", "axww", "-o", "args").stdout
        time.sleep(0.5)
    output = " ".join((tmp_path / "log").read_text().split())
    assert process.returncode == 0, output
    assert "h1: rank 0; h2: rank 1; gloo over eth0 (10.77.0.1)" in output
    assert f"environment W&B disabled; cache {os.environ['TRAINER_CACHE']}" in output, "exported on h1 only"
    assert "pdsh" in commands
    assert "secret-key" not in commands
    assert read_records(out)[-1]["event"] == "finished"
    assert 'it\'s 5 %n of \\"$HOME\\" *' in (out / "run.json").read_text()
