"""From records to rows on disk: blocks and completions, the validation split, and the cache."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import data_helpers as samples

from trainer.config import cli
from trainer.config.choices import MAX_NUM_SAMPLES
from trainer.config.errors import UserError
from trainer.config.run_metadata import DataBlock
from trainer.config.settings import DataSettings
from trainer.data import cache as store
from trainer.data.dataset import load
from trainer.data.formats import split_of
from trainer.data.prepare import NUM_SAMPLED_RECORDS, block_size_for, prepare
from trainer.data.tokenizer import load_tokenizer

EOS_ID = 0  # <|endoftext|> of the tokenizer that the samples train
PAIRS = [{"mr": f"Town {i}", "ref": f"On {i} January people met in Town {i}."} for i in range(60)]
TEMPLATES = {"prompt": "{mr}:", "completion": " {ref}"}


@pytest.fixture(scope="package")
def tokenizer(model):
    return load_tokenizer(model)


@pytest.fixture
def pairs_csv(tmp_path):
    return samples.write_csv(tmp_path / "a.csv", PAIRS)


@pytest.fixture
def prepare_file(tmp_path, model):
    """Prepare a file with the cache in the folder of the test."""

    def prepare_with_cache(data, global_batch=2, model=model, **settings):
        options = {"data": str(data), "block_size": 32, **settings}
        return prepare(DataSettings(**options), model=model, global_batch=global_batch, cache=tmp_path / "cache")

    return prepare_with_cache


def decode_rows(dataset, tokenizer):
    return [tokenizer.decode(dataset.row(i)) for i in range(len(dataset))]


def test_blocks_are_the_joined_texts_cut_with_the_tail_counted(tmp_path, prepare_file, tokenizer):
    lines = [f"On {i} January people met in Town {i}." for i in range(40)]
    (tmp_path / "a.txt").write_text("\n".join([*lines, "", " "]))
    made_of = prepare_file(tmp_path / "a.txt")
    for side, rows in (("train", made_of.train), ("val", made_of.val)):
        mine = [line for line in lines if split_of(line, 0.1) == side]
        stream = [token for line in mine for token in [*tokenizer(line)["input_ids"], EOS_ID]]
        whole = len(stream) // 32 * 32
        assert np.concatenate([rows.row(i) for i in range(len(rows))]).tolist() == stream[:whole]
        assert set(rows.lengths()) == {32}
        assert set(rows.first_target) == {1}
        facts = made_of.metadata[side]
        blocks = whole // 32
        counts = {"records": len(mine), "examples": blocks, "tokens": whole, "num_target_tokens": blocks * 31}
        assert {name: facts[name] for name in counts} == counts
        notice = f"{side}: the last {len(stream) - whole} tokens do not fill a block and are left out"
        assert notice in made_of.metadata["notices"]
    assert f"{tmp_path / 'a.txt'}: 2 blank records are left out" in made_of.metadata["notices"]


def test_a_completion_row_counts_the_completion_and_its_end_only(pairs_csv, prepare_file, tokenizer):
    prepared = prepare_file(pairs_csv, objective="completion", **TEMPLATES)
    rows = prepared.train
    pairs = [pair for pair in PAIRS if split_of(f"{pair['mr']}:", 0.1) == "train"]
    assert len(rows) == len(pairs)
    val_texts = [(f"{pair['mr']}:", f" {pair['ref']}") for pair in PAIRS if pair not in pairs]
    assert list(prepared.val_texts) == val_texts[:MAX_NUM_SAMPLES]
    for i, pair in enumerate(pairs):
        before, after = tokenizer(f"{pair['mr']}:")["input_ids"], tokenizer(f" {pair['ref']}")["input_ids"]
        assert rows.row(i).tolist() == [*before, *after, EOS_ID]
        assert rows.first_target[i] == len(before)
    assert rows.num_target_tokens().sum() == sum(len(tokenizer(f" {pair['ref']}")["input_ids"]) + 1 for pair in pairs)
    alone = prepare_file(pairs_csv, objective="completion", completion="{ref}")
    assert set(alone.train.first_target) == {1}  # nothing predicts the first token of a text
    assert set(alone.row_info("val").groups) == {None}


def test_examples_that_are_too_long_are_dropped_counted_and_the_first_is_named(tmp_path, prepare_file):
    pairs = [*PAIRS, {"mr": "x", "ref": "long " * 50}, {"mr": "x", "ref": "longer " * 50}]
    prepared = prepare_file(samples.write_csv(tmp_path / "a.csv", pairs), objective="completion", **TEMPLATES)
    (notice,) = prepared.metadata["notices"]
    assert "2 of" in notice
    assert "longer than --block-size 32 tokens" in notice
    assert "a.csv, row 61 (line 62)" in notice
    assert prepared.train.lengths().max() <= 32


@pytest.mark.parametrize("objective", ["blocks", "completion"])
def test_every_format_gives_the_same_tokens(tmp_path, prepare_file, objective):
    typed = [{**event, "fatalities": int(event["fatalities"])} for event in samples.EVENTS]
    files = [
        samples.write_csv(tmp_path / "a.csv", samples.EVENTS),
        samples.write_csv(tmp_path / "a.tsv", samples.EVENTS, "\t"),
        samples.write_jsonl(tmp_path / "a.jsonl", typed),
        samples.write_parquet(tmp_path / "a.parquet", typed),
        samples.write_csv(
            tmp_path / "old.csv", [{name.upper(): v for name, v in event.items()} for event in samples.EVENTS]
        ),
    ]
    facts = [prepare_file(file, objective=objective, block_size=200).metadata for file in files]
    assert len({fact["fingerprint"] for fact in facts}) == 1
    assert {fact["form"] for fact in facts} == {"acled"}
    events = [{**samples.EVENTS[0], "event_date": "05/01/2022"}, *samples.EVENTS[1:]]
    other = prepare_file(samples.write_csv(tmp_path / "b.csv", events), objective=objective, block_size=200).metadata
    assert other["fingerprint"] != facts[0]["fingerprint"]
    notice = r"1 dates stand as they were written \(first: .*row 1 \(line 2\): 05/01/2022"
    assert re.search(notice, "\n".join(other["notices"]))


def test_token_ids_are_taken_as_they_are_and_need_no_tokenizer(tmp_path, prepare_file):
    rows = [{"input_ids": list(range(i, i + 16)), "labels": [-100] * 16} for i in range(60)]
    prepared = prepare_file(samples.write_jsonl(tmp_path / "a.jsonl", rows), model="nobody-has-this", block_size=16)
    assert prepared.metadata["tokenizer"] is None
    assert prepared.metadata["vocabulary"] == 75
    both = [side.row(i).tolist() for side in (prepared.train, prepared.val) for i in range(len(side))]
    assert sorted(both) == [row["input_ids"] for row in rows]  # no end-of-text token is put between them
    assert any("`labels` is not used" in line for line in prepared.metadata["notices"])
    same = prepare_file(samples.write_parquet(tmp_path / "a.parquet", rows), model="nobody-has-this", block_size=16)
    assert same.metadata["fingerprint"] == prepared.metadata["fingerprint"]
    for largest, dtype in ((65_535, np.uint16), (65_536, np.uint32)):
        rows = [{"input_ids": [i, largest]} for i in range(60)]
        train = prepare_file(samples.write_jsonl(tmp_path / "b.jsonl", rows), block_size=2).train
        assert train.ids.dtype == dtype
        assert train.row(0)[1] == largest


def test_the_split_and_ids_do_not_move_when_rows_are_added_or_reordered(tmp_path, prepare_file, tokenizer):
    options = {"objective": "completion", "val_fraction": 0.3, **TEMPLATES}
    few, more, turned = (
        prepare_file(samples.write_csv(tmp_path / f"{name}.csv", pairs), **options)
        for name, pairs in (("few", PAIRS[:40]), ("more", PAIRS), ("turned", PAIRS[::-1]))
    )
    for side in ("train", "val"):
        before, after = decode_rows(getattr(few, side), tokenizer), decode_rows(getattr(more, side), tokenizer)
        assert set(before) < set(after)
        assert len(before) == few.metadata[side]["records"]
    assert more.row_info("val").ids == turned.row_info("val").ids[::-1]


def test_records_of_one_prompt_stay_in_one_split_and_are_one_group(tmp_path, prepare_file, tokenizer):
    shared = [{"mr": pair["mr"], "ref": f"{pair['ref']} {n}"} for pair in PAIRS for n in range(3)]
    file = samples.write_csv(tmp_path / "a.csv", shared)
    prepared = prepare_file(file, objective="completion", val_fraction=0.4, **TEMPLATES)
    train, val = (
        {text.split(":")[0] for text in decode_rows(rows, tokenizer)} for rows in (prepared.train, prepared.val)
    )
    assert not train & val
    assert 0 < len(val) < 60
    assert len(train | val) == 60
    groups = prepared.row_info("val").groups
    assert len(groups) == 3 * len(set(groups))
    everywhere = prepare_file(file, prompt="Say:", completion=" {ref}", objective="completion")
    assert everywhere.metadata["val"]["records"] > 0, "a prompt that is the same everywhere decides no split"


def test_the_split_is_the_first_eight_bytes_of_the_hash_against_the_fraction():
    # sha256("abc") = ba7816bf 8f01cfea ... (FIPS 180-2, appendix B.1); 0xba78 / 2^16 = 0.72839
    assert split_of("abc", 0.7285) == "val"
    assert split_of("abc", 0.7283) == "train"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"chat_template": "no.jinja"}, r"--chat-template no\.jinja: cannot be read"),
        ({"global_batch": 5000}, r"\d+ blocks of 32 tokens, fewer than one global batch of 5000; lower --global-batch"),
        ({"block_size": 150, "val_fraction": 0.05}, "validation records make 0 blocks of 150 tokens; raise --val-frac"),
        ({"val_fraction": 1e-6}, r"split by hash leaves 0 of 60 records for validation.*raise --val-fraction"),
        ({"test_fraction": 1e-6}, "0 of 60 records for the test at --test-fraction 1e-06; raise --test-f"),
        ({"test_fraction": 0.2, "test_data": "t.csv"}, "--test-fraction 0.2 and --test-data: expected one of them"),
        ({"test_fraction": 0.95}, "--test-fraction 0.95: expected a share under 0.9, beside validation"),
        ({"split_by": "dok"}, "--split-by dok: .* has no such column; expected one of mr, ref"),
        ({"objective": "completion", "block_size": 2}, "--block-size 2: all .* raise --block-size"),
    ],
)
def test_settings_that_leave_no_rows_are_refused_with_a_remedy(pairs_csv, prepare_file, settings, problem):
    with pytest.raises(UserError, match=problem):
        prepare_file(pairs_csv, **settings, **TEMPLATES)


def test_records_that_are_all_equal_cannot_be_split(tmp_path, prepare_file):
    with pytest.raises(UserError, match="all 60 records are equal, so none can be split off; give others"):
        prepare_file(samples.write_csv(tmp_path / "a.csv", PAIRS[:1] * 60), **TEMPLATES)


def test_a_mistake_in_the_last_row_is_found_before_anything_is_tokenised(tmp_path, prepare_file, monkeypatch):
    def too_early(*args):
        raise AssertionError("tokenised before all records were checked")

    monkeypatch.setattr("trainer.data.tokenizer.encode", too_early)
    file = samples.write_jsonl(tmp_path / "a.jsonl", [*PAIRS, {"mr": "x", "ref": None}])
    with pytest.raises(UserError, match="line 61: column 'ref'"):
        prepare_file(file, **TEMPLATES)


def test_the_same_contents_are_prepared_once_whatever_they_are_called(pairs_csv, tmp_path, prepare_file, monkeypatch):
    first = prepare_file(pairs_csv, **TEMPLATES)
    monkeypatch.setattr("trainer.data.prepare.write_rows", None)  # making them again would fail
    shutil.copy(pairs_csv, tmp_path / "b.csv")
    again = prepare_file(tmp_path / "b.csv", **TEMPLATES)
    assert again.folder == first.folder
    assert again.metadata == {**first.metadata, "source": str(tmp_path / "b.csv")}
    assert np.array_equal(again.train.ids, first.train.ids)
    loaded = load(first.folder)
    assert loaded.metadata == first.metadata
    assert loaded.val_texts == first.val_texts
    assert loaded.pad_id == EOS_ID
    assert isinstance(loaded.train.ids, np.memmap)


def test_changed_contents_tokenizer_or_settings_are_prepared_again(pairs_csv, tmp_path, prepare_file, model):
    changes = ({}, {"prompt": "{mr}"}, {"block_size": 31}, {"val_fraction": 0.2}, {"objective": "completion"})
    folders = [prepare_file(pairs_csv, **{**TEMPLATES, **change}).folder for change in changes]
    other = load_tokenizer(model)
    other.add_tokens(["January"])
    other.save_pretrained(tmp_path / "other")
    folders.append(prepare_file(pairs_csv, model=str(tmp_path / "other"), **TEMPLATES).folder)
    samples.write_csv(pairs_csv, PAIRS[1:])
    folders.append(prepare_file(pairs_csv, **TEMPLATES).folder)
    assert len(set(folders)) == 7


SLOW_PREPARE_CODE = """
import sys, time
from pathlib import Path
from trainer.config.settings import DataSettings
from trainer.data.prepare import prepare
from trainer.data.dataset import SplitWriter
whole = SplitWriter.close
def close(self):
    print("writing", flush=True)
    time.sleep(60)
    return whole(self)
