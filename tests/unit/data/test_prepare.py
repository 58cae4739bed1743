"""From records to rows: blocks and completions, the splits, who the rows are, and what leaves none."""

import numpy as np
import pytest
from helpers.data_helpers import write_records

from trainer.config import cli
from trainer.config.choices import MAX_NUM_SAMPLES
from trainer.config.errors import UserError
from trainer.data.prepare import NUM_SAMPLED_RECORDS, block_size_for, prepare, split_of
from trainer.data.tokenizer import load_tokenizer

EOS_ID = 0  # <|endoftext|> of the tokenizer that the samples train
PAIRS = [{"mr": f"Town {i}", "ref": f"On {i} January people met in Town {i}."} for i in range(60)]
TEMPLATES = {"prompt": "{mr}:", "completion": " {ref}"}
COMPLETION = {"objective": "completion", **TEMPLATES}


@pytest.fixture(scope="package")
def tokenizer(model):
    return load_tokenizer(model)


@pytest.fixture
def pairs_csv(tmp_path):
    return write_records(tmp_path / "a.csv", PAIRS)


def decode_rows(dataset, tokenizer):
    return [tokenizer.decode(dataset.row(i)) for i in range(len(dataset))]


def test_blocks_are_the_joined_texts_cut_with_the_tail_counted(tmp_path, prepare_file, tokenizer):
    lines = [f"On {i} January people met in Town {i}." for i in range(40)]
    prepared = prepare_file(write_records(tmp_path / "a.txt", "\n".join([*lines, "", " "])))
    for side, rows in (("train", prepared.train), ("val", prepared.val)):
        mine = [line for line in lines if split_of(line, 0.1) == side]
        stream = [token for line in mine for token in [*tokenizer(line)["input_ids"], EOS_ID]]
        whole = len(stream) // 32 * 32
        assert np.concatenate([rows.row(i) for i in range(len(rows))]).tolist() == stream[:whole]
        assert set(rows.lengths()) == {32}
        assert rows.is_target(0).tolist() == [False] + [True] * 31
        blocks = whole // 32
        counts = {"records": len(mine), "examples": blocks, "tokens": whole, "num_target_tokens": blocks * 31}
        assert {name: prepared.metadata[side][name] for name in counts} == counts
        notice = f"{side}: the last {len(stream) - whole} tokens do not fill a block and are left out"
        assert notice in prepared.metadata["notices"]
    assert f"{tmp_path / 'a.txt'}: 2 blank records are left out" in prepared.metadata["notices"]


def test_a_completion_row_counts_the_completion_and_its_end_only(pairs_csv, prepare_file, tokenizer):
    prepared = prepare_file(pairs_csv, **COMPLETION)
    rows, pairs = prepared.train, [pair for pair in PAIRS if split_of(f"{pair['mr']}:", 0.1) == "train"]
    assert len(rows) == len(pairs)
    val_texts = [(f"{pair['mr']}:", f" {pair['ref']}") for pair in PAIRS if pair not in pairs]
    assert list(prepared.val_texts) == val_texts[:MAX_NUM_SAMPLES]
    for i, pair in enumerate(pairs):
        before, after = tokenizer(f"{pair['mr']}:")["input_ids"], tokenizer(f" {pair['ref']}")["input_ids"]
        assert rows.row(i).tolist() == [*before, *after, EOS_ID]
        assert rows.is_target(i).tolist() == [False] * len(before) + [True] * (len(after) + 1)
    assert rows.num_target_tokens.sum() == sum(len(tokenizer(f" {pair['ref']}")["input_ids"]) + 1 for pair in pairs)
    joined = prepare_file(pairs_csv, prompt="{mr}", completion="{ref}").metadata["notices"]
    assert "60 of 60 records have nothing between prompt and completion" in "".join(joined)
    alone = prepare_file(pairs_csv, objective="completion", completion="{ref}")
    assert not any(alone.train.is_target(i)[0] for i in range(len(alone.train))), "nothing predicts a first token"
    assert set(alone.row_info("val")["group"]) == {None}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"chat_template": "no.jinja"}, r"--chat-template no\.jinja: cannot be read"),
        ({"global_batch": 5000}, r"\d+ examples of 32 tokens, and 5000 are needed; give more, or a smaller --b"),
        ({"val_fraction": 1e-6}, "--data .*0 validation records make 0 examples of .*--val-fraction"),
        ({"val_data": ("a.csv", "short.csv"), "allow_leakage": True}, r"short.csv: 1 validation \(short\) records"),
        ({"retain_data": "short.csv"}, r"--retain-data short\.csv: 1 retained records make 0 examples"),
        ({"test_fraction": 0.2, "test_data": "t.csv"}, "--test-fraction 0.2 and --test-data: expected one of them"),
        ({"split_by": "dok"}, "--split-by dok: .* has no such column; expected one of mr, ref"),
        (
            {"objective": "completion", "block_size": 2},
            r"train: (\d+) of \1 records are longer than --block-size 2 tokens .* raise --block-size",
        ),
    ],
)
def test_settings_that_leave_no_rows_are_refused_with_a_remedy(
    pairs_csv, prepare_file, settings, problem, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "short.csv", [{"text": "short", "mr": "s", "ref": "t"}])
    with pytest.raises(UserError, match=problem):
        prepare_file(pairs_csv, **{"objective": "blocks", **settings, **TEMPLATES})


