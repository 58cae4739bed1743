"""Evaluation records that are not new: found whatever they look like, named, left out, and many refused."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from helpers.data_helpers import write_records

from trainer.config.errors import UserError
from trainer.config.settings import DataSettings
from trainer.data.formats import choose_format
from trainer.data.unseen import NEAR_COPY_SHARE, SHINGLE_TOKENS, SeenRecords, find_near_copies

COMPLETION = {"objective": "completion", "prompt": "{mr}:", "completion": " {ref}"}


def make_pairs(seed, number=20, num_words=80):
    rng = np.random.default_rng(seed)
    texts = (" ".join(rng.choice(500, num_words).astype(str)) for _ in range(number))
    return [{"prompt": f"{seed}-{i}", "completion": text} for i, text in enumerate(texts)]


TRAIN, OTHERS, LONG = make_pairs(1), make_pairs(2), "Answer in one word, as a sailor would. " * 20


def edit(pairs, column, change):
    return [{**pair, column: change(pair[column])} for pair in pairs]


def replace_words(text, *places):
    return " ".join("other" if i in places else word for i, word in enumerate(text.split()))


def chats(pairs, last="Yes."):
    roles = ("system", "user", "assistant", "user", "assistant")
    all_texts = ((LONG, pair["prompt"], pair["completion"], "Sure?", last) for pair in pairs)
    return [{"messages": [{"role": r, "content": c} for r, c in zip(roles, texts, strict=True)]} for texts in all_texts]


def chinese(start):
    return [{"text": start + "".join(map(chr, range(0x4E00 + 40 * i, 0x4E28 + 40 * i)))} for i in range(20)]


NEW_PROMPTS = edit(TRAIN, "prompt", "x{}".format)
OLD_PROMPTS = [{**other, "prompt": f" {pair['prompt']}"} for pair, other in zip(TRAIN, OTHERS, strict=True)]
ACCENTS, OTHER_ACCENTS = (edit(TRAIN, "prompt", text.format) for text in ("Caf\u00e9 {}", "CAFE\u0301 {}"))
TEMPLATED, OTHERS_TEMPLATED = (edit(make_pairs(seed, num_words=3), "prompt", LONG.__add__) for seed in (1, 2))
COPIES, PROMPTS = "equal to training records", "with the prompt of training records"
NEAR, NEW = "near copies of training records", ""


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ({"test": edit(TRAIN, "completion", lambda text: "\u200b" + text.replace(" ", "\u00a0\u3000"))}, COPIES),
        ({"train": ACCENTS, "test": OTHER_ACCENTS}, COPIES),
        ({"test": OLD_PROMPTS}, PROMPTS),
        ({"test": edit(NEW_PROMPTS, "completion", lambda text: replace_words(text, 40))}, NEAR),
        ({"test": edit(NEW_PROMPTS, "completion", lambda text: replace_words(text, 30, 60))}, NEW),
        ({"test": edit(OTHERS, "prompt", "x{}".format), "val": OTHERS}, "near copies of validation records"),
        # under 13 tokens, and what a template or a system message says: records differ where they have their own words
        ({"train": TEMPLATED, "test": OTHERS_TEMPLATED}, NEW),
        ({"train": chats(TRAIN), "test": chats(OTHERS)}, NEW),
        ({"train": chats(TRAIN), "test": chats(TRAIN, last="No.")}, NEAR),
        ({"train": chats(TRAIN), "test": chats(edit(TRAIN, "completion", str), last=LONG)}, PROMPTS),
        ({"train": chinese("\u6c34\u706b"), "test": chinese("")}, NEAR),
    ],
)
def test_records_that_are_not_new_are_found_in_whatever_form(records, reason):
    records = {"train": TRAIN, **records}
    seen, examples = SeenRecords(None), []
    for split, split_records in records.items():
        record_format = choose_format(split_records[0], DataSettings(data="x", block_size=64), split)
        for number, record in enumerate(split_records):
            examples.append(record_format.render(record))
            examples[-1].split, examples[-1].where = split, f"{'' if split == 'test' else 'x/'}a as b, row {number}"
    for example in examples:
        seen.add(example)
    seen.find([*examples, examples[-1]])  # of a file that grows meanwhile, which is refused later
    assert Counter(seen.reasons["test"]) == {reason: 20}
    if reason == NEAR:
        assert seen.describe("test").startswith(
            f"20 {NEAR} (a as b, row 0 as x/a as b, row 0, row 1 as x/a as b, row 1"
        )


def test_near_copies_are_those_that_share_so_many_shingles_with_one_candidate():
    """Against their definition, on records cut out of a few long texts."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 2**63, 300).astype(np.uint64) for _ in range(6)]

    def draw():
        start, length = rng.integers(0, 200), rng.integers(5, 100)
        return texts[rng.integers(6)][start : start + length]

    def shingles(tokens):
        return {tuple(tokens[i : i + SHINGLE_TOKENS]) for i in range(len(tokens) - SHINGLE_TOKENS + 1)}

    records = [(int(rng.integers(1, 4)), draw()) for _ in range(100)]
    candidates = [(int(rng.integers(0, 3)), f"row {i}", draw()) for i in range(200)]
    counts = Counter(shingle for split, _, tokens in candidates if split == 0 for shingle in shingles(tokens))
    expected = {}
    for number, (split, tokens) in enumerate(records):
        own = {shingle for shingle in shingles(tokens) if counts[shingle] <= 12}
        for earlier, place, candidate in candidates:
            if earlier < split and own and len(own & shingles(candidate)) >= NEAR_COPY_SHARE * len(own) - 1e-9:
                expected.setdefault(number, (earlier, place))
    assert 10 < len(expected) < 90
    assert find_near_copies(records, candidates, max_records=12) == expected


