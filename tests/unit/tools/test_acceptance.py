"""The script for a day with a GPU: its commands are valid, a part that fails or hangs stops no other."""

import argparse
import json
import sys
import time
from pathlib import Path

import pytest
from helpers.gpu_visibility import has_gpu

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.data.formats import FORMATS
from trainer.tools.bench import acceptance, card


def test_every_part_calls_a_program_that_is_there_with_flags_it_takes(tmp_path):
    parts = acceptance.build_parts(tmp_path, acceptance.Sizes())
    assert tuple(parts) == acceptance.PARTS
    for command in parts.values():
        assert command[0] == sys.executable
        assert command[1] == "-m" or (acceptance.ROOT / command[1]).exists()
    settings = cli.parse_args(parts["prove"][3 : parts["prove"].index("--limit")]).settings
    assert (settings.mode, settings.train.max_steps) == ("full", acceptance.Sizes().num_steps)
    args = argparse.Namespace(model="gpt2", init="random", block_size=1024, max_steps=220)
    for mode in ("full", "lora"):
        assert cli.parse_args(card.train_argv(mode, "rows.jsonl", args, tmp_path)).settings.mode == mode


def test_the_rows_of_the_card_run_are_token_ids(tmp_path):
    card.write_rows(tmp_path / "rows.jsonl", 100, 16, 97)
    rows = [json.loads(line)["input_ids"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 103, "with those that are validated on"
    assert {len(row) for row in rows} == {16}
    assert max(map(max, rows)) < 97
    assert "input_ids" in {record_format.name for record_format in FORMATS}


def test_parts_of_one_stage_run_beside_one_another_and_their_tables_stand_in_one_file(tmp_path):
    waits = "import sys, time, pathlib; f = pathlib.Path(sys.argv[1]); f.mkdir(); (f / 'card.md').write_text('| a |')\n"
    waits += "while not all((f.parent / name).exists() for name in ('prove', 'card')): time.sleep(0.05)\n"
    waits += "print('\\nproof, 3 steps\\n  ok zero0')"
    parts = {name: [sys.executable, "-c", waits, str(tmp_path / name)] for name in ("prove", "card")}
    assert acceptance.run_parts(parts, tmp_path, limit_seconds=60.0) == 0
    results = (tmp_path / "results.md").read_text()
    assert "\n## card\n\n| a |" in results
    assert "\n## prove\n\n```text\n3 steps\n  ok zero0\n```" in results


@pytest.mark.sweep  # every part with tiny sizes: two minutes on a quiet core
def test_the_whole_script_runs_on_a_cpu(tmp_path):
    assert acceptance.run(["--rehearse", "--limit", "900", "--output-dir", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "results.json").read_text())) == len(acceptance.PARTS)
    assert "| full |" in (tmp_path / "card" / "card.md").read_text()


def test_a_part_that_fails_or_hangs_is_named_and_stops_no_other(tmp_path, capsys):
    parts = {
        "good": [sys.executable, "-c", "print('fine')"],
        "bad": [sys.executable, "-c", "print('a | b'); raise SystemExit(3)"],
        "hung": [sys.executable, "-c", "import time; time.sleep(600)"],
        "late": [sys.executable, "-c", ""],
    }
    assert acceptance.run_parts(parts, tmp_path, limit_seconds=2.0) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["exit_code"] for result in results] == [0, 3, None, None]
    assert results[3]["last_line"] == "not begun: the time was used up"
    assert "| bad | 3 |" in (tmp_path / "results.md").read_text()
    assert r"a \| b" in (tmp_path / "results.md").read_text()
    assert capsys.readouterr().out.startswith("good       passed")
    assert acceptance.run_parts({"good": parts["good"]}, tmp_path, limit_seconds=60.0) == 0


@pytest.mark.skipif(has_gpu(), reason="a GPU is here")
def test_without_a_gpu_it_is_refused_and_the_rehearsal_named(tmp_path):
    with pytest.raises(UserError, match=r"no NVIDIA GPU is here.*--rehearse"):
        acceptance.run(["--output-dir", str(tmp_path / "out")])


def test_an_unknown_part_is_refused_before_any_runs(tmp_path):
    with pytest.raises(UserError, match="--parts speed: expected some of tests, prove"):
        acceptance.run(["--parts", "speed", "--output-dir", str(tmp_path / "out")])
    assert not Path(tmp_path / "out").exists()


def test_an_interruption_ends_the_parts_that_run(tmp_path, monkeypatch):
    def interrupted(running):
        raise KeyboardInterrupt

    monkeypatch.setattr(acceptance, "as_completed", interrupted)
    start_time = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        acceptance.run_parts({"tests": ["sleep", "60"]}, tmp_path, 100.0)
    assert time.monotonic() - start_time < 30
