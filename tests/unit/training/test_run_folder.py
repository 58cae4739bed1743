"""What run.json says of the resumes of a run, and from what it may be resumed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.engines import save_stub_checkpoint
from helpers.fake_runs import make_metadata

from trainer.config.errors import UserError
from trainer.config.settings import Settings
from trainer.training.run_folder import _allowed_changes, find_resume_source


def test_that_rows_were_once_changed_is_told_after_every_later_resume():
    previous: dict[str, Any] = make_metadata("full")
    settings, changed = Settings(**previous["settings"]), {"records": ["as written", "a row was changed"]}
    previous["resumed"] = {"settings": previous["settings"], "changed": changed}
    fixed = {**settings.fixed_on_resume(), "model_config": None}
    data, precision = previous["data"]["fingerprint"], previous["resolved"]["precision"]
    identity = {"fixed": fixed, "data": data, "precision": precision}
    plan: Any = SimpleNamespace(checkpoint_identity=lambda: identity)
    assert _allowed_changes(previous, plan, None, ()) == changed


def test_the_checkpoint_of_another_model_is_refused(tmp_path: Path):
    save_stub_checkpoint(tmp_path / "checkpoints", 4)
    with pytest.raises(UserError, match=r"step-000004 is of a run on another base model \(test, here other\)"):
        find_resume_source(tmp_path, "latest", base="other", allows_records=False)
