"""The embedded events are those that numbers were measured on, and a stranger to the base's text."""

import hashlib
import json

import pytest
from helpers.data_helpers import read_records

from trainer.data.formats import format_prompt
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


def test_the_base_s_text_shares_no_line_and_no_name_with_the_demo_data():
    rows = read_records(DEMO_FILES["acled-demo"])
    documents = [record["text"] for record in read_records(DEMO_FILES["demo-base"])]
    lines = {line.strip() for document in documents for line in document.splitlines()}
    events = [f"{format_prompt(row)} {row['notes']}" for row in rows]
    assert not lines & {line.strip() for event in events for line in event.splitlines()}
    words = {word.strip(".,:;()") for document in documents for word in document.split()}
    names = {row[column] for row in rows for column in ("country", "admin1", "location")}
    names |= {source.split()[0] for row in rows for source in row["source"].split("; ")}
    assert len(names) > 300
    assert not words & names
