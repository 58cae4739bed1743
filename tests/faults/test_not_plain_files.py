"""Something else in the place of a file of a run folder: no program waits for it, and each says what it is. The sweep
puts each kind in the place of every file; here one file of each kind."""

import contextlib
import ctypes
import os
import runpy
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.launch_ranks import run_on_ranks, run_train_script, train
from helpers.tiny_inputs import tiny_argv

ROOT = Path(__file__).parents[2]
FILES = (
    "run.json",
    "metrics.jsonl",
    "eval_records/step-000004-val.parquet",
    "checkpoints/step-000004/state.json",
    "checkpoints/step-000004/state.safetensors",
    "model/adapter_model.safetensors",
)
KINDS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "unreadable": lambda path: path.touch(0),
}
SECONDS = 60  # of each program; it takes three
SAMPLE = tuple(zip(FILES[1:5], KINDS, strict=True))


@pytest.fixture(scope="module")
def finished(tiny_model, data_files, tmp_path_factory) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("plain") / "run"
    argv = tiny_argv(
        tiny_model, data_files, "--mode lora --block-size 16 --global-batch 4 --max-steps 4 --save-every 2"
    )
    train(argv, out=out)
    assert all((out / name).is_file() for name in FILES)
    return out, argv


def obey_file_modes() -> None:
    """Root may read whatever the mode of a file says; from now on this process may not."""
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, data) == 0
    data[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, in the effective set
    assert libc.capset(header, data) == 0


def run_programs(run: str, argv: list[str], kind: str) -> int:
    """Every program that reads a run folder; a line `PROGRAM CODE` after the output of each."""
    os.chdir(Path(run).parent)
    os.environ["WANDB_MODE"] = "disabled"
    programs = {
        "doctor": ["--check-run", run],
        "compare": [run, "--output-dir", "compared"],
        "generate": [run, "--prompt", "w1 w2", "--max-new-tokens", "2"],
        "export": [run, "--output-dir", "exported"],
        "train": [*argv, "--output-dir", run, "--resume"],
    }
    for name, flags in programs.items():
        main = runpy.run_path(str(ROOT / "launch" / f"{name}.py"))["main"] if name != "train" else run_train_script
        if kind == "unreadable":
            obey_file_modes()
        signal.alarm(SECONDS)
        code: object = 1
        with contextlib.suppress(SystemExit):
            code = main(flags)
        print(f"\nexit code of {name}: {code}", flush=True)
    return 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if (name, kind) in SAMPLE else pytest.mark.sweep)
        for name in FILES
        for kind in KINDS
    ],
)
def test_no_program_waits_for_what_is_no_plain_file_or_may_not_be_read(name, kind, finished, tmp_path):
    source, argv = finished
    run = tmp_path / "run"
    shutil.copytree(source, run)
    (run / name).unlink()
    KINDS[kind](run / name)
    run_on_ranks(1, run_programs, str(run), argv, kind, log=tmp_path / "log")
    output = (tmp_path / "log").read_text()
    assert "Traceback" not in output
    parts, rest = {}, output
    for program in ("doctor", "compare", "generate", "export", "train"):
        parts[program], found, rest = rest.partition(f"\nexit code of {program}: ")
        assert found, f"{program} did not end:\n{output}"
        code, _, rest = rest.partition("\n")
        assert code in "012", f"{program}: {code}"
        assert code == "0" or parts[program].count("error") >= 1, f"{program}:\n{parts[program]}"
    problem = "permission denied: let this user read it" if kind == "unreadable" else "not a plain file"
    if not name.endswith("state.json"):  # whose folder is then no checkpoint
        assert problem in parts["doctor"], parts["doctor"]
    assert str(name.split("/")[-1]) in parts["doctor"] or "step-000004" in parts["doctor"]
