"""What the doctor says of other hosts, with a stand-in for ssh that answers as a host would."""

import json

import pytest
from helpers.fake_ssh import put_ssh_script

from trainer.distributed.preflight import program_facts
from trainer.tools.doctor import host_checks
from trainer.tools.doctor.host_checks import check_hosts, check_own_name


@pytest.mark.parametrize(
    ("answer", "code", "level", "message"),
    [
        ({}, 0, "ok", ["127.0.0.1: the same program and packages"]),
        ({"torch": "1.0"}, 0, "error", ["torch is 1.0, here ", "install the same"]),
        ("Permission denied.", 255, "error", ["ssh does not start this program there", "without a password"]),
    ],
)
def test_a_host_is_reached_and_has_the_same_installed_or_it_is_said(
    answer, code, level, message, tmp_path, monkeypatch
):
    text = answer if isinstance(answer, str) else "a greeting\n" + json.dumps({**program_facts({}), **answer})
    (tmp_path / "answer").write_text(text)
    put_ssh_script(tmp_path, monkeypatch, f'echo "$@" >{tmp_path}/argv\ncat {tmp_path}/answer\nexit {code}\n')
    result = list(check_hosts(["localhost"]))[-1]
    assert result.level == level
    assert all(word in f"{result.message}; {result.remedy}" for word in message), result
    argv = (tmp_path / "argv").read_text()
    assert "-o BatchMode=yes" in argv
    assert " localhost cd " in argv


def test_a_host_without_an_address_and_an_own_name_that_is_a_loopback_are_named(monkeypatch):
    addresses = {"h1": "127.0.1.1", "h2": None}
    monkeypatch.setattr(host_checks, "_resolve", addresses.get)
    monkeypatch.setattr(host_checks.socket, "gethostname", lambda: "h1")
    own, other = check_hosts(["h2"])
    assert (own.level, other.level) == ("warning", "error")
    assert own.message == "h1 is 127.0.1.1 here: other hosts cannot reach that"
    assert "/etc/hosts" in own.remedy
    assert (other.name, other.message) == ("h2", "has no address here")
    addresses["h1"] = "10.0.0.1"
    assert (check_own_name().level, check_own_name().message) == ("ok", "h1 is 10.0.0.1 here")
