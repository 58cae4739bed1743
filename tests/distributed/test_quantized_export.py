"""A run on a base in 4 bits: what its folder and its card say of it, and its adapters on the float32 base."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.launch_ranks import train
from helpers.process_groups import read_events
from helpers.tiny_inputs import tiny_argv
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def quantized_run(tiny_model: str, data_files: tuple[str, str], session_dir: Path) -> Path:
    """A LoRA run whose moments are in 8 bits."""
    text = "--mode lora --block-size 16 --lr 3e-3 --global-batch 6 --eval-batch 4 --max-steps 4"
    argv = tiny_argv(tiny_model, data_files, f"{text} --quant nf4 --quant-double --optim adamw8bit")
    train(argv, out=session_dir / "packed")
    return session_dir / "packed"


def read_facts(run: Path) -> dict[str, Any]:
    return read_events(run, "finished")[0]["facts"]


def logits_difference(output: str) -> float:
    """The largest that a line tells."""
    match = re.search(r"logits differ by at most (\S+?)[,;]", output)
    assert match is not None, output
    return float(match[1])


def test_an_export_on_a_quantized_base_says_so_everywhere(quantized_run: Path):
    facts = read_facts(quantized_run)
    run = json.loads((quantized_run / "run.json").read_text())
    assert facts["export"].startswith("reloaded and checked: ")
    assert logits_difference(facts["export"]) <= 1e-5
    trainable = run["model"]["trainable"]
    assert facts["optimizer_bytes"] == 8 * trainable, "every tensor of this model is under 4,096 elements"
    assert run["model"]["kept_in_32_bits"]["kept_parameters"] == trainable
    plan = (quantized_run.parent / "packed.log").read_text()
    assert "base in nf4, scales in 8 bits: " in plan
    assert "adamw8bit: 16 of 16 trained tensors (100% of the parameters)" in plan
    assert run["resolved"]["ds_reason"] == "--optim adamw8bit is not sharded"
    card = (quantized_run / "model" / "README.md").read_text()
    assert "It was trained on the base in nf4, its scales in 8 bits" in card
    assert run["model"]["fingerprint"] in card
    assert "| base | nf4, double |" in card
    quantization = json.loads((quantized_run / "model" / "base_quantization.json").read_text())
    assert quantization["fingerprint"] == run["model"]["fingerprint"]
    contents = [path.read_bytes() for path in (quantized_run / "model").iterdir()]
    assert not any(str(quantized_run.parent).encode() in content for content in contents)


def test_a_checkpoint_on_a_quantized_base_is_exported_and_merged_onto_the_float32_base(
    quantized_run: Path, run_export_script: Any
):
    code, output = run_export_script(quantized_run)
    assert code == 0, output
    assert logits_difference(output) <= 1e-5
    code, output = run_export_script(quantized_run, "--merge")
    assert code == 0, output
    recorded = read_facts(quantized_run)["final"]["loss"]
    pattern = r"merged onto the float32 base instead of the quantised one: validation loss ([\d.]+), before ([\d.]+)"
    merged = re.search(pattern, output)
    assert merged is not None, output
    assert float(merged[2]) == pytest.approx(recorded, abs=1e-6)
    assert abs(float(merged[1]) - recorded) > 1e-5, "4 bits are not float32"
    folder = quantized_run / "merged-step-000004"
    assert merged[0] in (folder / "README.md").read_text()
    assert type(AutoModelForCausalLM.from_pretrained(folder)).__name__ == "GPT2LMHeadModel"
