"""Files, folders and saved data sets are taken for the split that they are named; test is never trained on."""

import pyarrow.parquet
import pytest
from helpers import data_helpers as samples
from helpers.data_helpers import NO_TEMPLATES, PAIRS

from trainer.config.errors import UserError
from trainer.data import sources


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
