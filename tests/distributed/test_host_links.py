"""The links between hosts, measured by ranks that doctor starts on each of them."""

import pytest
from helpers.fake_ssh import put_ssh_script

from trainer.config.errors import UserError
from trainer.tools.doctor import host_checks
from trainer.tools.doctor.host_checks import describe_links, measure_links


def test_every_pair_of_hosts_is_measured_by_ranks_that_are_started_there(fast_python, tmp_path, monkeypatch):
    """The hosts are this one, reached by a stand-in for ssh that runs what it is given."""
    put_ssh_script(tmp_path, monkeypatch, 'for command; do :; done\nexec env -i PATH="$PATH" sh -c "$command"\n')
    monkeypatch.setattr(host_checks.sys, "executable", fast_python)
    monkeypatch.setenv("SLURM_PROCID", "3")  # where the doctor itself runs is not passed on
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    speeds = measure_links(["localhost", "b", "c"])
    assert len(speeds) == 3
    assert all(0 < speed.latency_seconds < 1 for speed in speeds)
    assert speeds == sorted(speeds, key=lambda speed: speed.bandwidth)
    assert describe_links(speeds).startswith("3 pairs: ")


def test_hosts_that_do_not_meet_are_one_line(fast_python, tmp_path, monkeypatch):
    monkeypatch.setattr(host_checks.sys, "executable", fast_python)
    monkeypatch.setattr(host_checks, "JOIN_SECONDS", 1.0)
    put_ssh_script(tmp_path, monkeypatch, "echo no route to b >&2; exit 255\n")
    with pytest.raises(UserError, match="a rank on b: no route to b; let the hosts reach one another"):
        measure_links(["localhost", "b"])
    put_ssh_script(tmp_path, monkeypatch, "exec sleep 20\n")
    with pytest.raises(UserError, match=r"a rank on localhost: of 2 ranks these have not come to localhost:.*: 1; let"):
        measure_links(["localhost", "b"])
