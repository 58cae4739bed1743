"""A push reaches the stand-in whole, with its token, which appears nowhere else; what cannot work is one line."""

import huggingface_hub.constants
import pytest
from helpers.fake_hub import TOKEN, fake_hub

from trainer.config.errors import TrainingError, UserError
from trainer.export.folder import check_push, push_folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("# a model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\x01" * 3000)
    return tmp_path / "model"


@pytest.mark.parametrize("is_private", [False, True])
def test_a_push_uploads_every_file_to_the_repository(folder, is_private, capsys):
    with fake_hub() as hub:
        check_push("me/small")
        assert push_folder(folder, "me/small", is_private=is_private) == f"{hub.url}/me/small"
        assert hub.files == {"me/small": {path.name: path.read_bytes() for path in folder.iterdir()}}
        assert hub.created[0].get("visibility") == ("private" if is_private else None)
        assert f"Bearer {TOKEN}" in hub.tokens
    assert TOKEN not in "".join(capsys.readouterr())


@pytest.mark.parametrize("name", ["small", "me/", "me/sm all", "../small"])
def test_a_name_that_is_no_repository_is_refused(name):
    with fake_hub(), pytest.raises(UserError, match="expected NAMESPACE/NAME"):
        check_push(name)


def test_a_push_that_cannot_work_is_one_line_without_the_token(folder, monkeypatch, tmp_path):
    with fake_hub() as hub:
        hub.refuses = True
        with pytest.raises(UserError, match="the hub refuses the login") as refused:
            check_push("me/small")
        with pytest.raises(TrainingError, match="the checked folder is") as failed:
            push_folder(folder, "me/small", is_private=False)
        for error in (refused, failed):
            assert TOKEN not in str(error.value)
            assert "\n" not in str(error.value)
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(UserError, match="not logged in; expected HF_TOKEN"):
            check_push("me/small")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
            check_push("me/small")