def test_a_mistake_in_the_last_row_is_found_before_anything_is_tokenised(tmp_path, prepare_file, monkeypatch):
    def too_early(*args):
        raise AssertionError("tokenised before all records were checked")

    monkeypatch.setattr("trainer.data.prepare.encode", too_early)
    file = write_records(tmp_path / "a.jsonl", [*PAIRS, {"mr": "x", "ref": None}])
    with pytest.raises(UserError, match="line 61: column 'ref'"):
        prepare_file(file, **TEMPLATES)


def test_the_split_and_ids_do_not_move_when_rows_are_added_or_reordered(tmp_path, prepare_file, tokenizer):
    assert (split_of("abc", 0.7285), split_of("abc", 0.7283)) == ("val", "train")  # FIPS 180-2: its SHA-256 is ba78...
    few, more, turned = (
        prepare_file(write_records(tmp_path / f"{name}.csv", pairs), val_fraction=0.3, **COMPLETION)
        for name, pairs in (("few", PAIRS[:40]), ("more", PAIRS), ("turned", PAIRS[::-1]))
    )
    for side in ("train", "val"):
        before, after = decode_rows(getattr(few, side), tokenizer), decode_rows(getattr(more, side), tokenizer)
        assert set(before) < set(after)
        assert len(before) == few.metadata[side]["records"]
    assert more.row_info("val")["id"].tolist() == turned.row_info("val")["id"].tolist()[::-1]


def test_records_of_one_prompt_stay_in_one_split_and_are_one_group(tmp_path, prepare_file, tokenizer):
    shared = [{"mr": pair["mr"], "ref": f"{pair['ref']} {n}"} for pair in PAIRS for n in range(3)]
    file = write_records(tmp_path / "a.csv", shared)
    prepared = prepare_file(file, val_fraction=0.4, **COMPLETION)
    train, val = (
        {text.split(":")[0] for text in decode_rows(rows, tokenizer)} for rows in (prepared.train, prepared.val)
    )
    assert not train & val
    assert 0 < len(val) < 60
    assert len(train | val) == 60
    assert set(prepared.row_info("val")["group"].value_counts()) == {3}
    everywhere = prepare_file(file, prompt="Say:", completion=" {ref}", objective="completion")
    assert everywhere.metadata["val"]["records"] > 0, "a prompt that is the same everywhere decides no split"


def test_records_with_one_value_of_the_split_column_stay_in_one_split(tmp_path, prepare_file):
    records = [{"doc": f"d{i % 12}", **pair} for i, pair in enumerate(PAIRS)]
    file = write_records(tmp_path / "a.jsonl", records)
    options = {"val_fraction": 0.3, "test_fraction": 0.3, "split_by": "doc", **COMPLETION}
    prepared = prepare_file(file, **options)
    groups = {split: prepared.row_info(split)["group"] for split in ("val", "test")}
    assert not set(groups["val"]) & set(groups["test"])
    for split, values in groups.items():
        assert len(values) == len(getattr(prepared, split))
        assert set(values.value_counts()) == {5}
        assert prepared.metadata[split]["units"] == len(set(values))


def test_the_first_records_alone_are_read_and_tokenised(tmp_path, prepare_file, tokenizer):
    file = write_records(tmp_path / "a.jsonl", [*PAIRS, {"mr": None}])
    val = str(write_records(tmp_path / "v.jsonl", PAIRS[50:]))
    prepared = prepare_file(file, max_samples=20, val_fraction=0.3, **COMPLETION)
    whole = prepare_file(write_records(tmp_path / "b.jsonl", PAIRS[:20]), val_fraction=0.3, **COMPLETION)
    assert prepared.metadata["fingerprint"] == whole.metadata["fingerprint"]
    assert len(prepare_file(file, max_samples=20, val_data=val, **COMPLETION).val) == 10, "of --data alone"


@pytest.mark.parametrize("objective", ["completion", "blocks"])
def test_a_mixture_keeps_its_parts_apart_and_is_other_data_under_other_weights(tmp_path, prepare_file, objective):
    a, b = (write_records(tmp_path / name, PAIRS[i::2]) for i, name in enumerate(("a.csv", "b b.jsonl")))
    val = str(write_records(tmp_path / "v.csv", [{"mr": "x", "ref": f"{i} y" * 9} for i in range(9)]))
    options = {**COMPLETION, "objective": objective, "val_data": val}
    mixed, same, other = (prepare_file(f"{a}={x} {b}={y}", **options) for x, y in ((0.7, 0.3), (7, "3."), (1, 1)))
    parts = [prepare_file(file, **options).train for file in (a, b)]
    assert mixed.train.mixture == ((len(parts[0]), 0.7), (len(parts[1]), 0.3))
    rows = [part.row(i).tolist() for part in parts for i in range(len(part))]
    assert [mixed.train.row(i).tolist() for i in range(len(mixed.train))] == rows
    assert mixed.metadata["fingerprint"] == same.metadata["fingerprint"] != other.metadata["fingerprint"]
    for data, expected in (
        (f"{a}=9999 {b}=1", "examples and weight make 0.0.* expected at least 1"),
        (f"{a}=0 {b}=1", "=0: expected a weight above 0"),
        (f"{a} {b}", "or several with weights: A=0.7 B=0.3"),
    ):
        with pytest.raises(UserError, match=expected):
            prepare_file(data, **options)


