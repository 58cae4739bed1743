"""The hub's variables, obeyed by a whole run: where the model comes from, with which token, and where it is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.fake_hub import COMMIT, TOKEN, fake_hub
from helpers.launch_ranks import TRAIN_SCRIPT, make_environ
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trainer.distributed.machine import find_free_port

CHANGED = ("HF_HUB_OFFLINE", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RUN_CODE = """
import train
from trainer.export import export_cli, fresh_process
fresh_process.export_in_fresh_process = lambda request, _: export_cli.export_checkpoint(**request)
print("exit code", train.main())
"""


def train_in_fresh_process(argv: list[str], num_ranks: int = 1, **variables: str) -> str:
    """Rank 0's output, in fresh processes: the hub's library reads its variables when it is imported."""
    port, processes = find_free_port(), []
    for rank in range(num_ranks):
        places = make_environ(rank, num_ranks, port)
        environ = {k: v for k, v in {**os.environ, **places}.items() if k not in CHANGED}
        environ |= {name: places[name] for name in CHANGED if num_ranks > 1 and name != "HF_HUB_OFFLINE"}
        paths = os.pathsep.join(str(path) for path in (Path(TRAIN_SCRIPT).parent, Path(TRAIN_SCRIPT).parents[1]))
        environ |= {"NO_PROXY": "127.0.0.1", "PYTHONPATH": paths, **variables}
        command = [sys.executable, "-c", RUN_CODE, *argv]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=environ, **options))
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    return outputs[0]


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
        argv += ["--output-dir", str(tmp_path / "run")]
        output = train_in_fresh_process(argv, num_ranks=2, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, **places)
        assert f"Bearer {TOKEN}" in hub.tokens
    assert output.splitlines()[-1] == "exit code 0", output
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
    output = train_in_fresh_process([*argv, "--dry-run"], HF_HUB_OFFLINE="1", **places)
    assert output.splitlines()[-1] == "exit code 0", output
    assert "data           me/set:one: " in output
