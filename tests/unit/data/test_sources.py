"""What --data may name, and one line with file, row, column and remedy for whatever cannot be used."""

import gzip
import json
import os
import time
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from helpers.data_helpers import PAIRS, find_source, read_records, write_records

from trainer.config.errors import UserError
from trainer.config.settings import DataSettings
from trainer.data import hf_hub, readers, sources
from trainer.data.dataset import sha256
from trainer.data.sources import find_splits

DATES = [{"d": "2022-01-05", "n": 1}, {"d": 5, "x": [1]}, {"n": None}]
LONG = [{"i": i, "text": "[{]}" * 50_000} for i in range(12)]
BIG, DEEP = "1" * 5000, "[" * 200_000 + "]" * 200_000
KINDS = ("csv", "tsv", "txt", "jsonl")
FIRST = '{"mr": "1", "ref": "2"}'
AS_TEXT = {"prompt": None, "completion": None}  # without templates


def compress(suffix, content):
    """The content as a file of that suffix holds it."""
    if suffix == ".gz":
        return gzip.compress(content)
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


@pytest.mark.parametrize(
    ("name", "content", "records"),
    [
        ("a.csv", PAIRS, PAIRS),
        ("a.jsonl", PAIRS, PAIRS),
        ("a.parquet", PAIRS, PAIRS),
        ("a.json", json.dumps(PAIRS, indent=2), PAIRS),
        ("a.json", json.dumps(LONG), LONG),
        ("a.jsonl", DATES, DATES),
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


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.txt"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_text_file_gives_the_records_of_the_plain_one(tmp_path, name, suffix):
    plain = write_records(tmp_path / name, json.dumps(PAIRS) if name in ("a.json", "a.txt") else PAIRS)
    packed = write_records(tmp_path / (name + suffix), compress(suffix, plain.read_bytes()))
    assert read_records(packed) == read_records(plain)
    assert sha256(packed) == sha256(plain), "the hash of what it holds: prepared once"


def test_a_folder_and_a_glob_are_read_in_order_of_names(tmp_path):
    folder = tmp_path / "a[1] *"  # a name that a pattern could be taken for
    for name, content in {
        "b.csv": "text\nb\n",
        "a.csv": "text\na\n",
        "README.md": "",
        ".hidden.csv": "not,d\n",
    }.items():
        write_records(folder / name, content)
    for spec in (folder, tmp_path / "a*" / "[ab].csv"):
        assert [row["text"] for row in read_records(spec)] == ["a", "b"]


def test_a_path_that_is_not_utf8_can_be_read(tmp_path):
    assert read_records(write_records(tmp_path / os.fsdecode(b"\xff\xfe.csv"), PAIRS)) == PAIRS


def test_folders_of_save_to_disk_and_arrow_files_are_read(tmp_path):
    import datasets

    whole = datasets.Dataset.from_list(PAIRS)
    whole.save_to_disk(str(tmp_path / "one"))
    assert read_records(tmp_path / "one") == PAIRS
    assert read_records(next((tmp_path / "one").glob("*.arrow"))) == PAIRS  # a stream
    table = pyarrow.Table.from_pylist(PAIRS)
    with pyarrow.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert read_records(tmp_path / "file.arrow") == PAIRS
    datasets.DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(str(tmp_path / "two"))
    splits = sources.find_splits(str(tmp_path / "two"), "--data")
    assert {split: len(list(source.records())) for split, source in splits.items()} == {"train": 40, "test": 1}
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"one: not a whole saved data set"):
        read_records(tmp_path / "one")


@pytest.mark.parametrize(
    ("spec", "files", "problem"),
    [
        ("no.csv", {}, "--data no.csv: no such file"),
        ("./no", {}, "--data ./no: no such file or folder"),
        ("no*.csv", {}, "--data no*.csv: no file with a known ending; expected a CSV"),
        ("empty", {"empty/x/.keep": ""}, "--data empty: no file with a known ending"),
        ("a.xlsx", {"a.xlsx": "x"}, "--data a.xlsx: no file with a known ending"),
        ("b.parquet.gz", {"b.parquet.gz": compress(".gz", b"x")}, "no file with a known ending"),
        (".", {"a.csv": PAIRS, "b.jsonl": PAIRS}, "holds several kinds of data: CSV (a.csv), JSON (b.jsonl)"),
        ("*.csv", {"a.csv": PAIRS, "b.csv": "mr,text\nx,y\n"}, "b.csv, row 1 (line 2): column 'ref' is missing"),
        ("a.parquet", {"a.parquet": [*PAIRS, {"mr": "x", "ref": None}]}, "a.parquet, row 41: column 'ref' is null"),
        ("b.parquet", {"b.parquet": [{"mr": "x", "ref": [1]}]}, "b.parquet, row 1: column 'ref' holds a list"),
        ("a.csv", {"a.csv": '"mr\n\x1b[2J",b\n1,2\n'}, "its columns are 'mr\\n\\x1b[2J', b"),
        ("c", {"c/test.csv": PAIRS}, "--data c: holds no split `train`, only test"),
        ("c", {"c/train_test.csv": PAIRS}, "--data c: holds no split `train`, only test"),
    ],
)
def test_a_source_that_cannot_be_used_is_one_line(refusal_message, spec, files, problem):
    assert problem in refusal_message(spec, files)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        *((f"a.{kind}", "", ": holds no record") for kind in ("csv", "json", "txt")),
        ("a.parquet", "", ": not a whole Parquet file"),
        ("a.parquet", "no parquet at all", ": not a whole Parquet file"),
        ("a.arrow", "no arrow", ": not a whole Arrow file"),
        ("a.csv.gz", compress(".gz", os.urandom(3000).hex().encode())[:-100], ": not a whole .gz file ("),
        ("a.csv.zst", compress(".zst", os.urandom(3000).hex().encode())[:-100], ": not a whole .zst file ("),
        ("a.tsv", "mr\tref\n", ": holds no record"),
        ("a.jsonl", "\n\n", ": holds no record"),
        ("a.json", "[ ]", ": holds no record"),
        ("a.csv", "mr,mr\n1,2\n", ": names column 'mr' twice"),
        ("a.csv", "mr,ref\n1,2\n1,2,3\n", ", row 2 (line 3): 3 fields where the header has 2"),
        ("a.csv", 'mr,ref\n1,"2\n2"\n1\n', ", row 2 (line 4): 1 fields where the header has 2"),
        ("a.tsv", "mr\tref\n1\t2\n1,2\n", ", row 2 (line 3): 1 fields where the header has 2"),
        ("a.csv", 'mr,ref\n1,2\n3,"4\n', ", row 2 (line 3): not CSV (unexpected end of data); look for a quotation"),
        ("a.csv", "mr,ref\n1,2\n3,\n", ", row 2 (line 3): column 'ref' is null or empty: fill it, drop the row"),
        ("a.csv", 'mr,ref\n"1\n1",2\n,4\n', ", row 2 (line 4): column 'mr' is null or empty"),
        (
            "a.csv",
            "mr,ref\r1,2\r",
            ", row 0 (line 1): not CSV (a carriage return alone); save the file with line breaks",
        ),
        ("a.csv", 'mr,ref\n1,"2"x\n', ", row 1 (line 2): not CSV (',' expected after '\"')"),
        ("a.jsonl", f'{FIRST}\n{{"mr": "1", "ref": null}}\n', ", line 2: column 'ref' is null"),
        ("a.jsonl", f'{FIRST}\n\n{{"mr": "1"}}\n', ", line 3: column 'ref' is missing"),
        ("a.jsonl", f'{FIRST}\n{{"mr": "1" "ref"}}\n', ", line 2, character 12: not JSON"),
        ("a.jsonl", f"{FIRST}\n[1]\n", ", line 2: holds a list; expected a JSON object"),
        ("a.jsonl", f"{FIRST} {FIRST}\n", ", line 1, character 25: not JSON (Extra"),
        ("a.jsonl", '{"mr": "1", "ref": {"a": 1, "a": 2}}\n', ", line 1: not JSON (the key 'a' stands twice in an obj"),
        ("a.jsonl", '{"mr": "1", "ref": 1e999}\n', ", line 1: not JSON (the number 1e999 is larger than any float"),
        ("a.jsonl", '{"mr": "1", "ref": -Infinity}\n', ", line 1: not JSON (the number -Infinity is larger than any"),
        ("a.json", f"[{FIRST}][{FIRST}]", ", line 1, character 26: not JSON (Extra data)"),
        ("a.json", f"[{FIRST}] rubbish {{", ", line 1, character 27: not JSON (Extra data)"),
        *((f"a.{kind}", "mr,ref\n1,2\n".encode("utf-16-le"), ", line 1: holds a NUL byte (UTF-16?)") for kind in KINDS),
        *((f"a.{kind}", "mr,ref\n1,2\n".encode("utf-16"), ", line 1: holds a NUL byte (UTF-16?)") for kind in KINDS),
        ("a.csv", "mr;ref\n1;2\n", " has no column 'mr'; its columns are mr;ref (separated by ';'? save the file with"),
        ("a.csv", "mr|ref\n1|2\n", " has no column 'mr'; its columns are mr|ref (separated by '|'?"),
        ("a.jsonl", f'{FIRST}\n{{"n": {BIG}}}\n', ", line 2: not JSON (Exceeds the limit (4300 digits)"),
        ("a.jsonl", f'{{"n": {DEEP}}}\n', ", line 1: not JSON (nested too deeply)"),
        ("a.json", DEEP, ": not JSON (nested too deeply)"),
        ("a.json", f"[{FIRST},\n 3]", ", row 2: holds a int; expected a JSON object"),
        ("a.json", f"[{FIRST},\n {FIRST} {FIRST}]", ", line 2, character 26: not JSON (Expecting ',' delimiter)"),
        ("a.json", f'[{FIRST}, {{"mr": "1", "mr": "2"}}]', ": not JSON (the key 'mr' stands twice"),
        ("a.json", '{"mr": "1",\n "ref": "2"}', ", line 2, character 1: not JSON"),
    ],
)
def test_bad_content_is_named_by_file_and_place(refusal_message, name, content, problem):
    assert f"--data {name}{problem}" in refusal_message(name, {name: content})


