"""What is exported is what was trained: from every ZeRO stage, reloaded by plain transformers or peft, and said so. A
whole run, its export loaded again in a fresh process; the same from the command line with `launch/export.py`; and what
happens where the folder is not the model that was trained."""

import json
import re
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.engines import joined_ranks, prepare_data
from helpers.fake_hub import TOKEN, fake_hub
from helpers.launch_ranks import FRESH_EXPORT, run_on_ranks, run_train_script, train
from helpers.matrix import make_job, run_job
from helpers.model_cards import run_card
from helpers.process_groups import read_events
from helpers.tiny_inputs import tiny_argv
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trainer.data.dataset import load
from trainer.distributed.state_dict import EngineState
from trainer.export import export_cli, verify
from trainer.export.verify import compute_logits, fixed_input_ids, verify_folder
from trainer.training.checkpoint import Checkpoint
from trainer.training.schedule import TrainState


def make_argv(model: str, data_files: tuple[str, str], mode: str, flags: str = "") -> list[str]:
    text = f"--mode {mode} --block-size 16 --lr 3e-3 --global-batch 6 --eval-batch 4"
    return tiny_argv(model, data_files, f"{text} {flags}")


@pytest.fixture(scope="module")
def full_run(tiny_model: str, data_files: tuple[str, str], session_dir: Path) -> Path:
    """A full run with checkpoints at 2, 4 and 6, of which only 6 was evaluated."""
    flags = "--max-steps 6 --eval-every 3 --save-every 2 --save-total-limit 9 --ds-config zero0"
    train(make_argv(tiny_model, data_files, "full", flags), out=session_dir / "full", env=FRESH_EXPORT)
    return session_dir / "full"


@pytest.fixture(scope="module")
def lora_run(tiny_model, data_files, strict_zero_files, session_dir: Path) -> Path:
    """A LoRA run on a random base on two ranks under ZeRO-3."""
    flags = f"--max-steps 4 --init random --ds-config {strict_zero_files['zero3']} --lora-rank 2"
    argv = make_argv(tiny_model, data_files, "lora", flags)
    train(argv, out=session_dir / "lora", world_size=2)
    return session_dir / "lora"


@pytest.fixture(scope="module")
def quantized_run(tiny_model: str, data_files: tuple[str, str], session_dir: Path) -> Path:
    """A LoRA run on a base in 4 bits, whose moments are in 8 bits."""
    flags = "--max-steps 4 --quant nf4 --quant-double --optim adamw8bit"
    train(make_argv(tiny_model, data_files, "lora", flags), out=session_dir / "packed")
    return session_dir / "packed"


def read_finished_event(run: Path) -> dict[str, Any]:
    return read_events(run, "finished")[-1]


def logits_difference(line: str) -> float:
    """The largest that a line tells: transformers' own activation rounds otherwise than ours."""
    match = re.search(r"logits differ by at most (\S+?)[,;]", line)
    assert match is not None, line
    return float(match[1])


def max_difference(model: Any, expected_model: Any) -> float:
    ids = np.arange(1, 33)[None]
    logits = (compute_logits(each, ids, torch.device("cpu")) for each in (model, expected_model))
    return float(np.abs(np.subtract(*logits)).max())


# --- whole runs ---


