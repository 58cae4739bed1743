"""How numbers and tables read."""

import pytest

from trainer.config.text import format_bytes, format_duration, format_percent, markdown_table


@pytest.mark.parametrize(
    ("format_value", "texts"),
    [
        (format_bytes, {None: "-", 8_000_000: "8.0 MB", 1_500_000_000: "1.50 GB"}),
        (format_duration, {None: "-", 4.25: "4.2 s", 100: "100 s", 600: "10.0 min", 6_000: "1 h 40 min"}),
        (format_percent, {0.00953: "0.95%", 0.0095: "0.95%", 0.12345: "12%", 0.9999: "100%", 1.5: "150%"}),
    ],
)
def test_sizes_durations_and_shares_are_formatted_for_people(format_value, texts):
    assert {value: format_value(value) for value in texts} == texts


def test_a_markdown_table_escapes_its_cells_and_has_numbers_to_the_right():
    table = markdown_table(["name", "loss|nats"], [["a|b *c*\nd", "1.25"], ["e", "-"]])
    assert [line.replace(" ", "") for line in table.splitlines()] == [
        r"|name|loss\|nats|",
        "|:-------------|-------------:|",
        r"|a\|b\*c\*d|1.25|",
        "|e|-|",
    ]