def test_a_table_of_arrow_without_a_row_or_with_a_name_twice_is_refused(refusal_message, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"mr": [], "ref": []}), tmp_path / "c.parquet")
    assert "c.parquet: holds no record" in refusal_message("c.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([[1], [2]], ["mr", "mr"]), tmp_path / "d.parquet")
    assert "d.parquet: names column 'mr' twice; rename one" in refusal_message("d.parquet")


@pytest.mark.parametrize(
    ("array", "kind"), [([2**30], pyarrow.date32()), ([2**62], pyarrow.timestamp("us")), ([-(2**62)], pyarrow.date64())]
)
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_date_beyond_python_s_years_is_refused(refusal_message, tmp_path, array, kind, name):
    table = pyarrow.table({"mr": pyarrow.array(array, type=kind), "ref": ["x"]})
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        with pyarrow.ipc.new_file(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    assert f"--data {name}: not a whole {name[2:].capitalize()} file (" in refusal_message(name)


def test_other_flags_are_named_and_an_unknown_column_with_those_that_there_are(refusal_message):
    assert "--val-data no.csv: no such file" in refusal_message("a.csv", {"a.csv": PAIRS}, val_data="no.csv")
    line = refusal_message("a.csv", prompt="{name}")
    assert line == "--prompt: --data a.csv has no column 'name'; its columns are mr, ref"


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.json"])
@pytest.mark.parametrize("lines", [2, 60_000])
def test_bytes_that_are_not_utf8_are_named_by_line(refusal_message, name, lines):
    row = {"a.txt": "é" * 20, "a.csv": "é,é"}.get(name, '{"text": "é"}').encode() + b"\n"
    head = {"a.csv": b"text,b\n", "a.json": b"[\n"}.get(name, row)
    content = head + row * (lines - 2) + row.replace("é".encode(), b"\xe9", 1) + row
    line = refusal_message(name, {name: content}, **AS_TEXT)
    assert f"{name}, line {lines}: not UTF-8 (byte 0xe9); save the file as UTF-8" in line


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("one\ntwo é".encode()[:-1], "a.txt, line 2: not UTF-8 (byte 0xc3)"),  # a character cut off at the end
        (b"short\n" + b"x" * (3 * 2**20), "a.txt, line 2: longer than 1 MB"),
        (b"\n  \n\n", "a.txt: holds blank lines only"),
    ],
)
def test_a_text_file_that_cannot_be_read_is_refused(refusal_message, monkeypatch, content, problem):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 2**20)
    assert problem in refusal_message("a.txt", {"a.txt": content}, **AS_TEXT)


