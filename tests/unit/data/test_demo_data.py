"""The embedded texts are those that numbers were measured on, which are strangers to one another."""

import hashlib
import json

import pytest
from helpers.data_helpers import read_records

from trainer.data.sources import DEMO_FILES


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("acled-demo", "c7a72d79e6e4f59f502cde73aed3afb9af9f12e7dbe0de525907325e2cc9607a"),
        ("demo-base", "624041d36014f765fb59e3b1e4f0acaae1fcb5945edc41c4e001627da0db05af"),
    ],
)
def test_the_demo_texts_are_those_on_which_every_number_was_measured(name, digest):
    """README reports numbers of these texts: a change of them comes with all of those measured again."""
    records = [{key: value or "" for key, value in record.items()} for record in read_records(DEMO_FILES[name])]
    assert hashlib.sha256(json.dumps(records).encode()).hexdigest() == digest
