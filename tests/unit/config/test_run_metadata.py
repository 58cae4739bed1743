"""run.json is read by one reader: whatever stands there, the answer is its content or one line."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.any_inputs import JSON_VALUES, check_inputs, many_inputs
from hypothesis import strategies as st

from tests.helpers.fake_runs import make_metadata
from trainer.config.errors import UserError
from trainer.config.run_metadata import read_run_metadata
from trainer.config.settings import Settings

METADATA = json.loads(json.dumps(make_metadata("lora")))
ABSENT = object()


def list_paths(value: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of nested objects, as a path."""
    if not isinstance(value, dict):
        return []
    return [path for key, item in value.items() for path in ((*prefix, key), *list_paths(item, (*prefix, key)))]


def read_edited(folder: Path, *changes: tuple[Any, Any]) -> dict[str, Any]:
    """What is read of METADATA with other values at paths (with dots, or as keys), or without them, or gone before."""
    metadata = copy.deepcopy(METADATA)
    for path, value in changes:
        *sections, key = path.split(".") if isinstance(path, str) else path
        section: Any = metadata
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(key, None)
            section |= {} if value is ABSENT else {key: value}
    (folder / "run.json").write_text(json.dumps(metadata))
    return read_run_metadata(folder / "run.json")


@pytest.mark.parametrize(
    ("path", "value", "answer"),
    [
        ("data.fingerprint", ABSENT, "data.fingerprint is missing; expected what a run writes"),
        ("settings.lora", {}, "settings.lora.adapter is missing; expected what a run writes"),
        ("schema_version", 2, "schema_version is 2, expected 6; the run was written by another version"),
        ("model.trainable", 0, "model.trainable is 0; expected a whole number from 1"),
        ("settings.lora.rank", True, "settings.lora.rank is true; expected a whole number from 1"),
        ("settings.train.unknown", 1, "settings.train.unknown is 1; expected no setting of this name"),
        ("settings.data.data", "a\0b", 'settings.data.data is "a\\u0000b"; expected a name'),
        ("settings.mode", "full", "mode is lora; expected that of settings, full"),
        ("settings.model.quant_double", True, "settings: --quant-double: expected with --quant nf4"),
        ("execution", [{}], "execution.0.path is missing; expected what a run writes"),
        ("run_id", "../x", 'run_id is "../x"; expected 1 to 64 letters, digits, _ and -'),
        ("resumed", {"settings": METADATA["settings"], "changed": []}, "resumed.changed is []; expected an object"),
    ],
)
def test_a_damaged_run_json_is_one_line_that_names_key_found_and_expected(path, value, answer, tmp_path):
    with pytest.raises(UserError) as caught:
        read_edited(tmp_path, (path, value))
    assert str(caught.value).startswith(f"{tmp_path}/run.json: {answer}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (b"[]", "not a JSON object; expected one"),
        (b'{"format": 1}', "schema_version is 1, expected 6; the run was written by another version"),
        *((text, "not JSON") for text in (b"", b"9" * 5000, b"[" * 200_000, b'{"schema_version": NaN}')),
        (b"\xff", "cannot be read (not UTF-8); expected JSON"),
    ],
)
def test_a_file_that_is_no_run_json_is_refused(content, answer, tmp_path):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_run_metadata(tmp_path / "run.json")
    assert str(caught.value).startswith(f"{tmp_path}/run.json: {answer}")


@many_inputs(100)
def test_any_edit_of_run_json_is_accepted_or_one_line(num_inputs, tmp_path):
    """What is accepted can be made settings of."""

    def check(changes):
        message = f"{tmp_path}/run.json: "
        try:
            accepted = read_edited(tmp_path, *changes)
            assert Settings(**accepted["settings"]).as_dict().keys() == METADATA["settings"].keys()
        except UserError as error:
            message = str(error)
        assert message.startswith(f"{tmp_path}/run.json: ")
        assert "\n" not in message

    change = st.tuples(st.sampled_from(list_paths(METADATA)), st.just(ABSENT) | JSON_VALUES)
    check_inputs(num_inputs, check, st.lists(change, max_size=3))