def test_a_full_run_leaves_a_plain_folder_that_answers_as_the_trained_model(full_run: Path):
    message = read_finished_event(full_run)["message"]
    assert "model reloaded and checked: logits differ by at most " in message
    assert logits_difference(message) <= 1e-5
    model = AutoModelForCausalLM.from_pretrained(full_run / "model")
    assert model.lm_head.weight is model.transformer.wte.weight
    stored = load_file(full_run / "model" / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    config = json.loads((full_run / "model" / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"], "llama.cpp's converter reads it"
    assert config.get("use_cache", True), "training without a cache must not slow the user's generation"


def test_a_lora_run_under_zero3_leaves_an_adapter_that_learnt_something(lora_run: Path):
    assert "model reloaded and checked" in read_finished_event(lora_run)["message"]
    stored = load_file(lora_run / "model" / "adapter_model.safetensors")
    assert len(stored) == 2 * 2 * 4  # A and B of two layers' c_attn, c_proj, c_fc, c_proj
    assert all(tensor.numel() and tensor.any() and tensor.dtype == torch.float32 for tensor in stored.values())
    model = run_card(lora_run / "model", lora_run / "base")["model"]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert max_difference(model, AutoModelForCausalLM.from_pretrained(lora_run / "base")) > 1e-3
    auto = AutoPeftModelForCausalLM.from_pretrained(lora_run / "model")
    assert max_difference(auto, model) == 0, "it names its base where it lies on this machine"
    assert "kept only in the folder `base` of the run" in (lora_run / "model" / "README.md").read_text()


def test_an_export_on_a_quantized_base_says_so_everywhere_and_is_merged_onto_the_float32_base(
    quantized_run, run_export_script
):
    facts, run = read_finished_event(quantized_run)["facts"], json.loads((quantized_run / "run.json").read_text())
    assert facts["export"].startswith("reloaded and checked: ")
    assert logits_difference(facts["export"]) <= 1e-5
    assert facts["optimizer_bytes"] == 8 * run["model"]["trainable"], "all tensors of this model are small"
    card = (quantized_run / "model" / "README.md").read_text()
    for text in ("on the base in nf4, its scales in 8 bits", run["model"]["fingerprint"], "| base | nf4, double"):
        assert text in card
    quantization = json.loads((quantized_run / "model" / "base_quantization.json").read_text())
    config = quantization.pop("quantization_config")
    assert quantization == {"base": run["model"]["name"], "fingerprint": run["model"]["fingerprint"]}
    assert (config["bnb_4bit_use_double_quant"], config["bnb_4bit_quant_type"]) == (True, "nf4")
    code, output = run_export_script(quantized_run, "--merge")
    assert code == 0, output
    pattern = r"merged onto the float32 base instead of the quantised one: validation loss ([\d.]+), before ([\d.]+)"
    merged = re.search(pattern, output)
    assert merged is not None, output
    assert float(merged[2]) == pytest.approx(facts["final"]["loss"], abs=1e-6)
    assert abs(float(merged[1]) - float(merged[2])) > 1e-5, "4 bits are not float32"
    assert merged[0] in (quantized_run / "merged-step-000004" / "README.md").read_text()


def test_no_exported_file_names_a_place_of_this_machine_and_the_card_has_the_hubs_metadata(
    full_run, lora_run, quantized_run, tiny_model, session_dir, tmp_path
):
    """But of adapters in the run's folder, which peft finds on their base as it is."""
    for run, library in ((full_run, "transformers"), (lora_run, "peft"), (quantized_run, "peft")):
        model, exported = run / "model", tmp_path / run.name
        assert not list(run.glob(".*.tmp")), "no temporary file stays beside them"
        assert len({path.stat().st_mode & 0o777 for path in model.iterdir()}) == 1
        names = {path.name for path in model.iterdir() if str(session_dir).encode() in path.read_bytes()}
        assert names <= {"adapter_config.json", "base_quantization.json"}
        assert export_cli.export_checkpoint(run, output_dir=exported)["problems"] == []
        assert not [path for path in exported.iterdir() if str(session_dir).encode() in path.read_bytes()]
        run_card(model, run / "base" if run is lora_run else tiny_model, generates=run is not quantized_run)
        generation = json.loads((model / "generation_config.json").read_text())
        assert (generation["eos_token_id"], generation["pad_token_id"]) == (0, 0)
        assert not (model / "chat_template.jinja").exists(), "trained on bare prompts"
        card = ModelCard.load(model / "README.md")
        assert (card.data.library_name, card.data.pipeline_tag) == (library, "text-generation")
        assert {result.metric_type for result in card.data.eval_results} == {"loss", "perplexity"}
        assert card.data.base_model is None, "a folder is no hub id, and random weights are nobody's"
        assert all(part in card.text for part in ("### Training hyperparameters", "### Training results"))
        assert "gpt2-acled-t2s" not in card.text, "nobody asked for that card"
    adapter = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (Path(tiny_model).name, None)


def run_job_counting_tensors(job: dict[str, Any]) -> int:
    """Of the tensors that are gathered one may be alive at a time: that and the next."""
    original, peak = EngineState.iter_state_dict, 0

    def track(self: Any) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal peak
        references = []
        for name, tensor in original(self):
            references.append(weakref.ref(tensor))
            yield name, tensor
            del tensor
            peak = max(peak, sum(reference() is not None for reference in references))

    EngineState.iter_state_dict = track  # type: ignore[method-assign]
    with joined_ranks() as dist_context:
        run_job(dist_context, job)
    assert 1 <= peak <= 2
    return 0


def test_zero_3_exports_what_was_evaluated_and_holds_one_gathered_tensor_at_a_time(
    tiny_model, data_files, strict_zero_files, tmp_path
):
    flags = f"--max-steps 2 --save-every never --ds-config {strict_zero_files['zero3']}"
    job, log = make_job(tmp_path, "job", make_argv(tiny_model, data_files, "full", flags)), tmp_path / "log"
    assert run_on_ranks(2, run_job_counting_tensors, job, log=log) == 0, log.read_text()
    result = export_cli.export_checkpoint(tmp_path / "job", data_folder=job["data"])
    assert result["problems"] == []
    assert "(recorded " in result["summary"], "the loss of the folder is held to the run's"


# --- launch/export.py ---


def test_an_export_is_held_to_the_recorded_loss_of_its_checkpoint_or_says_that_there_is_none(
    full_run, lora_run, run_export_script, tmp_path
):
    code, output = run_export_script(full_run, "--checkpoint", "best", "--output-dir", tmp_path / "best")
    assert code == 0, output
    loss = read_finished_event(full_run)["facts"]["best"]["loss"]
    assert f"validation loss {loss:.6f} (recorded {loss:.6f})" in output
    last, again = (load_file(folder / "model.safetensors") for folder in (full_run / "model", tmp_path / "best"))
    assert all(torch.equal(last[name], again[name]) for name in last), "step 6 is the run's last and best"
    (metric, *_) = ModelCard.load(tmp_path / "best" / "README.md").data.eval_results
    assert metric.metric_value == pytest.approx(loss)
    code, output = run_export_script(full_run, "--checkpoint", "step-4")
    assert code == 0, output
    assert f"-> {full_run / 'export-step-000004'}" in output
    assert "(none was recorded)" in output
    card = (full_run / "export-step-000004" / "README.md").read_text()
    assert "after step 4 of 6" in card
    assert "| 6 |" not in card, "the card ends at the checkpoint"
    run = shutil.copytree(lora_run, tmp_path / "moved")
    metadata = json.loads((run / "run.json").read_text())
    metadata["settings"]["data"]["data"] = str(tmp_path / "gone.jsonl")
    (run / "run.json").write_text(json.dumps(metadata))
    code, output = run_export_script(run)
    assert code == 0, output
    assert logits_difference(output) <= 1e-5
    card = (run / "export-step-000004" / "README.md").read_text()
    assert "validation loss not evaluated again (the data of the run are not there any more)" in card


@pytest.mark.parametrize(("run", "dtype", "name"), [("full_run", "fp16", "float16"), ("lora_run", "bf16", "bfloat16")])
def test_rounded_weights_are_stored_in_their_dtype_with_the_loss_after_rounding(
    run, dtype, name, run_export_script, request, tmp_path
):
    run = request.getfixturevalue(run)
    code, output = run_export_script(run, "--dtype", dtype, "--output-dir", tmp_path / "out")
    assert code == 0, output
    losses = re.search(rf"{name}; rounded to {dtype}: validation loss (\S+), before (\S+) \((\S+)\)", output)
    assert losses is not None, output
    assert float(losses[2]) == pytest.approx(read_finished_event(run)["facts"]["final"]["loss"], abs=1e-6)
    assert 0 < abs(float(losses[3])) < 0.05, "rounding moves the loss a little, not at all would be no rounding"
    assert losses[0].partition("; ")[2] in (tmp_path / "out" / "README.md").read_text()
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert {str(tensor.dtype) for tensor in load_file(file).values()} == {f"torch.{name}"}


def test_mistakes_in_the_export_command_are_one_line_and_exit_2(
    full_run, lora_run, tiny_model, run_export_script, tmp_path
):
    mine = tmp_path / "mine" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("do not touch")
    (full_run / "export-step-000002").mkdir()
    (full_run / "export-step-000002" / "notes.txt").write_text("mine")
    (full_run / "export-step-000002-bf16").symlink_to(mine.parent)
    base = shutil.copytree(lora_run, tmp_path / "rebased") / "base" / "model.safetensors"
    shutil.rmtree(shutil.copytree(lora_run, tmp_path / "baseless") / "base")
    stored = load_file(base)
    stored["transformer.wpe.weight"] += 1
    save_file(stored, base, metadata={"format": "pt"})
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-3}))
    metadata = (full_run / "run.json").read_text().replace(json.dumps(tiny_model), json.dumps(str(other)))
    changed = shutil.copytree(full_run, tmp_path / "changed", symlinks=True)
    (changed / "run.json").write_text(metadata)
    (tmp_path / "answer.json").write_text("{}")
    for arguments, expected in (
        ([changed], "the config.json of"),
        ([full_run, "--answer", tmp_path / "answer.json"], "answer.json: its sentence is None; expected answer.json"),
        ([tmp_path / "rebased"], "its adapters were trained on another base model"),
        ([tmp_path / "baseless"], "base: the random weights that its adapters stand on are gone; restore"),
        ([tmp_path / "none"], "no run.json there"),
        ([full_run, "--merge"], "--merge: "),
        ([full_run, "--private"], "--private: goes with --push"),
        ([full_run, "--checkpoint", "step-5"], "whole checkpoints there: step-000002, step-000004, step-000006"),
        ([full_run, "--output-dir", mine.parent], "not empty"),
        ([full_run, "--checkpoint", "step-2"], "export-step-000002: holds notes.txt, which no export writes"),
        ([full_run, "--checkpoint", "step-2", "--dtype", "bf16"], "export-step-000002-bf16: is not a folder"),
    ):
        code, output = run_export_script(*arguments)
        assert (code, output.count("\n")) == (2, 1), output
        assert output.startswith("error: ")
        assert expected in output
    assert mine.exists()


