"""Prepared data are what was written, or are made anew: every byte is covered by a hash, facts.json by its own."""

import json
import os

import numpy as np
import pytest
from helpers import data_helpers as samples
from helpers.any_inputs import JSON_VALUES, check_inputs, many_inputs
from hypothesis import strategies as st

from trainer.config.settings import DataSettings
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


def write_facts(folder, content):
    """facts.json with this content and the checksum that belongs to it."""
    content.pop("checksum", None)
    content["checksum"] = store.content_checksum(content)
    folder.mkdir(exist_ok=True)
    (folder / "facts.json").write_text(json.dumps(content))


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


#: What is done to the content of facts.json, whose checksum is made right again.
CHANGES = {
    "no val_texts": lambda c: c.pop("val_texts"),
    "no pad_id": lambda c: c.pop("pad_id"),
    "no fingerprint": lambda c: c["facts"].pop("fingerprint"),
    "val_texts wrong": lambda c: c.update(val_texts=7),
    "val_texts of numbers": lambda c: c.update(val_texts=[1, 2]),
    "dtype wrong": lambda c: c.update(dtype="object"),
    "other format": lambda c: c.update(format=-1),
    "counts wrong": lambda c: c["facts"]["train"].update(examples=-1),
    "a path out of the folder": lambda c: c["sha256"].update({"../../x": "0" * 64}),
    "no facts": lambda c: c.update(facts=None),
}
#: (file, what is done to it); only the first reading of the columns of the rows notices what happened to them.
DAMAGES = {
    "no file of facts": ("facts.json", os.unlink),
    "half facts": ("facts.json", lambda path: os.truncate(path, 100)),
    "a pipe for facts": ("facts.json", replace_by_pipe),
    "short ids": ("train.ids.bin", lambda path: os.truncate(path, 10)),
    "a pipe for ids": ("train.ids.bin", replace_by_pipe),
    "no offsets": ("val.offsets.bin", os.unlink),
    "a pipe for the columns of the rows": ("val.rows.parquet", replace_by_pipe),
}


@pytest.mark.parametrize("damage", [*CHANGES, *DAMAGES])
def test_a_damaged_folder_is_refused_not_waited_for_and_made_anew(prepare_pairs, damage):
    data, _ = prepare_pairs()
    folder, expected, ids = data.folder, data.metadata, np.array(data.train.ids)
    if damage in CHANGES:
        content = json.loads((folder / "facts.json").read_text())
        CHANGES[damage](content)
        write_facts(folder, content)
    else:
        name, do_damage = DAMAGES[damage]
        do_damage(folder / name)
    if "rows" not in damage:
        with pytest.raises(ValueError, match=folder.name):
            load(folder)
    again, _ = prepare_pairs()
    assert again.metadata == expected
    assert np.array_equal(again.train.ids, ids)
    assert os.listdir(folder.parent) == [folder.name]


@pytest.fixture(scope="module")
def facts_folder(tmp_path_factory, model):
    """facts.json of the demo, in the folder where tests write others."""
    data = DataSettings(data="acled-demo", block_size=64)
    return prepare(data, model=model, global_batch=2, cache=tmp_path_factory.mktemp("facts")).folder


def check_any_facts(facts_folder, place, value):
    """facts.json with one value in another's place is read or refused by ValueError, never anything else."""
    content = json.loads((facts_folder / "facts.json").read_text())
    target = content
    *parents, last = place
    for key in parents:
        target = target[key]
    target[last] = value
    write_facts(facts_folder / "changed", content)
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
