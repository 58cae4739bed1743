"""Compressed files, pipes, numbers and nesting beyond measure, names that are no text: read, or refused in a line."""

import gzip
import json
import os

import pyarrow.parquet
import pytest
from helpers import data_helpers as samples
from helpers.data_helpers import NO_TEMPLATES, PAIRS

from trainer.config.schema import DataSettings
from trainer.data import cache, sources
from trainer.data.prepare import prepare


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
        ("a.jsonl", '{{"mr": "1", "ref": "2"}}\n{{"n": {big}}}\n', "line 2, column 'n': a number of 5,000 digits"),
        ("a.jsonl", '{{"n": {big}}}\n', "line 1, column 'n': a number of 5,000 digits; expected at most 4,300"),
        ("a.json", '[{{"mr": "1", "ref": "2"}}, {{"n": {big}}}]', "row 2, column 'n': a number of 5,000 digits"),
        ("a.jsonl", '{{"\\u001b[": {deep}}}\n', "line 1, column '\\\\u001b[': JSON nested more than 500 deep"),
        ("a.json", '[{{"mr": "1", "ref": "2"}}, {{"d": {deep}}}]', "row 2, column 'd': JSON nested more than 500 deep"),
        ("a.json", "{deep}", "row 1: not an object; expected a list of objects"),
    ],
)
def test_numbers_too_long_and_nesting_too_deep_are_named_by_row_and_column(
    refusal_message, tmp_path, name, content, problem
):
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