def test_a_resumed_run_refuses_to_replace_a_file_of_the_users_before_it_trains(
    full_run, tiny_model, data_files, tmp_path
):
    run = shutil.copytree(full_run, tmp_path / "run", symlinks=True)
    (run / "model" / "notes.txt").write_text("mine")
    rows = (run / "metrics.jsonl").read_bytes()
    flags = "--max-steps 6 --eval-every 3 --save-every 2 --save-total-limit 9 --ds-config zero0 --resume latest"
    argv = make_argv(tiny_model, data_files, "full", f"{flags} --output-dir {run}")
    assert run_on_ranks(1, run_train_script, argv, log=tmp_path / "log") == 2
    assert "model: holds notes.txt, which no export writes and would be lost; move it" in (tmp_path / "log").read_text()
    assert (run / "metrics.jsonl").read_bytes() == rows


def test_a_checked_export_is_pushed_and_one_that_fails_its_check_is_not(
    full_run, run_export_script, monkeypatch, tmp_path
):
    (tmp_path / "answer.json").write_text('{"sentence": "LoRA is good enough."}')
    arguments = (full_run, "--push", "me/small", "--private", "--answer", tmp_path / "answer.json", "--output-dir")
    with fake_hub() as hub:
        code, output = run_export_script(*arguments, tmp_path / "out")
        assert code == 0, output
        assert output.endswith(f"pushed to {hub.url}/me/small\n")
        pushed = hub.files.pop("me/small")
        assert pushed == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert hub.created[0]["visibility"] == "private"
        assert {"model.safetensors", "README.md", "tokenizer.json", "generation_config.json"} <= set(pushed)
        assert all(text in pushed["README.md"].decode() for text in ("reloaded and checked", "LoRA is good enough."))
        assert f"Bearer {TOKEN}" in hub.tokens
        files = [path for path in (*tmp_path.rglob("*"), *full_run.rglob("*")) if path.is_file()]
        assert TOKEN.encode() not in b"".join(path.read_bytes() for path in files) + output.encode()
        monkeypatch.setattr(verify, "load_folder", lambda *_: 1 / 0)
        code, output = run_export_script(*arguments, tmp_path / "again")
        assert code == 1
        assert output.rstrip().endswith("nothing is pushed")
        assert not hub.files


