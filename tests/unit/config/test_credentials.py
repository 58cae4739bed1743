"""Keys and tokens: a flag that holds one is refused without showing it, and no message shows one."""

import pytest

from trainer.config.cli import parse_args
from trainer.config.errors import UserError, mask_credentials

HUB_TOKEN = "hf_" + "aB3" * 12


@pytest.mark.parametrize(
    ("flag", "value", "secret"),
    [
        ("--data", f"https://user:{HUB_TOKEN}@huggingface.co/datasets/a/b", HUB_TOKEN),
        ("--run-name", "k" * 40, "k" * 40),
        ("--hub-token", HUB_TOKEN, HUB_TOKEN),
    ],
)
def test_a_flag_or_a_file_that_holds_a_secret_is_refused_and_does_not_show_it(
    flag, value, secret, monkeypatch, tmp_path
):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    (tmp_path / "a.yaml").write_text(f"data: {value}\n")
    for argv, named in (
        ([flag, value], flag),
        ([f"{flag}={value}"], flag),
        (["--config", f"{tmp_path}/a.yaml"], "--data"),
    ):
        with pytest.raises(UserError, match="holds a token or a login") as caught:
            parse_args(["--mode", "lora", *argv])
        assert str(caught.value).startswith(f"{named}: ")
        assert secret not in str(caught.value)


def test_messages_of_libraries_are_masked():
    environ = {"HF_TOKEN": "a-token-of-the-hub", "API_KEY": "short", "PATH": "/usr/bin/and/more"}
    text = "401 for https://u:p@hub/a with a-token-of-the-hub (short, /usr/bin/and/more, a@b, hf_internal_testing)"
    masked = "401 for https://***@hub/a with *** (short, /usr/bin/and/more, a@b, hf_internal_testing)"
    assert mask_credentials(text, environ) == masked
    assert HUB_TOKEN not in str(UserError(f"the hub says {HUB_TOKEN}"))
