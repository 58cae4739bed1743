"""What --data may name, and one line with file, row, column and remedy for whatever cannot be used."""

import json
import os
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from helpers.data_helpers import PAIRS, find_source, read_records, write_records

from trainer.config.errors import UserError
from trainer.config.settings import DataSettings
from trainer.data import hf_hub, readers, sources
from trainer.data.sources import find_sources, find_splits

FIRST = '{"mr": "1", "ref": "2"}'
AS_TEXT = {"prompt": None, "completion": None}  # without templates


def write_arrow(path, table):
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("name", "content", "records"),
    [
        ("a.csv", PAIRS, PAIRS),
        ("a.jsonl", PAIRS, PAIRS),
        ("a.parquet", PAIRS, PAIRS),
        (os.fsdecode(b"\xff\xfe.csv"), PAIRS, PAIRS),
        ("a.json", "\n " + json.dumps(PAIRS, indent=2), PAIRS),
        ("a.tsv", "mr\tref\n1\t2,3\n", [{"mr": "1", "ref": "2,3"}]),
        ("a.txt", "\ufeffone é\r\ntwo\n\nthree", [{"text": text} for text in ("one é", "two", "", "three")]),
        (
            "a.csv",
            b'\xef\xbb\xbf,b,c\r\n007,NA,"x\n""y"""\r\n\r\n1.50,,null\n',
            [{"column 1": "007", "b": "NA", "c": 'x\n"y"'}, {"column 1": "1.50", "b": None, "c": "null"}],
        ),
    ],
)
def test_a_file_gives_its_records_as_they_are_written(tmp_path, name, content, records):
    assert read_records(write_records(tmp_path / name, content)) == records


def test_a_folder_and_a_glob_are_read_in_order_of_names(tmp_path):
    folder = tmp_path / "a[1] *"  # a name that a pattern could be taken for
    contents = {"b.csv": "text\nb\n", "a.csv": "text\na\n", "README.md": "", ".hidden.csv": "not,d\n"}
    for name, content in contents.items():
        write_records(folder / name, content)
    for spec in (folder, tmp_path / "a*" / "[ab].csv"):
        assert [row["text"] for row in read_records(spec)] == ["a", "b"]


def test_both_formats_of_arrow_files_are_read(tmp_path):
    table = pyarrow.Table.from_pylist(PAIRS)
    write_arrow(tmp_path / "file.arrow", table)
    with pyarrow.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("file", "stream"):
        assert read_records(tmp_path / f"{name}.arrow") == PAIRS