# --- where the folder is not the model that was trained ---


def train_with_damaged_export(argv: list[str]) -> int:
    """A whole run that exports other weights than it trained."""
    original = export_cli.save_plain_model

    def save_damaged(folder: Path, module: Any, weights: dict[str, torch.Tensor], *more: Any) -> None:
        name = "transformer.h.0.attn.c_proj.weight"
        original(folder, module, {**weights, name: weights[name].T.contiguous()}, *more)

    export_cli.save_plain_model = save_damaged  # type: ignore[assignment]
    return run_train_script(argv)


def test_a_run_with_a_broken_export_ends_with_one_line_and_exit_1(tiny_model, data_files, tmp_path):
    flags = make_argv(tiny_model, data_files, "full", f"--max-steps 2 --output-dir {tmp_path / 'run'}")
    assert run_on_ranks(1, train_with_damaged_export, flags, log=tmp_path / "log") == 1
    (error,) = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("error: ")]
    assert "CHECK FAILED: logits differ by" in error
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert "CHECK FAILED" in (tmp_path / "run" / "model" / "README.md").read_text()
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()


HARM = {
    "the tied embedding is stored 2 times": lambda w: w | {"lm_head.weight": w["transformer.wte.weight"].clone()},
    "stored as F16, its config says float32, expected float32": lambda w: {n: t.half() for n, t in w.items()},
    "logits differ by": lambda w: w | {"transformer.ln_f.bias": w["transformer.ln_f.bias"] + 1e-3},
    "could not be loaded again": lambda w: {},
}