def test_a_file_that_may_not_be_read_says_so(refusal_message, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(readers, "open_bytes", refuse)  # root may read everything
    problem = "--data a.csv: cannot be read (Permission denied); check its permissions"
    assert refusal_message("a.csv", {"a.csv": PAIRS}) == problem


def test_a_named_pipe_is_refused_and_not_waited_for(refusal_message, tmp_path):
    os.mkfifo(tmp_path / "a.csv")
    assert "--data a.csv: not a regular file (a pipe or a device)" in refusal_message("a.csv")


def test_a_file_that_changes_while_it_is_read_is_refused(refusal_message, tmp_path, monkeypatch):
    file, whole = write_records(tmp_path / "a.csv", PAIRS), sources.Source.records

    def growing(*args, **options):
        yield from whole(*args, **options)
        with open(file, "a") as opened:
            opened.write("more,rows\n")

    monkeypatch.setattr(sources.Source, "records", growing)
    assert "--data a.csv: a file changed while it was read" in refusal_message("a.csv")


def test_files_of_two_formats_are_refused_by_name(refusal_message):
    files = {"mix/a.jsonl": [{"messages": [{"role": "assistant", "content": "x"}]}], "mix/b.jsonl": [{"text": "x"}]}
    line = refusal_message("mix", files, **AS_TEXT)
    assert "mix/b.jsonl: another format than a.jsonl, whose records are messages" in line
    for content, other in (({"text": "x"}, "text"), ({"instruction": "x", "output": "y"}, "alpaca")):
        files = {"two/train.jsonl": [{"prompt": "x", "completion": "y"}], "two/val.jsonl": [content]}
        line = refusal_message("two", files, **AS_TEXT)
        assert "one holds prompt-completion (" in line
        assert f", the other {other} (" in line


# --- the hub ---


def test_the_hub_out_of_reach_is_one_line_that_names_the_file_flag(refusal_message, monkeypatch):
    began = time.monotonic()
    line = refusal_message("nobody/nothing-of-that-name")
    assert time.monotonic() - began < 20
    assert "no such file or folder here, and the hub cannot be reached" in line
    assert "give --data a file, a folder, acled-demo" in line


def test_the_hub_is_asked_whether_it_answers_before_it_is_waited_for(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    began = time.monotonic()
    assert not hf_hub.is_reachable()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(("flag", "split"), [("--data", "train"), ("--val-data", "validation")])
def test_a_hub_data_set_gives_the_split_of_the_flag(monkeypatch, flag, split):
    import datasets

    names = ("train", "validation")
    splits = {name: datasets.Dataset.from_list([{"text": f"{name} {i}"} for i in range(3)]) for name in names}
    config = SimpleNamespace(HF_HUB_OFFLINE=False)
    stand_in = SimpleNamespace(load_dataset=lambda name, config_name: splits, config=config)
    monkeypatch.setattr(hf_hub, "import_datasets", lambda: stand_in)  # the hub itself cannot be asked in a test
    found = list(find_source("some/name", flag).records())
    assert [record["text"] for _, record in found] == [f"{split} {i}" for i in range(3)]
    assert found[1][0] == "some/name, row 2"


# --- files are taken for the split that they are named ---


def find_files(spec, val_data=None):
    """({split: the names of its files}, the notices)."""
    found = sources.find_sources(DataSettings(data=str(spec), val_data=val_data, block_size=8))
    return {source.split: [file.name for file in source.files] for source in found}, found[0].notices


@pytest.mark.parametrize(
    "names",
    [
        ("train.csv", "validation.csv", "test.csv"),
        ("data/train-00000-of-00001.csv", "data/validation-00000-of-00001.csv", "data/test-00000-of-00001.csv"),
        ("training/a.csv", "dev/b.csv", "eval/c.csv"),
        ("my_train_set.csv", "my_valid_set.csv", "my_testing_set.csv"),
    ],
)
def test_a_folder_with_splits_takes_each_file_for_what_it_is_named(tmp_path, names):
    for name in names:
        write_records(tmp_path / name, "text\nx\n")
    expected = {split: [name.split("/")[-1]] for split, name in zip(("train", "val", "test"), names, strict=True)}
    uses = dict(zip(names, ("for training", "for validation", "for test"), strict=True))
    splits, (notice,) = find_files(tmp_path)
    assert splits == expected
    assert sorted(notice.removeprefix(f"{tmp_path}: ").split(", ")) == sorted(f"{n} {use}" for n, use in uses.items())
    assert find_files(tmp_path / "**" / "*.csv")[0] == expected
    for flag, name in (("--val-data", names[1]), ("--test-data", names[2])):
        assert find_source(tmp_path, flag).files == (tmp_path / name,)


def test_what_is_named_for_no_split_beside_a_training_file_is_left_out_with_a_notice(tmp_path):
    for name in ("train.csv", "extra.csv", "validation.csv", "contest_latest.csv"):
        write_records(tmp_path / name, "text\nx\n")
    other = write_records(tmp_path.parent / f"{tmp_path.name}-other.csv", "text\nx\n")
    splits, notices = find_files(tmp_path, val_data=str(other))
    assert splits == {"train": ["train.csv"], "val": [other.name]}
    left_out = "contest_latest.csv, extra.csv left out, train.csv for training, validation.csv left out"
    assert notices == (f"{tmp_path}: {left_out}",), "of a name with `test` in it the word alone counts"


def test_a_folder_within_that_may_not_be_read_is_not_left_out_in_silence(tmp_path, monkeypatch):
    (tmp_path / ".locked").mkdir()
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr("os.access", lambda path, mode: "locked" not in str(path.name))
    assert find_source(tmp_path).files == (tmp_path / "a.txt",), "whose hidden folders are no data"
    (tmp_path / "locked").mkdir()
    for spec in ("", "/*/*.txt", "/**/*.txt", "/locked/*.txt"):
        with pytest.raises(UserError, match=f"^--data {tmp_path}/locked: permission denied; let this user read the fo"):
            find_splits(f"{tmp_path}{spec}", "--data")
    assert find_source(f"{tmp_path}/*.txt").files == (tmp_path / "a.txt",)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_list_is_read_behind_any_number_of_blanks(name, tmp_path):
    text = (" " * 5000 + "\n") * 30 + json.dumps(PAIRS)
    file = tmp_path / name
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert read_records(file) == PAIRS
