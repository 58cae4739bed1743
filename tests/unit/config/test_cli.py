"""The command line: the flags of the contract, each made of its field, and `--config FILE`."""

import dataclasses
import json
from pathlib import Path

import pytest
from helpers.any_inputs import check_inputs, many_inputs
from helpers.fake_runs import make_metadata
from hypothesis import strategies as st

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.config.fields import flag_of
from trainer.config.files import name_data, split_weights
from trainer.config.settings import GROUPS
from trainer.training.run_plan import collect_notes

# The names are a contract with the user; these are no settings.
COMMANDS = (
    "--mode --preset --config --resume --allow-change --dry-run --show-example --find-batch --local_rank "
    "--local-rank --help"
)

# Each other flag, with a value that no preset has; a switch has none.
SETTINGS = """
--model=m --init=random --quant=nf4 --quant-double --dropout=0.3
--lora-rank=4 --lora-alpha=3 --lora-dropout=0.5 --lora-target-modules=a,b --adapter=dora
--modules-to-save=wte,bias
--data=d.csv --val-data=v.csv --val-fraction=0.2 --test-data=t.csv --test-fraction=0.1 --retain-data=r.txt --split-by=mr
--max-samples=9 --allow-leakage
--prompt={p} --completion={c} --chat-template=c.jinja --unusable-records=drop --objective=completion
--block-size=77 --packing
--epochs=1.5 --max-steps=9 --global-batch=10 --micro-batch=5 --eval-batch=7 --lr=1e-3 --min-lr=1e-6 --schedule=cosine
--warmup-steps=3 --warmup-ratio=0.1 --weight-decay=0.1 --max-grad-norm=0 --seed=1 --optim=adamw --early-stop=2
--label-smoothing=0.1 --adam-beta1=0.8 --adam-beta2=0.95 --adam-epsilon=1e-6
--ds-config=zero3 --precision=bf16 --hang-timeout=60 --grace=9 --execution=eager --activation-checkpointing
--eval-every=5 --save-every=never --save-total-limit=3 --output-dir=o --wandb=disabled --wandb-project=p --run-name=n
--wandb-group=g --wandb-tags=t,u --report-to=tensorboard --export=best --num-samples=5 --score=f1
--score-tokens=9 --base-from=runs --peft-config={"peft_type":"VERA"}
"""
VALUES = {flag: value for flag, _, value in (word.partition("=") for word in SETTINGS.split())}
FIELDS = {flag_of(field): (name, field.name) for name, group in GROUPS.items() for field in dataclasses.fields(group)}


def parse(words: str, *more: str) -> cli.CliArgs:
    return cli.parse_args([*words.split(), *more])


def test_the_flags_are_those_of_the_contract_each_a_settings_field_or_a_command():
    flags = {option for action in cli.build_parser()._actions for option in action.option_strings} - {"-h"}
    assert flags == {*VALUES, *COMMANDS.split()}
    assert set(FIELDS) == set(VALUES)


def test_a_mixture_is_one_setting_and_scorers_one_a_flag_in_flags_and_yaml_and_handed_on(tmp_path):
    scorers = ("exact", "regex:a,b ", "-x.py:f")
    argv = ["--mode", "full", "--model", "m", "--data", "a.csv=0.7", "~/b.csv=0.3", *(f"--score={s}" for s in scorers)]
    settings = cli.parse_args(argv).settings
    assert settings.output.score == scorers
    assert split_weights(settings.data.data) == [("a.csv", 0.7), (str(Path("~/b.csv").expanduser()), 0.3)]
    assert [name_data(data) for data in (settings.data.data, "/x/c.csv")] == ["a.csv=0.7 b.csv=0.3", "c.csv"]
    assert settings.run_name == "full-a-b"
    yaml = "data: [a.csv=0.7, ~/b.csv=0.3]\nmode: full\nmodel: m\nscore: [exact, 'regex:a,b ', -x.py:f]"
    (tmp_path / "c.yaml").write_text(yaml)
    for again in (cli.to_argv(settings, {}), ["--config", str(tmp_path / "c.yaml")]):
        assert cli.parse_args(again).settings.overrides == settings.overrides


@pytest.mark.parametrize("flag", sorted(FIELDS))
def test_each_flag_sets_its_field_and_is_recorded_as_overridden(flag):
    typed = VALUES[flag]
    more = {"--prompt": ["--completion", "{c}"], "--quant-double": ["--quant", "nf4"]}.get(flag, [])
    settings, base = (parse("--mode lora", *more, *argv).settings for argv in ([flag, *([typed] if typed else [])], []))
    group, field = FIELDS[flag]
    value, default = (getattr(getattr(run, group), field) for run in (settings, base))
    assert value == settings.overrides[group][field] != default
    assert value == (tuple(typed.split(",")) if isinstance(value, tuple) else type(value)(typed or not default))
    assert set(settings.overridden) == {flag, *more[:1]}


def test_commands_are_read_and_the_launchers_rank_changes_nothing():
    args = parse("--mode full")
    assert (args.settings.preset, args.resume, args.dry_run, args.allow_change) == ("demo", None, False, ())
    assert [parse(f"--mode full --resume{value}").resume for value in ("", " auto")] == ["latest", "auto"]
    args = parse("--mode full --resume --allow-change lr,global-batch --allow-change max_steps")
    assert args.allow_change == ("lr", "global_batch", "max_steps")
    for flag in ("--local_rank=1", "--local-rank=1"):  # deepspeed's, torch.distributed.launch's
        assert parse(flag, "--mode", "full") == parse("--mode full")
    settings = parse("--mode lora --preset card --lr 3e-5").settings
    assert (settings.overridden, settings.train.lr) == (("--lr",), 3e-5), "the preset's own value counts as given"


