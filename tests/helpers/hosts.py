"""Hosts for tests of runs on several: network namespaces on a bridge, each with its own name, processes and files.
Nothing of the real network is touched, and no address outside is reached. Where the kernel allows no namespaces, or
`ip` is missing, the tests are skipped with the reason."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.launch_ranks import _run_worker, make_process, run_train_script, session_environ
from helpers.process_groups import Ranks, wait_until

ROOT = Path(__file__).parents[2]
SSHD, SSH_CONFIG = "/usr/sbin/sshd", "/etc/ssh/ssh_config"


def run_tool(*argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=check)


def skip_without_namespaces() -> None:
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs `ip` and `unshare`")
    probe = run_tool("unshare", "-nmup", "--fork", "ip", "link", "add", "br0", "type", "bridge", check=False)
    if probe.returncode:
        pytest.skip(f"no namespaces here: {probe.stderr.strip()}")


class Hosts:
    """h1, h2, ... at 10.77.0.1, 10.77.0.2, ...; `private`: a path under which each has a folder of its own."""

    def __init__(self, folder: Path, count: int, *, private: Path, etc_hosts: str):
        self.folder, self.private = folder, private
        self.processes: list[subprocess.Popen[bytes]] = []
        self.runs: list[RanksOnHosts] = []
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
        own_line = etc_hosts.format(name=name)  # the first line of a name counts
        (home / "etc-hosts").write_text(own_line + (self.folder / "etc-hosts").read_text())
        self.own_folder(name).mkdir()
        init = [
            f"hostname {name}",
            f"mount --bind {self.own_folder(name)} {self.private}",
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
        wait_until(children.read_text, 10)
        self.pids[name] = int(children.read_text().split()[0])
        self._in_switch(
            f"ip link add c{number} type veth peer name p{number} && ip link set c{number} master br0 up && "
            f"ip link set p{number} netns {self.pids[name]} name eth0"
        )
        address = f"ip addr add 10.77.0.{number}/24 dev eth0 && ip link set eth0 up"
        run_tool("nsenter", "-t", str(self.pids[name]), "-n", "sh", "-c", address)

    def _write_ssh_files(self, home: Path) -> None:
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

    def own_folder(self, name: str) -> Path:
        return self.folder / name / "private"

    def start(self, name: str, argv: list[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        variables = [f"{key}={value}" for key, value in env.items()]
        enter = ["nsenter", "-t", str(self.pids[name]), "-n", "-p", "-m", "-u", "env", *variables, *argv]
        with open(log, "wb") as file:
            process = subprocess.Popen(enter, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        self.processes.append(process)
        return process

    def train(
        self,
        flags: list[str],
        logs: Path,
        *,
        ranks: Sequence[str] = ("h1", "h2"),
        with_srun: bool = False,
    ) -> "RanksOnHosts":
        logs.mkdir(exist_ok=True)
        size, rank_name = str(len(ranks)), "SLURM_PROCID" if with_srun else "RANK"
        launch = (
            {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": size, "SLURM_STEP_NODELIST": "h[1-3]", "SLURM_NTASKS": size}
            if with_srun
            else {"WORLD_SIZE": size, "MASTER_ADDR": ranks[0], "MASTER_PORT": "29500"}
        )
        shared = {**launch, **ENVIRON, **session_environ()}
        logs_of_ranks = [logs / f"rank-{rank}" for rank in range(len(ranks))]
        processes = [
            make_process(target=_enter_host, args=(self.pids[name], {**shared, rank_name: str(rank)}, str(log), flags))
            for rank, (name, log) in enumerate(zip(ranks, logs_of_ranks, strict=True))
        ]
        self.runs.append(RanksOnHosts(processes, logs_of_ranks))
        return self.runs[-1]

    def running(self) -> list[str]:
        """Command lines of all that runs on the hosts beside what makes them (their first processes, sshd)."""
        namespaces, lines = {os.readlink(f"/proc/{pid}/ns/pid") for pid in self.pids.values()}, []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                if os.readlink(folder / "ns/pid") in namespaces:
                    lines.append((folder / "cmdline").read_text(errors="replace").replace("\0", " "))
        # Without a command line: one that has ended, for which nobody here waits.
        return [line for line in lines if line and not line.startswith(("sleep", "sshd: "))]

    def plug_in(self, name: str) -> None:
        self._in_switch(f"ip link set c{name[1:]} up")

    def cut_cable(self, name: str) -> None:
        """Packets from and to the host vanish, and nobody is told."""
        self._in_switch(f"ip link set c{name[1:]} down")

    def close(self) -> None:
        """End what was started here, and nothing else."""
        for rank in (process for run in self.runs for process in run.processes):
            rank.kill()
            rank.join(10)
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait(10)


class RanksOnHosts(Ranks):
    """The ranks of one run on several hosts."""

    def wait(self, timeout_seconds: float = 240) -> list[int]:
        """Exit codes; those of a signal are 128 + its number."""
        return super().wait(timeout_seconds)

    def pid(self, rank: int) -> int:
        parent = super().pid(rank)
        return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])


def _join_namespaces(host_pid: int) -> Any:
    """Belong to the host, as for its processes the children only; libc."""
    libc = ctypes.CDLL(None, use_errno=True)
    namespaces = [os.open(f"/proc/{host_pid}/ns/{name}", os.O_RDONLY) for name in ("net", "uts", "pid", "mnt")]
    for namespace in namespaces:
        if libc.setns(namespace, 0):
            raise OSError(ctypes.get_errno(), "setns")
    os.chdir(ROOT)
    return libc


def _enter_host(host_pid: int, environ: Mapping[str, str], log: str, flags: list[str]) -> None:
    """Run launch/train.py on the host, in a child."""
    libc = _join_namespaces(host_pid)
    child = os.fork()
    if child == 0:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: whoever ends the parent means the rank
        _run_worker(environ, log, run_train_script, (flags,))
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256)


ENVIRON = {
    "OMP_NUM_THREADS": "1",
    "WANDB_MODE": "disabled",
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
    "GOMP_SPINCOUNT": "0",
}


@contextlib.contextmanager
def started_hosts(folder: Path, count: int, *, private: Path, etc_hosts: str) -> Iterator[Hosts]:
    skip_without_namespaces()
    hosts = Hosts(folder, count, private=private, etc_hosts=etc_hosts)
    try:
        yield hosts
    finally:
        hosts.close()
