"""Scores of generated texts against their references, from 0 to 1; each scorer runs in a process of its own.

A pattern may take for ever and a user's function may do anything: the process has a time limit for each text, shares
nothing with the run, and ends with it. `python -m trainer.training.scorers FILE_DESCRIPTOR` is that process.
"""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import string
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from trainer.config import choices
from trainer.config.errors import UserError, first_line
from trainer.config.text import shorten
from trainer.distributed.launch_environment import without_launcher

START_SECONDS = 60.0  # to load a scorer, and what it imports
TEXT_SECONDS = 10.0  # for one text
ROOT = Path(__file__).parents[2]
PACKAGES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rougeL": "rouge_score"}
NEEDS = {"numeric": "a number", "json": "a JSON value"}  # in a reference; else any text
#: (sign, digits, exponent); a minus behind a letter, a digit or a bracket is a dash or an operator.
_NUMBER = re.compile(
    r"((?<![\w)\]])[-−])?\$?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE]([+-]?\d{1,4})\b)?"
)


class ScorerError(Exception):
    """Why a scorer gives no scores, in half a sentence."""


def check_scorers(names: Sequence[str]) -> None:
    """UserError in one line where a scorer of --score cannot be used here; loads what the user named."""
    from trainer.tracking.eval_records import score_name  # with pandas, for which a scorer's process need not wait

    columns = [score_name(name) for name in names]
    for name in names:
        try:
            choices.check_scorer(name)
        except ValueError:
            raise UserError(f"--score {name}: expected {choices.SCORERS}") from None
        if columns.count(column := score_name(name)) > 1:
            raise UserError(f"--score {name}: two scorers would write the column score_{column}; expected one")
        if (package := PACKAGES.get(name)) and importlib.util.find_spec(package) is None:
            raise UserError(f"--score {name}: needs {package}, which is not installed; pip install '.[metrics]'")
        _try_scorer(name, ())


def check_references(names: Sequence[str], references: Sequence[str | None], source: str) -> None:
    """UserError where a scorer finds no reference in the records of `source`, or fails on the first one itself."""
    for name in names:
        found = [str(reference) for reference in references if has_reference(name, reference)][:1]
        if not found:
            raise UserError(f"--score {name}: no {source} has {NEEDS.get(name, 'a text')} to compare with")
        _try_scorer(name, found)


def _try_scorer(name: str, texts: Sequence[str]) -> None:
    """UserError where a scorer fails for texts that are their own references; none is needed of our own scorers."""
    if ":" in name:
        try:
            score_texts(name, texts, texts)
        except ScorerError as error:
            raise UserError(f"--score {name}: {error}") from None


def has_reference(name: str, reference: str | None) -> bool:
    if reference is None or not reference.strip():
        return False
    return EXTRACTORS.get(name, str)(reference) is not None


def score_texts(
    name: str, texts: Sequence[str], references: Sequence[str | None], *, on_wait: Callable[[], None] = lambda: None
) -> list[float | None]:
    """The score of each text by one scorer, from 0 to 1; None where its reference holds nothing to compare. ScorerError
    where the scorer fails, takes more than TEXT_SECONDS for a text, or returns no such number. `on_wait` is called once
    a second, and for each text."""
    scores: list[float | None] = []
    with _started(on_wait) as ask:
        ask([name], START_SECONDS)
        for number, (text, reference) in enumerate(zip(texts, references, strict=True), start=1):
            try:
                scores.append(ask([text, reference], TEXT_SECONDS) if has_reference(name, reference) else None)
            except ScorerError as error:
                raise ScorerError(f"{error} (text {number} of {len(texts)})") from None
    return scores


@contextlib.contextmanager
def _started(on_wait: Callable[[], None]) -> Iterator[Callable[[Sequence[str | None], float], float | None]]:
    """A scorer's process: a function that sends it a message and returns its answer within so many seconds."""
    ours, theirs = multiprocessing.Pipe()
    command = [sys.executable, "-P", "-m", "trainer.training.scorers", str(theirs.fileno())]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with ours:
        with theirs:
            process = subprocess.Popen(
                command,
                env={**without_launcher(os.environ), "PYTHONPATH": path},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

        def ask(message: Sequence[str | None], seconds: float) -> float | None:
            deadline = time.monotonic() + seconds
            on_wait()
            try:
                ours.send_bytes(json.dumps(message).encode())
                while not ours.poll(max(0.0, min(1.0, deadline - time.monotonic()))):
                    on_wait()
                    if time.monotonic() > deadline:
                        raise ScorerError(f"takes more than {seconds:g} s")
                answer = json.loads(ours.recv_bytes())
            except (EOFError, OSError, ValueError):  # the process has ended, or sends no answer
                with contextlib.suppress(subprocess.TimeoutExpired):  # it may have closed the connection alone
                    process.wait(1)
                raise ScorerError(f"its process ended with exit code {process.returncode}") from None
            if "error" in answer:
                raise ScorerError(answer["error"])
            score: float | None = answer["score"]
            return score

        try:
            yield ask
        finally:  # with whatever it has started, in sessions of their own too
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            for child in children:
                with contextlib.suppress(psutil.Error):
                    child.kill()
            process.wait()


def last_number(text: str) -> Decimal | None:
    """The last number of a text, None where it has none: `-$1,234.50` is -1234.5, `50%` is 50, `3,4` ends in 4. So also
    of GSM8K's answers, which end in `#### 72`."""
    if not (numbers := _NUMBER.findall(text)):
        return None
    sign, digits, exponent = numbers[-1]
    return Decimal(f"{'-' if sign else ''}{digits.replace(',', '')}e{exponent or 0}")


def json_value(text: str) -> str | None:
    """A text that is the same for equal JSON values, None for what is no JSON: blanks, the order of keys and how a
    number is written do not count; 1 and true differ."""

    def number(digits: str) -> float:
        return int(value) if (value := float(digits)).is_integer() else value

    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text, parse_float=number, parse_constant=int)  # which refuses NaN
        return json.dumps(value, sort_keys=True)
    return None


