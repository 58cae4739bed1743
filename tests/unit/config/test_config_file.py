"""--config FILE: a command line kept in a file, which flags win over."""

import json
import os
from pathlib import Path

import pytest
from helpers.fake_runs import make_metadata

from trainer.config import cli
from trainer.config.errors import UserError


def write_config(folder: Path, text: str) -> str:
    (folder / "config.yaml").write_text(text)
    return str(folder / "config.yaml")


def test_a_yaml_file_gives_the_settings_of_its_flags(tmp_path):
    path = write_config(
        tmp_path,
        """
mode: lora
lr: 1e-4            # a text in YAML 1.1, a number here
global_batch: 16    # with - or _
prompt: "{a}"
completion: "{b}"
lora-target-modules: [c_attn, c_fc]
no-shuffle: true
quant-double: false
max-steps:
""",
    )
    flags = "--mode lora --lr 1e-4 --global-batch 16 --prompt {a} --completion {b}"
    flags += " --lora-target-modules c_attn,c_fc --no-shuffle"
    assert cli.parse_args(["--config", path]) == cli.parse_args(flags.split())


def test_flags_win_over_the_file_wherever_they_stand(tmp_path):
    path = write_config(tmp_path, "mode: full\nlr: 1e-4\nseed: 3")
    for argv in (["--config", path, "--lr", "2e-4"], ["--lr", "2e-4", f"--config={path}"]):
        train = cli.parse_args(argv).settings.train
        assert (train.lr, train.seed) == (2e-4, 3)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("mode: full\nlearning_rate: 1e-4", "--learning_rate 1e-4: did you mean --lr 1e-4?"),
        ("mode: full\nlrr: 3", "--lrr 3: did you mean --lr 3?"),
        ("mode: full\nlr: [1e-4, {}]", "lr is ['1e-4', {}]: expected a number, a text (in quotes) or a list of them"),
        ("mode: full\nprompt: {a}", "prompt is {'a': None}: expected a number, a text (in quotes) or a list of them"),
        ("mode: full\nwandb: off", "wandb is false: expected a number, a text (in quotes) or a list of them"),
        ("mode: full\nno-shuffle: 3", "no-shuffle is 3: expected true or false"),
        ("mode: full\nconfig: other.yaml", "--config other.yaml"),
        ("- mode", "expected lines like `lr: 1e-4`, or a run.json"),
        ("a: [", ", line 1: is not YAML (expected the node content, but found '<stream end>'); expected lines like"),
        ("\x00", "is not YAML (damaged); expected lines like `lr: 1e-4`"),
        ("lr: 1\nlr: 2", ", line 1: is not YAML (lr stands there twice); expected lines like"),
        ("lr: &a [1]\nseed: !!python/object/apply:os.getpid []", ", line 2: is not YAML (could not determine"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(tmp_path, text, answer):
    path = write_config(tmp_path, text)
    with pytest.raises(UserError) as caught:
        cli.parse_args(["--config", path])
    assert str(caught.value).startswith(f"--config {path}")
    assert answer in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_that_a_flag_refuses_is_refused_from_the_file_too(tmp_path):
    path = write_config(tmp_path, "mode: full\nlr: fast")
    with pytest.raises(UserError, match="--lr fast: expected a number above 0"):
        cli.parse_args(["--config", path])


def test_a_file_that_is_not_there_or_would_be_waited_for_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, problem in (("no.yaml", "cannot be read"), ("no.json", "no such file"), ("pipe", "not a regular file")):
        with pytest.raises(UserError, match=rf"^--config {tmp_path}/{name}: {problem}"):
            cli.parse_args(["--config", str(tmp_path / name)])


def test_a_run_json_runs_it_again_in_another_folder(tmp_path):
    words = "--mode lora --model org/m --lr 3e-4 --no-shuffle --lora-target-modules a,b --output-dir first"
    first = cli.parse_args(words.split()).settings
    metadata = make_metadata("lora") | {"settings": first.as_dict(), "preset": first.preset}
    (tmp_path / "run.json").write_text(json.dumps(metadata))
    again = cli.parse_args(["--config", str(tmp_path / "run.json"), "--output-dir", "second"]).settings
    for group in ("model", "lora", "data", "train", "engine"):
        assert getattr(again, group) == getattr(first, group)
    assert (again.mode, again.preset, again.run_folder) == (first.mode, first.preset, "second")


def test_a_damaged_run_json_is_refused_by_its_reader(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="schema_version is missing"):
        cli.parse_args(["--config", str(tmp_path / "run.json")])
