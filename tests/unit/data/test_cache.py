"""Prepared data are what was written, or are made anew: every byte is covered by a hash, facts.json by its own."""

import json
import os

import numpy as np
import pytest
from helpers import data_helpers as samples
from helpers.any_inputs import JSON_VALUES, check_inputs, many_inputs
from hypothesis import strategies as st

from trainer.config.errors import UserError
from trainer.config.schema import DataSettings
from trainer.data import cache as store
from trainer.data.dataset import load
from trainer.data.prepare import prepare

PAIRS = [{"mr": f"Town {i}:", "ref": f" On {i} January people met."} for i in range(60)]


@pytest.fixture
def prepare_pairs(tmp_path, model):
    """Prepare the pairs; returns the data and the lines that were said."""
    file = samples.write_csv(tmp_path / "a.csv", PAIRS)

    def prepare_again(objective="completion"):
        lines: list[str] = []
        data = DataSettings(data=str(file), block_size=32, prompt="{mr}", completion="{ref}", objective=objective)
        return prepare(data, model=model, global_batch=2, cache=tmp_path / "cache", log=lines.append), lines

    return prepare_again


def flip_byte(path, position):
    """Change one byte and leave size and modification time as they were."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("objective", ["blocks", "completion"])
def test_a_flipped_byte_of_any_file_is_noticed_and_the_data_are_made_anew(prepare_pairs, objective):
    data, lines = prepare_pairs(objective)
    folder, expected, ids = data.folder, data.metadata, np.array(data.train.ids)
    assert lines == []
    names = sorted(path.name for path in folder.iterdir() if path.stat().st_size)
    assert {"train.ids.bin", "val.first.bin", "train.offsets.bin", "val.rows.parquet", "facts.json"} <= set(names)
    for name in names:
        flip_byte(folder / name, (folder / name).stat().st_size // 2)
        again, lines = prepare_pairs(objective)
        assert len(lines) == 1, name
        assert lines[0].startswith("prepared data are damaged and are made anew (")
        assert again.metadata == expected
        assert np.array_equal(again.train.ids, ids)
        assert os.listdir(folder.parent) == [folder.name]


def test_hashes_are_remembered_while_a_file_does_not_change(prepare_pairs, monkeypatch):
    monkeypatch.setattr(store, "SETTLE_SECONDS", -1.0)
    folder = prepare_pairs()[0].folder
    hashed = []
    whole = store.sha256
    monkeypatch.setattr(store, "sha256", lambda file: hashed.append(file.name) or whole(file))
    prepare_pairs()
    assert "train.ids.bin" in hashed
    hashed.clear()
    prepare_pairs()
    assert hashed == []
    flip_byte(folder / "train.ids.bin", 5)
    assert prepare_pairs()[1] != []
    hashed.clear()
    flip_byte(folder / "val.ids.bin", 5)
    assert prepare_pairs()[1] != []


DAMAGES = {
    "no val_texts": lambda c: c.pop("val_texts"),
    "no pad_id": lambda c: c.pop("pad_id"),
    "no fingerprint": lambda c: c["facts"].pop("fingerprint"),
    "val_texts wrong": lambda c: c.update(val_texts=7),
    "val_texts of numbers": lambda c: c.update(val_texts=[1, 2]),
    "dtype wrong": lambda c: c.update(dtype="object"),
    "counts wrong": lambda c: c["facts"]["train"].update(examples=-1),
    "a path out of the folder": lambda c: c["sha256"].update({"../../x": "0" * 64}),
    "no facts": lambda c: c.update(facts=None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_wrong_facts_are_refused_even_with_a_right_checksum(prepare_pairs, damage):
    data, _ = prepare_pairs()
    content = json.loads((data.folder / "facts.json").read_text())
    del content["checksum"]
    DAMAGES[damage](content)
    content["checksum"] = store.content_checksum(content)
    (data.folder / "facts.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not prepared data"):
        load(data.folder)
    assert prepare_pairs()[0].metadata == data.metadata


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


INCOMPLETE = {
    "no facts": ("facts.json", os.unlink),
    "half facts": ("facts.json", lambda path: os.truncate(path, 100)),
    "a pipe for facts": ("facts.json", replace_by_pipe),
    "other format": ("facts.json", lambda p: p.write_text(json.dumps({**json.loads(p.read_text()), "format": -1}))),
    "short ids": ("train.ids.bin", lambda path: os.truncate(path, 10)),
    "a pipe for ids": ("train.ids.bin", replace_by_pipe),
    "no offsets": ("val.offsets.bin", os.unlink),
}


@pytest.mark.parametrize(("name", "damage"), INCOMPLETE.values(), ids=INCOMPLETE)
def test_an_incomplete_folder_is_refused_not_waited_for_and_made_anew(prepare_pairs, name, damage):
    data, _ = prepare_pairs()
    folder, expected, ids = data.folder, data.metadata, np.array(data.train.ids)
    damage(folder / name)
    with pytest.raises(ValueError, match=folder.name):
        load(folder)
    again, _ = prepare_pairs()
    assert again.metadata == expected
    assert np.array_equal(again.train.ids, ids)
    assert os.listdir(folder.parent) == [folder.name]


def test_a_pipe_in_the_place_of_the_rows_columns_is_not_waited_for(prepare_pairs):
    data, _ = prepare_pairs()
    replace_by_pipe(data.folder / "val.rows.parquet")
    assert prepare_pairs()[0].metadata == data.metadata


def test_a_folder_whose_path_is_not_utf8_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"TRAINER_CACHE\): its path is not UTF-8; name another folder"):
        store.resolve_cache_dir(tmp_path / "\udcff")


@pytest.fixture(scope="module")
def facts_folder(tmp_path_factory, model):
    """facts.json of the demo, in the folder where tests write others."""
    data = DataSettings(data="acled-demo", block_size=64)
    folder = prepare(data, model=model, global_batch=2, cache=tmp_path_factory.mktemp("facts")).folder
    return folder


def check_any_facts(facts_folder, place, value):
    """facts.json with one value in another's place is read or refused by ValueError, never anything else."""
    content = json.loads((facts_folder / "facts.json").read_text())
    target = content
    *parents, last = place
    for key in parents:
        target = target[key]
    target[last] = value
    content.pop("checksum", None)
    content["checksum"] = store.content_checksum(content)
    (facts_folder / "changed").mkdir(exist_ok=True)
    (facts_folder / "changed" / "facts.json").write_text(json.dumps(content))
    try:
        manifest = store.read_manifest(facts_folder / "changed")
    except ValueError:
        return
    expected = store.read_manifest(facts_folder)
    assert all(isinstance(value, type(getattr(expected, name))) for name, value in manifest)


PLACES = st.sampled_from(
    [
        *((name,) for name in ("dtype", "pad_id", "val_texts", "facts", "sha256", "format")),
        *(("facts", *names) for names in (("train",), ("val", "examples"), ("fingerprint",), ("test", "tokens"))),
        ("sha256", "train.ids.bin"),
    ]
)


@many_inputs(300)
def test_any_value_in_the_facts_is_read_or_refused(facts_folder, num_inputs):
    check_inputs(num_inputs, lambda place, value: check_any_facts(facts_folder, place, value), PLACES, JSON_VALUES)


@many_inputs(200)
def test_any_bytes_for_the_facts_are_refused(tmp_path, num_inputs):
    def check(content):
        (tmp_path / "facts.json").write_bytes(content)
        with pytest.raises(ValueError, match="is not prepared data"):
            store.read_manifest(tmp_path)

    check_inputs(num_inputs, check, st.binary(max_size=200))
