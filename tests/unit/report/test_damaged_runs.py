"""Whatever the files of a run hold: a comparison of what can be read of them, or the run is left out by name."""

import copy
import json
import re

import pytest
from helpers.any_inputs import JSON_VALUES, check_inputs, many_inputs
from helpers.fake_runs import make_metadata, make_records, make_run_folder, write_run_folder
from hypothesis import strategies as st

from trainer.report.load import load_runs
from trainer.report.page import compare, render_markdown
from trainer.tracking.records import EventRecord, to_line

SAMPLES = {
    "epoch": 1.0,
    "scored": 3,
    "scores": {"date": 0.5},
    "texts": [{"prompt": "a", "completion": "b", "reference": "c"}],
}
METADATA = make_metadata("lora")
ROWS = [json.loads(to_line(row)) for row in make_records(METADATA)][-60:]
for name, facts in (("samples", SAMPLES), ("retain_evaluation", {"loss": 2.0})):
    ROWS.insert(-1, json.loads(to_line(EventRecord(event=name, step=9, message="", time=1.0, facts=facts))))


def list_places(value, place=()):
    """The path of every value inside a JSON value."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*place, key)
            yield from list_places(inner, (*place, key))


def replace_values(content, edits):
    content = copy.deepcopy(content)
    for (*parents, last), value in edits:
        target = content
        for key in parents:
            exists = isinstance(target, dict) and key in target
            exists = exists or (isinstance(target, list) and isinstance(key, int) and key < len(target))
            target = target[key] if exists else None
        if isinstance(target, dict) or (isinstance(target, list) and isinstance(last, int) and last < len(target)):
            target[last] = value
    return content


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    return make_run_folder(tmp_path_factory.mktemp("runs") / "whole", "full")


def check_comparison(whole_run, metadata_edits, row_edits):
    folder = whole_run.with_name("damaged")
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(replace_values(METADATA, metadata_edits)))
    rows = replace_values(ROWS, row_edits)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs, problems = load_runs([str(whole_run), str(folder)])
    assert len(runs) == 2 or any(problem.is_excluded for problem in problems)
    assert all("\n" not in str(problem) for problem in problems)
    comparison = compare(runs, problems)
    assert render_markdown(comparison)


EDITS = [
    st.lists(st.tuples(st.sampled_from(list(list_places(content))), JSON_VALUES), max_size=2)
    for content in (METADATA, ROWS)
]


@many_inputs(40)
def test_any_value_in_the_files_of_a_run_is_compared_or_left_out(whole_run, num_inputs):
    check_inputs(num_inputs, lambda run_json, rows: check_comparison(whole_run, run_json, rows), *EDITS)


def test_the_samples_of_a_whole_run_are_shown(whole_run):
    folder = write_run_folder(whole_run.with_name("samples"), METADATA, [])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    comparison = compare(*load_runs([str(folder)]))
    assert re.search(r"\| a +\| c +\| b +\|", render_markdown(comparison))
    assert [len(table.rows) for table in comparison.optional_tables] == [1, 1]
