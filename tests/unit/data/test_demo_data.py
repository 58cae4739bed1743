"""The embedded events: the same everywhere, shaped as the real ones, and every note says what its record says."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from trainer.data import demo
from trainer.data.acled import format_prompt, is_acled
from trainer.data.demo import EVENT_TYPES, LABELS, MONTHS, NOTE_TEMPLATES, Rng, events, invented_world

NUM_ROWS = 8000  # three standard errors of a share of one half are then 1.7 points


@pytest.fixture(scope="module")
def rows():
    return list(events(NUM_ROWS, seed=5))


def fraction(rows, predicate):
    return sum(map(predicate, rows)) / len(rows)


# The events are part of what the README reports: change this only together with every number measured on them.
DIGEST = "7b67b1dd0070688bc0d38305ccbca638080481c57559568a5ee6569fe700171d"


def test_the_same_seed_gives_the_same_demo_data_on_every_platform_and_version():
    text = json.dumps(list(events(50, seed=1)), ensure_ascii=True)
    assert hashlib.sha256(text.encode()).hexdigest() == DIGEST


def test_a_shorter_demo_data_set_is_a_prefix_of_a_longer_one_and_seeds_differ():
    assert list(events(5, seed=3)) == list(events(20, seed=3))[:5]
    assert list(events(5, seed=3)) != list(events(5, seed=4))


def test_the_demo_rng_uses_no_method_whose_sequence_python_may_change():
    """Python keeps only the sequence of random() (documentation of `random`, "Notes on Reproducibility")."""
    assert Rng(0).random() == 0.8444218515250481  # random.Random(0).random() of CPython 3.11
    assert vars(Rng(0)).keys() == {"random"}


# Shares of public rows: event types, empty second actors and fatalities of Africa 2018-2022, phrasing of 2022 notes.
@pytest.mark.parametrize(
    ("event_type", "expected"),
    [
        ("Protests", 0.305),
        ("Violence against civilians", 0.237),
        ("Battles", 0.218),
        ("Riots", 0.109),
        ("Explosions/Remote violence", 0.067),
        ("Strategic developments", 0.065),
    ],
)
def test_event_types_are_as_frequent_as_in_real_exports(rows, event_type, expected):
    assert fraction(rows, lambda row: row["event_type"] == event_type) == pytest.approx(expected, abs=0.017)


def test_second_actors_are_missing_as_often_as_in_real_exports(rows):
    assert fraction(rows, lambda row: not row["actor2"]) == pytest.approx(0.315, abs=0.02)
    assert all((row["inter2"] == 0) == (row["actor2"] == "") for row in rows)


def test_fatalities_are_mostly_none_with_a_heavy_tail(rows):
    counts = sorted(int(row["fatalities"]) for row in rows)
    assert fraction(rows, lambda row: row["fatalities"] == 0) == pytest.approx(0.703, abs=0.02)
    assert sum(counts) / NUM_ROWS == pytest.approx(1.28, abs=0.35)
    assert counts[int(0.9 * NUM_ROWS)] in (2, 3, 4)
    assert 14 <= counts[int(0.99 * NUM_ROWS)] <= 24
    assert 60 < counts[-1] <= 170


def test_notes_open_and_end_as_real_ones(rows):
    notes = [row["notes"] for row in rows]
    labels = tuple(f"{label}: On " for label in LABELS.values())
    assert fraction(notes, lambda note: note.startswith("On ")) == pytest.approx(0.895, abs=0.015)
    assert fraction(notes, lambda note: note.startswith("Around ")) == pytest.approx(0.05, abs=0.015)
    assert fraction(notes, lambda note: note.startswith(labels)) == pytest.approx(0.055, abs=0.015)
    assert fraction(notes, lambda note: note.endswith("]") and " [size=" in note) == pytest.approx(0.59, abs=0.02)


def test_every_note_repeats_the_date_and_the_location_of_its_record(rows):
    for row in rows:
        opening = re.match(r"(?:[A-Z][a-z -]+: )?(?:On|Around) (\d+ \w+ \d{4}), ", row["notes"])
        assert opening is not None
        assert opening[1] == row["event_date"]
        assert re.search(rf"\b{row['location']}\b", row["notes"])


def test_over_half_of_the_notes_repeat_the_digit_of_their_fatalities(rows):
    deadly = [row for row in rows if row["fatalities"]]
    repeated = fraction(
        deadly, lambda row: str(row["fatalities"]) in re.findall(r"\d+", row["notes"].partition(",")[2])
    )
    assert repeated == pytest.approx(0.57, abs=0.04)


def test_notes_are_finished_sentences(rows):
    for note in (row["notes"] for row in rows):
        assert not re.search(r"[{}|]|  |\.\.| [.,]|\[(?!size=)", note), note
        assert not re.search(r"[.:] [a-z]", note), note
        assert re.search(r"\.( \[size=[^]]+\])?$", note), note


def test_no_name_stands_in_a_note_that_its_record_does_not_hold(rows):
    """So no person can be named: the other columns hold invented places, groups and sources only."""
    plain = {*MONTHS, "On", "Around", "IED", "Liberation", "Front", *" ".join(LABELS.values()).split()}
    for row in rows:
        known = {word for column, value in row.items() if column != "notes" for word in re.findall(r"\w+", str(value))}
        inside = re.findall(r"(?<![.:] )(?<!^)\b[A-Z]\w+", row["notes"])
        assert set(inside) <= plain | known, row["notes"]


def test_columns_hold_only_the_invented_world_and_the_codebook(rows):
    countries, sources = invented_world()
    by_name = {country.name: country for country in countries}
    for row in rows:
        country = by_name[row["country"]]
        assert (row["location"], row["admin1"]) in country.places
        assert row["region"] == country.region
        assert row["actor1"] in {name for name, _ in country.actors[int(row["inter1"])]}
        assert not row["actor2"] or row["actor2"] in {name for name, _ in country.actors[int(row["inter2"])]}
        assert set(row["source"].split("; ")) <= set(sources)
        assert row["event_date"].endswith(f" {row['year']}")
        assert row["sub_event_type"] in EVENT_TYPES[row["event_type"]][3]


def test_every_sub_event_type_has_phrases_and_is_drawn(rows):
    kinds = {kind for _, _, _, weights in EVENT_TYPES.values() for kind in weights}
    assert set(NOTE_TEMPLATES) == kinds
    assert {row["sub_event_type"] for row in rows} == kinds


def test_demo_data_have_patterns_and_no_repeated_note():
    embedded = list(events(demo.DEMO_RECORDS, demo.DEMO_SEED))
    assert len({row["notes"] for row in embedded}) == len({row["event_id_cnty"] for row in embedded}) == len(embedded)
    assert len({row["location"] for row in embedded}) > len(embedded) / 2
    assert Counter(row["country"] for row in embedded).most_common(1)[0][1] < len(embedded) / 2


def test_demo_data_are_recognised_as_an_acled_export():
    row = next(events(1))
    assert is_acled(row)
    prompt = format_prompt({name: str(value) for name, value in row.items()})
    assert f"Date: {row['event_date']}\n" in prompt
    assert f"Location: {row['location']}\n" in prompt


def test_the_demo_generator_needs_nothing_but_python():
    """Its file alone: what else the package of its neighbours imports is theirs."""
    heavy = "{'torch', 'numpy', 'datasets', 'transformers', 'trainer'}"
    code = f"import runpy, sys; runpy.run_path({demo.__file__!r}); sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