def test_data_sets_saved_by_datasets_are_read_as_their_splits_and_refused_where_not_whole(tmp_path, monkeypatch):
    import datasets

    whole = datasets.Dataset.from_list(PAIRS)
    whole.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": whole, "test": whole.select([3])}).save_to_disk(str(tmp_path / "two"))
    datasets.DatasetDict({"train_sft": whole}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(UserError, match="no split `train`, only train_sft; save one to a file, and pass that"):
        read_records(tmp_path / "other")
    assert read_records(tmp_path / "one") == read_records(tmp_path / "two") == PAIRS
    assert [record for _, record in find_source(tmp_path / "two", "--test-data").records()] == [PAIRS[3]]
    monkeypatch.chdir(tmp_path)  # files of a relative path have absolute ones there
    notices = find_sources(DataSettings(data="two", block_size=0))[0].notices
    assert notices == ("two: split train for training, split test for test",)
    Path("two/train/state.json").unlink()
    Path("two/train/data-00000-of-00001.arrow").rename("two/train/pairs-train.arrow")
    assert read_records(tmp_path / "two" / "train") == PAIRS, "a folder of the cache of `load_dataset`: plain files"
    (tmp_path / "one" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"one: not a whole saved data set .*; save it again"):
        read_records(tmp_path / "one")


@pytest.mark.parametrize(
    ("spec", "files", "problem"),
    [
        ("./no", {}, "--data ./no: no such file or folder"),
        ("no*.csv", {}, "--data no*.csv: no file with a known ending; expected a CSV"),
        (".", {"a.csv": PAIRS, "b.jsonl": PAIRS}, "holds several kinds of data: CSV (a.csv), JSON (b.jsonl)"),
        ("a.parquet", {"a.parquet": [*PAIRS, {"mr": "x", "ref": None}]}, "a.parquet, row 41: column 'ref' is null"),
        ("a.csv", {"a.csv": '"m\n\x1b[2J",b\n1,2\n'}, "has no column 'mr'; its columns are m\\n\\x1b[2J, b"),
        ("c", {"c/train_test.csv": PAIRS}, "--data c: holds no split `train`, only test"),
    ],
)
def test_a_source_that_cannot_be_used_is_one_line(refusal_message, spec, files, problem):
    assert problem in refusal_message(spec, files)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.parquet", "no parquet at all", ": not a whole Parquet file"),
        ("a.arrow", "no arrow", ": not a whole Arrow file"),
        ("a.json", "[ ]", ": holds no record; expected at least one"),
        ("a.csv", "mr,mr\n1,2\n", ": names column 'mr' twice"),
        ("a.csv", 'mr,ref\n1,"2\n2"\n1\n', ", row 2 (line 4): 1 fields where the header has 2"),
        ("a.csv", 'mr,ref\n1,2\n3,"4\n', ", row 2 (line 3): not CSV (unexpected end of data); look for a quotation"),
        ("a.csv", "mr;ref\n1;2\n", " has no column 'mr'; its columns are mr;ref (separated by ';'? save the file with"),
        ("a.jsonl", f'{FIRST}\n{{"mr": "1" "ref"}}\n', ", line 2, character 12: not JSON"),
        ("a.jsonl", '{"mr": "1", "ref": {"a": 1, "a": 2}}\n', ", line 1: not JSON (the key 'a' occurs twice in an obj"),
        ("a.jsonl", '{"mr": "1", "ref": 1e999}\n', ", line 1: not JSON (the number 1e999 is larger than any float"),
        ("a.json", f"[{FIRST}][{FIRST}]", ", line 1, character 26: not JSON (Extra data)"),
        ("a.json", "[" * 200_000 + "]" * 200_000, ": not JSON (nested too deeply)"),
        ("a.json", f"[{FIRST},\n 3]", ", row 2: holds a int; expected a JSON object"),
        ("a.csv", "mr,ref\n1,2\n".encode("utf-16-le"), ", line 1: holds a NUL byte (UTF-16?)"),
        ("a.txt", b"short\n" + b"x" * (3 * 2**20), ", line 2: longer than 1 MB"),
        ("a.txt", b"\n  \n\n", ": holds blank lines only"),
    ],
)
def test_bad_content_is_named_by_file_and_place(refusal_message, monkeypatch, name, content, problem):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 2**20)
    assert f"--data {name}{problem}" in refusal_message(name, {name: content}, **(AS_TEXT if "txt" in name else {}))


@pytest.mark.parametrize(("name", "first"), [("a.jsonl", b'{"text": "x"}\n'), ("a.json", b"[\n")])
def test_bytes_that_are_not_utf8_are_named_by_line(refusal_message, name, first):
    row = '{"text": "é"}\n'.encode()
    line = refusal_message(name, {name: first + 19_998 * row + row.replace("é".encode(), b"\xe9") + row}, **AS_TEXT)
    assert f"{name}, line 20000: not UTF-8 (byte 0xe9); save the file as UTF-8" in line


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_of_arrow_that_cannot_be_used_is_refused(refusal_message, tmp_path, suffix):
    date = pyarrow.array([2**30], type=pyarrow.date32())
    doubled, beyond_years = (["x"], ["y"], ["z"]), (date, ["x"])
    problems = ("names column 'mr' twice; rename one", f"not a whole {suffix.capitalize()} file (")
    for number, (arrays, problem) in enumerate(zip((doubled, beyond_years), problems, strict=True)):
        table = pyarrow.Table.from_arrays(list(map(pyarrow.array, arrays)), ["mr", "ref", "mr"][: len(arrays)])
        write = write_arrow if suffix == "arrow" else lambda path, table: pyarrow.parquet.write_table(table, path)
        write(tmp_path / f"{number}.{suffix}", table)
        assert f"--data {number}.{suffix}: {problem}" in refusal_message(f"{number}.{suffix}")


