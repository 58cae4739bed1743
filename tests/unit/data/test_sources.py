"""What --data may name, and one line with file, row, column and remedy for whatever cannot be used."""

import gzip
import json
import os
import time
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from helpers import data_helpers as samples
from helpers.data_helpers import NO_TEMPLATES, PAIRS

from trainer.config.errors import UserError
from trainer.data import cache, hf_hub, readers, sources

DATES = [{"d": "2022-01-05", "n": 1}, {"d": 5, "x": [1]}, {"n": None}]
LONG = [{"i": i, "text": "[{]}" * 50_000} for i in range(12)]  # 2.4 MB, more than is read at once
BIG, DEEP = "1" * 5000, "[" * 200_000 + "]" * 200_000
FIRST = '{"mr": "1", "ref": "2"}'


def pack(suffix, content):
    """The content as a file of that suffix holds it."""
    if suffix == ".gz":
        return gzip.compress(content)
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def write_files(folder, files):
    """Write {name: records, text or bytes} and return the last path."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            writers = {".csv": samples.write_csv, ".jsonl": samples.write_jsonl, ".parquet": samples.write_parquet}
            writers[path.suffix](path, content)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


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
            b'\xef\xbb\xbf,b,c\n007,NA,"x\n""y"""\n\n1.50,,null\n',
            [{"column 1": "007", "b": "NA", "c": 'x\n"y"'}, {"column 1": "1.50", "b": None, "c": "null"}],
        ),
    ],
)
def test_a_file_gives_its_records_as_they_are_written(tmp_path, name, content, records):
    assert samples.read_records(write_files(tmp_path, {name: content})) == records


def test_a_folder_and_a_glob_are_read_in_order_of_names(tmp_path):
    files = {f"{name}.csv": [{"text": name}] for name in "ba"} | {"README.md": "no data", ".hidden.csv": "not,data\n"}
    write_files(tmp_path / "a[1] *", files)  # a name that a pattern could be taken for
    for spec in (tmp_path / "a[1] *", tmp_path / "a*" / "[ab].csv"):
        assert [row["text"] for row in samples.read_records(spec)] == ["a", "b"]


