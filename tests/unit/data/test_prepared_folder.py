"""Prepared data are what was written, or are made anew: every byte is covered by a hash, facts.json by its own."""

import json
import os
import shutil
import time

import numpy as np
import pytest
from helpers.any_inputs import JSON_VALUES, check_inputs, many_inputs
from helpers.data_helpers import write_records
from hypothesis import strategies as st

from trainer.config.errors import UserError
from trainer.data import dataset as store
from trainer.data.dataset import load
from trainer.data.tokenizer import load_tokenizer

PAIRS = [{"mr": f"Town {i}", "ref": f"On {i} January people met in Town {i}."} for i in range(60)]
TEMPLATES = {"prompt": "{mr}:", "completion": " {ref}"}


@pytest.fixture
def prepare_pairs(tmp_path, prepare_file):
    """Prepare the pairs; returns the data and the lines that were said."""
    file = write_records(tmp_path / "a.csv", PAIRS)

    def prepare_again(**settings):
        lines: list[str] = []
        return prepare_file(file, log=lines.append, **{**TEMPLATES, **settings}), lines

    return prepare_again


def flip_byte(path):
    """Change one byte and leave size and modification time as they were."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [flip_byte, replace_by_pipe, os.unlink, lambda path: os.truncate(path, 10)])
def test_damage_of_any_file_is_noticed_not_waited_for_and_the_data_are_made_anew(prepare_pairs, damage):
    data, lines = prepare_pairs(objective="completion")
    folder, expected, ids = data.folder, data.metadata, np.array(data.train.ids)
    assert lines == []
    names = sorted(path.name for path in folder.iterdir() if path.stat().st_size)
    assert {"train.ids.bin", "val.mask.bin", "val.rows.parquet", "facts.json"} <= set(names)
    for name in names:
        damage(folder / name)
        if name == "facts.json" or (damage is not flip_byte and "rows" not in name):
            with pytest.raises(ValueError, match=folder.name):
                load(folder)
        again, lines = prepare_pairs(objective="completion")
        assert len(lines) == 1, name
        assert lines[0].startswith("prepared data are damaged and are made anew (")
        assert again.metadata == expected
        assert np.array_equal(again.train.ids, ids)
        assert os.listdir(folder.parent) == [folder.name]


@many_inputs(100)
def test_any_content_for_the_facts_is_refused(tmp_path, num_inputs):
    def check(content):
        (tmp_path / "facts.json").write_bytes(content)
        with pytest.raises(ValueError, match="is not prepared data"):
            store.read_manifest(tmp_path)

    objects = st.dictionaries(st.sampled_from(["facts", "dtype", "sha256", "checksum"]), JSON_VALUES)
    check_inputs(num_inputs, check, st.binary(max_size=200) | objects.map(lambda value: json.dumps(value).encode()))


def test_a_long_preparation_says_how_far_it_is(prepare_pairs, monkeypatch):
    monkeypatch.setattr("trainer.data.prepare.LOG_SECONDS", 0.0)
    lines = prepare_pairs()[1]
    assert lines[-1].startswith("tokenising "), lines
    assert lines[-1].endswith("a.csv: 60 records so far")


def test_the_same_contents_are_prepared_once_whatever_they_are_called(
    prepare_pairs, prepare_file, tmp_path, monkeypatch
):
    first, _ = prepare_pairs()
    monkeypatch.setattr("trainer.data.prepare.write_rows", None)  # making them again would fail
    shutil.copy(tmp_path / "a.csv", tmp_path / "b.csv")
    again = prepare_file(tmp_path / "b.csv", **TEMPLATES)
    assert again.folder == first.folder
    assert again.metadata == {**first.metadata, "source": str(tmp_path / "b.csv")}
    assert np.array_equal(again.train.ids, first.train.ids)
    assert isinstance(load(first.folder).train.ids, np.memmap)


def test_changed_contents_tokenizer_or_settings_are_prepared_again(prepare_pairs, tmp_path, model):
    other = load_tokenizer(model)
    other.add_tokens(["January"])
    other.save_pretrained(tmp_path / "other")
    changes = [{}, {"prompt": "{mr}"}, {"block_size": 31}, {"val_fraction": 0.2}, {"objective": "blocks"}]
    folders = [prepare_pairs(**change)[0].folder for change in [*changes, {"model": str(tmp_path / "other")}]]
    write_records(tmp_path / "a.csv", PAIRS[1:])
    assert len({*folders, prepare_pairs()[0].folder}) == 7


def test_a_killed_preparation_is_never_taken_for_whole_nor_in_the_way(tmp_path, prepare_pairs, monkeypatch):
    if (child := os.fork()) == 0:
        monkeypatch.setattr(store.SplitWriter, "close", lambda self: os.kill(os.getpid(), 9))
        try:
            prepare_pairs()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 9
    (left,) = (tmp_path / "cache" / "prepared").iterdir()
    assert left.name.startswith(".")
    with pytest.raises(ValueError, match="is not prepared data"):
        load(left)
    prepared, _ = prepare_pairs()
    assert prepared.metadata["train"]["records"] + prepared.metadata["val"]["records"] == 60


def test_several_processes_may_prepare_the_same_data_at_once(tmp_path, prepare_pairs):
    folder = prepare_pairs()[0].folder
    copy = tmp_path / "copy"
    shutil.move(folder, copy)
    killed = folder.with_name(f".{folder.name}.0123456789ab.tmp")
    killed.mkdir()
    os.utime(killed, (0, time.time() - 2 * store.ABANDONED_SECONDS))

    def fill(temp_folder, name):
        shutil.copytree(copy, temp_folder, dirs_exist_ok=True)
        (temp_folder / "facts.json").unlink()
        if name == "late":  # another one finishes while this one is still writing
            store.load_or_build(folder, lambda other: fill(other, "early"), source="x", log=print)
        manifest = store.read_manifest(copy)
        return {**manifest, "val_texts": [("made by", name)]}

    prepared = store.load_or_build(folder, lambda other: fill(other, "late"), source="x", log=print)
    assert prepared.val_texts[0][1] == "early"
    assert os.listdir(folder.parent) == [folder.name], "nor what a process left that was killed long ago"


def test_the_cache_folder_follows_the_environment_and_is_refused_where_it_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.delenv("TRAINER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.resolve_cache_dir() == tmp_path / "xdg" / "gpt2-full-vs-lora"
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "mine"))
    assert store.resolve_cache_dir() == tmp_path / "mine"
    (tmp_path / "file").touch()
    for name, problem in (
        ("file/x", "cannot be written .*TRAINER_CACHE"),
        ("\udcff", "TRAINER_CACHE.: its path is not"),
    ):
        monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / name))
        with pytest.raises(UserError, match=problem):
            store.resolve_cache_dir()
