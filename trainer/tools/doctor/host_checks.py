"""Hosts that a run is to have beside this one: whether they are found, reached by ssh, and have the same installed."""

import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.distributed.preflight import program_facts
from trainer.tools.cluster.launch_files import SSH_OPTIONS
from trainer.tools.doctor.check_result import ERROR, WARNING, CheckResult, join_names, make_result

SSH_TIMEOUT_SECONDS = 60  # of the imports there, from a network file system that has not seen them yet
_ASK = "import json; from trainer.distributed.preflight import program_facts; print(json.dumps(program_facts({})))"


def check_hosts(hosts: Sequence[str]) -> Iterator[CheckResult]:
    """Names, ssh, and what is installed; nothing is started there but Python that says its versions."""
    yield check_own_name()
    addresses = {host: _resolve(host) for host in hosts}
    for host, address in addresses.items():
        if address is None:
            yield CheckResult(
                level=ERROR,
                name=host,
                message="has no address here",
                remedy="a name that every host resolves, or its IP",
            )
    here = program_facts({})
    for host in (host for host, address in addresses.items() if address is not None):
        yield _check_host(host, addresses[host] or "", here)


def check_own_name(name: str | None = None) -> CheckResult:
    """Whether this host's name leads others, and torchrun, to it: Debian's /etc/hosts says 127.0.1.1."""
    name = name or socket.gethostname()
    address = _resolve(name)
    return make_result(
        address is None or address.startswith("127."), WARNING, "own name",
        f"{name} is {address or 'unknown'} here" + (": other hosts cannot reach that" if address else ""),
        f"in /etc/hosts, the address that other hosts know for {name}; or torchrun --local-addr ADDRESS (started "
        "otherwise, the ranks find their interface themselves)",
    )  # fmt: skip


def _check_host(host: str, address: str, here: dict[str, Any]) -> CheckResult:
    command = f"cd {shlex.quote(str(Path.cwd()))} && {shlex.quote(sys.executable)} -c {shlex.quote(_ASK)}"
    try:
        answer = subprocess.run(
            ["ssh", *SSH_OPTIONS.split(), host, command], capture_output=True, text=True, timeout=SSH_TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        there = json.loads(answer.stdout.strip().splitlines()[-1]) if answer.returncode == 0 else None
        reason = (answer.stderr.strip().splitlines() or ["no answer"])[-1]
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        there, reason = None, type(error).__name__
    if there is None:
        return CheckResult(
            level=ERROR, name=host, message=f"{address}: ssh does not start this program there ({reason})",
            remedy=f"let `ssh {host}` work without a password, and have checkout and environment under the same paths",
        )  # fmt: skip
    differences = [f"{name} is {there.get(name)}, here {here[name]}" for name in here if there.get(name) != here[name]]
    return make_result(
        bool(differences), ERROR, host,
        f"{address}: {join_names(differences)}" if differences else f"{address}: the same program and packages",
        "install the same on all hosts (a run refuses it before its first step)",
    )  # fmt: skip


def _resolve(host: str) -> str | None:
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0])
    except OSError:
        return None
