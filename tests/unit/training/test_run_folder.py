"""What run.json says of the resumes of a run."""

from types import SimpleNamespace
from typing import Any

from helpers.fake_runs import make_metadata

from trainer.config.settings import Settings
from trainer.training.run_folder import _allowed_changes


def test_that_rows_were_once_changed_is_told_after_every_later_resume():
    previous: dict[str, Any] = make_metadata("full")
    settings, changed = Settings.from_dict(previous["settings"]), {"records": ["as written", "a row was changed"]}
    previous["resumed"] = {"settings": previous["settings"], "changed": changed}
    fixed = {**settings.fixed_on_resume(), "model_config": None}
    data, precision = {"fingerprint": previous["data"]["fingerprint"]}, previous["resolved"]["precision"]
    plan: Any = SimpleNamespace(fixed_on_resume=lambda: fixed, data_info=data, precision=precision)
    assert _allowed_changes(previous, plan, None, ()) == changed
