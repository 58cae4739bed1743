"""An interpreter for tests that has its imports behind it: `[fast_python, "-m", "module", ...]` starts in milliseconds.

A server, forked from the one that ranks are forked from, forks a process for each call and gives it the caller's
arguments, environment, folder and streams. What such a process is to its starter (its parent, its signals beyond
SIGTERM and SIGINT, its first import) is not that of a fresh one: tests of that start `sys.executable`.
"""

import array
import contextlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.launch_ranks import make_process

CLIENT = """#!{python} -SE
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
call = {{"argv": sys.argv[1:], "environ": dict(os.environ), "folder": os.getcwd()}}
socket.send_fds(server, [json.dumps(call).encode() + b"\\n"], [0, 1, 2])
answers = server.makefile()
pid = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: os.kill(pid, number))
code = int(answers.readline() or 1)
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextlib.contextmanager
def serve_interpreter(folder: Path) -> Iterator[str]:
    """Path of an interpreter that works until the end of the block."""
    address = str(folder / "socket")
    program = folder / "python"
    program.write_text(CLIENT.format(python=sys.executable, address=address))
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        server: Any = make_process(target=_serve, args=(listener, os.getpid()))
        server.start()
    yield str(program)
    server.kill()
    server.join()


def _serve(listener: socket.socket, tests_pid: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the processes below are nobody's
    end_of_tests = os.pidfd_open(tests_pid)
    while end_of_tests not in select.select([listener, end_of_tests], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()  # as a login shell on another host does: nobody above it is taken for one who adopted it
            _answer(connection)
        connection.close()


def _answer(connection: socket.socket) -> None:
    """Run the call in a child, which is killed where its caller goes away, and send its exit code."""
    message, fds, _, _ = socket.recv_fds(connection, 2**20, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(2**20)
    pid = os.fork()
    if pid == 0:
        connection.close()
        _run(json.loads(message), fds)
    for fd in fds:
        os.close(fd)
    connection.sendall(b"%d\n" % pid)
    done = 0
    while not done:
        done, status = os.waitpid(pid, os.WNOHANG)
        if not done and select.select([connection], [], [], 0.02)[0]:
            os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _run(call: dict[str, Any], fds: "array.array[int] | list[int]") -> None:
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(call["environ"])
    sys.executable = call["environ"].get("TEST_PYTHON", sys.executable)  # for what it starts itself
    os.chdir(call["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.process._children.clear()  # type: ignore[attr-defined]
    streams = [os.fdopen(fd, mode, buffering=1, closefd=False) for fd, mode in enumerate("rww")]
    sys.stdin, sys.stdout, sys.stderr = streams
    code: Any = 0
    try:
        _interpret(call["argv"])
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code or 0)


def _interpret(argv: list[str]) -> None:
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    kind, *rest = argv[1:] if argv[0] == "-u" else argv
    if kind == "-c":
        code, *sys.argv[1:] = rest
        sys.argv[0] = "-c"
        sys.path.insert(0, "")
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        module, *sys.argv[1:] = rest
        sys.path.insert(0, os.getcwd())
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        sys.path.insert(0, str(Path(kind).resolve().parent))
        runpy.run_path(kind, run_name="__main__")
