"""Hosts for tests of runs on several: network namespaces on a bridge, each with its own name, processes and files.

Nothing of the real network is touched, and no address outside is reached. Where the kernel allows no namespaces, or
`ip` is missing, the tests are skipped with the reason.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAIN_SCRIPT = str(ROOT / "launch" / "train.py")
SSHD, SSH_CONFIG = "/usr/sbin/sshd", "/etc/ssh/ssh_config"


def run_tool(*argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=check)


def skip_without_namespaces() -> None:
    """Skip where hosts cannot be made here."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs `ip` and `unshare`")
    probe = run_tool(
        "unshare", "-n", "-m", "-u", "-p", "--fork", "ip", "link", "add", "br0", "type", "bridge", check=False
    )
    if probe.returncode:
        pytest.skip(f"no namespaces here: {probe.stderr.strip()}")


class Hosts:
    """h1, h2, ... at 10.77.0.1, 10.77.0.2, ...; `private`: folders of which each host has its own, empty at first."""

    def __init__(self, folder: Path, count: int, *, private: tuple[Path, ...] = (), etc_hosts: str = ""):
        self.folder, self.private = folder, private
        self.processes: list[subprocess.Popen[bytes]] = []
        self.pids: dict[str, int] = {}
        lines = [f"10.77.0.{n} h{n}" for n in range(1, count + 1)]
        (folder / "etc-hosts").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        self.switch = self._start(["unshare", "-n", "sleep", "infinity"])
        time.sleep(0.3)
        self._in_switch("ip link add br0 type bridge && ip link set br0 up")
        for number in range(1, count + 1):
            self._start_host(number, etc_hosts)

    def _start(self, argv: list[str]) -> subprocess.Popen[bytes]:
        # Where the tests are killed, the kernel ends the host too.
        argv = ["setpriv", "--pdeathsig", "KILL", *argv]
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)
        self.processes.append(process)
        return process

    def _in_switch(self, line: str) -> None:
        run_tool("nsenter", "-t", str(self.switch.pid), "-n", "sh", "-c", line)

    def _start_host(self, number: int, etc_hosts: str) -> None:
        name, home = f"h{number}", self.folder / f"h{number}"
        self._write_ssh_files(home)
        own_hosts = (self.folder / "etc-hosts").read_text() + etc_hosts.format(name=name)
        (home / "etc-hosts").write_text(own_hosts)
        binds = [(home / f"private-{index}", path) for index, path in enumerate(self.private)]
        for source, _ in binds:
            source.mkdir()
        init = [
            f"hostname {name}",
            *(f"mount --bind {shlex.quote(str(source))} {shlex.quote(str(path))}" for source, path in binds),
            f"mount --bind {home}/etc-hosts /etc/hosts",
            f"test -e {SSH_CONFIG} && mount --bind {self.folder}/ssh_config {SSH_CONFIG}",
            "mount -t tmpfs tmpfs /dev/shm",
            "ip link set lo up",
            f"test -x {SSHD} && mkdir -p /run/sshd && {SSHD} -f {home}/sshd_config",
            "exec sleep infinity",
        ]
        script = home / "init"
        script.write_text("\n".join(init) + "\n")
        namespaces = ["-n", "-p", "-m", "-u", "--fork", "--kill-child", "--mount-proc"]
        unshare = self._start(["unshare", *namespaces, "sh", str(script)])
        children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")
        deadline = time.monotonic() + 10
        while not children.read_text().split():
            assert time.monotonic() < deadline, f"{name} does not start"
            time.sleep(0.05)
        self.pids[name] = int(children.read_text().split()[0])
        self._in_switch(
            f"ip link add c{number} type veth peer name p{number} && ip link set c{number} master br0 up && "
            f"ip link set p{number} netns {self.pids[name]} name eth0"
        )
        address = f"ip addr add 10.77.0.{number}/24 dev eth0 && ip link set eth0 up"
        run_tool("nsenter", "-t", str(self.pids[name]), "-n", "sh", "-c", address)

    def _write_ssh_files(self, home: Path) -> None:
        """A key that opens every host, what ssh needs to use it, and sshd's configuration with its own host key."""
        home.mkdir()
        key = self.folder / "key"
        if shutil.which("ssh-keygen") is None:
            return
        for path in (key, home / "host_key"):
            if not path.exists():
                run_tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path))
        (self.folder / "ssh_config").write_text(
            f"Host *\n StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n LogLevel ERROR\n IdentityFile {key}\n"
        )
        (home / "sshd_config").write_text(
            f"HostKey {home}/host_key\nPidFile none\nPermitRootLogin yes\nStrictModes no\nUsePAM no\n"
            f"AuthorizedKeysFile {key}.pub\n"
        )

    def start(self, name: str, argv: list[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """A command on a host, its output in `log`."""
        variables = [f"{key}={value}" for key, value in env.items()]
        enter = ["nsenter", "-t", str(self.pids[name]), "-n", "-p", "-m", "-u", "env", *variables, *argv]
        with open(log, "wb") as file:
            process = subprocess.Popen(enter, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        self.processes.append(process)
        return process

    def train(
        self, flags: list[str], logs: Path, *, env: Mapping[str, str] | None = None
    ) -> list[subprocess.Popen[bytes]]:
        """One rank on each host, as a scheduler that sets RANK and WORLD_SIZE starts them; logs in logs/h1, ..."""
        logs.mkdir(exist_ok=True)
        shared = {
            "WORLD_SIZE": str(len(self.pids)),
            "MASTER_ADDR": "h1",
            "MASTER_PORT": "29500",
            **ENVIRON,
            **(env or {}),
        }
        argv = [sys.executable, TRAIN_SCRIPT, *flags]
        return [
            self.start(name, argv, logs / name, {**shared, "RANK": str(rank)}) for rank, name in enumerate(self.pids)
        ]

    def cut_cable(self, name: str) -> None:
        """Packets from and to the host vanish, and nobody is told."""
        self._in_switch(f"ip link set c{name[1:]} down")

    def close(self) -> None:
        """End what was started here, and nothing else."""
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait(10)


ENVIRON = {
    "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu",
    "GOMP_SPINCOUNT": "0",
}  # fmt: skip


@contextlib.contextmanager
def started_hosts(folder: Path, count: int = 2, **options: object) -> Iterator[Hosts]:
    """Hosts until the end of the block."""
    skip_without_namespaces()
    folder.mkdir(exist_ok=True)
    hosts = Hosts(folder, count, **options)  # type: ignore[arg-type]
    try:
        yield hosts
    finally:
        hosts.close()
