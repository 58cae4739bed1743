"""Runs on several hosts: what differs between them is refused by name, and a host that is cut off is named.

The hosts are network namespaces (`helpers/hosts.py`).
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from helpers.hosts import SSHD, TRAIN_SCRIPT, started_hosts
from helpers.process_groups import last_logged_step, read_records
from helpers.tiny_inputs import TEMPLATE_FLAGS, write_records

pytestmark = pytest.mark.slow
TIMEOUT_SECONDS = 240


@pytest.fixture(scope="module")
def flags(tiny_model: str, data_files: tuple[str, str]) -> list[str]:
    text = f"--mode full --model {tiny_model} --val-data {data_files[1]} --block-size 16 --global-batch 6"
    return [*text.split(), "--preset", "demo", *TEMPLATE_FLAGS, "--num-samples", "0", "--eval-every", "never"]


def wait_all(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    return [process.wait(TIMEOUT_SECONDS) for process in processes]


def error_lines(logs: Path) -> list[str]:
    texts = [path.read_text() for path in sorted(logs.iterdir())]
    assert "Traceback" not in "".join(texts), texts
    return [line for text in texts for line in text.splitlines() if line.startswith("error: ")]


def test_other_data_on_the_second_host_is_refused_by_name(flags, tmp_path):
    private = tmp_path / "data"
    private.mkdir()
    with started_hosts(tmp_path / "hosts", private=(private,)) as hosts:
        for number in (1, 2):
            write_records(tmp_path / "hosts" / f"h{number}" / "private-0" / "d.jsonl", num_records=25, seed=number)
        argv = [*flags, "--data", str(private / "d.jsonl"), "--output-dir", str(tmp_path / "run"), "--max-steps", "4"]
        codes = wait_all(hosts.train(argv, tmp_path / "logs"))
    (line,) = error_lines(tmp_path / "logs")
    assert codes == [2, 2]
    assert line.startswith("error: the data is ")
    assert " on h1 (rank 0) and " in line
    assert line.endswith(" on h2 (rank 1): all ranks must have the same")
    assert not (tmp_path / "run").exists()


def test_a_resume_reads_rank_0s_checkpoint_on_every_host_or_not_at_all(flags, data_files, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    argv = [*flags, "--data", data_files[0], "--output-dir", str(runs / "run"), "--ds-config", "zero1"]
    h1, h2 = (tmp_path / "hosts" / name / "private-0" / "run" for name in ("h1", "h2"))
    with started_hosts(tmp_path / "hosts", private=(runs,)) as hosts:
        argv = [*argv, "--save-every", "2", "--max-steps", "4"]
        # Its own name leads to a loopback, as on Debian; the ranks meet all the same.
        for name in ("h1", "h2"):
            with open(tmp_path / "hosts" / name / "etc-hosts", "a") as file:
                file.write(f"127.0.1.1 {name}\n")
        assert wait_all(hosts.train(argv, tmp_path / "first")) == [0, 0], (tmp_path / "first" / "h1").read_text()
        assert "h1: rank 0; h2: rank 1; gloo over eth0 (10.77.0.1)" in (tmp_path / "first" / "h1").read_text()

        assert wait_all(hosts.train([*argv, "--resume"], tmp_path / "second")) == [2, 2]
        (line,) = error_lines(tmp_path / "second")
        assert "--resume: on h2 (rank 1) checkpoint " in line
        assert "cannot read state.safetensors" in line

        shutil.copytree(h1, h2, dirs_exist_ok=True)
        newest = max((h2 / "checkpoints").iterdir()) / "state.safetensors"
        newest.write_bytes(newest.read_bytes()[:-1] + b"\x01")  # of another run with the same shapes
        assert wait_all(hosts.train([*argv, "--resume"], tmp_path / "third")) == [2, 2]
        (line,) = error_lines(tmp_path / "third")
        assert "on h2 (rank 1) checkpoint " in line
        assert "was changed since it was written (checksum)" in line


def test_a_host_that_is_cut_off_is_named_on_both_sides(flags, data_files, tmp_path):
    out = tmp_path / "run"
    argv = [*flags, "--data", data_files[0], "--output-dir", str(out), "--max-steps", "5000", "--hang-timeout", "8"]
    with started_hosts(tmp_path / "hosts") as hosts:
        processes = hosts.train([*argv, "--save-every", "3"], tmp_path / "logs")
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while last_logged_step(out) < 4:
            assert time.monotonic() < deadline, (tmp_path / "logs" / "h1").read_text()
            time.sleep(0.2)
        hosts.cut_cable("h2")
        start_time = time.monotonic()
        codes = wait_all(processes)
        assert time.monotonic() - start_time < 40
    assert codes == [1, 1]
    first, second = error_lines(tmp_path / "logs")
    assert "no rank has moved for 8 s (--hang-timeout): rank 1 on h2 does not answer; rank 0 waiting at " in first
    assert "rank 0 on h1 does not answer" in second


@pytest.mark.skipif(shutil.which("pdsh") is None or not Path(SSHD).exists(), reason="needs pdsh and sshd")
def test_deepspeed_starts_two_hosts_over_pdsh(flags, data_files, tmp_path):
    out = tmp_path / "run"
    with started_hosts(tmp_path / "hosts") as hosts:
        (tmp_path / "hostfile").write_text("h1 slots=1\nh2 slots=2\n")
        variables = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "TRAINER_CACHE": os.environ["TRAINER_CACHE"]}
        (tmp_path / ".deepspeed_env").write_text("\n".join(f"{name}={value}" for name, value in variables.items()))
        env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        launcher = [shutil.which("deepspeed") or "deepspeed", "--hostfile", str(tmp_path / "hostfile")]
        argv = [*launcher, TRAIN_SCRIPT, *flags, "--data", data_files[0], "--output-dir", str(out), "--max-steps", "4"]
        process = hosts.start("h1", argv, tmp_path / "log", env)
        assert process.wait(TIMEOUT_SECONDS) == 0, (tmp_path / "log").read_text()
    output = (tmp_path / "log").read_text()
    assert "h1: rank 0; h2: ranks 1, 2; gloo over eth0 (10.77.0.1)" in output
    assert read_records(out)[-1]["event"] == "finished"
