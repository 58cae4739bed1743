"""Hosts that a run is to have beside this one: whether they are found, reached by ssh, and have the same installed."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.distributed.launch_environment import without_launcher
from trainer.distributed.network_check import LinkSpeed
from trainer.distributed.preflight import program_facts
from trainer.distributed.process_group import find_free_port
from trainer.tools.cluster.launch_files import SSH_OPTIONS
from trainer.tools.doctor.check_result import ERROR, WARNING, CheckResult, join_names, make_result
from trainer.tools.worker_processes import last_line

SSH_TIMEOUT_SECONDS = 60  # of the imports there, from a network file system that has not seen them yet
LINKS_TIMEOUT_SECONDS = 180  # with a second or less for each host
JOIN_SECONDS = 60.0  # of imports from a network file system that has not seen them yet
MAX_LINKS_SHOWN = 6
_ASK = "import json; from trainer.distributed.preflight import program_facts; print(json.dumps(program_facts({})))"


def check_hosts(hosts: Sequence[str]) -> Iterator[CheckResult]:
    """Names, ssh, and what is installed; nothing is started there but Python that says its versions."""
    yield check_own_name()
    addresses = {host: _resolve(host) for host in hosts}
    for host, address in addresses.items():
        if address is None:
            yield CheckResult(ERROR, host, "has no address here", "a name that every host resolves, or its IP")
    here = program_facts({})
    for host, address in addresses.items():
        if address is not None:
            yield _check_host(host, address, here)


def check_own_name() -> CheckResult:
    """Whether this host's name leads others, and torchrun, to it: Debian's /etc/hosts says 127.0.1.1."""
    name = socket.gethostname()
    address = _resolve(name)
    is_loopback = address is not None and address.startswith("127.")
    return make_result(
        address is None or is_loopback,
        WARNING,
        "own name",
        f"{name} is {address or 'unknown'} here" + ": other hosts cannot reach that" * is_loopback,
        f"in /etc/hosts, the address that other hosts know for {name}; or torchrun --local-addr ADDRESS (started "
        "otherwise, the ranks find their interface themselves)",
    )


def measure_links(hosts: Sequence[str]) -> list[LinkSpeed]:
    """The link of every two hosts, as one rank on each of them sees it, the slowest first. UserError: they do not meet.

    This host is the first.
    """
    place = {"WORLD_SIZE": str(len(hosts)), "MASTER_ADDR": hosts[0], "MASTER_PORT": str(find_free_port())}
    variables = " ".join(f"{name}={value}" for name, value in place.items())
    argv = [sys.executable, "-m", "trainer.tools.doctor.link_worker", str(JOIN_SECONDS)]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    ranks = [
        subprocess.Popen(
            argv if n == 0 else _ssh_argv(host, f"RANK={n} {variables} {shlex.join(argv)}"),
            env={**without_launcher(os.environ), **place, "RANK": "0"} if n == 0 else None,
            text=True,
            **pipes,
        )
        for n, host in enumerate(hosts)
    ]
    deadline = time.monotonic() + LINKS_TIMEOUT_SECONDS
    try:
        while ranks[0].poll() is None and not any(rank.poll() for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
        if ranks[0].poll() == 0:
            speeds = [LinkSpeed(**row) for row in json.loads(ranks[0].communicate()[0].splitlines()[-1])]
            return sorted(speeds, key=lambda speed: speed.bandwidth)
        failed = [(host, rank) for host, rank in zip(hosts, ranks, strict=True) if rank.poll()]
    finally:
        for rank in ranks:
            rank.kill()
        errors = {rank: rank.communicate()[1] for rank in ranks}
    for host, rank in failed:
        reason = last_line(errors[rank] or f"exit code {rank.returncode}").removeprefix("error: ")
        raise UserError(f"a rank on {host}: {reason}; let the hosts reach one another at any port")
    raise UserError(f"the ranks on {', '.join(hosts)} have not measured within {LINKS_TIMEOUT_SECONDS} s")


def describe_links(speeds: Sequence[LinkSpeed]) -> str:
    """The links of all pairs, the slowest first, cut after a few."""
    links = (
        f"{speed.source}-{speed.target} {speed.bandwidth / 1e9:.3g} GB/s {speed.latency_seconds * 1e3:.2g} ms"
        for speed in speeds
    )
    return f"{len(speeds)} pair{'s' * (len(speeds) > 1)}: {join_names(links, MAX_LINKS_SHOWN)}"


def _ssh_argv(host: str, command: str) -> list[str]:
    """A command on a host, in the folder of this process."""
    return ["ssh", *SSH_OPTIONS.split(), host, f"cd {shlex.quote(str(Path.cwd()))} && {command}"]


def _check_host(host: str, address: str, here: dict[str, Any]) -> CheckResult:
    try:
        answer = subprocess.run(
            _ssh_argv(host, shlex.join([sys.executable, "-c", _ASK])),
            capture_output=True,
            text=True,
            timeout=SSH_TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
        )
        there = json.loads(answer.stdout.strip().splitlines()[-1]) if answer.returncode == 0 else None
        reason = last_line(answer.stderr)
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        there, reason = None, type(error).__name__
    if there is None:
        message = f"{address}: ssh does not start this program there ({reason})"
        remedy = f"let `ssh {host}` work without a password, and have checkout and environment under the same paths"
        return CheckResult(ERROR, host, message, remedy)
    differences = [f"{name} is {there.get(name)}, here {here[name]}" for name in here if there.get(name) != here[name]]
    message = f"{address}: {join_names(differences) or 'the same program and packages'}"
    remedy = "install the same on all hosts (a run refuses it before its first step)"
    return make_result(bool(differences), ERROR, host, message, remedy)


def _resolve(host: str) -> str | None:
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0])
    except OSError:
        return None