SplitWriter.close = close
data, model, cache = sys.argv[1:]
settings = DataSettings(data=data, block_size=32, prompt="{mr}:", completion=" {ref}")
prepare(settings, model=model, global_batch=2, cache=Path(cache))
"""


def test_a_killed_preparation_is_never_taken_for_whole_nor_in_the_way(pairs_csv, tmp_path, prepare_file, model):
    command = [sys.executable, "-c", SLOW_PREPARE_CODE, str(pairs_csv), model, str(tmp_path / "cache")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout.readline() == "writing\n"
        killed.send_signal(signal.SIGKILL)
    (left,) = (tmp_path / "cache" / "prepared").iterdir()
    assert left.name.startswith(".")
    assert left.name.endswith(".tmp")
    with pytest.raises(ValueError, match="is not prepared data"):
        load(left)
    prepared = prepare_file(pairs_csv, **TEMPLATES)
    assert prepared.metadata["train"]["records"] + prepared.metadata["val"]["records"] == 60
    old = time.time() - 2 * store.ABANDONED_AFTER_SECONDS
    for path in (*left.iterdir(), left):
        os.utime(path, (old, old))
    shutil.rmtree(prepared.folder)
    again = prepare_file(pairs_csv, **TEMPLATES)  # which sweeps away what was left
    assert os.listdir(again.folder.parent) == [prepared.folder.name]


def test_several_processes_may_prepare_the_same_data_at_once(pairs_csv, tmp_path, prepare_file):
    first = prepare_file(pairs_csv, **TEMPLATES)
    copy = tmp_path / "copy"
    shutil.move(first.folder, copy)

    def fill(folder, **changes):
        shutil.copytree(copy, folder, dirs_exist_ok=True)
        (folder / "facts.json").unlink()
        if not changes:  # another one finishes while this one is still writing
            store.load_or_build(first.folder, tmp_path, load, lambda other: fill(other, pad_id=7))
        contents = store.read_manifest(copy).model_dump()
        return {**{name: contents[name] for name in ("dtype", "val_texts", "facts")}, "pad_id": 0, **changes}

    store.load_or_build(first.folder, tmp_path, load, fill)
    assert load(first.folder).pad_id == 7  # the first to finish named the folder
    assert os.listdir(first.folder.parent) == [first.folder.name]


def test_the_cache_folder_follows_the_environment_and_is_refused_where_it_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.delenv("TRAINER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.resolve_cache_dir() == tmp_path / "xdg" / "gpt2-full-vs-lora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert store.resolve_cache_dir() == tmp_path / "home" / ".cache" / "gpt2-full-vs-lora"
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "mine"))
    assert store.resolve_cache_dir() == tmp_path / "mine"
    assert store.resolve_cache_dir(tmp_path / "given") == tmp_path / "given"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written .*TRAINER_CACHE"):
        store.resolve_cache_dir(tmp_path / "file" / "x")
    with pytest.raises(UserError, match=r"TRAINER_CACHE\): its path is not UTF-8; name another folder"):
        store.resolve_cache_dir(tmp_path / "\udcff")


def test_data_metadata_have_the_fields_that_run_json_promises(prepare_file):
    facts = prepare_file("acled-demo", objective="completion", block_size=512, global_batch=8).metadata
    assert (facts["source"], facts["form"], facts["notices"]) == ("acled-demo", "acled", [])
    assert set(DataBlock.model_fields) <= set(facts)
    assert set(facts["train"]) == {"records", "examples", "tokens", "num_target_tokens"}
    assert set(facts["val"]) == set(facts["test"]) == {*facts["train"], "target_bytes", "units"}
    assert facts["split"] == "hash 0.1"
    assert facts["vocabulary"] == 400
    json.dumps(facts, allow_nan=False)


# --- the test split, and who the rows are ---


def test_a_test_split_is_taken_from_the_training_records_only(pairs_csv, prepare_file):
    without = prepare_file(pairs_csv, objective="completion", **TEMPLATES)
    prepared = prepare_file(pairs_csv, objective="completion", test_fraction=0.3, **TEMPLATES)
    assert len(without.test) == 0
    assert len(prepared.test) > 5
    assert prepared.metadata["val_fingerprint"] == without.metadata["val_fingerprint"]
    assert len(prepared.train) + len(prepared.test) == len(without.train)
    rows = [{tuple(side.row(i)) for i in range(len(side))} for side in (prepared.train, prepared.val, prepared.test)]
    assert len(set().union(*rows)) == sum(map(len, rows))
    assert prepared.metadata["test"]["records"] == len(prepared.test)
    assert without.metadata["test_fingerprint"] is None
    assert prepared.metadata["fingerprint"] != without.metadata["fingerprint"]


def test_records_with_one_value_of_the_split_column_stay_in_one_split(tmp_path, prepare_file):
    records = [{"doc": f"d{i % 12}", **pair} for i, pair in enumerate(PAIRS)]
    file = samples.write_jsonl(tmp_path / "a.jsonl", records)
    options = {"objective": "completion", "val_fraction": 0.3, "test_fraction": 0.3, "split_by": "doc", **TEMPLATES}
    prepared = prepare_file(file, **options)
    groups = {split: prepared.row_info(split).groups for split in ("val", "test")}
    assert all(len(groups[split]) == len(getattr(prepared, split)) for split in groups)
    assert not set(groups["val"]) & set(groups["test"])
    assert {split: prepared.metadata[split]["units"] for split in groups} == {s: len(set(groups[s])) for s in groups}
    assert all(values.count(value) == 5 for values in groups.values() for value in values)
    broken = samples.write_jsonl(tmp_path / "b.jsonl", [*records, {**records[0], "doc": None}])
    with pytest.raises(UserError, match=r"b.jsonl, line 61: column 'doc' is null or empty"):
        prepare_file(broken, **options)


@pytest.mark.parametrize("objective", ["blocks", "completion"])
def test_the_bytes_of_the_targets_are_those_of_the_text(tmp_path, prepare_file, tokenizer, objective):
    pairs = [{**pair, "ref": f"{pair['ref']} Größe 東京 🌍"} for pair in PAIRS]
    file = samples.write_csv(tmp_path / "a.csv", pairs)
    prepared = prepare_file(file, objective=objective, block_size=64, val_fraction=0.4, **TEMPLATES)
    info = prepared.row_info("val")
    assert list(info.targets) == prepared.val.num_target_tokens().tolist()
    assert prepared.metadata["val"]["target_bytes"] == sum(info.num_bytes)
    if objective == "completion":
        texts = [f" {p['ref']}" for p in pairs if split_of(f"{p['mr']}:", 0.4) == "val"]
        assert list(info.num_bytes) == [len(text.encode()) for text in texts]
    else:  # blocks end within characters, so only the sum over all tokens is a text's
        for i in range(len(prepared.val)):
            pieces = [tokenizer.convert_ids_to_tokens(int(t)) for t in prepared.val.row(i)[1:] if t != EOS_ID]
            assert info.num_bytes[i] == sum(map(len, pieces))


def test_evaluation_records_equal_to_a_training_record_are_marked_and_many_refused(pairs_csv, tmp_path, prepare_file):
    fresh = [{"mr": f"Elsewhere {i}", "ref": "Nobody met."} for i in range(40)]
    few = samples.write_csv(tmp_path / "few.csv", [*fresh, PAIRS[0], *PAIRS[:1]])
    options = {
        "objective": "completion",
        "val_data": str(samples.write_csv(tmp_path / "v.csv", [*fresh, PAIRS[1]])),
        **TEMPLATES,
    }
    prepared = prepare_file(pairs_csv, test_data=str(few), **options)
    assert prepared.metadata["split"] == "given"
    assert [prepared.metadata[split]["records"] for split in ("train", "val", "test")] == [60, 41, 42]
    assert list(prepared.row_info("test").in_train) == [False] * 40 + [True] * 2
    assert list(prepared.row_info("test").occurrences)[-2:] == [0, 1]
    assert prepared.metadata["equal_to_train"] == {"val": 1, "test": 2, "retain": 0}
    assert prepared.metadata["repeated_in_train"] == 0
    doubled = prepare_file(samples.write_csv(tmp_path / "twice.csv", [*PAIRS, *PAIRS[:7]]), **options)
    assert doubled.metadata["repeated_in_train"] == 7
    blocks = prepare_file(tmp_path / "twice.csv", **{**options, "objective": "blocks"}).metadata
    assert (blocks["equal_to_train"]["val"], blocks["repeated_in_train"]) == (1, 7), "of records, which blocks cut"
    for notice in ("1 of 41 validation records", "2 of 42 test records"):
        assert f"{notice} also stand in the training data" in prepared.metadata["notices"]
    many = samples.write_csv(tmp_path / "many.csv", [*fresh, *PAIRS[:3]])
    with pytest.raises(UserError, match="3 of 43 test records also stand in the training data; expected at most 5%"):
        prepare_file(pairs_csv, test_data=str(many), **options)


def test_retained_text_makes_blocks_changes_no_fingerprint_and_is_not_trained_on(pairs_csv, tmp_path, prepare_file):
    options = {"objective": "completion", "val_fraction": 0.4, **TEMPLATES}
    prepared, without = prepare_file(pairs_csv, retain_data="demo-base", **options), prepare_file(pairs_csv, **options)
    assert set(prepared.retain.lengths()) == {prepared.metadata["block_size"]}
    assert prepared.metadata["retain"]["records"] == 240
    assert prepared.metadata["fingerprint"] == without.metadata["fingerprint"]
    assert len(without.retain) == 0
    (tmp_path / "old.txt").write_text("".join(f"{pair['mr']}: {pair['ref']}\n" for pair in PAIRS))
    with pytest.raises(UserError, match="retained records also stand in the training data; expected at most 5%, take"):
        prepare_file(pairs_csv, retain_data=str(tmp_path / "old.txt"), **options)
    with pytest.raises(UserError, match=r"--retain-data .*: 1 records make 0 blocks of"):
        prepare_file(pairs_csv, retain_data=str(samples.write_csv(tmp_path / "b.csv", [{"text": "short"}])), **options)


# --- the block size that the lengths of the records ask for ---


@pytest.mark.parametrize(
    ("lengths", "objective", "max_positions", "expected"),
    [
        ([20, 130], "completion", None, 256),
        ([20, 128], "completion", None, 128),
        ([20, 130], "completion", 200, 200),
        ([9000], "completion", None, 2048),
        ([100] * 50, "blocks", None, 128),
        ([1000] * 300, "blocks", None, 1024),
        ([600] * 100, "blocks", None, 512),
        ([10] * NUM_SAMPLED_RECORDS, "blocks", None, 1024),
        ([10] * NUM_SAMPLED_RECORDS, "blocks", 512, 512),
    ],
)
def test_the_block_size_holds_the_records_and_fits_the_model(lengths, objective, max_positions, expected):
    assert block_size_for(lengths, objective, max_positions) == expected


def test_the_finetune_preset_takes_its_block_size_from_the_data_and_a_flag_overrides_it(tiny_model, tmp_path):
    records = [{"prompt": f"w{n % 90} " * 70, "completion": "w2 " * 80} for n in range(1, 60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = f"--mode full --preset finetune --model {tiny_model} --data {tmp_path / 'data.jsonl'} --val-fraction 0.2"
    settings = cli.parse_args(flags.split()).settings
    assert settings.data.block_size == 0
    options = {"model": tiny_model, "global_batch": 4}
    chosen = prepare(settings.data, **options)
    assert chosen.metadata["block_size"] == 256
    assert int(chosen.train.lengths().max()) == 151
    argv_text = cli.parse_args([*flags.split(), "--block-size", "151"]).settings.data
    assert prepare(argv_text, **options).metadata["block_size"] == 151
