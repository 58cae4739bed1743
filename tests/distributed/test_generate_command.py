"""launch/generate.py: base, full and LoRA complete the same prompts; what it shows is what the runs themselves made."""

import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.launch_ranks import train
from helpers.process_groups import read_events
from helpers.tiny_inputs import make_tiny_gpt2

from trainer.tools import generate as generate_module
from trainer.training.scorers import score_text

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^(.*?)  +(.*)$", re.M)  # of what is shown: a label and its text
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} w0 {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, session_dir: Path) -> tuple[Path, Path]:
    """A full and a LoRA run on prompts with two references each."""
    out = tmp_path_factory.mktemp("generate")
    model = make_tiny_gpt2(out / "tiny", dropout=0.0)
    records = [{"prompt": f"w{n} w{n + 1}", "completion": f" w{m} w{n}"} for n in range(1, 41) for m in (50, 60)]
    (out / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = f"--model {model} --data {out / 'data.jsonl'} --block-size 16 --preset demo --lr 1e-2 --max-steps 6"
    flags += " --val-fraction 0.3 --num-samples 3 --wandb disabled --save-every never"
    for mode in ("full", "lora"):
        train(["--mode", mode, *flags.split(), "--run-name", mode], out=out / mode)
    return out / "full", out / "lora"


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str]) -> Any:
    """launch/generate.py in this process; returns (exit code, stdout, or stderr where it failed)."""
    main = runpy.run_path(str(ROOT / "launch" / "generate.py"))["main"]

    def call(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        exit_code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return exit_code, captured.out if exit_code == 0 else captured.err

    return call


def test_base_full_and_lora_complete_the_validation_prompts_as_the_runs_did(runs, generate):
    code, message = generate(*runs, "--num", 3, "--score", "exact", "--score", "f1")
    assert code == 0, message
    blocks = message.split("\n\n")[:3]
    last = {run.name: read_events(run, "samples")[-1]["facts"]["texts"] for run in runs}
    for i, block in enumerate(blocks):
        lines = dict(LINE.findall(block))
        text = {name: texts[i] for name, texts in last.items()}
        assert list(lines) == ["prompt", "reference 1", "reference 2", "base (tiny)", "full", "lora"]
        assert lines["prompt"] == text["full"]["prompt"]
        assert lines["base (tiny)"] == text["full"]["base"].strip() == text["lora"]["base"].strip()
        assert (lines["full"], lines["lora"]) == tuple(text[name]["completion"].strip() for name in ("full", "lora"))
    scores = re.findall(r"^(.+): (\w+) (.+) over 3 prompts$", message, re.M)
    names = ("base (tiny)", "full", "lora")
    assert [score[:2] for score in scores] == [(label, name) for label in names for name in ("exact", "f1")]
    for label, _, mean in scores[1::2]:  # the better of the two references counts
        completions = [dict(LINE.findall(block)) for block in blocks]
        best = [max(score_text("f1", c[label], c[f"reference {n}"]) for n in (1, 2)) for c in completions]
        assert mean == f"{sum(best) / 3:.3g}"


def test_a_checkpoint_is_that_which_was_trained_whatever_run_json_says(runs, generate, run_export_script, tmp_path):
    run = Path(shutil.copytree(runs[1], tmp_path / "lora"))
    metadata = json.loads((run / "run.json").read_text())
    metadata["settings"]["lora"]["alpha"] *= 50
    (run / "run.json").write_text(json.dumps(metadata))
    assert generate(run, "--num", 3) == generate(runs[1], "--num", 3)
    code, output = run_export_script(run, "--output-dir", tmp_path / "out")
    assert code == 0, output
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["lora_alpha"] == metadata["settings"]["lora"]["alpha"] / 50

    base = Path(shutil.copytree(metadata["settings"]["model"]["model"], tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"n_head": 4}))
    metadata["settings"]["model"]["model"] = str(base)
    (run / "run.json").write_text(json.dumps(metadata))
    for code, output in (generate(run, "--num", 3), run_export_script(run)):
        assert (code, output.count("\n")) == (2, 1), output
        assert "base was changed since the run; restore it" in output


def test_a_prompt_is_in_the_chat_template_of_the_runs(runs, generate, tmp_path):
    metadata = json.loads((runs[1] / "run.json").read_text())
    metadata["data"]["chat_template"] = TEMPLATE
    chat = tmp_path / "chat"
    chat.mkdir()
    for path in runs[1].iterdir():
        (chat / path.name).symlink_to(path)
    (chat / "run.json").unlink()
    (chat / "run.json").write_text(json.dumps(metadata))
    code, message = generate(chat, "--prompt", "w5 w6")
    assert code == 0, message
    assert message != generate(runs[1], "--prompt", "w5 w6")[1]


def test_mistakes_are_one_line_and_exit_2(runs, generate, tmp_path):
    for arguments, expected in (
        ([tmp_path], "no run.json there"),
        ([runs[0], "--prompt", "w1 \udc80"], "--prompt: column 'text' holds half a character"),
        ([runs[0], "--prompt", "w1 " * 40], "--prompt: 40 tokens; expected from 1 to"),
        ([runs[0], "--prompt", "w1", "--score", "f1"], "--score f1: no prompt has a text to compare with"),
        ([runs[0], "--prompt", "w1", "--score", "bleurt"], "--score bleurt: expected exact, contains"),
        ([runs[0], "--checkpoint", "step-9"], "whole checkpoints there: step-000006"),
    ):
        code, message = generate(*arguments)
        assert (code, message.splitlines()[-1].startswith("error: ")) == (2, True), message
        assert expected in message


def test_a_checkpoint_that_a_run_removes_meanwhile_is_one_line(runs, generate, tmp_path, monkeypatch):
    """It is chosen, then the base is built for seconds."""
    run = Path(shutil.copytree(runs[1], tmp_path / "run"))
    build_model = generate_module.build_model

    def build_slowly(*args, **options):
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        return build_model(*args, **options)

    monkeypatch.setattr(generate_module, "build_model", build_slowly)
    code, message = generate(run, "--prompt", "w5")
    assert (code, message.count("\n")) == (2, 1), message
    assert "state.safetensors cannot be read" in message
