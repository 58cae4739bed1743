"""What the tests of the data room share."""

import pytest
from helpers import data_helpers as samples
from helpers.data_helpers import write_records

from trainer.config.errors import UserError
from trainer.config.settings import DataSettings
from trainer.data.prepare import prepare


@pytest.fixture(scope="package")
def model(tmp_path_factory):
    return str(samples.make_tokenizer(tmp_path_factory.mktemp("model")))


@pytest.fixture
def prepare_file(tmp_path, model, monkeypatch):
    """Prepare a file with the cache in the folder of the test."""
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))

    def prepare_with_cache(data, model=model, global_batch=2, log=lambda line: None, **settings):
        options = {"data": str(data), "block_size": 32, **settings}
        if isinstance(options.get("val_data"), str):
            options["val_data"] = (options["val_data"],)
        return prepare(DataSettings(**options), model=model, global_batch=global_batch, log=log)

    return prepare_with_cache


@pytest.fixture
def refusal_message(tmp_path, prepare_file, monkeypatch):
    """The one line with which `data` in the folder of the test is refused; `files`: {name: records, text or bytes}."""
    monkeypatch.chdir(tmp_path)

    def prepare_refused(data, files=None, **settings):
        for name, content in (files or {}).items():
            write_records(tmp_path / name, content)
        with pytest.raises(UserError) as error_info:
            prepare_file(data, **{"prompt": "{mr}", "completion": "{ref}", **settings})
        assert "\n" not in str(error_info.value)
        assert not list((tmp_path / "cache").glob("prepared/*"))
        return str(error_info.value)

    return prepare_refused
