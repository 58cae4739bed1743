"""The command line: the flags of the contract, each made of its field, with presets told from what was given."""

import dataclasses

import pytest

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.config.fields import flag_of
from trainer.config.presets import preset_notes
from trainer.config.settings import GROUPS

# The names are a contract with the user; these are no settings.
COMMANDS = (
    "--mode --preset --config --resume --allow-change --dry-run --show-example --find-lr --find-batch --local_rank "
    "--local-rank --verbose --help"
)
FLAGS_WITHOUT_FIELD = set(COMMANDS.split())

# A value of each other flag that no preset has, as typed and as read.
VALUES = {
    "--model": ("m", "m"),
    "--init": ("random", "random"),
    "--lora-rank": ("4", 4),
    "--lora-alpha": ("3", 3.0),
    "--lora-dropout": ("0.5", 0.5),
    "--lora-target-modules": ("a, b", ("a", "b")),
    "--data": ("d.csv", "d.csv"),
    "--val-data": ("v.csv", "v.csv"),
    "--val-fraction": ("0.2", 0.2),
    "--test-data": ("t.csv", "t.csv"),
    "--test-fraction": ("0.1", 0.1),
    "--retain-data": ("r.txt", "r.txt"),
    "--split-by": ("mr", "mr"),
    "--prompt": ("{p}", "{p}"),
    "--completion": ("{c}", "{c}"),
    "--format": ("alpaca", "alpaca"),
    "--chat-template": ("c.jinja", "c.jinja"),
    "--unusable-records": ("drop", "drop"),
    "--packing": (None, True),
    "--objective": ("completion", "completion"),
    "--block-size": ("77", 77),
    "--no-shuffle": (None, False),
    "--epochs": ("1.5", 1.5),
    "--max-steps": ("9", 9),
    "--global-batch": ("10", 10),
    "--micro-batch": ("5", 5),
    "--eval-batch": ("7", 7),
    "--lr": ("1e-3", 0.001),
    "--warmup-steps": ("3", 3),
    "--weight-decay": ("0.1", 0.1),
    "--max-grad-norm": ("0", 0.0),
    "--seed": ("1", 1),
    "--ds-config": ("zero3", "zero3"),
    "--precision": ("bf16", "bf16"),
    "--hang-timeout": ("60", 60.0),
    "--grace": ("9", 9.0),
    "--eval-every": ("5", "5"),
    "--save-every": ("never", "never"),
    "--save-total-limit": ("3", 3),
    "--output-dir": ("o", "o"),
    "--wandb": ("disabled", "disabled"),
    "--wandb-project": ("p", "p"),
    "--run-name": ("n", "n"),
    "--report-to": ("tensorboard", ("tensorboard",)),
    "--profile": ("5", 5),
    "--adapter": ("dora", "dora"),
    "--lora-plus-ratio": ("16", 16.0),
    "--modules-to-save": ("wte,bias", ("wte", "bias")),
    "--quant": ("nf4", "nf4"),
    "--quant-double": (None, True),
    "--optim": ("adamw", "adamw"),
    "--activation-checkpointing": (None, True),
    "--execution": ("eager", "eager"),
    "--dropout": ("0.3", 0.3),
    "--early-stop": ("2:0.1", "2:0.1"),
    "--export": ("best", "best"),
    "--num-samples": ("5", 5),
    "--score-samples": (None, True),
    "--adam-beta1": ("0.8", 0.8),
    "--schedule": ("cosine", "cosine"),
    "--warmup-ratio": ("0.1", 0.1),
    "--min-lr": ("1e-6", 1e-06),
    "--adam-beta2": ("0.95", 0.95),
    "--adam-epsilon": ("1e-6", 1e-06),
}
FIELDS = {flag_of(field): (name, field.name) for name, group in GROUPS.items() for field in dataclasses.fields(group)}


def test_the_flags_are_those_of_the_contract_each_a_settings_field_or_a_command():
    flags = {option for action in cli.build_parser()._actions for option in action.option_strings} - {"-h"}
    assert flags == set(VALUES) | FLAGS_WITHOUT_FIELD
    assert set(FIELDS) == set(VALUES)


@pytest.mark.parametrize("flag", sorted(FIELDS))
def test_each_flag_sets_its_field_and_is_recorded_as_overridden(flag):
    typed, expected = VALUES[flag]
    more = {"--prompt": ["--completion", "{c}"], "--quant-double": ["--quant", "nf4"]}.get(flag, [])
    request = cli.parse_args(["--mode", "lora", *more, flag, *([typed] if typed is not None else [])])
    group, field = FIELDS[flag]
    assert getattr(getattr(request.settings, group), field) == expected
    assert request.overrides[group][field] == expected
    assert flag in request.settings.overridden
    assert len(request.settings.overridden) == 1 + bool(more)


def test_no_flags_override_nothing():
    request = cli.parse_args(["--mode", "full"])
    assert request.settings.overridden == ()
    assert not any(request.overrides.values())
    assert (request.settings.preset, request.resume, request.dry_run) == ("demo", None, False)
    assert request.allow_change == ()


