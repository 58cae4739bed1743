"""What --data may name, and one line with file, row, column and remedy for whatever cannot be used."""

import json
import os
import time
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from helpers import data_helpers as samples
from helpers.data_helpers import NO_TEMPLATES, PAIRS

from trainer.data import cache, hf_hub, readers, sources


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


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet", "a.txt"])
def test_an_empty_file_is_refused(refusal_message, tmp_path, name):
    (tmp_path / name).touch()
    assert f"--data {name}: the file is empty" in refusal_message(name)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", "mr,ref\n", "a.csv: has a header but no row"),
        ("a.jsonl", "\n\n", "a.jsonl: holds no record"),
        ("a.json", "[ ]", "a.json: the list is empty"),
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
        ("a.json", '[{"mr": "1", "ref": "2"}, {"mr": "1", "mr": "2"}]', "a.json, row 2: the key 'mr' stands twice"),
        (
            "a.jsonl",
            '{"mr": "1", "ref": "2"} {"mr": "3", "ref": "4"}\n',
            "a.jsonl, line 1, character 25: not JSON (Extra",
        ),
        ("a.jsonl", '{"mr": "1", "ref": {"a": 1, "a": 2}}\n', "a.jsonl, line 1: the key 'a' stands twice in an object"),
        ("a.jsonl", '{"mr": "1", "ref": 1e999}\n', "a.jsonl, line 1: the number 1e999 is larger than any float"),
        ("a.jsonl", '{"mr": "1", "ref": -Infinity}\n', "a.jsonl, line 1: the number -Infinity is larger than any"),
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
