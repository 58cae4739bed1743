"""One record becomes prompt and completion: templates, ACLED exports of every kind, a text column."""

import datetime

import pytest

from trainer.config.errors import UserError
from trainer.config.settings import DataSettings
from trainer.data.formats import ACLED_FIELDS, choose_format, format_field
from trainer.data.readers import RecordError


def read_export(header, row):
    return dict(zip(header.split(","), row.split(","), strict=True))


OLD_EXPORT = read_export(
    "EVENT_ID_CNTY,EVENT_DATE,EVENT_TYPE,SUB_EVENT_TYPE,ACTOR1,INTER1,ACTOR2,COUNTRY,LOCATION,FATALITIES,SOURCE,NOTES",
    "1A,18-December-2019,Protests,Peaceful protest,Protesters (Algeria),6,,Algeria,Bejaia,0,A; B,Students met.",
)
NEW_EXPORT = read_export(
    "event_id_cnty,event_date,event_type,sub_event_type,actor1,inter1,actor2,country,location,source,fatalities,notes",
    "1A,2019-12-18,Protests,Peaceful protest,Protesters (Algeria),Protesters,,Algeria,Bejaia,A; B,0.0,Students met.",
)
EVENT_PROMPT = (
    "Date: 18 December 2019\nType: Protests\nSub-type: Peaceful protest\nActor 1: Protesters (Algeria)\n"
    "Inter 1: Protesters\nCountry: Algeria\nLocation: Bejaia\nFatalities: 0\nSource: A; B\nNotes:"
)


def choose(first, **settings):
    """The format of a file that begins with this record."""
    return choose_format(first, DataSettings(**{"data": "d.csv", "block_size": 64, **settings}), "d.csv")


def render(record, **settings):
    """(prompt, completion) of a record that is the first of its file."""
    example = choose(record, **settings).render(record)
    return example.prompt, example.completion


@pytest.mark.parametrize(
    ("record", "prompt", "completion", "expected"),
    [
        ({"mr": "x{y}", "a b": 3, "ref": "z"}, "{{{mr}}} {a b}:", " {ref}", ("{x{y}} 3:", " z")),
        # a line of the prompt whose columns are empty is left out
        ({"q": "why", "hint": "see", "a": "so"}, "Q: {q}\nH: {hint}\nA:", "{a}", ("Q: why\nH: see\nA:", "so")),
        ({"q": "why", "hint": "", "a": "so"}, "Q: {q}\nH: {hint}\nA:", "{a}", ("Q: why\nA:", "so")),
        # numbers and dates are written as in a CSV file
        ({"v": datetime.datetime(2022, 1, 5)}, None, "{v}", ("", "2022-01-05")),
    ],
)
def test_templates_fill_columns(record, prompt, completion, expected):
    assert render(record, prompt=prompt, completion=completion) == expected


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"prompt": "a", "completion": " b", "label": False}, "'label' says whether the completion is wanted"),
        ({**NEW_EXPORT, "notes": None}, "column 'notes' is null or empty"),
        ({"v": None, "w": "x"}, "column 'v' is null or empty"),
        ({"v": [1], "w": "x"}, "column 'v' holds a list"),
        ({"v": "a\ud800", "w": "x"}, "'v' holds half a character"),
        ({"w": "x"}, "column 'v' is missing"),
        ({"v": "x", "w": " "}, "--completion is empty"),
    ],
)
def test_a_record_that_its_format_cannot_use_is_refused_by_its_column(record, problem):
    record_format = choose({"v": "", "w": ""}, prompt="{v}", completion="{w}") if "w" in record else choose(record)
    with pytest.raises(RecordError, match=problem):
        record_format.render(record)


@pytest.mark.parametrize("rename", [str, lambda name: f" {name.title().replace('_', ' ')} "])
def test_acled_exports_of_one_event_become_the_same_text_in_any_case_and_with_columns_missing(rename):
    event = {rename(name): value for name, value in NEW_EXPORT.items()}
    assert render(OLD_EXPORT) == render(event) == (EVENT_PROMPT, " Students met.")
    for name in ("event_date", "actor1"):
        fewer = {other: value for other, value in event.items() if other != rename(name)}
        lines = [line for line in EVENT_PROMPT.splitlines() if not line.startswith(f"{ACLED_FIELDS[name]}:")]
        assert render(fewer)[0].splitlines() == lines


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("event_date", "05-January-2022", "5 January 2022"),
        ("event_date", "2022-01-05T00:00:00", "5 January 2022"),
        *(("event_date", text, text) for text in ("05/01/2022", "2022-02-30")),
        *(("inter1", text, "State Forces") for text in ("1", "1.0", "State forces")),
        ("inter1", "0", ""),
        ("fatalities", "3.0", "3"),
    ],
)
def test_spellings_of_a_field_become_one_and_an_unknown_one_stays_as_it_is(field, value, expected):
    assert format_field(field, value) == expected


def test_templates_go_before_acled_before_text():
    record = {"text": "a", **NEW_EXPORT}
    assert choose(record, completion="{notes}").name == "template"
    assert choose(record).name == "acled"
    assert render({"text": " a\n", "other": 1}) == ("", " a\n")
    by_template = choose(record, prompt="{text}", completion="{notes}")  # as the same data in named columns
    assert by_template.objectives[0] == choose({"prompt": "a", "completion": "b"}).objectives[0] == "completion"
    assert choose(record, completion="{notes}").objectives[0] == "blocks"  # there is no prompt to leave out
    alpaca = {"instruction": "{a}", "input": "b", "output": " c"}
    assert render(alpaca)[0].endswith("### Instruction:\n{a}\n\n### Input:\nb\n\n### Response:\n")
    assert render({**alpaca, "input": ""})[0].endswith("request.\n\n### Instruction:\n{a}\n\n### Response:\n")


@pytest.mark.parametrize(
    ("columns", "settings", "problem"),
    [
        ("mr ref", {"completion": "{reff}"}, "--completion: d.csv has no column 'reff'; its columns are mr, ref"),
        ("mr", {"completion": "{{{mr"}, r"--completion .* brace stands alone at character 3"),
        ("mr", {"completion": "done"}, r"--completion 'done': has no \{column\}; expected one of mr"),
        ("mr ref", {}, r"d\.csv: no ACLED.*, text .*--prompt and --completion.*columns: mr, ref"),
        ("prompt chosen rejected", {}, r"`chosen` and `rejected` are not trained on"),
        ("text", {"objective": "completion"}, "--objective completion needs .*--completion"),
        ("messages", {"objective": "blocks"}, "--objective blocks needs another format than messages"),
    ],
)
def test_columns_that_make_no_format_are_refused_with_the_flags_that_help(columns, settings, problem):
    with pytest.raises(UserError, match=problem):
        choose(dict.fromkeys(columns.split(), "x"), **settings)