@pytest.mark.parametrize(
    ("spec", "files", "problem"),
    [
        ("no.csv", {}, "--data no.csv: no such file"),
        ("./no", {}, "--data ./no: no such file or folder"),
        ("no*.csv", {}, "--data no*.csv: the pattern holds no data file"),
        ("empty", {"empty/x/.keep": ""}, "--data empty: the folder holds no data file"),
        ("a.xlsx", {"a.xlsx": "x"}, "--data a.xlsx: the ending '.xlsx' is not known; expected a CSV"),
        (".", {"a.csv": PAIRS, "b.jsonl": PAIRS}, "several kinds of data: CSV (a.csv), JSON (b.jsonl)"),
        ("*.csv", {"a.csv": PAIRS, "b.csv": "mr,text\nx,y\n"}, "b.csv, row 1 (line 2): column 'ref' is missing"),
        ("a.parquet", {"a.parquet": [*PAIRS, {"mr": "x", "ref": None}]}, "a.parquet, row 41: column 'ref' is null"),
        ("b.parquet", {"b.parquet": [{"mr": "x", "ref": [1]}]}, "b.parquet, row 1: column 'ref' holds a list"),
        ("a.csv", {"a.csv": '"mr\n\x1b[2J",b\n1,2\n'}, "its columns are 'mr\\n\\x1b[2J', b"),
        ("b.parquet.gz", {"b.parquet.gz": pack(".gz", b"x")}, "the ending '.gz' is not known"),
    ],
)
def test_a_source_that_cannot_be_used_is_one_line(refusal_message, tmp_path, spec, files, problem):
    if files:
        write_files(tmp_path, files)
    assert problem in refusal_message(spec)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", "", ": holds no record"),
        ("a.json", "", ": holds no record"),
        ("a.txt", "", ": holds no record"),
        ("a.parquet", "", ": not a whole Parquet file"),
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
        ("a.csv", 'mr,ref\n1,"2"x\n', ", row 1 (line 2): not CSV (',' expected after '\"')"),
        ("a.jsonl", f'{FIRST}\n{{"mr": "1", "ref": null}}\n', ", line 2: column 'ref' is null"),
        ("a.jsonl", f'{FIRST}\n\n{{"mr": "1"}}\n', ", line 3: column 'ref' is missing"),
        ("a.jsonl", '{"mr": "1", "ref": [2]}\n', ", line 1: column 'ref' holds a list"),
        ("a.jsonl", f'{FIRST}\n{{"mr": "1" "ref"}}\n', ", line 2, character 12: not JSON"),
        ("a.jsonl", f"{FIRST}\n[1]\n", ", line 2: holds a list; expected one JSON object"),
        ("a.jsonl", f"{FIRST} {FIRST}\n", ", line 1, character 25: not JSON (Extra"),
        ("a.jsonl", '{"mr": "1", "ref": {"a": 1, "a": 2}}\n', ", line 1: not JSON (the key 'a' stands twice in an obj"),
        ("a.jsonl", '{"mr": "1", "ref": 1e999}\n', ", line 1: not JSON (the number 1e999 is larger than any float"),
        ("a.jsonl", '{"mr": "1", "ref": -Infinity}\n', ", line 1: not JSON (the number -Infinity is larger than any"),
        ("a.jsonl", f'{FIRST}\n{{"n": {BIG}}}\n', ", line 2: not JSON (Exceeds the limit (4300 digits)"),
        ("a.jsonl", f'{{"n": {DEEP}}}\n', ", line 1: not JSON (nested too deeply)"),
        ("a.json", f'[{FIRST}, {{"n": {BIG}}}]', ", row 2: not JSON (Exceeds the limit (4300 digits)"),
        ("a.json", f'[{FIRST}, {{"d": {DEEP}}}]', ", row 2: not JSON (nested too deeply)"),
        ("a.json", DEEP, ", row 1: not an object; expected a list of objects"),
        ("a.json", f'[{FIRST}, {{"mr": 1', ", row 2: not JSON"),
        ("a.json", f"[{FIRST}", ", row 2: not JSON (the list is not closed)"),
        ("a.json", f"[{FIRST}, 3]", ", row 2: not an object"),
        ("a.json", f"[{FIRST},]", ", row 2: not an object"),
        ("a.json", f"[{FIRST}][{FIRST}]", ", row 2: not JSON (text follows the end of the list)"),
        ("a.json", f"[{FIRST} {FIRST}]", ", row 2: not JSON (a comma is missing)"),
        ("a.json", f'[{FIRST}, {{"mr": "1", "mr": "2"}}]', ", row 2: not JSON (the key 'mr' stands twice"),
        ("a.parquet", "no parquet at all", ": not a whole Parquet file"),
    ],
)
def test_bad_content_is_named_by_file_and_row(refusal_message, tmp_path, name, content, problem):
    (tmp_path / name).write_text(content)
    assert f"--data {name}{problem}" in refusal_message(name)


def test_a_table_of_arrow_without_a_row_or_with_a_name_twice_is_refused(refusal_message, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"mr": [], "ref": []}), tmp_path / "c.parquet")
    assert "c.parquet: holds no record" in refusal_message("c.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([[1], [2]], ["mr", "mr"]), tmp_path / "d.parquet")
    assert "d.parquet: names column 'mr' twice; rename one" in refusal_message("d.parquet")


def test_other_flags_are_named_and_an_unknown_column_with_those_that_there_are(refusal_message, tmp_path):
    samples.write_csv(tmp_path / "a.csv", PAIRS)
    assert "--val-data no.csv: no such file" in refusal_message("a.csv", val_data="no.csv")
    line = refusal_message("a.csv", prompt="{name}")
    assert line == "--prompt: --data a.csv has no column 'name'; its columns are mr, ref"


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
@pytest.mark.parametrize("lines", [2, 60_000])
def test_bytes_that_are_not_utf8_are_named_by_line(refusal_message, tmp_path, name, lines):
    row = {"a.txt": "é" * 20, "a.csv": "é,é", "a.jsonl": '{"text": "é"}'}[name].encode() + b"\n"
    head = b"text,b\n" if name == "a.csv" else row
    (tmp_path / name).write_bytes(head + row * (lines - 2) + row.replace("é".encode(), b"\xe9", 1) + row)
    line = refusal_message(name, **NO_TEMPLATES)
    assert f"{name}, line {lines}: not UTF-8 (byte 0xe9); save the file as UTF-8" in line


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("one\ntwo é".encode()[:-1], "a.txt, line 2: not UTF-8 (byte 0xc3)"),  # a character cut off at the end
        (b"short\n" + b"x" * (3 * 2**20), "a.txt, line 2: longer than 1 MB"),
        (b"\n  \n\n", "a.txt: holds blank lines only"),
    ],
)
def test_a_text_file_that_cannot_be_read_is_refused(refusal_message, tmp_path, monkeypatch, content, problem):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 2**20)
    (tmp_path / "a.txt").write_bytes(content)
    assert problem in refusal_message("a.txt", **NO_TEMPLATES)