def test_near_copies_need_some_ten_numbers_of_memory_for_each_shingle():
    texts = np.random.default_rng(0).integers(0, 2**63, (1000, 60), dtype=np.uint64)
    tracemalloc.start()
    near_copies = find_near_copies([(1, text) for text in texts], [(0, "x", text) for text in texts], max_records=1)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(near_copies) == 1000
    assert peak_bytes < 160 * 1000 * 48, "318 bytes each with sets"


def test_records_that_are_not_new_are_named_marked_and_more_than_5_percent_refused(tmp_path, prepare_file):
    pairs = [{"doc": f"d{i}", "mr": f"Town {i}", "ref": f"People met {i} times."} for i in range(100)]
    train = write_records(tmp_path / "train.csv", pairs[:50])
    few = write_records(tmp_path / "few.csv", [*pairs[50:90], pairs[0], {**pairs[90], "doc": "D1"}])
    some = write_records(tmp_path / "some.csv", [*pairs[50:90], *pairs[:3]])
    prepared = prepare_file(train, test_data=str(few), **COMPLETION)
    problem = f"1 of 42 test records are not new: 1 equal to training records ({few}, row 41 (line 42))"
    assert f"warning: {problem}, so the test loss says little about new ones" in prepared.metadata["notices"]
    assert prepared.row_info("test")["is_seen"].tolist() == [False] * 40 + [True, False]
    assert prepared.metadata["num_seen"] == {"val": 0, "test": 1, "retain": 0}
    blocks = prepare_file(train, test_data=str(few), block_size=8, **{**COMPLETION, "objective": "blocks"})
    assert 0 < blocks.row_info("test")["is_seen"].sum() < 6, "the blocks with a part of the record"
    by_doc = prepare_file(train, test_data=str(few), split_by="doc", **COMPLETION).metadata["notices"]
    assert any("1 equal to validation records, 1 with the doc of training records" in notice for notice in by_doc)
    old = write_records(tmp_path / "old.txt", "".join(f"{pair['mr']}: {pair['ref']}\n" for pair in pairs[50:90]))
    for options, expected in (
        ({"test_data": str(some)}, r"3 of 43 .* \(.*some.csv, row 41 \(line 42\), row 42"),
        ({"val_data": str(few), "test_data": str(few)}, "42 of 42 .*: 41 equal to validation records, 1 equal"),
        ({"test_data": str(few), "retain_data": str(old)}, "--retain-data .*: 40 of 40 retained .* equal to test"),
    ):
        with pytest.raises(UserError, match=expected):
            prepare_file(train, **options, **COMPLETION)


@pytest.mark.parametrize("objective", ["blocks", "completion"])
def test_leaked_validation_records_are_a_note_a_warning_or_refused(tmp_path, prepare_file, objective):
    pairs = [{"mr": f"Town {i}", "ref": f"People met {i} times."} for i in range(400)]
    file, options = write_records(tmp_path / "a.csv", pairs[:200]), {**COMPLETION, "objective": objective}
    sets = {n: str(write_records(tmp_path / f"v{n}.csv", pairs[200 - n : 400 - n])) for n in (0, 1, 2, 99, 100, 200)}
    for num_shared, start in ((1, ""), (2, "warning: "), (99, "warning: ")):
        notices = prepare_file(file, val_data=sets[num_shared], **options).metadata["notices"]
        problem = f"{start}{num_shared} of 200 validation records are not new: {num_shared} equal to training records ("
        assert sum(notice.startswith(problem) for notice in notices) == 1
    for num_shared in (100, 200):
        problem = f"{num_shared} of 200 validation records are not new: .* under 50%, or --allow-leakage"
        alone = prepare_file(file, val_data=sets[num_shared], allow_leakage=True, **options)
        assert alone.row_info("val")["is_seen"].all() == (num_shared == 200)
        with pytest.raises(UserError, match=f"--val-data .*v{num_shared}.csv: {problem}"):
            prepare_file(file, val_data=sets[num_shared], **options)
        both = (sets[0], f"old={sets[num_shared]}")
        with pytest.raises(UserError, match=problem.replace("validation", r"validation \(old\)")):
            prepare_file(file, val_data=both, **options)
        prepared = prepare_file(file, val_data=both, allow_leakage=True, **options)
        assert prepared.metadata["num_seen"] == {"val": 0, "test": 0, "retain": 0, "val-old": num_shared}
        assert np.array_equal(prepared.val_sets["old"].ids, alone.val.ids)
        without = prepare_file(file, val_data=sets[0], **options)
        assert prepared.metadata["fingerprint"] != without.metadata["fingerprint"]
    for name in ("train", "validation"):
        write_records(tmp_path / "folder" / f"{name}.csv", pairs)
    with pytest.raises(UserError, match=r"^--data .*folder: 400 of 400 validation records are not new"):
        prepare_file(tmp_path / "folder", **options)