def test_a_flag_with_the_presets_own_value_still_counts_as_overridden():
    lr = cli.parse_args(["--mode", "full", "--preset", "card"]).settings.train.lr
    request = cli.parse_args(["--mode", "lora", "--preset", "card", "--lr", str(lr)])
    assert request.settings.overridden == ("--lr",)
    assert request.settings.train.lr == lr, "and the mode does not change it"


@pytest.mark.parametrize(("argv", "expected"), [([], None), (["--resume"], "latest"), (["--resume", "auto"], "auto")])
def test_resume_takes_a_checkpoint_or_the_newest(argv, expected):
    assert cli.parse_args(["--mode", "full", *argv]).resume == expected


def test_allowed_changes_may_be_joined_repeated_and_written_as_flags():
    argv = ["--allow-change", "lr,global-batch", "--allow-change", "max_steps"]
    assert cli.parse_args(["--mode", "full", "--resume", *argv]).allow_change == ("lr", "global_batch", "max_steps")


@pytest.mark.parametrize("flag", ["--local_rank=1", "--local-rank=1"])  # deepspeed's, torch.distributed.launch's
def test_the_launchers_rank_is_accepted_and_changes_nothing(flag):
    assert cli.parse_args([flag, "--mode", "full"]).settings == cli.parse_args(["--mode", "full"]).settings


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--mode"),
        (["--mode", "qlora"], "qlora"),
        (["--mode", "full", "--learning-rate", "1"], "--learning-rate"),
        (["--mode", "full", "--lr"], "--lr"),
        (["--mode", "full", "--lr", "fast"], "fast"),
        (["--mode", "full", "--max-steps", "1.5"], "1.5"),
        (["--mode", "full", "--block", "9"], "--block"),
        (["--mode", "full", "--precision", "tf32"], "tf32"),
        (["--mode", "full", "--seed", "-1"], "--seed -1"),
        (["--mode", "full", "stray"], "stray"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line_that_names_it(argv, message):
    with pytest.raises(UserError) as caught:
        cli.parse_args(argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_shows_groups_units_and_both_presets_defaults(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.parse_args(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for title in cli.TITLES.values():
        assert f"{title}:" in text
    assert "(default: demo 256, card 1024, finetune 0 tokens)" in text
    assert "card 3e-05, finetune 2e-05)" in text
    assert "(default: 3.0)" in text
    for flag in {*VALUES, *FLAGS_WITHOUT_FIELD} - {"--local_rank", "--local-rank"}:
        assert f"{flag} " in text, flag
    assert "local_rank" not in text, "it is the launcher's, not the user's"


@pytest.mark.parametrize(
    ("argv", "preset"),
    [
        ([], "demo"),
        (["--model", "demo-base"], "demo"),
        (["--model", "gpt2"], "card"),
        (["--model", "HuggingFaceTB/SmolLM2-135M"], "finetune"),
        (["--model", "gpt2", "--preset", "finetune"], "finetune"),
        (["--model", "some/folder", "--preset", "demo"], "demo"),
    ],
)
def test_the_preset_is_the_one_that_fits_the_model_unless_asked_for(argv, preset):
    assert cli.parse_args(["--mode", "full", *argv]).settings.preset == preset


def test_any_other_model_gets_rates_of_its_own_and_a_line_that_calls_them_a_guess():
    full, lora = (cli.parse_args(["--mode", mode, "--model", "org/m"]).settings for mode in ("full", "lora"))
    assert (full.train.lr, lora.train.lr) == (2e-5, 2e-4)
    assert (full.train.schedule, full.train.num_warmup_steps(1000)) == ("cosine", 30)
    block_note, lr_note = preset_notes(full)
    assert block_note.endswith("from the lengths of the data; --block-size sets another")
    assert lr_note.startswith("learning rate 2e-05: a guess from the literature; the same command with --find-lr")
    flags = ["--mode", "full", "--model", "org/m", "--lr", "1e-4", "--block-size", "64"]
    assert preset_notes(cli.parse_args(flags).settings) == []
    assert preset_notes(cli.parse_args(["--mode", "full"]).settings) == []
    (note,) = preset_notes(cli.parse_args(["--mode", "full", "--preset", "demo", "--model", "org/m"]).settings)
    assert "of --preset demo, made for demo-base" in note


def test_warm_up_steps_given_take_the_place_of_the_presets_share():
    train = cli.parse_args(["--mode", "full", "--model", "org/m", "--warmup-steps", "0"]).settings.train
    assert train.num_warmup_steps(1000) == 0


def test_the_finetune_preset_needs_a_model():
    with pytest.raises(UserError, match="--preset finetune without --model: expected --model"):
        cli.parse_args(["--mode", "full", "--preset", "finetune"])


@pytest.mark.parametrize("flag", ["--data", "--model", "--output-dir", "--run-name", "--config", "--chat-template"])
def test_a_name_that_no_file_can_have_is_refused(flag):
    for value in ("a" * 256, "a/" * 2048 + "a", "a\0"):
        with pytest.raises(UserError, match=rf"^{flag} a.*(expected at most 255 between|holds a null byte)"):
            cli.parse_args(["--mode", "full", flag, value])
    assert cli.parse_args(["--mode", "full", "--completion", "a" * 5000]).settings.data.completion == "a" * 5000
