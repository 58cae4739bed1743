"""Reading runs back: the report sees what a run folder says, and what is broken is said for that run alone."""

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers.any_inputs import JSON_VALUES, check_inputs, many_inputs
from helpers.fake_runs import (
    make_metadata,
    make_records,
    make_run_folder,
    synthetic_val_loss,
    write_eval_records,
    write_run_folder,
)
from hypothesis import strategies as st

from trainer.report.answer_file import to_answer
from trainer.report.load import load_runs
from trainer.report.page import compare, json_text, markdown_sections
from trainer.report.run_data import read_folder
from trainer.tracking.records import EventRecord, StepRecord, to_line


def test_records_and_metadata_of_a_run_folder_come_back_as_written(tmp_path: Path) -> None:
    run = make_metadata("lora")
    records = make_records(run)
    run_data = read_folder(write_run_folder(tmp_path / "run", run, records))
    steps = [record for record in records if isinstance(record, StepRecord)]
    for name in ("step", "epoch", "tokens", "loss", "lr"):
        assert run_data.steps[name].tolist() == [getattr(step, name) for step in steps], name
    assert (run_data.mode, run_data.run_id, run_data.notes, run_data.state) == ("lora", "lora0042", (), "finished")
    assert run_data.metadata == json.loads(json.dumps(run))
    assert run_data.initial_loss == 4.0
    assert run_data.best_eval == run_data.final_eval == {"step": 90.0, "epoch": 3.0, "loss": synthetic_val_loss(3, 2.1)}
    assert run_data.summary["wall_seconds"] == 100.0
    uneven = read_folder(make_run_folder(tmp_path / "uneven", losses={0: 1.0, 1: 3.0, 2: 2.0, 3: 2.5}))
    assert uneven.best_eval == {"step": 60.0, "epoch": 2.0, "loss": 2.0}, "the lowest after step 0, not the last"


def test_truncated_and_broken_records_are_ignored_and_reported(tmp_path: Path) -> None:
    path = make_run_folder(tmp_path / "run") / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    broken = ['{"kind": "step", "step"\n', "no JSON\n", '{"kind": "step", "loss": 1.0}\n']
    path.write_text("".join([*lines[:5], *broken, *lines[5:], '{"kind": "eval", "st']))
    run_data = read_folder(path.parent)
    assert run_data.notes == ("its last row was cut off and is left out", "3 rows could not be read and are left out")
    assert run_data.steps["step"].tolist() == list(range(1, 91))


def test_records_repeated_after_a_resume_count_once_with_their_last_values(tmp_path: Path) -> None:
    run = make_metadata()  # killed at 40, saved at 30
    first = [record for record in make_records(run, floor=9.0, finished=False) if record.step <= 40]
    again = [record for record in make_records(run) if record.step > 30]
    run_data = read_folder(write_run_folder(tmp_path / "run", run, [*first, *again]))
    assert run_data.steps["step"].tolist() == list(range(1, 91))
    assert run_data.steps["loss"][35] == pytest.approx(synthetic_val_loss(36 / 30, 2.0) + 0.05 * np.sin(36))
    assert run_data.evals["step"].tolist() == [0, 30, 60, 90]
    assert run_data.notes[0] == "10 step rows are there again behind later ones; the last ones count"


def test_what_a_run_lacks_is_noted_and_an_unfinished_one_is_going_while_its_records_are_fresh(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path / "run", finished=False)
    assert read_folder(folder).notes == ("still going (step 89 of 90); left out of the verdict",)
    os.utime(folder / "metrics.jsonl", (0, 0))
    assert read_folder(folder).notes == ("stopped before its end (step 89 of 90); left out of the verdict",)
    before = [record for record in make_records(make_metadata(), finished=False) if record.step <= 40]
    last = EventRecord(event="not_finite", step=40, message="what happened", time=40.0)
    diagnosis = EventRecord(event="diagnosis", step=40, message="diverging", time=40.0)  # which a run adds
    notes = read_folder(write_run_folder(tmp_path / "nan", make_metadata(), [*before, last, diagnosis])).notes
    assert notes == ("stopped before its end (step 40 of 90): what happened; so its setting is not judged",)
    no_base = read_folder(make_run_folder(tmp_path / "base", losses={1: 3.0}))
    assert no_base.notes == ("no evaluation at step 0: how far it improved on its base is unknown",)


