"""Whatever a file holds, its records are read or refused in one line: no traceback, no wait, on any input."""

import json
import tempfile
from pathlib import Path

from helpers.any_inputs import JSON_VALUES, check_inputs, many_inputs
from hypothesis import strategies as st

from trainer.config.errors import UserError
from trainer.config.settings import DataSettings
from trainer.data.formats import FORMATS
from trainer.data.prepare import check_records, iter_examples, open_source
from trainer.data.sources import find_sources

NAMES = st.sampled_from(["a.csv", "a.tsv", "a.jsonl", "a.json", "a.txt", "a.parquet", "a.arrow"])
#: Bytes that mean something to one of the readers, in any order, among any others.
WORDS = [*b'\\u \\ud800 messages "text" 1e999 NaN null PAR1 ARROW1'.split(), b"9" * 5000, b"[" * 3000]
CHARACTERS = [b"\r\n", b"\xef\xbb\xbf", b"\x1b]0;x\x07", *(bytes([c]) for c in b'",\t\n\r{}[]:\xff\0')]
BYTES = st.lists(st.sampled_from([*WORDS, *CHARACTERS]) | st.binary(max_size=6), max_size=24).map(b"".join)
KEYS = ["role", "content", "from", "value", "tool_calls"]
OTHER_COLUMNS = ["input", "notes", "event_date", "fatalities", "tools", "system"]
COLUMNS = st.sampled_from([*(name for known in FORMATS for name in known.needs), *OTHER_COLUMNS, *KEYS])
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "robot"])
MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"role": ROLES, "content": JSON_VALUES, "from": ROLES}), max_size=3
)
RECORDS = st.lists(st.dictionaries(COLUMNS, JSON_VALUES | MESSAGES, max_size=5), min_size=1, max_size=3)
TEMPLATES = st.sampled_from([{}, {"prompt": "{text}\n", "completion": "{notes}"}, {"completion": "{text}"}])


def read_or_refuse(name, content, options):
    """Read a file as a run would, up to its texts; what cannot be read is one line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        refusal = ""
        settings = DataSettings(data=str(path), block_size=8, **options)
        try:
            sources = [open_source(source, settings, (0.1, 0.0)) for source in find_sources(settings)]
            check_records(settings, sources)
            assert all(example is None or example.content() for example in iter_examples(sources[0]))
        except UserError as error:
            refusal = str(error)
        assert "\n" not in refusal
        assert "\x1b" not in refusal


def check_file(name, records, options):
    text = json.dumps(records) if name == "a.json" else "".join(json.dumps(record) + "\n" for record in records)
    read_or_refuse(name, text.encode(), options)


@many_inputs(100)
def test_any_bytes_are_read_or_refused_in_one_line(num_inputs):
    check_inputs(num_inputs, read_or_refuse, NAMES, BYTES, TEMPLATES)


@many_inputs(100)
def test_any_json_records_are_read_or_refused_in_one_line(num_inputs):
    check_inputs(num_inputs, check_file, st.sampled_from(["a.jsonl", "a.json"]), RECORDS, TEMPLATES)
