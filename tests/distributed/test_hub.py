"""The hub's variables, obeyed by a whole run: where the model comes from, with which token, and where it is kept."""

import json
import os
import re
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
RUN_TWICE_CODE = """
import json, sys, train
for sys.argv[1:] in json.loads(sys.argv[1]):
    code = train.main()
    print("exit code", code, flush=True)
"""


def train_in_fresh_process(*argvs: list[str], **variables: str) -> list[str]:
    """Output with each argv, in one fresh process: the hub's library reads its variables when it is imported."""
    environ = {name: value for name, value in {**os.environ, **make_environ(0, 1, 0)}.items() if name not in CHANGED}
    paths = os.pathsep.join(str(path) for path in (Path(TRAIN_SCRIPT).parent, Path(TRAIN_SCRIPT).parents[1]))
    environ |= {"NO_PROXY": "127.0.0.1", "PYTHONPATH": paths, **variables}
    line = [sys.executable, "-c", RUN_TWICE_CODE, json.dumps(argvs)]
    done = subprocess.run(line, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200)
    return re.split(r"(?<=exit code \d\n)", done.stdout)


@pytest.mark.slow
def test_a_model_of_the_hub_comes_as_the_variables_say_and_is_named_with_its_commit(tiny_model, data_files, tmp_path):
    argv = tiny_argv("me/tiny", data_files, "--mode lora --block-size 16 --max-steps 2 --eval-every never")
    absent = ["--mode", "lora", "--model", "me/none", "--output-dir", str(tmp_path / "none")]
    with fake_hub() as hub:
        hub.files["me/tiny"] = {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()}
        outputs = train_in_fresh_process(
            absent, [*argv, "--output-dir", str(tmp_path / "run")],
            HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HOME=str(tmp_path / "home"),
        )  # fmt: skip
        assert f"Bearer {TOKEN}" in hub.tokens
    assert outputs[0].endswith("exit code 2\n"), outputs
    (line,) = (line for line in outputs[0].splitlines() if line.startswith("error: "))
    assert "--model me/none: no such folder, and its config.json cannot be had from the hub" in line
    assert not (tmp_path / "none").exists()
    assert outputs[1].endswith("exit code 0\n"), outputs
    assert TOKEN not in "".join(outputs)
    adapter = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("me/tiny", COMMIT)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("me/tiny"), ADAPTER)' in card
    assert str(tmp_path) not in card
    assert list((tmp_path / "home" / "hub").glob("models--me--tiny/snapshots/*/config.json"))


def test_a_model_that_is_not_here_is_one_line_offline(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    with pytest.raises(UserError, match="the hub cannot be reached"):
        load_tokenizer("me/none")
