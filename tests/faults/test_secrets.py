"""No key, token or login of the environment is in a process list, a file, a log, a report, a card or at W&B."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.fake_hub import fake_hub
from helpers.fake_wandb import API_KEY, FakeWandb, child_env
from helpers.launch_ranks import find_free_port
from helpers.process_groups import read_events
from helpers.tiny_inputs import tiny_argv

pytestmark = [pytest.mark.sweep, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]
SECRETS = {
    "HF_TOKEN": "hf_" + "Zq7" * 11,
    "GITHUB_TOKEN": "ghp_" + "Qy4" * 12,
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI-not-a-real-one",
    "https_proxy": "http://proxyuser:proxy-pass-word@127.0.0.1:9",
}
LOGINS = ("hubuser", "hub-pass-word", "wanduser", "wand-pass-word", "proxy-pass-word")


def command_lines() -> set[bytes]:
    lines = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.add(path.read_bytes())
        except OSError:  # it has ended
            continue
    return lines


def run(argv: list[str], environ: dict[str, str], folder: Path) -> tuple[int, str, set[bytes]]:
    """(exit code, output, command lines of every process of the machine meanwhile)."""
    log, lines = folder / "log.txt", set()
    with open(log, "a") as stream:
        process = subprocess.Popen(
            argv, cwd=folder, env=environ, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL
        )
        while process.poll() is None:
            lines |= command_lines()
            time.sleep(0.02)
    return process.returncode, log.read_text(), lines


def test_secrets_of_the_environment_appear_nowhere_on_two_ranks(tiny_model, data_files, tmp_path):
    argv = tiny_argv(
        tiny_model, data_files, "--mode lora --block-size 16 --max-steps 4 --global-batch 6 --wandb online"
    )
    argv[argv.index("--model") + 1] = "me/tiny"
    bin_dir, out = Path(sys.executable).parent, tmp_path / "run"
    with fake_hub() as hub, FakeWandb() as server:
        hub.files["me/tiny"] = {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()}
        environ = child_env(
            **{
                **server.env(tmp_path / "home"),
                **SECRETS,
                "HOME": str(tmp_path / "home"),
                "no_proxy": "127.0.0.1",
                "HF_ENDPOINT": hub.url.replace("//", "//hubuser:hub-pass-word@"),
                "HF_HUB_OFFLINE": "0",
                "HF_HOME": str(tmp_path / "home" / "hf"),
                "TRAINER_CACHE": str(tmp_path / "cache"),
                "WANDB_BASE_URL": server.url.replace("//", "//wanduser:wand-pass-word@"),
                "PATH": f"{bin_dir}:/usr/bin:/bin",
            }
        )
        (tmp_path / "home").mkdir()
        launcher = [str(bin_dir / "deepspeed"), "--num_gpus", "2", "--master_port", str(find_free_port())]
        train = [*launcher, str(ROOT / "launch" / "train.py"), *argv, "--output-dir", str(out)]
        code, output, lines = run(train, environ, tmp_path)
        assert code == 0, output
        for script, *flags in (
            ["compare.py", str(out), "--output-dir", str(tmp_path / "compared")],
            ["doctor.py", "--check-run", str(out)],
        ):
            code, output, more = run([sys.executable, str(ROOT / "launch" / script), *flags], environ, tmp_path)
            lines |= more
        sent = repr(server.runs).encode()
    assert read_events(out, "finished")
    assert any(b"local_rank" in line for line in lines), "the ranks were not looked at"
    contents = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any(path.suffix == ".wandb" for path in contents)
    for secret in (*SECRETS.values(), *LOGINS, API_KEY):
        text = secret.encode()
        assert not [line for line in lines if text in line], f"{secret} in a process list"
        assert [path for path, content in contents.items() if text in content] == [], secret
        assert text not in sent, secret
        assert secret not in output
