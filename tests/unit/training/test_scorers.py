"""Scorers against answers that were counted by hand, and what a scorer of a user's may do without harm to a run."""

import subprocess
import time
from pathlib import Path

import pytest

from trainer.config.errors import UserError
from trainer.training import scorers
from trainer.training.scorers import ScorerError, check_references, check_scorers, score_texts

SQL = "SELECT a FROM t"


@pytest.mark.parametrize(
    ("name", "text", "reference", "expected"),
    [
        ("exact", f" {SQL}\n", SQL, 1),
        ("contains", "It is Paris, of course.", " Paris\n", 1),
        ("regex:answer is (\\d+)", "so the answer is 42.", "42", 1),  # a reference without a match is taken whole
        ("regex:[A-C]", "B, not A", "A", 0),
        ("numeric", "She has 12 * 6 = 72 apples.", "6 + 66\n#### 72", 1),
        ("numeric", "It costs $1,234.50", "1234.5", 1),
        ("numeric", "-$5", "#### -5.00", 1),
        ("numeric", "1,000,000", "1e6", 1),
        ("numeric", "none", "7", 0),
        ("numeric", "7", "seven", None),
        ("json", '{"b": [1.0, null], "a": "x"}', '{ "a":"x", "b":[1, null] }', 1),
        ("json", "[-0.0, 2e1]", "[0, 20]", 1),
        ("json", "9007199254740993", "9007199254740992", 0),  # equal as floats
        ("json", "[true]", "[1]", 0),
        ("json", "1", "no JSON", None),
        ("json", "[" * 9000, "[[]]", 0),
        ("f1", "The Cat, sat!", "a cat sat", 1),  # articles, case and punctuation do not count
        ("f1", "the cat sat on a mat", "cat mat", 2 * 2 / (4 + 2)),  # cat sat on mat: 2 of 4 and 2 of 2 words
        # ROUGE-L, the F-measure of the longest common subsequence: 3 of 4 words on either side (Lin 2004, section 3.2)
        ("rougeL", "police kill the gunman", "police killed the gunman", 0.75),
        ("bleu", "the cat sat on the mat", "the cat sat on the mat ", 1),
        # 4 of 4 words, 2 of 3, 0 of 2 and 0 of 1 n-grams; sacrebleu's exponential smoothing makes the zeros 1/4 and 1/4
        ("bleu", "a b d c", "a b c d", (1 * (1 / 3) * (1 / 4) * (1 / 4)) ** 0.25),
        ("chrf", "zzz", "abc", 0),
    ],
)
def test_a_score_is_the_one_that_was_counted_by_hand(name, text, reference, expected):
    """In this process; that of a scorer calls the same function."""
    score = None
    if scorers.has_reference(name, reference):
        score = scorers.load_scorer(name)(text, reference)
    assert score == (None if expected is None else pytest.approx(expected))


SCORER_CODE = """
import os, subprocess, sys, time
from decimal import Decimal
print("a word on stdout")
def good(text, reference):
    os.fork()  # only this process answers
    return Decimal(len(text)) / 10
def hangs_with_children(text, reference):
    subprocess.run("sleep 617 & setsid -f sleep 617; setsid sleep 617", shell=True)
def raises(text, reference): raise KeyError("no\\nkey")
def leaves(text, reference): sys.exit(0)
def dies(text, reference): os._exit(3)
def says(text, reference): return {"two": 2, "nan": float("nan")}[text]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(SCORER_CODE)
    return tmp_path / "mine.py"


def test_a_python_scorer_gets_text_and_reference(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    (file.parent / "json.py").write_text("raise SystemExit('a file of the folder took the place of a library')")
    assert score_texts("mine.py:good", ["abc", "", "abcdefgh"], ["r", None, "r"]) == [0.3, None, 0.8]


@pytest.mark.parametrize(
    ("function", "text", "reason"),
    [
        ("regex:(a+)+$", "a" * 64 + "b", "takes more than 0.5 s (text 2 of 2)"),
        ("hangs_with_children", "x", "takes more than 0.5 s (text 2 of 2)"),
        ("raises", "x", "failed with KeyError: 'no\\nkey' (text 2 of 2)"),
        ("leaves", "x", "failed with SystemExit: 0 (text 2 of 2)"),
        ("dies", "x", "its process ended with exit code 3 (text 2 of 2)"),
        ("says", "two", "returned 2; expected a number from 0 to 1 (text 2 of 2)"),
        ("says", "nan", "returned nan; expected a number from 0 to 1 (text 2 of 2)"),
    ],
)
def test_a_scorer_that_fails_hangs_or_returns_no_number_gives_a_reason(file, monkeypatch, function, text, reason):
    monkeypatch.setattr(scorers, "TEXT_SECONDS", 0.5)
    waits: list[float] = []
    name = function if function.startswith("regex:") else f"{file}:{function}"
    with pytest.raises(ScorerError) as caught:
        score_texts(name, ["x", text], [None, "r"], on_wait=lambda: waits.append(time.monotonic()))
    assert reason in str(caught.value)
    assert waits, "the watchdog hears of it"
    deadline = time.monotonic() + 5
    while subprocess.run(["pgrep", "-f", "^sleep 617"], capture_output=True).stdout:
        assert time.monotonic() < deadline, "what it started has ended with it"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["acc"], "--score acc: expected exact, contains, numeric"),
        (["exact", "f1", "exact"], "--score exact: two scorers would write the column score_exact; expected one"),
        (["regex:a+", "regex:a*"], "--score regex:a+: two scorers would write the column score_regex_a_"),
        (["regex:("], "--score regex:(: is no regular expression of Python's re (missing )"),
        (["none.py:f"], "--score none.py:f: failed with FileNotFoundError"),
        (["FILE:other"], "FILE has no function other"),
        (["BAD:f"], "failed with SyntaxError: "),
        (["rougeL"], "--score rougeL: needs rouge_score, which is not installed; pip install '.[metrics]'"),
    ],
)
def test_a_scorer_that_cannot_be_used_is_one_line_before_anything_slow(file, monkeypatch, names, message):
    find_spec = scorers.importlib.util.find_spec
    monkeypatch.setattr(scorers.importlib.util, "find_spec", lambda n: None if n == "rouge_score" else find_spec(n))
    bad = file.with_name("bad.py")
    bad.write_text("def f(:")
    names, message = ([t.replace("FILE", str(file)).replace("BAD", str(bad)) for t in x] for x in (names, [message]))
    with pytest.raises(UserError) as caught:
        check_scorers(names)
    assert message[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_records_in_which_a_scorer_finds_nothing_to_compare_are_refused(file):
    references = ["no number", None]
    check_references(["exact", f"{file}:good"], references, "test record")
    for name, message in (
        ("numeric", "--score numeric: no test record has a number to compare with"),
        (f"{file}:raises", "failed with KeyError: 'no\\nkey' (text 1 of 1)"),
    ):
        with pytest.raises(UserError) as caught:
            check_references(["exact", name], references, "test record")
        assert message in str(caught.value)
