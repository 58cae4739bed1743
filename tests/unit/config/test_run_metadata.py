"""run.json is read by one reader: whatever stands there, the answer is its content or one line."""

import copy
import json
from typing import Any

import pytest
from helpers.any_inputs import JSON_VALUES, check_inputs, many_inputs
from hypothesis import strategies as st

from tests.helpers.fake_runs import make_metadata
from trainer.config.errors import UserError, escape_controls
from trainer.config.run_metadata import check_run_metadata, read_run_metadata
from trainer.config.settings import Settings

METADATA = json.loads(json.dumps(make_metadata("lora")))


def list_paths(value: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of nested objects, as a path."""
    if not isinstance(value, dict):
        return []
    return [path for key, item in value.items() for path in ((*prefix, key), *list_paths(item, (*prefix, key)))]


PATHS = list_paths(METADATA)


def edit(path: str, value: Any = ...) -> dict[str, Any]:
    """METADATA with another value at a dotted path, or without it."""
    metadata = copy.deepcopy(METADATA)
    *sections, key = path.split(".")
    section = metadata
    for name in sections:
        section = section[name]
    if value is ...:
        del section[key]
    else:
        section[key] = value
    return metadata


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_what_a_run_writes_is_read_back_whole(mode, tmp_path):
    metadata = json.loads(json.dumps(make_metadata(mode)))
    (tmp_path / "run.json").write_text(json.dumps(metadata))
    assert read_run_metadata(tmp_path / "run.json") == metadata
    assert Settings.from_dict(metadata["settings"]).mode == mode


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ([], "not a JSON object; expected one"),
        (3, "not a JSON object; expected one"),
        (None, "not a JSON object; expected one"),
        ({}, "schema_version is missing; expected what a run writes"),
        ({**METADATA, "schema_version": 2}, "schema_version is 2, expected 3; the run was written by another version"),
        ({"format": 1, "settings": {}}, "schema_version is 1, expected 3; the run was written by another version"),
        (edit("settings"), "settings is missing; expected what a run writes"),
        (edit("data"), "data is missing; expected what a run writes"),
        (edit("data.fingerprint"), "data.fingerprint is missing; expected what a run writes"),
        (edit("model.trainable", 0), "model.trainable is 0; expected a whole number from 1"),
        (edit("data.train.examples", "9"), 'data.train.examples is "9"; expected a whole number'),
        (edit("resolved.precision"), "resolved.precision is missing; expected what a run writes"),
        (edit("settings", None), "settings is null; expected an object"),
        (edit("settings.train", []), "settings.train is a list; expected an object"),
        (edit("settings.train"), "settings.train is missing; expected what a run writes"),
        (edit("settings.train.lr"), "settings.train.lr is missing; expected what a run writes"),
        (edit("settings.train.seed"), "settings.train.seed is missing; expected what a run writes"),
        (edit("settings.lora", {}), "settings.lora.rank is missing; expected what a run writes"),
        (edit("settings.train.lr", "x"), 'settings.train.lr is "x"; expected a number above 0'),
        (edit("settings.train.lr", None), "settings.train.lr is null; expected a number above 0"),
        (edit("settings.train.lr", -1), "settings.train.lr is -1; expected a number above 0"),
        (edit("settings.train.lr", 10**400), "settings.train.lr is 100000000000000000000000000000000000000…; expect"),
        (edit("data.train.examples", 10**400), "data.train.examples is 100000000000000000000000000000000000000…"),
        (edit("settings.lora.rank", [8]), "settings.lora.rank is a list; expected a whole number from 1"),
        (edit("settings.lora.rank", True), "settings.lora.rank is true; expected a whole number from 1"),
        (edit("settings.train.unknown", 1), "settings.train.unknown is 1; expected no setting of this name"),
        (edit("settings.data.data", "a\0b"), 'settings.data.data is "a\\u0000b"; expected a file'),
        (edit("settings.mode", "full"), "mode is 'lora'; expected that of settings, full"),
        (edit("settings.model.quant_double", True), "settings: --quant-double: expected with --quant nf4 or fp4"),
        (edit("wandb", "x"), 'wandb is "x"; expected an object'),
        (edit("run_id", "../x"), 'run_id is "../x"; expected 1 to 64 letters, digits, _ and -'),
        (edit("run_id", "a\nb"), 'run_id is "a\\nb"; expected 1 to 64 letters, digits, _ and -'),
        (edit("run_id"), "run_id is missing; expected what a run writes"),
        (edit("wandb.id", "<b>"), 'wandb.id is "<b>"; expected 1 to 64 letters, digits, _ and -'),
        (edit("wandb.project", "a/b"), 'wandb.project is "a/b"; expected a name of at most 128 characters without'),
        (edit("wandb.mode", "x"), 'wandb.mode is "x"; expected online, offline or disabled'),
        (edit("versions.torch", 3), "versions.torch is 3; expected a text"),
        (b"", "not JSON"),
        (b'{"mode": "fu', "not JSON"),
        (b"\xff", "not JSON"),
        (b"9" * 5000, "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"schema_version": NaN}', "not JSON (NaN is not JSON)"),
        (edit("resumed", {}), "resumed.settings is missing; expected what a run writes"),
        (edit("resumed", {"settings": METADATA["settings"], "changed": []}), "resumed.changed is a list; expected"),
    ],
)
def test_a_damaged_run_json_is_one_line_that_names_key_found_and_expected(content, answer, tmp_path):
    path = tmp_path / "run.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(UserError) as caught:
        read_run_metadata(path)
    assert str(caught.value).startswith(f"{path}: {answer}")
    assert "\n" not in str(caught.value)


def test_a_folder_without_run_json_or_with_something_else_in_its_place_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no run\.json there; expected a run folder"):
        read_run_metadata(tmp_path / "run.json")
    (tmp_path / "run.json").mkdir()
    with pytest.raises(UserError, match="not a regular file; expected JSON"):
        read_run_metadata(tmp_path / "run.json")


EDITS = st.lists(st.tuples(st.sampled_from(PATHS), st.none() | JSON_VALUES.map(lambda v: [v])), max_size=3)


@many_inputs(200)
def test_any_edit_of_run_json_is_accepted_or_one_line(num_inputs):
    check_inputs(num_inputs, check_edited, EDITS)


def check_edited(edits: list[tuple[list[str], list[Any] | None]]) -> None:
    """An edit removes a key (None) or puts a value there; what is accepted can be made settings of."""
    metadata = copy.deepcopy(METADATA)
    for (*sections, key), replacement in edits:
        section: Any = metadata
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(key, None)
            if replacement is not None:
                section[key] = replacement[0]
    accepted, message = None, "run.json: "
    try:
        accepted = check_run_metadata(json.loads(json.dumps(metadata)), source="run.json")
    except UserError as error:
        message = escape_controls(str(error))
    assert message.startswith("run.json: ")
    assert "\n" not in message
    if accepted is not None:
        assert Settings.from_dict(accepted["settings"]).as_dict().keys() == METADATA["settings"].keys()


@many_inputs(200)
def test_any_content_of_the_file_is_one_line(num_inputs, tmp_path):
    def check(content):
        (tmp_path / "run.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        with pytest.raises(UserError) as caught:
            read_run_metadata(tmp_path / "run.json")
        assert "\n" not in escape_controls(str(caught.value))

    check_inputs(num_inputs, check, JSON_VALUES | st.binary(max_size=40))