def test_broken_runs_are_reported_one_by_one_and_the_others_are_read_and_told_apart(tmp_path: Path) -> None:
    good, same_run = make_run_folder(tmp_path / "good"), make_run_folder(tmp_path / "copy")
    namesake = make_run_folder(tmp_path / "namesake", metadata=make_metadata(run_id="bbbb0002"))
    empty = make_run_folder(tmp_path / "empty", "lora")
    (empty / "metrics.jsonl").unlink()
    (tmp_path / "nothing").mkdir()
    folders = (good, namesake, same_run, empty, tmp_path / "nothing")
    runs, problems = load_runs(list(map(str, folders)))
    assert [run.name for run in runs] == ["full-s42 (full0042)", "full-s42 (bbbb0002)"]
    assert all(problem.text.endswith("; left out") for problem in problems)
    texts = (
        f"same run id as {good.name} (full0042)",
        "no metrics: cannot read metrics.jsonl",
        "holds neither run.json and metrics.jsonl nor a trainer_state.json",
    )
    assert [text in problem.text for problem, text in zip(problems, texts, strict=True)] == [True] * 3


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "eval_records/step-000090-val.parquet"])
def test_what_is_no_plain_file_in_a_run_folder_is_one_line_and_never_waited_for(tmp_path: Path, make, name) -> None:
    folder = make_run_folder(tmp_path / "run", "lora", losses={0: 4.0, 3: 2.0})
    good = make_run_folder(tmp_path / "good", losses={0: 4.0, 3: 2.0})
    write_eval_records(good, {90: [2.0] * 9}, targets=[5] * 9)
    write_eval_records(folder, {0: [4.0] * 9}, targets=[5] * 9)
    path = folder / name
    path.unlink(missing_ok=True)
    make(path)
    runs, problems = load_runs([str(good), str(folder)])
    is_excluded = name in ("run.json", "metrics.jsonl")
    assert len(problems) == is_excluded
    assert all("left out" in str(problem) and "\n" not in str(problem) for problem in problems)
    said = compare(runs, problems).verdict.sentence
    assert is_excluded or "Cannot tell whether LoRA" in said


# --- whatever the files hold: a comparison of what can be read of them, or the run is left out by name ---

TEXTS = [{"prompt": "a", "completion": "b", "reference": "c"}]
SAMPLES = {"epoch": 1.0, "scored": 3, "scores": {"date": 0.5}, "texts": TEXTS}
METADATA = make_metadata("lora")
ROWS = [json.loads(to_line(row)) for row in make_records(METADATA)][-60:]
EVENTS = {"samples": SAMPLES, "retain_evaluation": {"loss": 2.0}, "test_scores": {"scores": {"f1": 0.5}}}
for name, facts in EVENTS.items():
    ROWS.insert(-1, json.loads(to_line(EventRecord(event=name, step=9, message="", time=1.0, facts=facts))))


def list_places(value, place=()):
    """The path of every value inside a JSON value."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*place, key)
            yield from list_places(inner, (*place, key))


def write_edited(folder, metadata_edits=(), row_edits=()):
    folder.mkdir(exist_ok=True)
    contents = copy.deepcopy([METADATA, ROWS])
    for content, edits in zip(contents, (metadata_edits, row_edits), strict=True):
        for (*parents, last), value in edits:
            try:  # a place may be gone with an edit before
                target = content
                for key in parents:
                    target = target[key]
                target[last] = value
            except (LookupError, TypeError):
                continue
    (folder / "run.json").write_text(json.dumps(contents[0]))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in contents[1]))
    return str(folder)


@many_inputs(40)
def test_any_value_in_the_files_of_a_run_is_compared_or_left_out(tmp_path, num_inputs):
    whole = str(make_run_folder(tmp_path / "whole", "full"))
    edited = compare(load_runs([whole, write_edited(tmp_path / "damaged")])[0])  # what is there without an edit
    assert edited.samples == {"a": {"reference": "c", "LoRA": "b"}}
    assert "f1, test records" in edited.by_run[0].headings

    def check(metadata_edits, row_edits):
        runs, problems = load_runs([whole, write_edited(tmp_path / "damaged", metadata_edits, row_edits)])
        assert len(runs) == 2 or any(problem.text.endswith("; left out") for problem in problems)
        assert all("\n" not in str(problem) for problem in problems)
        comparison = compare(runs, problems)
        assert markdown_sections(comparison)
        assert json_text(to_answer(comparison.verdict))

    places = [st.sampled_from(list(list_places(content))) for content in (METADATA, ROWS)]
    check_inputs(num_inputs, check, *(st.lists(st.tuples(place, JSON_VALUES), max_size=2) for place in places))
