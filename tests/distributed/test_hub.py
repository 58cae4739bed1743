"""The hub's variables, obeyed by a whole run: where the model comes from, with which token, and where it is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.fake_hub import COMMIT, TOKEN, fake_hub
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).parents[1]
#: In a fresh process, as the hub's library reads its variables when it is imported; a line of input is for each start.
STARTS_CODE = """
import json, sys
from pathlib import Path
from helpers.launch_ranks import train
for world_size, flags in json.loads(sys.argv[1]):
    input()
    train(flags, out=Path(sys.argv[2]), world_size=world_size)
    print("done", flush=True)
"""


def test_model_and_data_of_the_hub_come_once_to_a_host_as_the_variables_say_and_stay_for_a_start_without_it(
    tiny_model, tmp_path
):
    text = "--mode lora --block-size 16 --max-steps 2 --eval-every never --global-batch 6 --micro-batch 1 --seed 7"
    argv = [*text.split(), "--model", "me/adapter", "--data", "me/set:one", "--val-data", "me/set:two"]
    config = LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    base = {"base_model_name_or_path": "me/tiny", "revision": COMMIT}
    path.write_text(json.dumps(json.loads(path.read_text()) | base))
    names = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "TRAINER_CACHE")
    places = {name: str(tmp_path / name) for name in names}
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("one", "two"))
    with fake_hub() as hub:
        for name, folder in (("me/tiny", Path(tiny_model)), ("me/adapter", tmp_path / "adapter")):
            hub.files[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
        hub.files["me/tiny"]["consolidated.safetensors"] = b"the weights once more, as Mistral's repositories have"
        data = hub.files["datasets/me/set"] = {"README.md": f"---\nconfigs:\n{configs}---\n".encode()}
        for name in ("one", "two"):
            rows = (json.dumps({"text": f"{name} and {n}, {n} or {name}"}) + "\n" for n in range(20))
            data[f"{name}/train.jsonl"] = "".join(rows).encode()
        environ = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "NO_PROXY": "127.0.0.1", **places}
        environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
        environ.pop("HF_HUB_OFFLINE", None)
        starts = json.dumps([(2, argv), (1, [*argv, "--dry-run"])])
        command = [sys.executable, "-c", STARTS_CODE, starts, str(tmp_path / "run")]
        process = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        process.stdin.write("\n")
        process.stdin.flush()
        assert "done\n" in iter(process.stdout.readline, "")
        assert f"Bearer {TOKEN}" in hub.tokens
    output = (tmp_path / "run.log").read_text()
    assert "fetching me/tiny from the hub" in output
    assert TOKEN not in output
    weights = [request for request in hub.requests if request.startswith("GET") and "safetensors" in request]
    assert len(weights) == 2, "of the adapter and of its base, by one rank"
    assert base.items() <= json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text()).items()
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("me/tiny", generation_config=' in card
    assert str(tmp_path) not in card
    assert list((tmp_path / "HF_HUB_CACHE").glob("models--me--tiny/snapshots/*/config.json"))
    assert list((tmp_path / "HF_HUB_CACHE").glob("datasets--me--set/snapshots/*/one/train.jsonl"))
    assert {path.parts[-4] for path in (tmp_path / "HF_DATASETS_CACHE").rglob("*.arrow")} == {"one", "two"}
    with process:
        process.communicate("\n", timeout=120)
    assert process.returncode == 0
    assert "data           me/set:one: " in (tmp_path / "run.log").read_text().removeprefix(output)