def test_a_test_split_is_taken_from_the_training_records_only(pairs_csv, prepare_file):
    without = prepare_file(pairs_csv, **COMPLETION)
    prepared = prepare_file(pairs_csv, test_fraction=0.3, **COMPLETION)
    assert len(prepared.test) > len(without.test) == 0
    assert prepared.metadata["val_fingerprint"] == without.metadata["val_fingerprint"]
    assert len(prepared.train) + len(prepared.test) == len(without.train)
    assert prepared.metadata["fingerprint"] != without.metadata["fingerprint"]


def test_ids_of_a_large_vocabulary_are_kept_whole(pairs_csv, prepare_file, monkeypatch):
    small = prepare_file(pairs_csv, **COMPLETION).train
    monkeypatch.setattr("trainer.data.prepare.vocabulary_size", lambda tokenizer: 65_537)
    large = prepare_file(pairs_csv, block_size=33, **COMPLETION).train
    assert (small.ids.dtype, large.ids.dtype) == (np.uint16, np.uint32)
    assert small.ids.tolist() == large.ids.tolist()


@pytest.mark.parametrize("objective", ["blocks", "completion"])
def test_the_bytes_of_the_targets_are_those_of_the_text(tmp_path, prepare_file, tokenizer, objective):
    pairs = [{**pair, "ref": f"{pair['ref']} Größe 東京 🌍"} for pair in PAIRS]
    file = write_records(tmp_path / "a.csv", pairs)
    prepared = prepare_file(file, block_size=64, val_fraction=0.4, **{**COMPLETION, "objective": objective})
    info = prepared.row_info("val")
    assert info["targets"].tolist() == prepared.val.num_target_tokens.tolist()
    assert prepared.metadata["val"]["target_bytes"] == info["bytes"].sum()
    if objective == "completion":
        texts = [f" {p['ref']}" for p in pairs if split_of(f"{p['mr']}:", 0.4) == "val"]
        assert info["bytes"].tolist() == [len(text.encode()) for text in texts]
        assert all(text[1:5] in excerpt for text, excerpt in zip(texts, info["excerpt"], strict=True))
    else:  # blocks end within characters, so only the sum over all tokens is a text's
        for i in range(len(prepared.val)):
            pieces = [tokenizer.convert_ids_to_tokens(int(t)) for t in prepared.val.row(i)[1:] if t != EOS_ID]
            assert info["bytes"][i] == sum(map(len, pieces))


def test_retained_text_makes_blocks_changes_no_fingerprint_and_is_not_trained_on(pairs_csv, tmp_path, prepare_file):
    options = {"val_fraction": 0.4, **COMPLETION}
    prepared, without = prepare_file(pairs_csv, retain_data="demo-base", **options), prepare_file(pairs_csv, **options)
    assert set(prepared.retain.lengths()) == {prepared.metadata["block_size"]}
    assert prepared.metadata["fingerprint"] == without.metadata["fingerprint"]
    assert len(without.retain) == 0
    pairs = write_records(tmp_path / "pairs.jsonl", '{"prompt": "p q", "completion": " r s"}\n' * 2)
    with_pairs = prepare_file(pairs_csv, retain_data=str(pairs), **options)
    assert len(with_pairs.retain) == 2, "a prompt and its reference are a row"


@pytest.mark.parametrize(
    ("lengths", "objective", "max_positions", "expected"),
    [
        ([20, 130], "completion", None, 256),
        ([100] * 50, "blocks", None, 128),
        ([10] * NUM_SAMPLED_RECORDS, "blocks", 512, 512),
    ],
)
def test_the_block_size_holds_the_records_and_fits_the_model(lengths, objective, max_positions, expected):
    assert block_size_for(lengths, objective, max_positions) == expected


def test_the_finetune_preset_takes_its_block_size_from_the_data(tiny_model, tmp_path):
    long = write_records(tmp_path / "a.jsonl", [{"prompt": f"w{n} " * 70, "completion": "w2 " * 80} for n in range(60)])
    short = write_records(tmp_path / "b.jsonl", [{"prompt": f"w{n}", "completion": "w2"} for n in range(60)])
    argv = f"--mode full --preset finetune --model {tiny_model} --val-fraction 0.2 --data {short}=0.5 {long}=0.5"
    settings = cli.parse_args(argv.split()).settings.data
    assert prepare(settings, model=tiny_model, global_batch=4).metadata["block_size"] == 256
