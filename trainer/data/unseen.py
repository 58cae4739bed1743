"""Which evaluation records are not new: equal to earlier records, near copies of one, or with the prompt of one.
Blanks, case and invisible characters do not tell two apart. A near copy shares 0.8 or more of its shingles of 13 tokens
(words, punctuation marks, single Chinese and Japanese characters) with one earlier record; those that a tenth of the
training records have are a template's and do not count, nor do system messages."""

import math
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.config.text import list_some
from trainer.data.dataset import SPLITS
from trainer.data.formats import Example, content_hash

SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test", "retain": "retained"}
EARLIER_SPLITS = {"val": ("train",), "test": ("train", "val"), "retain": ("train", "val", "test")}
SHINGLE_TOKENS, NEAR_COPY_SHARE = 13, 0.8
TEMPLATE_SHARE, MIN_TEMPLATE_RECORDS = 0.1, 10  # of the distinct training records that have a shingle
MAX_PLACES = 10  # that a message names
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]")
TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")
#: Powers of an odd number, by which the hashes of a shingle's tokens are added up modulo 2^64.
FACTORS = np.array([pow(0x9E3779B97F4A7C15, j, 2**64) for j in range(SHINGLE_TOKENS)], dtype=np.uint64)

Hashes = NDArray[np.uint64]


