"""What a push needs is found before slow work; what cannot work is one line without the token."""

import huggingface_hub.constants
import pytest
from helpers.fake_hub import TOKEN, fake_hub

from trainer.config.errors import TrainingError, UserError
from trainer.export.folder import check_push, push_folder


@pytest.mark.parametrize("name", ["small", "a/b/c", "../small", "me/" + 99 * "a"])
def test_a_name_that_is_no_repository_is_refused(name):
    with pytest.raises(UserError, match="expected NAMESPACE/NAME"):
        check_push(name)


def test_a_push_that_cannot_work_is_one_line_without_the_token(monkeypatch, tmp_path):
    with fake_hub() as hub:
        check_push("me/small")
        hub.refuses = True
        with pytest.raises(UserError, match="the hub does not take the login") as refused:
            check_push("me/small")
        with pytest.raises(TrainingError, match="the checked folder is") as failed:
            push_folder(tmp_path, "me/small", is_private=False)
        with monkeypatch.context() as patch:  # else the tests after this one would ask the real hub
            patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
            with pytest.raises(UserError, match="HF_HUB_OFFLINE") as offline:
                check_push("me/small")
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(UserError, match="not logged in; expected HF_TOKEN") as anonymous:
            check_push("me/small")
    for error in (refused, failed, anonymous, offline):
        assert TOKEN not in str(error.value)
        assert "\n" not in str(error.value)
