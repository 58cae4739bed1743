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
from trainer.config.schema import DataSettings
from trainer.data import cache, hf_hub, readers, sources
from trainer.data.prepare import prepare


def test_every_file_format_gives_the_same_records(tmp_path):
    files = [
        samples.write_csv(tmp_path / "a.csv", PAIRS),
        samples.write_csv(tmp_path / "a.tsv", PAIRS, "\t"),
        samples.write_jsonl(tmp_path / "a.jsonl", PAIRS),
        samples.write_parquet(tmp_path / "a.parquet", PAIRS),
        tmp_path / "a.json",
    ]
    files[-1].write_text(json.dumps(PAIRS, indent=2))
    for file in files:
        assert samples.read_records(file) == PAIRS, file.name


def test_a_text_file_holds_a_record_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone é\r\ntwo\n\nthree".encode())
    assert [record["text"] for record in samples.read_records(tmp_path / "a.txt")] == ["one é", "two", "", "three"]


def test_csv_cells_are_read_as_written(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbf,b,c\n007,NA,"x\n""y"""\n\n1.50,,null\n')
    assert samples.read_records(tmp_path / "a.csv") == [
        {"column 1": "007", "b": "NA", "c": 'x\n"y"'},
        {"column 1": "1.50", "b": None, "c": "null"},
    ]


def test_dates_in_json_stay_as_written_and_rows_may_differ(tmp_path):
    rows = [{"d": "2022-01-05", "n": 1}, {"d": 5, "x": [1]}, {"n": None}]
    assert samples.read_records(samples.write_jsonl(tmp_path / "a.jsonl", rows)) == rows


def test_a_json_list_is_read_piece_by_piece(tmp_path):
    rows = [{"i": i, "text": "[{]}" * 50_000} for i in range(12)]  # 2.4 MB, more than is read at once
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert samples.read_records(tmp_path / "a.json") == rows


def test_a_folder_and_a_glob_are_read_in_order_of_names(tmp_path):
    folder = tmp_path / "a[1] *"  # names that a pattern could be taken for
    folder.mkdir()
    for name in ("b.csv", "a.csv"):
        samples.write_csv(folder / name, [{"text": name}])
    (folder / "README.md").write_text("not data")
    (folder / ".hidden.csv").write_text("not,data\n")
    assert [row["text"] for row in samples.read_records(folder)] == ["a.csv", "b.csv"]
    assert [row["text"] for row in samples.read_records(tmp_path / "a*" / "[ab].csv")] == ["a.csv", "b.csv"]


def test_missing_data_files_are_named(refusal_message, tmp_path):
    assert "--data no.csv: no such file" in refusal_message("no.csv")
    assert "--data ./no: no such file or folder" in refusal_message("./no")
    assert "--data no*.csv: no file matches" in refusal_message("no*.csv")
    (tmp_path / "empty").mkdir()
    assert "--data empty: the folder holds no data file" in refusal_message("empty")
    samples.write_csv(tmp_path / "a.csv", PAIRS)
    assert "--val-data no.csv: no such file" in refusal_message("a.csv", val_data="no.csv")


def test_unknown_file_extensions_and_mixed_formats_are_refused(refusal_message, tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"x")
    assert "--data a.xlsx: the ending '.xlsx' is not known; expected a CSV" in refusal_message("a.xlsx")
    samples.write_csv(tmp_path / "a.csv", PAIRS)
    samples.write_jsonl(tmp_path / "b.jsonl", PAIRS)
    line = refusal_message(".")
    assert "several kinds of data: CSV (a.csv), JSON (b.jsonl)" in line


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", "", "a.csv: holds no record"),
        ("a.json", "", "a.json: holds no record"),
        ("a.txt", "", "a.txt: holds no record"),
        ("a.parquet", "", "a.parquet: not a whole Parquet file"),
        ("a.tsv", "mr\tref\n", "a.tsv: holds no record"),
        ("a.jsonl", "\n\n", "a.jsonl: holds no record"),
        ("a.json", "[ ]", "a.json: holds no record"),
        ("a.csv", "mr,mr\n1,2\n", "a.csv: names column 'mr' twice"),
        ("a.csv", "mr,ref\n1,2\n1,2,3\n", "a.csv, row 2 (line 3): 3 fields where the header has 2"),
        ("a.csv", 'mr,ref\n1,"2\n2"\n1\n', "a.csv, row 2 (line 4): 1 fields where the header has 2"),
        ("a.tsv", "mr\tref\n1\t2\n1,2\n", "a.tsv, row 2 (line 3): 1 fields where the header has 2"),
        (
            "a.csv",
            'mr,ref\n1,2\n3,"4\n',
            "a.csv, row 2 (line 3): not CSV (unexpected end of data); look for a quotation mark",
        ),
        ("a.csv", "mr,ref\n1,2\n3,\n", "a.csv, row 2 (line 3): column 'ref' is null or empty: fill it, drop the row"),
        ("a.csv", 'mr,ref\n"1\n1",2\n,4\n', "a.csv, row 2 (line 4): column 'mr' is null or empty"),
        ("a.jsonl", '{"mr": "1", "ref": "2"}\n{"mr": "1", "ref": null}\n', "a.jsonl, line 2: column 'ref' is null"),
        ("a.jsonl", '{"mr": "1", "ref": "2"}\n\n{"mr": "1"}\n', "a.jsonl, line 3: column 'ref' is missing"),
        ("a.jsonl", '{"mr": "1", "ref": [2]}\n', "a.jsonl, line 1: column 'ref' holds a list"),
        ("a.jsonl", '{"mr": "1", "ref": "2"}\n{"mr": "1" "ref"}\n', "a.jsonl, line 2, character 12: not JSON"),
        ("a.jsonl", '{"mr": "1", "ref": "2"}\n[1]\n', "a.jsonl, line 2: holds a list; expected one JSON object"),
        ("a.json", '[{"mr": "1", "ref": "2"}, {"mr": 1', "a.json, row 2: not JSON"),
        ("a.json", '[{"mr": "1", "ref": "2"}', "a.json, row 2: not JSON (the list is not closed)"),
        ("a.json", '[{"mr": "1", "ref": "2"}, 3]', "a.json, row 2: not an object"),
        (
            "a.json",
            '[{"mr": "1", "ref": "2"}][{"mr": "3", "ref": "4"}]',
            "row 2: not JSON (text follows the end of the",
        ),
        ("a.json", '[{"mr": "1", "ref": "2"} {"mr": "3", "ref": "4"}]', "a.json, row 2: not JSON (a comma is missing)"),
        ("a.json", '[{"mr": "1", "ref": "2"},]', "a.json, row 2: not an object"),
        (
            "a.json",
            '[{"mr": "1", "ref": "2"}, {"mr": "1", "mr": "2"}]',
            "a.json, row 2: not JSON (the key 'mr' stands twice",
        ),
        (
            "a.jsonl",
            '{"mr": "1", "ref": "2"} {"mr": "3", "ref": "4"}\n',
            "a.jsonl, line 1, character 25: not JSON (Extra",
        ),
        (
            "a.jsonl",
            '{"mr": "1", "ref": {"a": 1, "a": 2}}\n',
            "a.jsonl, line 1: not JSON (the key 'a' stands twice in an object",
        ),
        (
            "a.jsonl",
            '{"mr": "1", "ref": 1e999}\n',
            "a.jsonl, line 1: not JSON (the number 1e999 is larger than any float",
        ),
        (
            "a.jsonl",
            '{"mr": "1", "ref": -Infinity}\n',
            "a.jsonl, line 1: not JSON (the number -Infinity is larger than any",
        ),
        ("a.csv", 'mr,ref\n1,"2"x\n', "a.csv, row 1 (line 2): not CSV (',' expected after '\"')"),
        ("a.parquet", "no parquet at all", "a.parquet: not a whole Parquet file"),
    ],
)
def test_bad_content_is_named_by_file_and_row(refusal_message, tmp_path, name, content, problem):
    (tmp_path / name).write_text(content)
    assert problem in refusal_message(name)