def test_a_pipe_and_a_file_that_may_not_be_read_are_refused_and_not_waited_for(refusal_message, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    os.mkfifo(tmp_path / "b.csv")
    assert "--data b.csv: not a regular file (a pipe or a device)" in refusal_message("b.csv")
    monkeypatch.setattr(readers, "open_plain_file", refuse)  # root may read everything
    assert refusal_message("a.csv", {"a.csv": PAIRS}) == "--data a.csv: cannot be read (Permission denied)"


def test_a_file_that_changes_while_it_is_read_is_refused(refusal_message, tmp_path, monkeypatch):
    file, whole = write_records(tmp_path / "a.csv", PAIRS), sources.Source.records

    def growing(*args, **options):
        yield from whole(*args, **options)
        with open(file, "a") as opened:
            opened.write("more,rows\n")

    monkeypatch.setattr(sources.Source, "records", growing)
    assert "--data a.csv: a file changed while it was read" in refusal_message("a.csv")


def test_files_of_two_formats_are_refused_by_name(refusal_message):
    files = {"two/train.jsonl": [{"prompt": "x", "completion": "y"}], "two/val.jsonl": [{"text": "x"}]}
    line = refusal_message("two", files, **AS_TEXT)
    assert "one holds prompt-completion (loss on the completion), the other text (" in line


def test_the_hub_out_of_reach_is_one_line_that_names_the_file_flag(refusal_message, monkeypatch):
    import huggingface_hub.constants

    began = time.monotonic()
    line = refusal_message("nobody/nothing-of-that-name")
    assert "no such file or folder here, and the hub cannot be reached" in line
    assert "expected a file, a folder, acled-demo or a hub id" in line
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    assert not hf_hub.is_reachable()
    assert time.monotonic() - began < 20


def find_files(spec, val_data=()):
    """({split: the names of its files}, the notices)."""
    found = sources.find_sources(DataSettings(data=str(spec), val_data=val_data, block_size=8))
    return {source.split: [file.name for file in source.files] for source in found}, found[0].notices


@pytest.mark.parametrize(
    "names",
    [
        ("train.csv", "my_valid_set.csv", "test.csv"),
        ("training/a.csv", "dev/b.csv", "eval/c.csv"),
    ],
)
def test_a_folder_with_splits_takes_each_file_for_what_it_is_named(tmp_path, names):
    for name in names:
        write_records(tmp_path / name, "text\nx\n")
    expected = {split: [name.split("/")[-1]] for split, name in zip(("train", "val", "test"), names, strict=True)}
    uses = dict(zip(names, ("for training", "for validation", "for test"), strict=True))
    splits, (notice,) = find_files(tmp_path)
    assert sorted(notice.removeprefix(f"{tmp_path}: ").split(", ")) == sorted(f"{n} {use}" for n, use in uses.items())
    assert find_files(tmp_path / "**" / "*.csv")[0] == splits == expected
    for flag, name in (("--val-data", names[1]), ("--test-data", names[2])):
        assert find_source(tmp_path, flag).files == (tmp_path / name,)


def test_what_is_named_for_no_split_beside_a_training_file_is_left_out_with_a_notice(tmp_path, monkeypatch):
    for name in ("train.csv", "extra.csv", "validation.csv", "contest_latest.csv"):
        write_records(tmp_path / name, "text\nx\n")
    monkeypatch.chdir(tmp_path.parent)
    other = write_records(Path(f"{tmp_path.name}=other.csv"), "text\nx\n")  # a path, and no name with a path
    splits, notices = find_files(tmp_path, val_data=(str(other), f"all={tmp_path}"))
    assert splits == {"train": ["train.csv"], "val": [other.name], "val-all": ["validation.csv"]}
    left_out = "contest_latest.csv, extra.csv left out, train.csv for training, validation.csv left out"
    assert notices == (f"{tmp_path}: {left_out}",), "of a name with `test` in it the word alone counts"


def test_a_folder_within_that_may_not_be_read_is_not_left_out_in_silence(tmp_path, monkeypatch):
    (tmp_path / ".locked").mkdir()
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr("os.access", lambda path, mode: "locked" not in str(path.name))
    assert find_source(tmp_path).files == (tmp_path / "a.txt",), "whose hidden folders are no data"
    (tmp_path / "locked").mkdir()
    for spec in ("", "/*/*.txt", "/**/*.txt"):
        with pytest.raises(UserError, match=f"^--data {tmp_path}/locked: permission denied; let this user read the fo"):
            find_splits(f"{tmp_path}{spec}", "--data")
    assert find_source(f"{tmp_path}/*.txt").files == (tmp_path / "a.txt",)
