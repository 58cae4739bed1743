"""Several sets of --val-data on real ranks: each has its rows and its curve, and the first alone decides."""

import json
import shutil

import pytest
from helpers.launch_ranks import train
from helpers.process_groups import read_records, read_reproducible_records
from helpers.tiny_inputs import tiny_argv, write_records

from trainer.report.comparable import group_by_seed
from trainer.report.judge import DEFAULT_MARGIN
from trainer.report.plots import render_pictures
from trainer.report.run_data import read_folder
from trainer.report.sentence import build_verdict


def read_losses(folder, name) -> dict[int, tuple[float, int]]:
    rows = [row for row in read_records(folder) if row["kind"] == "eval" and row.get("val_set") == name]
    return {row["step"]: (row["loss"], row["eval_tokens"]) for row in rows}


@pytest.mark.slow
def test_each_validation_set_has_its_rows_and_its_curve_and_the_first_alone_decides(tiny_model, data_files, tmp_path):
    other = write_records(tmp_path / "other.jsonl", num_records=11, seed=7, unknown_word="x")
    flags = "--mode full --global-batch 4 --block-size 16 --max-steps 6 --eval-every 2 --save-every 2 "
    flags += f"--save-total-limit 4 --lr 0.02 --val-data {other} --val-data again={data_files[1]}"
    out = tmp_path / "run"
    printed = train(tiny_argv(tiny_model, data_files, flags), out=out, world_size=2)
    main, others = read_losses(out, None), read_losses(out, "other")
    assert list(main) == list(others) == [0, 2, 4, 6]
    assert read_losses(out, "again") == main, "the same records, the same numbers"
    assert not set(main.values()) & set(others.values())
    (header,) = (line for line in printed.splitlines() if line.startswith("| step"))
    (last,) = (line for line in printed.splitlines() if line.startswith("|    6 |") or line.startswith("| 6 "))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, last)]
    table = dict(zip(*cells, strict=True))
    assert [table["other loss"], table["again loss"]] == [f"{others[6][0]:.4f}", f"{main[6][0]:.4f}"]

    best = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["facts"]["best"]
    assert best["loss"] == min(loss for step, (loss, _) in main.items() if step)
    val_sets = read_folder(out).val_sets
    assert {name: dict(zip(rows["step"], rows["loss"], strict=True)) for name, rows in val_sets.items()} == {
        name: {step: loss for step, (loss, _) in losses.items()}
        for name, losses in (("other", others), ("again", main))
    }
    groups = group_by_seed([read_folder(out)])
    drawn = dict(render_pictures(groups, build_verdict(groups, DEFAULT_MARGIN), False)[1])
    assert f": {others[6][0]:.4g}</title>" in drawn["Validation loss of other by epoch"]

    again = shutil.copytree(out, tmp_path / "resumed", symlinks=True)
    train(["--mode", "full", "--resume", "step-2"], out=again, world_size=2)
    assert read_reproducible_records(again) == read_reproducible_records(out)
    flags = ["--mode", "full", "--resume", "--val-data", data_files[1]]
    assert "data is " in train(flags, out=again, world_size=2, check=False), "one set less is other data"