def normalise(text: str) -> str:
    """The text without what does not tell two apart: case, kinds of blanks, invisible characters, composed accents."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    return " ".join(text.casefold().split())


def name_records(split: str) -> str:
    return SPLIT_NAMES.get(split) or f"validation ({split.removeprefix('val-')})"


class SeenRecords:
    """Finds the evaluation records that are not new: `add` every record, then `find` sets `reasons`, {split: [why each
    of its records is not new, empty where it is]}."""

    def __init__(self, split_by: str | None, splits: Iterable[str] = SPLITS) -> None:
        self._split_by = split_by
        self._contents = {split: array("Q") for split in splits}
        self._groups = {split: array("Q") for split in splits}  # 0: none
        self._places: dict[str, list[list[str]]] = {split: [] for split in splits}  # and that of a copy's original
        self._tokens: dict[tuple[str, int], Hashes] = {}  # of evaluation records, by split and number
        self.reasons: dict[str, list[str]] = {}

    def add(self, example: Example) -> None:
        """One more record; of training records two hashes are kept."""
        split, group = example.split, example.group
        if example.conversation is not None and self._split_by is None:
            group = example.conversation.text(example.conversation.target_turns()[0])
        self._contents[split].append(content_hash(normalise(example.text())))
        self._groups[split].append(content_hash(normalise(group)) if group and split != "retain" else 0)
        if split != "train":
            if len(tokens := _hash_tokens(example)) >= SHINGLE_TOKENS:
                self._tokens[split, len(self._places[split])] = tokens
            self._places[split].append([example.where])

    def find(self, examples: Iterable[Example]) -> None:
        """`examples`: the records that were added, once more; read only where there are long ones to compare."""
        self.reasons = {split: [""] * len(hashes) for split, hashes in self._contents.items() if split != "train"}
        self._mark(self._contents, "equal to {} records")
        records = [key for key in self._tokens if not self.reasons[key[0]][key[1]]]
        earlier_splits = SPLITS[: max((_number(split) for split, _ in records), default=0)]

        def candidates() -> Iterator[tuple[int, str, Hashes]]:
            contents, hashes = set[int | None](), {split: iter(values) for split, values in self._contents.items()}
            for example in examples:
                content = next(hashes[example.split], None)  # None: of a file that has grown since, which is refused
                if example.split in earlier_splits and content not in contents:
                    contents.add(content)
                    yield _number(example.split), example.where, _hash_tokens(example)

        near_copies = find_near_copies(
            [(_number(split), self._tokens[split, i]) for split, i in records],
            candidates(),
            max_records=max(MIN_TEMPLATE_RECORDS, int(TEMPLATE_SHARE * len(set(self._contents["train"])))),
        )
        for number, (earlier, place) in near_copies.items():
            split, i = records[number]
            self._places[split][i].append(place)
            self.reasons[split][i] = f"near copies of {SPLIT_NAMES[SPLITS[earlier]]} records"
        self._mark(self._groups, f"with the {self._split_by or 'prompt'} of {{}} records")

    def _mark(self, hashes: Mapping[str, Sequence[int]], reason: str) -> None:
        for split in self.reasons:
            for earlier in EARLIER_SPLITS[SPLITS[_number(split)]]:
                for i in np.flatnonzero(np.isin(hashes[split], hashes[earlier])).tolist():
                    if hashes[split][i] and not self.reasons[split][i]:
                        self.reasons[split][i] = reason.format(SPLIT_NAMES[earlier])

    def describe(self, split: str) -> str:
        """Why records are not new, and where the first ones stand."""
        counts = Counter(filter(None, self.reasons[split]))
        found = [places for places, reason in zip(self._places[split], self.reasons[split], strict=True) if reason]
        file = found[0][0].rpartition(", ")[0] + ", "  # which is named once
        places = (" as ".join(place.removeprefix(file) for place in pair) for pair in found)
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in counts.items())
        return f"{reasons} ({file}{list_some(places, MAX_PLACES)})"


def _number(split: str) -> int:
    return SPLITS.index(split.partition("-")[0])


def _hash_tokens(example: Example) -> Hashes:
    tokens = TOKEN.findall(normalise(example.text(with_system=False)))
    return np.fromiter(map(hash, tokens), dtype=np.int64, count=len(tokens)).view(np.uint64)


def _shingles(tokens: Hashes) -> Hashes:
    return np.correlate(tokens, FACTORS, "valid") if len(tokens) >= SHINGLE_TOKENS else tokens[:0]


def find_near_copies(
    records: Sequence[tuple[int, Hashes]], candidates: Iterable[tuple[int, str, Hashes]], *, max_records: int
) -> dict[int, tuple[int, str]]:
    """{number of a record: (split, place) of the first candidate of an earlier split that it is a near copy of}, of
    records (number of the split, tokens) and candidates, which have a place, too. A shingle that more than
    `max_records` candidates of the training data (split 0) have does not count."""
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *(_shingles(tokens) for _, tokens in records)]))
    if not len(known):
        return {}

    def find_known(tokens: Hashes) -> NDArray[np.int64]:  # a shingle is called by its place among the known ones
        shingles = _shingles(tokens)
        places = np.searchsorted(known, shingles)
        places = places[known.take(places, mode="clip") == shingles]
        return np.unique(places) if len(places) else places

    num_train, num_all = np.zeros((2, len(known)), dtype=np.int64)  # candidates that have each shingle
    found: list[tuple[int, str, NDArray[np.int64]]] = []  # split, place and known shingles of candidates
    for split, place, tokens in candidates:
        if len(shared := find_known(tokens)):
            num_all[shared] += 1
            num_train[shared] += split == 0
            found.append((split, place, shared[num_train[shared] <= max_records]))

    # Who shares so many of a record's shingles has at least one of the others and one more: the rarest are looked up.
    shingles_by_record, least_shared, records_by_shingle = [], [], dict[int, list[int]]()
    for number, (_, tokens) in enumerate(records):
        shingles = find_known(tokens)
        shingles = shingles[num_train[shingles] <= max_records]
        shingles_by_record.append(shingles)
        least_shared.append(math.ceil(NEAR_COPY_SHARE * len(shingles) - 1e-9))
        rarest = shingles[np.argsort(num_all[shingles])][: len(shingles) - least_shared[-1] + 1]
        for shingle in rarest[num_all[rarest] > 0].tolist():
            records_by_shingle.setdefault(shingle, []).append(number)
    near_copies: dict[int, tuple[int, str]] = {}
    for split, place, shared in found:
        for number in {number for shingle in shared.tolist() for number in records_by_shingle.get(shingle, ())}:
            if split < records[number][0] and np.isin(shingles_by_record[number], shared).sum() >= least_shared[number]:
                near_copies.setdefault(number, (split, place))
    return near_copies
