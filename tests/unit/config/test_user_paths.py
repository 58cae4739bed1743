"""The one door for a user's paths and files: `~` means the same everywhere, and nothing but a plain file is read."""

import contextlib
import os
import re
import runpy
import socket
from pathlib import Path

import pytest

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.config.files import open_plain_file, path_from_environment
from trainer.config.settings import GROUPS, OutputSettings
from trainer.data.dataset import resolve_cache_dir
from trainer.distributed.deepspeed_config import read_deepspeed_file
from trainer.distributed.process_group import simulated_context
from trainer.tracking.wandb_logger import wandb_block
from trainer.training.run_plan import validate_early

ROOT = Path(__file__).parents[3]
TRAIN_FLAGS = "--model --data --val-data --test-data --retain-data --chat-template --ds-config --output-dir"
NOBODY = "~no-such-user/x"


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("flag", TRAIN_FLAGS.split())
@pytest.mark.parametrize("from_file", [False, True])
def test_a_home_folder_is_put_for_a_tilde_in_each_path_of_a_run(flag, from_file, home):
    def parse(value):
        (home / "a.yaml").write_text(f"{flag.removeprefix('--')}: {value}\n")
        given = ["--config", "~/a.yaml"] if from_file else [flag, value]
        settings = cli.parse_args(["--mode", "full", *given]).settings
        values = [value for group in GROUPS for value in settings.overrides[group].values()]
        return [item for value in values for item in (value if isinstance(value, tuple) else [value])]

    assert parse("~/x") == [f"{home}/x"]
    assert parse("a/~b") == ["a/~b"]
    with pytest.raises(UserError, match=rf"^{flag} ~no-such-user/x: expected .*~ or ~user for a home folder"):
        parse(NOBODY)


@pytest.mark.parametrize(
    ("program", "argv"),
    [
        ("train", "--mode full --config"),
        ("cluster", "--hosts a:1 --mode full --folder"),
        ("compare", ""),
        ("compare", "--output-dir"),
        ("doctor", "--check-run"),
        ("export", "RUN --answer"),
        ("study", "--join"),
    ],
)
def test_a_tilde_of_nobody_is_one_line_in_every_program(program, argv, capsys):
    main = runpy.run_path(str(ROOT / "launch" / f"{program}.py"))["main"]
    assert main([*argv.split(), NOBODY]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {argv.split()[-1] if argv else ''}")
    assert "~no-such-user/x: there is no home folder of ~no-such-user" in line


@pytest.mark.parametrize("flag", ["--data", "--val-data", "--test-data", "--retain-data"])
def test_a_missing_file_is_said_before_a_model_that_only_the_hub_has_and_a_folder_that_is_gone(flag, home, monkeypatch):
    settings = cli.parse_args(argv := ["--mode", "lora", "--model", "no/model", flag, "no.csv"]).settings
    with pytest.raises(UserError, match=f"^{flag} no.csv: no such file or folder; expected a CSV"):
        validate_early(settings, simulated_context(1))
    monkeypatch.chdir(home)
    home.rmdir()
    with pytest.raises(UserError, match=r"^the folder that this shell is in has been removed; change to another one$"):
        cli.parse_args(argv)


@pytest.mark.parametrize("place", ["/dev/null", "FILE/below", "CLOSED/below"])
@pytest.mark.parametrize(
    ("program", "argv"),
    [
        ("train", "--mode full --dry-run --output-dir"),
        ("compare", "RUN --output-dir"),
        ("judge", "A B --base C --data D --output-dir"),
        ("study", "--dry-run --output-dir"),
    ],
)
def test_a_place_where_no_folder_can_be_is_refused_by_every_program(program, argv, place, capsys, monkeypatch, home):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "CLOSED")  # root may write anywhere
    monkeypatch.setattr("trainer.distributed.watch.SignalHandler.__init__", lambda *_, **__: None)
    monkeypatch.setattr("trainer.distributed.watch.SignalHandler.defer_signals", contextlib.nullcontext)
    (home / "FILE").touch()
    (home / "CLOSED").mkdir()
    argv = [*argv.split(), str(home / place)]
    main = runpy.run_path(str(ROOT / "launch" / f"{program}.py"))["main"]
    assert main(argv) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    problem = "is read-only for this user" if "CLOSED" in place else "is not a folder"
    assert re.match(rf"error: {argv[-2]}:? {re.escape(argv[-1])}: .*{problem}", line)


@pytest.mark.parametrize("name", ["TRAINER_CACHE", "XDG_CACHE_HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_DIR"])
def test_a_home_folder_is_put_for_a_tilde_in_a_variable_and_one_of_nobody_is_one_line(name, monkeypatch, home):
    for variable in ("TRAINER_CACHE", "WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    read = resolve_cache_dir if "CACHE" in name else lambda: wandb_block(OutputSettings(), "data.csv")
    monkeypatch.setenv(name, NOBODY)
    with pytest.raises(UserError, match=f"^{name}=~no-such-user/x: there is no home folder of ~no-such-user; "):
        read()
    monkeypatch.setenv(name, "~/x")
    assert path_from_environment(name, "") == home / "x"
    assert "CACHE" not in name or (home / "x") in (read(), read().parent)


def test_every_other_file_leaves_the_tilde_to_the_door():
    paths = [path for folder in ("trainer", "launch") for path in (ROOT / folder).rglob("*.py")]
    users = [path.name for path in paths if re.search(r"expanduser|Path\.home\(", path.read_text())]
    assert users == ["files.py"]


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # a name of at most 108 bytes


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, make_socket, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_plain_file_is_refused_at_once(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "x")
    with pytest.raises(OSError, match="not a plain file, but a folder, a pipe or a device"):
        open_plain_file(tmp_path / "x")
    with pytest.raises(UserError, match=r"^--ds-config x: cannot be read \(not a plain file, but a folder, a pipe"):
        read_deepspeed_file("x")
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    with open_plain_file(tmp_path / "link") as file:
        assert file.read() == b"content"
