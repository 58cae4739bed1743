"""The block size that the lengths of the records ask for."""

import json

import pytest

from trainer.config import cli
from trainer.data.prepare import NUM_SAMPLED_RECORDS, block_size_for, prepare


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
