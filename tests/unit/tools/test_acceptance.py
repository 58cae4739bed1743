"""The script for a day with a GPU: its commands are valid, a part that fails or hangs stops no other."""

import json
import sys
from pathlib import Path

import pytest

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.data.formats import FORMATS
from trainer.tools.bench import acceptance


def test_every_part_calls_a_program_that_is_there_with_flags_it_takes(tmp_path):
    parts = acceptance.build_parts(tmp_path)
    assert list(parts) == ["tests", "doctor", "bench", "memory", "card-full", "card-lora", "compare"]
    for command in parts.values():
        assert command[0] == sys.executable
        assert command[1] == "-m" or (acceptance.ROOT / command[1]).exists()
    for mode in ("full", "lora"):
        settings = cli.parse_args(parts[f"card-{mode}"][2:]).settings
        assert (settings.mode, settings.train.max_steps) == (mode, acceptance.CARD_STEPS)


def test_the_rows_of_the_card_run_are_token_ids(tmp_path):
    acceptance.write_rows(tmp_path / "rows.jsonl")
    rows = [json.loads(line)["input_ids"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == acceptance.CARD_ROWS
    assert {len(row) for row in rows} == {acceptance.CARD_WIDTH}
    assert max(map(max, rows)) < acceptance.CARD_VOCABULARY
    assert "input_ids" in {record_format.name for record_format in FORMATS}


def test_a_part_that_fails_or_hangs_is_named_and_stops_no_other(tmp_path, capsys):
    parts = {
        "good": [sys.executable, "-c", "print('fine')"],
        "bad": [sys.executable, "-c", "print('a | b'); raise SystemExit(3)"],
        "hung": [sys.executable, "-c", "import time; time.sleep(600)"],
        "late": [sys.executable, "-c", ""],
    }
    assert acceptance.run_parts(parts, tmp_path, limit_seconds=8.0) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["exit_code"] for result in results] == [0, 3, None, None]
    assert results[3]["last_line"] == "not begun: the time was used up"
    assert "| bad | 3 |" in (tmp_path / "results.md").read_text()
    assert r"a \| b" in (tmp_path / "results.md").read_text()
    assert capsys.readouterr().out.startswith("good       passed")
    assert acceptance.run_parts({"good": parts["good"]}, tmp_path, limit_seconds=60.0) == 0


def test_an_unknown_part_is_refused_before_any_runs(tmp_path):
    with pytest.raises(UserError, match="--parts speed: expected some of tests, doctor"):
        acceptance.run(["--parts", "speed", "--output-dir", str(tmp_path / "out")])
    assert not Path(tmp_path / "out").exists()
