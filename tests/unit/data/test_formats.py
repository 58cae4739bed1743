"""One record becomes prompt and completion: templates, ACLED exports of every kind, a text column, token ids."""

import datetime
import subprocess
import sys

import pytest

from trainer.config.errors import UserError
from trainer.config.settings import DataSettings
from trainer.data import acled
from trainer.data.formats import RecordError, choose_format, parse_template

OLD_EXPORT = {
    "EVENT_ID_CNTY": "1ALG",
    "EVENT_DATE": "18-December-2019",
    "YEAR": 2019,
    "EVENT_TYPE": "Protests",
    "SUB_EVENT_TYPE": "Peaceful protest",
    "ACTOR1": "Protesters (Algeria)",
    "INTER1": 6,
    "ACTOR2": None,
    "INTER2": 0,
    "COUNTRY": "Algeria",
    "LOCATION": "Bejaia",
    "FATALITIES": 0,
    "SOURCE": "A; B",
    "NOTES": "On 18 December 2019, students met in Bejaia.",
}
NEW_EXPORT = {
    "event_id_cnty": "1ALG",
    "event_date": "2019-12-18",
    "year": "2019",
    "disorder_type": "Demonstrations",
    "event_type": "Protests",
    "sub_event_type": "Peaceful protest",
    "actor1": "Protesters (Algeria)",
    "assoc_actor_1": "",
    "inter1": "Protesters",
    "actor2": "",
    "inter2": "",
    "civilian_targeting": "",
    "country": "Algeria",
    "location": "Bejaia",
    "source": "A; B",
    "fatalities": 0.0,
    "tags": "crowd size=no report",
    "notes": "On 18 December 2019, students met in Bejaia.",
    "timestamp": "1577145600",
}


def format_of(columns, **settings):
    return choose_format(columns, DataSettings(**{"data": "d.csv", "block_size": 64, **settings}), "d.csv")


def test_templates_fill_columns_and_halve_doubled_braces():
    chosen = format_of(["mr", "a b", "ref"], prompt="{{{mr}}} {a b}:", completion=" {ref}")
    assert chosen.render({"mr": "x{y}", "a b": 3, "ref": "z"}) == ("{x{y}} 3:", " z")
    assert chosen.columns == ("mr", "a b", "ref")


@pytest.mark.parametrize("hint", [{"hint": ""}, {"hint": None}, {}])
def test_a_line_of_the_prompt_whose_columns_are_empty_is_left_out(hint):
    chosen = format_of(["q", "hint", "a"], prompt="Q: {q}\nHint: {hint}\nA:", completion="{a}")
    assert chosen.render({"q": "why", "hint": "see", "a": "so"}) == ("Q: why\nHint: see\nA:", "so")
    assert chosen.render({"q": "why", "a": "so", **hint}) == ("Q: why\nA:", "so")


@pytest.mark.parametrize("template", ["{mr", "mr}", "{}", "a { b", "{{mr}"])
def test_a_stray_brace_is_refused_with_its_place(template):
    with pytest.raises(UserError, match=r"--prompt .* brace stands alone at character \d"):
        parse_template(template, "--prompt")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (0.5, "0.5"),
        (datetime.date(2022, 1, 5), "2022-01-05"),
        (datetime.datetime(2022, 1, 5), "2022-01-05"),
        (datetime.datetime(2022, 1, 5, 6), "2022-01-05 06:00:00"),
    ],
)
def test_numbers_and_dates_are_written_as_in_a_csv_file(value, text):
    assert format_of(["v"], completion="{v}").render({"v": value}) == ("", text)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"v": None, "w": "x"}, "column 'v' is null or empty"),
        ({"v": float("nan"), "w": "x"}, "column 'v' is null"),
        ({"v": "", "w": "x"}, "column 'v' is null or empty"),  # as in a CSV file, which has no other null
        ({"v": [1], "w": "x"}, "column 'v' holds a list"),
        ({"v": {}, "w": "x"}, "column 'v' holds a dict"),
        ({"v": b"x", "w": "x"}, "column 'v' holds a bytes"),
        ({"v": "a\ud800", "w": "x"}, "'v' holds half a character"),
        ({"w": "x"}, "column 'v' is missing"),
        ({"v": "x", "w": " "}, "--completion is empty"),
    ],
)
def test_a_value_that_is_no_text_is_refused_with_its_column(record, problem):
    with pytest.raises(RecordError, match=problem):
        format_of(["v", "w"], prompt="{v}", completion="{w}").render(record)