def test_a_null_or_a_list_in_parquet_is_named_by_row(refusal_message, tmp_path):
    samples.write_parquet(tmp_path / "a.parquet", [*PAIRS, {"mr": "x", "ref": None}])
    assert "a.parquet, row 41: column 'ref' is null" in refusal_message("a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"mr": [], "ref": []}), tmp_path / "c.parquet")
    assert "c.parquet: holds no record" in refusal_message("c.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([[1], [2]], ["mr", "mr"]), tmp_path / "d.parquet")
    assert "d.parquet: names column 'mr' twice; rename one" in refusal_message("d.parquet")
    samples.write_parquet(tmp_path / "b.parquet", [{"mr": "x", "ref": [1]}])
    assert "b.parquet, row 1: column 'ref' holds a list" in refusal_message("b.parquet")


def test_an_unknown_column_is_named_in_the_first_file_and_in_the_second(refusal_message, tmp_path):
    samples.write_csv(tmp_path / "a.csv", PAIRS)
    line = refusal_message("a.csv", prompt="{name}")
    assert line == "--prompt: --data a.csv has no column 'name'; its columns are mr, ref"
    samples.write_csv(tmp_path / "b.csv", [{"mr": "x", "text": "y"}])
    assert "b.csv, row 1 (line 2): column 'ref' is missing" in refusal_message("*.csv")


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
@pytest.mark.parametrize("lines", [2, 60_000])
def test_bytes_that_are_not_utf8_are_named_by_line(refusal_message, tmp_path, name, lines):
    row = {"a.txt": "é" * 20, "a.csv": "é,é", "a.jsonl": '{"text": "é"}'}[name].encode() + b"\n"
    head = b"text,b\n" if name == "a.csv" else row
    (tmp_path / name).write_bytes(head + row * (lines - 2) + row.replace("é".encode(), b"\xe9", 1) + row)
    assert f"{name}, line {lines}: not UTF-8 (byte 0xe9); save the file as UTF-8" in refusal_message(
        name, **NO_TEMPLATES
    )


def test_a_character_cut_off_at_the_end_is_named(refusal_message, tmp_path):
    (tmp_path / "a.txt").write_bytes("one\ntwo é".encode()[:-1])
    assert "a.txt, line 2: not UTF-8 (byte 0xc3)" in refusal_message("a.txt", **NO_TEMPLATES)


def test_a_line_too_long_to_hold_is_refused(refusal_message, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 2**20)
    (tmp_path / "a.txt").write_text("short\n" + "x" * (3 * 2**20))
    assert "a.txt, line 2: longer than 1 MB" in refusal_message("a.txt", **NO_TEMPLATES)


def test_blank_texts_only_are_refused(refusal_message, tmp_path):
    (tmp_path / "a.txt").write_text("\n  \n\n")
    assert "a.txt: holds blank lines only" in refusal_message("a.txt", **NO_TEMPLATES)


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
    monkeypatch.setattr(cache, "SETTLE_SECONDS", -1.0)
    path = samples.write_csv(tmp_path / "a.csv", PAIRS)
    source = sources.find(str(path))
    before, stat = cache.fingerprint_files(source, tmp_path / "cache"), path.stat()
    assert cache.fingerprint_files(source, tmp_path / "cache") == before
    path.write_bytes(path.read_bytes().replace(b"name[7]", b"name[8]"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time
    assert cache.fingerprint_files(source, tmp_path / "cache")[0].sha256 != before[0].sha256


def test_the_hash_of_a_recently_changed_file_is_not_cached(tmp_path):
    source = sources.find(str(samples.write_csv(tmp_path / "a.csv", PAIRS)))
    cache.fingerprint_files(source, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/files/*"))


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


def test_reading_from_the_hub_prints_nothing(tmp_path, capfd):
    (tmp_path / "a.csv").write_text("a\n1\n")
    assert samples.read_records(tmp_path / "a.csv") == [{"a": "1"}]
    assert hf_hub.import_datasets().logging.get_verbosity() > 40
    assert capfd.readouterr() == ("", "")


# --- files are taken for the split that they are named ---


def find_splits(spec, val_data=None, test_data=None):
    return {source.split: source for source in sources.find_sources(str(spec), val_data, test_data)}


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
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        samples.write_csv(tmp_path / name, [{"text": name}])
    splits = find_splits(tmp_path)
    assert [[row["text"] for _, _, row in sources.records(splits[split])] for split in ("train", "val", "test")] == [
        [name] for name in names
    ]
    assert splits["train"].notices == (
        f"{tmp_path}: {names[0]} for training, {names[1]} for validation, {names[2]} for the test",
    )
    splits = find_splits(tmp_path / "**" / "*.csv")
    assert [len(splits[split].files) for split in ("train", "val", "test")] == [1, 1, 1]


def test_a_test_file_is_never_trained_on(refusal_message, tmp_path):
    (tmp_path / "folder").mkdir()
    samples.write_csv(tmp_path / "folder" / "test.csv", PAIRS)
    assert "--data folder: holds no split `train`, only test" in refusal_message("folder")
    samples.write_csv(tmp_path / "folder" / "train_test.csv", PAIRS)
    assert "--data folder: holds no split `train`, only test" in refusal_message("folder")
    (tmp_path / "folder" / "train_test.csv").unlink()
    samples.write_csv(tmp_path / "folder" / "contest_latest.csv", PAIRS)  # the word alone counts
    splits = find_splits(tmp_path / "folder")
    assert [file.name for file in splits["train"].files] == ["contest_latest.csv"]
    assert [file.name for file in splits["test"].files] == ["test.csv"]


def test_what_is_named_for_no_split_beside_a_training_file_is_left_out_with_a_notice(tmp_path):
    for name in ("train.csv", "extra.csv", "validation.csv"):
        samples.write_csv(tmp_path / name, [{"text": name}])
    other = samples.write_csv(tmp_path.parent / f"{tmp_path.name}-other.csv", [{"text": "other"}])
    splits = find_splits(tmp_path, val_data=str(other))
    assert [source.files[0].name for source in splits.values()] == ["train.csv", other.name]
    assert splits["train"].notices == (
        f"{tmp_path}: train.csv for training",
        f"{tmp_path}: extra.csv left out: named for no split",
        f"{tmp_path}: validation.csv left out: named for validation",
    )


def test_validation_data_of_a_folder_are_its_validation_split(tmp_path):
    for name in ("train.csv", "validation.csv", "test.csv"):
        samples.write_csv(tmp_path / name, [{"text": name}])
    assert sources.find(str(tmp_path), "--val-data").files[0].name == "validation.csv"
    assert sources.find(str(tmp_path), "--test-data").files[0].name == "test.csv"


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
    with pytest.raises(UserError, match=r"broken\.arrow: not a whole Arrow file"):
        samples.read_records(tmp_path / "broken.arrow")
    state = tmp_path / "one" / "state.json"
    state.write_text(state.read_text().replace("data-00000", "../two/train/data-00000"))
    with pytest.raises(UserError, match=r"one: its state\.json names .*, outside of the folder"):
        samples.read_records(tmp_path / "one")
    state.write_text("{")
    with pytest.raises(UserError, match=r"one: not a whole saved data set"):
        samples.read_records(tmp_path / "one")


def test_files_of_two_formats_in_one_folder_are_refused_by_name(refusal_message, tmp_path):
    (tmp_path / "mix").mkdir()
    samples.write_jsonl(tmp_path / "mix" / "a.jsonl", [{"messages": [{"role": "assistant", "content": "x"}]}])
    samples.write_jsonl(tmp_path / "mix" / "b.jsonl", [{"text": "x"}])
    assert "mix/b.jsonl: another format than a.jsonl, whose records are messages" in refusal_message(
        "mix", **NO_TEMPLATES
    )
    (tmp_path / "two").mkdir()
    samples.write_jsonl(tmp_path / "two" / "train.jsonl", [{"prompt": "x", "completion": "y"}])
    for content, other in (({"text": "x"}, "text"), ({"instruction": "x", "output": "y"}, "alpaca")):
        samples.write_jsonl(tmp_path / "two" / "val.jsonl", [content])
        line = refusal_message("two", **NO_TEMPLATES)
        assert f"one holds prompt-completion, the other {other}; give both in one format" in line


# --- compressed files, pipes, numbers and nesting beyond measure ---


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.txt"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_text_file_gives_the_records_of_the_plain_one(tmp_path, name, suffix):
    if name == "a.csv":
        samples.write_csv(tmp_path / name, PAIRS)
    else:
        (tmp_path / name).write_text(
            json.dumps(PAIRS) if name == "a.json" else "".join(f"{json.dumps(p)}\n" for p in PAIRS)
        )
    content = (tmp_path / name).read_bytes()
    pack = gzip.compress if suffix == ".gz" else lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True)
    (tmp_path / f"{name}{suffix}").write_bytes(pack(content))
    assert samples.read_records(tmp_path / f"{name}{suffix}") == samples.read_records(tmp_path / name)
    plain, packed = (
        cache.fingerprint_files(sources.find(str(tmp_path / file)), tmp_path / "cache")[0]
        for file in (name, name + suffix)
    )
    assert plain.sha256 == packed.sha256  # of what it holds: prepared once


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_off_is_refused(refusal_message, tmp_path, suffix):
    content = os.urandom(3000).hex().encode()
    pack = gzip.compress if suffix == ".gz" else lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True)
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(content)[:-100])
    assert f"a.txt{suffix}: not a whole {suffix} file (" in refusal_message(f"a.txt{suffix}", **NO_TEMPLATES)
    (tmp_path / f"b.parquet{suffix}").write_bytes(pack(content))
    assert f"the ending '{suffix}' is not known" in refusal_message(f"b.parquet{suffix}")


def test_a_named_pipe_is_refused_and_not_waited_for(refusal_message, tmp_path):
    os.mkfifo(tmp_path / "a.csv")
    assert "--data a.csv: not a regular file (a pipe or a device)" in refusal_message("a.csv")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", '{{"mr": "1", "ref": "2"}}\n{{"n": {big}}}\n', "line 2: not JSON (Exceeds the limit (4300 digits)"),
        ("a.json", '[{{"mr": "1", "ref": "2"}}, {{"n": {big}}}]', "row 2: not JSON (Exceeds the limit (4300 digits)"),
        ("a.jsonl", '{{"n": {deep}}}\n', "line 1: not JSON (nested too deeply)"),
        ("a.json", '[{{"mr": "1", "ref": "2"}}, {{"d": {deep}}}]', "row 2: not JSON (nested too deeply)"),
        ("a.json", "{deep}", "row 1: not an object; expected a list of objects"),
    ],
)
def test_numbers_too_long_and_nesting_too_deep_are_named_by_row(refusal_message, tmp_path, name, content, problem):
    (tmp_path / name).write_text(content.format(big="1" * 5000, deep="[" * 200_000 + "]" * 200_000))
    assert f"--data {name}, {problem}" in refusal_message(name)


def test_a_line_break_in_a_column_name_is_shown_escaped(refusal_message, tmp_path):
    samples.write_csv(tmp_path / "a.csv", [{"mr\n\x1b[2J": "1", "b": "2"}])
    assert "its columns are 'mr\\n\\x1b[2J', b" in refusal_message("a.csv")


def test_a_path_that_is_not_utf8_can_be_read(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff\xfe.csv")
    samples.write_csv(path, PAIRS)
    source = sources.find(str(path))
    assert len(cache.fingerprint_files(source, tmp_path / "cache")) == 1
    assert len(list(sources.records(source))) == len(PAIRS)


@pytest.mark.parametrize("empty", ["csv", "jsonl-empty", "jsonl-null", "jsonl-missing"])
def test_an_empty_optional_field_is_the_same_in_csv_and_jsonl(tmp_path, model, empty):
    rows = [{"q": f"What is {i}?", "hint": f"see {i}" if i % 2 else "", "a": f" {i}"} for i in range(40)]
    if empty == "csv":
        file = samples.write_csv(tmp_path / "a.csv", rows)
    else:
        value = {"jsonl-null": {"hint": None}, "jsonl-missing": {}, "jsonl-empty": {"hint": ""}}[empty]
        for row in rows[::2]:
            del row["hint"]
            row |= value
        file = samples.write_jsonl(tmp_path / "a.jsonl", [rows[1], *rows[:1], *rows[2:]])
    settings = DataSettings(
        data=str(file),
        block_size=64,
        prompt="Q: {q}\nHint: {hint}\nA:",
        completion="{a}",
        objective="completion",
        val_fraction=0.3,
    )
    prepared = prepare(settings, model=model, global_batch=2, cache=tmp_path / "cache")
    prompts = sorted(prompt for prompt, _ in prepared.val_texts)
    assert all(("Hint: see" in prompt) == bool(int(prompt.split()[3].rstrip("?")) % 2) for prompt in prompts)
    assert all("Hint: \n" not in prompt for prompt in prompts)
