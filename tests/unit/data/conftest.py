"""What the tests of the data room share."""

import pytest
from helpers import data_helpers as samples

from trainer.config.errors import UserError
from trainer.config.settings import DataSettings
from trainer.data.prepare import prepare


@pytest.fixture(scope="package")
def model(tmp_path_factory):
    return str(samples.make_tokenizer(tmp_path_factory.mktemp("model")))


@pytest.fixture
def refusal_message(tmp_path, model, monkeypatch):
    """Prepare `data` in the folder of the test and return the one line it is refused with."""
    monkeypatch.chdir(tmp_path)

    def prepare_refused(data, **settings):
        options = {"block_size": 16, "prompt": "{mr}", "completion": "{ref}", **settings}
        with pytest.raises(UserError) as error_info:
            prepare(DataSettings(data=data, **options), model=model, global_batch=2, cache=tmp_path / "cache")
        assert "\n" not in str(error_info.value)
        assert not list((tmp_path / "cache").glob("prepared/*"))
        return str(error_info.value)

    return prepare_refused