@pytest.mark.parametrize("flag", ["--data", "--output-dir", "--config"])
def test_a_name_that_no_file_can_have_is_refused(flag):
    for value in ("a" * 256, "a\0", "a\ud800"):
        with pytest.raises(UserError, match=rf"^{flag} a.*: expected a name"):
            parse("--mode full", flag, value)
    assert parse("--mode full --completion", "a" * 5000).settings.data.completion == "a" * 5000


def test_help_shows_every_flag_with_the_presets_defaults_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "demo 256, card 1024, gpt2 1024, finetune 0)" in text
    for flag in {*VALUES, *COMMANDS.split()} - {"--local_rank", "--local-rank"}:
        assert f"{flag} " in text, flag
    assert "local_rank" not in text, "it is the launcher's, not the user's"


@pytest.mark.parametrize(
    ("words", "preset", "lr", "notes"),
    [
        ("--data a.csv", "gpt2", 3e-5, ["learning rate 3e-05: of --preset gpt2, a guess"]),
        ("--data a.csv --preset card", "card", 3e-5, []),
        ("--data a.csv --preset demo", "demo", 5e-4, ["--preset demo trains demo-base, the embedded toy, on"]),
        ("--model org/m", "finetune", 2e-5, ["learning rate 2e-05: of --preset finetune"]),
    ],
)
def test_the_preset_is_the_one_that_fits_the_model_and_says_what_is_a_guess(words, preset, lr, notes):
    settings = parse("--mode full", *words.split()).settings
    assert (settings.preset, settings.train.lr) == (preset, lr)
    assert [note[: len(start)] for note, start in zip(collect_notes(settings, {}), notes, strict=True)] == notes


# --- --config FILE ---


YAML = """
mode: lora
lr: 1e-4            # a text in YAML 1.1, a number here
global_batch: 16    # with - or _
prompt: "{a}"
completion: "{b}"
lora-target-modules: [c_attn, c_fc]
packing: true
quant-double: false
max-steps:
"""


def test_yaml_gives_the_settings_of_its_flags_which_win_over_it_as_a_second_file_does(tmp_path):
    path, second = tmp_path / "config.yaml", tmp_path / "second.yaml"
    path.write_text(YAML)
    flags = "--mode lora --lr 1e-4 --global-batch 16 --prompt {a} --completion {b}"
    assert parse(f"--config {path}") == parse(f"{flags} --lora-target-modules c_attn,c_fc --packing")
    path.write_text("mode: full\nlr: 1e-4\nseed: 3\nval_data: [a, b]")
    second.write_text("lr: 2e-4\nval_data: c\n")
    flags = "--lr 2e-4 --val_data c"
    for words in (f"--config {path} {flags}", f"{flags} --config={path}", f"--config {path} --config {second}"):
        settings = parse(words).settings
        assert (settings.train.lr, settings.train.seed, settings.data.val_data) == (2e-4, 3, ("c",))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("mode: full\nlr: [1e-4, {}]", ", line 2: lr: expected a number, a text (in quotes) or a list of them"),
        ("mode: full\nprompt: {a}", ', line 2: prompt: YAML reads {a} as a mapping; write prompt: "{a}"'),
        ("? [a, b]\n: 1", ", line 1: expected lines like `lr: 1e-4`, or a run.json"),
        ("a: [", ", line 1: is not YAML (expected the node content, but found '<stream end>'); expected lines like"),
        ("lr: 1\nlr: 2", ", line 2: lr is given twice"),
        ("mode: full\nseed: !!python/object/apply:os.getpid []", None),  # no tag is looked at
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(tmp_path, text, answer):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        parse(f"--config {path}")
    names = f"--config {path}{answer}" if answer else f"--{text.splitlines()[1].partition(':')[0]} "
    assert str(caught.value).startswith(names)
    assert "\n" not in str(caught.value)
    for name, problem in {"no.yaml": "cannot be read", "no.json": "no such file"}.items():
        with pytest.raises(UserError, match=f"^--config {name}: {problem}"):
            parse(f"--config {name}")


def test_a_run_json_runs_it_again_in_another_folder(tmp_path):
    words = "--mode lora --model org/m --lr 0.333333333333333 --packing --lora-target-modules a,b --completion={y}=--"
    first = parse(words, "--output-dir", "a b", "--prompt=-{x}").settings
    metadata = make_metadata("lora") | {"settings": first.as_dict(), "preset": first.preset}
    (tmp_path / "run.json").write_text(json.dumps(metadata))
    again = parse("--output-dir second --config", str(tmp_path / "run.json")).settings
    for group in ("mode", "preset", "model", "lora", "data", "train", "engine"):
        assert getattr(again, group) == getattr(first, group)
    assert again.run_folder == "second"


YAML_PARTS = st.sampled_from(
    ["mode: full", "lr:", "packing", ": ", "\n", "- ", "{", "}", "[", "]", "&a", "*a", "!!int", "'"]
)


@many_inputs(50)
def test_any_content_of_a_config_file_is_taken_or_one_line(num_inputs, tmp_path):
    path = tmp_path / "a.yaml"

    def check(content):
        message = f"--config {path}"
        path.write_bytes(content if isinstance(content, bytes) else "".join(content).encode("utf-8", "surrogatepass"))
        try:
            parse("--config", str(path))
        except UserError as error:
            message = str(error)
        assert message.startswith("--")
        assert "\n" not in message

    check_inputs(num_inputs, check, st.lists(YAML_PARTS | st.text(max_size=4), max_size=12) | st.binary(max_size=40))