def _f1(text: str, reference: str) -> float:
    """F1 of the words that both have, normalised as by SQuAD's evaluate-v2.0.py (Rajpurkar et al., arXiv 1806.03822):
    lower case, without punctuation and articles; where one has no word, 1 if the other has none either, else 0."""

    def split(text: str) -> list[str]:
        text = "".join(character for character in text.lower() if character not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    words, expected = split(text), split(reference)
    num_common = (Counter(words) & Counter(expected)).total()
    return 2 * num_common / (len(words) + len(expected)) if words and expected else float(words == expected)


@cache
def _library_metric(name: str) -> Callable[[str, str], float]:
    if name == "rougeL":
        from rouge_score.rouge_scorer import RougeScorer

        rouge = RougeScorer([name])
        return lambda text, reference: float(rouge.score(reference, text)[name].fmeasure)
    from sacrebleu.metrics import BLEU, CHRF

    metric: Any = BLEU(effective_order=True) if name == "bleu" else CHRF()
    return lambda text, reference: float(metric.sentence_score(text.strip(), [reference.strip()]).score) / 100


#: What is compared of a text and a reference; None: it has none.
EXTRACTORS: dict[str, Callable[[str], object]] = {"exact": str.strip, "numeric": last_number, "json": json_value}


def score_text(name: str, text: str, reference: str) -> float:
    if extract := EXTRACTORS.get(name):
        return float(extract(text) == extract(reference))
    if name == "contains":
        return float(reference.strip() in text)
    return _f1(text, reference) if name == "f1" else _library_metric(name)(text, reference)


def _regex_scorer(pattern: str) -> Callable[[str, str], float]:
    """What the pattern finds first (its first group, if it has one) in the text and in the reference; a reference in
    which it finds nothing is taken whole."""
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ScorerError(f"is no regular expression of Python's re ({first_line(error)})") from None

    def find(text: str) -> str | None:
        match = compiled.search(text)
        return None if match is None else match[min(1, compiled.groups)]

    def score(text: str, reference: str) -> float:
        found, expected = find(text), find(reference)
        return float(found is not None and found.strip() == (reference if expected is None else expected).strip())

    return score


def load_scorer(name: str) -> Callable[[str, str], Any]:
    """The function (text, reference) of a scorer; of FILE.py:function a user's."""
    if name.startswith("regex:"):
        return _regex_scorer(name.removeprefix("regex:"))
    if not (file := choices.scorer_file(name)):
        return partial(score_text, name)
    path, function_name = Path(file).absolute(), name.rpartition(":")[2]
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("scorer", path)
    assert spec is not None and spec.loader is not None, "a file of Python"  # noqa: PT018
    module = sys.modules["scorer"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(function := getattr(module, function_name, None)):
        raise ScorerError(f"{path} has no function {function_name}")
    return function


def main() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end when the run ends
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what its children leave behind becomes a child of its own
    scorer: Callable[[str, str], Any] | None = None
    process_id = os.getpid()
    with Connection(int(sys.argv[1])) as connection, contextlib.suppress(EOFError):
        while True:
            message = json.loads(connection.recv_bytes())
            answer: dict[str, Any] = {"score": None}
            try:
                if scorer is None:
                    scorer = load_scorer(*message)
                else:
                    value = scorer(*message)
                    if not hasattr(value, "__float__") or not 0 <= float(value) <= 1:  # of numpy and torch too
                        raise ScorerError(f"returned {shorten(repr(value), 60)}; expected a number from 0 to 1")
                    answer = {"score": float(value)}
            except ScorerError as error:
                answer = {"error": str(error)}
            except (Exception, SystemExit) as error:
                answer = {"error": f"failed with {type(error).__name__}: {first_line(error)}"}
            if os.getpid() != process_id:  # a fork that the scorer has left: one answer to each text
                os._exit(1)
            connection.send_bytes(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
