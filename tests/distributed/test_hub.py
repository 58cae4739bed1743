"""The hub's variables, obeyed by a whole run: where the model comes from, with which token, and where it is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fake_hub import COMMIT, TOKEN, fake_hub
from helpers.launch_ranks import TRAIN_SCRIPT, make_environ
from helpers.tiny_inputs import tiny_argv

from trainer.config.errors import UserError
from trainer.data.tokenizer import load_tokenizer

CHANGED = ("HF_HUB_OFFLINE", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_train(argv: list[str], **variables: str) -> tuple[int, str]:
    """launch/train.py in a fresh process, since the hub's library reads its variables when it is imported."""
    environ = {name: value for name, value in {**os.environ, **make_environ(0, 1, 0)}.items() if name not in CHANGED}
    environ |= {"NO_PROXY": "127.0.0.1", "PYTHONPATH": str(Path(TRAIN_SCRIPT).parents[1]), **variables}
    line = [sys.executable, TRAIN_SCRIPT, *argv]
    done = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_model_of_the_hub_comes_as_the_variables_say_and_is_named_with_its_commit(tiny_model, data_files, tmp_path):
    argv = tiny_argv("me/tiny", data_files, "--mode lora --block-size 16 --max-steps 2 --eval-every never")
    with fake_hub() as hub:
        hub.files["me/tiny"] = {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()}
        code, output = run_train(
            [*argv, "--output-dir", str(tmp_path / "run")],
            HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HOME=str(tmp_path / "home"),
        )  # fmt: skip
        assert code == 0, output
        assert f"Bearer {TOKEN}" in hub.tokens
    assert TOKEN not in output
    adapter = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("me/tiny", COMMIT)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("me/tiny"), ADAPTER)' in card
    assert str(tmp_path) not in card
    assert list((tmp_path / "home" / "hub").glob("models--me--tiny/snapshots/*/config.json"))


@pytest.mark.slow
def test_a_model_that_the_hub_does_not_have_is_one_line(data_files, tmp_path):
    argv = tiny_argv("me/none", data_files, "--mode lora", "--output-dir", str(tmp_path / "run"))
    with fake_hub() as hub:
        code, output = run_train(argv, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
    assert code == 2, output
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert "--model me/none: no such folder, and its config.json cannot be had from the hub" in line
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_here_is_one_line_offline(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    with pytest.raises(UserError, match="the hub cannot be reached"):
        load_tokenizer("me/none")