def test_verification_finds_a_damaged_folder_and_a_loss_that_is_off_by_more_than_rounding(
    full_run, tiny_model, data_files, tmp_path
):
    data, cpu = load(prepare_data(make_argv(tiny_model, data_files, "full"))), torch.device("cpu")
    ids, recorded = fixed_input_ids(data), read_finished_event(full_run)["facts"]["final"]["loss"]
    expected = compute_logits(AutoModelForCausalLM.from_pretrained(full_run / "model"), ids, cpu)
    folder = shutil.copytree(full_run / "model", tmp_path / "model")

    def find_problems(loss: float = recorded, logits: np.ndarray = expected, is_tied: bool = True) -> str:
        metadata = {"precision": "fp32", "device": "cpu"}
        source = Checkpoint(folder=folder, metadata=metadata, train_state=TrainState(step=6, val_loss=loss))
        options = {"is_tied": is_tied, "device": cpu, "val": data.val, "eval_batch": 4}
        result = verify_folder(folder, source, input_ids=ids, logits=logits, **options)
        assert result.summary.startswith("CHECK FAILED: " if result.problems else "reloaded and checked: ")
        return "; ".join(result.problems)

    assert find_problems() == ""
    assert find_problems(is_tied=False) == "input and output embeddings are now tied"
    for factor in (1 - 3e-6, 1 + 3e-6):
        assert find_problems(recorded * factor).startswith("validation loss ")
    assert find_problems(logits=expected * np.nan).startswith("logits differ by nan")
    weights = load_file(folder / "model.safetensors")
    for message, harm in HARM.items():
        save_file(harm(weights), folder / "model.safetensors", metadata={"format": "pt"})
        if not harm(weights):
            (folder / "model.safetensors").unlink()
        assert message in find_problems()
