"""Keys and tokens: a flag that holds one is refused without showing it, and no message shows one."""

import pytest

from trainer.config.cli import parse_args
from trainer.config.errors import UserError, mask_credentials

HUB_TOKEN = "hf_" + "aB3" * 12


@pytest.mark.parametrize(
    ("argv", "flag", "secret"),
    [
        (["--data", f"https://user:{HUB_TOKEN}@huggingface.co/datasets/a/b"], "--data", HUB_TOKEN),
        (["--data", "https://someone:pass@host/a.csv"], "--data", "pass@"),
        ([f"--model=https://{HUB_TOKEN}@huggingface.co/gpt2"], "--model", HUB_TOKEN),
        (["--run-name", "k" * 40], "--run-name", "k" * 40),
        (["--wandb-project", HUB_TOKEN], "--wandb-project", HUB_TOKEN),
        (["--hub-token", HUB_TOKEN], "--hub-token", HUB_TOKEN),
    ],
)
def test_a_flag_that_holds_a_secret_is_refused_and_does_not_show_it(argv, flag, secret, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    with pytest.raises(UserError, match="holds a token or a login") as caught:
        parse_args(["--mode", "lora", *argv])
    assert str(caught.value).startswith(f"{flag}: ")
    assert secret not in str(caught.value)


def test_a_config_file_is_read_by_the_same_rule(tmp_path):
    (tmp_path / "a.yaml").write_text(f"mode: lora\nmodel: {HUB_TOKEN}\n")
    with pytest.raises(UserError, match=r"^--model: its value holds a token"):
        parse_args(["--config", str(tmp_path / "a.yaml")])


def test_messages_of_libraries_are_masked():
    environ = {"HF_TOKEN": "a-token-of-the-hub", "API_KEY": "short", "PATH": "/usr/bin/and/more"}
    text = (
        "401 for https://u:p@hub/a with a-token-of-the-hub (short, /usr/bin/and/more, user@host, hf_internal_testing)"
    )
    masked = "401 for https://***@hub/a with *** (short, /usr/bin/and/more, user@host, hf_internal_testing)"
    assert mask_credentials(text, environ) == masked
    assert HUB_TOKEN not in str(UserError(f"the hub says {HUB_TOKEN}"))


def test_ordinary_command_lines_are_taken(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "1234")
    args = parse_args(["--mode", "lora", "--max-steps", "1234", "--data", "a@b.csv"])
    assert args.settings.train.max_steps == 1234