def test_old_and_new_acled_exports_of_one_event_become_the_same_text():
    assert acled.is_acled(OLD_EXPORT)
    assert acled.is_acled(NEW_EXPORT)
    prompt, completion = format_of(list(OLD_EXPORT)).render(OLD_EXPORT)
    assert format_of(list(NEW_EXPORT)).render(NEW_EXPORT) == (prompt, completion)
    assert prompt == (
        "Date: 18 December 2019\nType: Protests\nSub-type: Peaceful protest\nActor 1: Protesters (Algeria)\n"
        "Inter 1: Protesters\nCountry: Algeria\nLocation: Bejaia\nFatalities: 0\nSource: A; B\nNotes:"
    )
    assert completion == " On 18 December 2019, students met in Bejaia."


@pytest.mark.parametrize("key", [str.title, str.upper, lambda name: f" {name.replace('_', ' ')} "])
def test_acled_columns_are_known_in_any_case_and_may_be_missing(key):
    event, whole = {key(name): value for name, value in NEW_EXPORT.items()}, format_of(list(NEW_EXPORT))
    assert format_of(list(event)).render(event) == whole.render(NEW_EXPORT)
    for name in ("event_date", "sub_event_type", "actor1", "fatalities", "location"):
        fewer = {other: value for other, value in event.items() if other != key(name)}
        lines = whole.render(NEW_EXPORT)[0].splitlines()
        expected = [line for line in lines if not line.startswith(f"{acled.FIELDS[name]}:")]
        assert len(expected) == len(lines) - 1
        assert format_of(list(fewer)).render(fewer)[0].splitlines() == expected


@pytest.mark.parametrize(
    ("date", "expected"),
    [
        *((f"{day}{month}2022", "5 January 2022") for day in ("5", "05") for month in ("-January-", " jan ")),
        ("2022-01-05", "5 January 2022"),
        ("2022-01-05T00:00:00", "5 January 2022"),
        *((unknown, None) for unknown in ("05/01/2022", "2022-02-30", "5 Janvier 2022", "2022", "")),
    ],
)
def test_spellings_of_a_date_become_one_and_an_unknown_one_stays_as_it_is(date, expected):
    assert acled.format_date(date) == expected
    assert acled.format_field("event_date", date) == (expected or date)


@pytest.mark.parametrize(
    ("inter", "name"),
    [
        ("1", "State Forces"),
        ("1.0", "State Forces"),
        ("State forces", "State Forces"),
        ("Rebel group", "Rebel Groups"),
        ("0", ""),
        ("External/Other forces", "External/Other Forces"),
        ("42", "42"),
    ],
)
def test_inter_codes_and_names_become_one_spelling(inter, name):
    assert acled.inter_name(inter) == name


def test_templates_go_before_token_ids_before_acled_before_text():
    columns = ["input_ids", "text", *NEW_EXPORT]
    assert format_of(columns, completion="{notes}").name == "template"
    assert format_of(columns).name == "input_ids"
    assert format_of(columns[1:]).name == "acled"
    assert format_of(["text", "other"]).name == "text"
    assert format_of(["text", "other"]).render({"text": " a\n"}) == ("", " a\n")


@pytest.mark.parametrize(
    ("columns", "settings", "problem"),
    [
        (["mr", "ref"], {"completion": "{reff}"}, "--completion: d.csv has no column 'reff'; its columns are mr, ref"),
        (["mr"], {"completion": "done"}, "--completion 'done': names no column"),
        (["mr", "ref"], {}, r"d\.csv: no column `text`.*--prompt and --completion.*columns: mr, ref"),
        (
            ["prompt", "chosen", "rejected"],
            {},
            r"preferences \(columns chosen, rejected\).*; this program trains on one",
        ),
        (["chosen", "rejected"], {}, r"preferences \(columns chosen, rejected\).*; this program trains on one answer"),
        (["text"], {"objective": "completion"}, "--objective completion needs .*--completion"),
        (["input_ids"], {"objective": "completion"}, "--objective completion needs .*--completion"),
        (["mr", "ref"], {"objective": "completion"}, "--objective completion needs .*--completion"),
    ],
)
def test_columns_that_make_no_format_are_refused_with_the_flags_that_help(columns, settings, problem):
    with pytest.raises(UserError, match=problem):
        format_of(columns, **settings)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"prompt": "a", "completion": " b", "label": False}, "'label' says whether the completion is wanted"),
        ({**NEW_EXPORT, "notes": None}, "column 'notes' is null or empty"),
        *(
            ({"input_ids": ids}, "column 'input_ids'")
            for ids in (None, "1 2", 7, [], [1, None], [1.0, 2.0], [-1], [True], [[1]], [2**31])
        ),
    ],
)
def test_a_record_that_its_format_cannot_use_is_refused_by_its_column(record, problem):
    with pytest.raises(RecordError, match=problem):
        format_of(list(record)).render(record)


def test_importing_the_data_package_loads_nothing_heavy():
    heavy = ["torch", "datasets", "transformers", "tokenizers", "pandas", "pyarrow", "huggingface_hub"]
    code = f"import sys, trainer.data; print([name for name in {heavy!r} if name in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert process.stdout.strip() == "[]"