def test_a_file_that_changes_while_it_is_read_is_refused(refusal_message, tmp_path, monkeypatch):
    file = samples.write_csv(tmp_path / "a.csv", PAIRS)
    whole = sources.records

    def growing(*args, **options):
        yield from whole(*args, **options)
        with open(file, "a") as opened:
            opened.write("more,rows\n")

    monkeypatch.setattr(sources, "records", growing)
    assert "--data a.csv: the file changed while it was read" in refusal_message("a.csv")


def test_a_file_that_is_only_touched_is_not_refused(tmp_path):
    source = sources.find(str(samples.write_csv(tmp_path / "a.csv", PAIRS)))
    facts = cache.fingerprint_files(source, tmp_path)
    os.utime(tmp_path / "a.csv", (1, 1))
    assert cache.find_change(source, facts) is None
    (tmp_path / "a.csv").unlink()
    assert "changed while it was read" in str(cache.find_change(source, facts))


def test_a_cached_file_hash_never_stands_for_other_contents(tmp_path, monkeypatch):
    path = samples.write_csv(tmp_path / "a.csv", PAIRS)
    source = sources.find(str(path))
    cache.fingerprint_files(source, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/files/*")), "a file that changed just now is not remembered"
    monkeypatch.setattr(cache, "SETTLE_SECONDS", -1.0)
    before, stat = cache.fingerprint_files(source, tmp_path / "cache"), path.stat()
    assert cache.fingerprint_files(source, tmp_path / "cache") == before
    path.write_bytes(path.read_bytes().replace(b"name[7]", b"name[8]"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time
    assert cache.fingerprint_files(source, tmp_path / "cache")[0].sha256 != before[0].sha256


# --- the hub ---


def test_the_hub_out_of_reach_is_one_line_that_names_the_file_flag(refusal_message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    began = time.monotonic()
    line = refusal_message("nobody/nothing-of-that-name")
    assert time.monotonic() - began < 20
    assert "no such file or folder here" in line
    assert "hub cannot be reached; give --data a file, a folder or acled-demo" in line


def test_the_hub_is_asked_whether_it_answers_before_it_is_waited_for(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port, where nothing listens
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
    source = sources.find("some/name", flag)
    assert [record["text"] for _, _, record in sources.records(source)] == [f"{split} {i}" for i in range(3)]
    assert source.locate(None, "row 2") == "some/name, row 2"


def test_reading_from_the_hub_prints_nothing(capfd):
    assert hf_hub.import_datasets().logging.get_verbosity() > 40
    assert capfd.readouterr() == ("", "")


# --- files are taken for the split that they are named ---


def find_splits(spec, val_data=None):
    return {source.split: source for source in sources.find_sources(str(spec), val_data, None)}


@pytest.mark.parametrize(
    "names",
    [
        ("train.csv", "validation.csv", "test.csv"),
        ("data/train-00000-of-00001.csv", "data/validation-00000-of-00001.csv", "data/test-00000-of-00001.csv"),
        ("training/a.csv", "dev/a.csv", "eval/a.csv"),
        ("my_train_set.csv", "my_valid_set.csv", "my_testing_set.csv"),
    ],
)
def test_a_folder_with_splits_takes_each_file_for_what_it_is_named(tmp_path, names):
    write_files(tmp_path, {name: [{"text": name}] for name in names})
    splits = find_splits(tmp_path)
    texts = [[row["text"] for _, _, row in sources.records(splits[split])] for split in ("train", "val", "test")]
    assert texts == [[name] for name in names]
    assert splits["train"].notices == (
        f"{tmp_path}: {names[0]} for training, {names[1]} for validation, {names[2]} for the test",
    )
    splits = find_splits(tmp_path / "**" / "*.csv")
    assert [len(splits[split].files) for split in ("train", "val", "test")] == [1, 1, 1]
    for flag, name in (("--val-data", names[1]), ("--test-data", names[2])):
        assert sources.find(str(tmp_path), flag).files == (tmp_path / name,)


def test_a_test_file_is_never_trained_on(refusal_message, tmp_path):
    for name in ("test.csv", "train_test.csv"):
        write_files(tmp_path, {f"folder/{name}": PAIRS})
        assert "--data folder: holds no split `train`, only test" in refusal_message("folder")
    (tmp_path / "folder" / "train_test.csv").unlink()
    write_files(tmp_path, {"folder/contest_latest.csv": PAIRS})  # the word alone counts
    splits = find_splits(tmp_path / "folder")
    assert [splits[name].files[0].name for name in ("train", "test")] == ["contest_latest.csv", "test.csv"]


def test_what_is_named_for_no_split_beside_a_training_file_is_left_out_with_a_notice(tmp_path):
    write_files(tmp_path, {name: [{"text": name}] for name in ("train.csv", "extra.csv", "validation.csv")})
    other = samples.write_csv(tmp_path.parent / f"{tmp_path.name}-other.csv", [{"text": "other"}])
    splits = find_splits(tmp_path, val_data=str(other))
    assert [source.files[0].name for source in splits.values()] == ["train.csv", other.name]
    assert splits["train"].notices == (
        f"{tmp_path}: train.csv for training",
        f"{tmp_path}: extra.csv left out: named for no split",
        f"{tmp_path}: validation.csv left out: named for validation",
    )


def test_folders_of_save_to_disk_and_arrow_files_are_read(tmp_path):
    import datasets

    whole = datasets.Dataset.from_list(PAIRS)
    whole.save_to_disk(str(tmp_path / "one"))
    assert samples.read_records(tmp_path / "one") == PAIRS
    assert samples.read_records(next((tmp_path / "one").glob("*.arrow"))) == PAIRS  # a stream
    table = pyarrow.Table.from_pylist(PAIRS)
    with pyarrow.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert samples.read_records(tmp_path / "file.arrow") == PAIRS
    datasets.DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(str(tmp_path / "two"))
    splits = find_splits(tmp_path / "two")
    assert {split: len(list(sources.records(source))) for split, source in splits.items()} == {"train": 40, "test": 1}
    (tmp_path / "broken.arrow").write_bytes(b"no arrow")
    state = tmp_path / "one" / "state.json"
    outside = state.read_text().replace("data-00000", "../two/train/data-00000")
    for name, content, problem in (
        ("broken.arrow", "no arrow", r"broken\.arrow: not a whole Arrow file"),
        ("one", outside, r"one: its state\.json names .*, outside of the folder"),
        ("one", "{", r"one: not a whole saved data set"),
    ):
        (state if name == "one" else tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=problem):
            samples.read_records(tmp_path / name)


def test_files_of_two_formats_in_one_folder_are_refused_by_name(refusal_message, tmp_path):
    chat = [{"messages": [{"role": "assistant", "content": "x"}]}]
    write_files(tmp_path, {"mix/a.jsonl": chat, "mix/b.jsonl": [{"text": "x"}]})
    line = refusal_message("mix", **NO_TEMPLATES)
    assert "mix/b.jsonl: another format than a.jsonl, whose records are messages" in line
    for content, other in (({"text": "x"}, "text"), ({"instruction": "x", "output": "y"}, "alpaca")):
        write_files(tmp_path, {"two/train.jsonl": [{"prompt": "x", "completion": "y"}], "two/val.jsonl": [content]})
        line = refusal_message("two", **NO_TEMPLATES)
        assert f"one holds prompt-completion, the other {other}; give both in one format" in line


# --- compressed files, pipes, and names that are no text ---


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.txt"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_text_file_gives_the_records_of_the_plain_one(tmp_path, name, suffix):
    plain = write_files(tmp_path, {name: json.dumps(PAIRS) if name in ("a.json", "a.txt") else PAIRS})
    packed = write_files(tmp_path, {name + suffix: pack(suffix, plain.read_bytes())})
    assert samples.read_records(packed) == samples.read_records(plain)
    facts = [cache.fingerprint_files(sources.find(str(file)), tmp_path / "cache")[0] for file in (plain, packed)]
    assert facts[0].sha256 == facts[1].sha256  # of what it holds: prepared once


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_off_is_refused(refusal_message, tmp_path, suffix):
    write_files(tmp_path, {f"a.txt{suffix}": pack(suffix, os.urandom(3000).hex().encode())[:-100]})
    assert f"a.txt{suffix}: not a whole {suffix} file (" in refusal_message(f"a.txt{suffix}", **NO_TEMPLATES)


def test_a_named_pipe_is_refused_and_not_waited_for(refusal_message, tmp_path):
    os.mkfifo(tmp_path / "a.csv")
    assert "--data a.csv: not a regular file (a pipe or a device)" in refusal_message("a.csv")


def test_a_path_that_is_not_utf8_can_be_read(tmp_path):
    source = sources.find(str(samples.write_csv(tmp_path / os.fsdecode(b"\xff\xfe.csv"), PAIRS)))
    assert len(cache.fingerprint_files(source, tmp_path / "cache")) == 1
    assert len(list(sources.records(source))) == len(PAIRS)
