"""From `--data` to rows on disk: find the records, check all of them, then tokenise, split, pack and keep."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.choices import LEAKAGE_FRACTION, MAX_SHARED_FRACTION, WARN_SHARED_FRACTION, Objective
from trainer.config.errors import UserError
from trainer.config.files import name_val_sets
from trainer.config.settings import DataSettings
from trainer.data import dataset as store
from trainer.data.chat import ChatTemplate, MaskError, load_template
from trainer.data.dataset import SPLITS, PreparedDataset, SplitWriter
from trainer.data.formats import Example, choose_format, content_hash
from trainer.data.readers import RecordError, list_columns, require, to_text
from trainer.data.sources import Source, find_sources, name_others
from trainer.data.tokenizer import Row, encode, load_tokenizer, tokenizer_fingerprint, vocabulary_size
from trainer.data.unseen import SeenRecords, name_records

#: Settings that decide which rows there are, beside the sources, the tokenizer and what follows from them.
KEY_SETTINGS = ("max_samples", "objective", "split_by", "prompt", "completion", "block_size", "unusable_records")
BATCH_RECORDS, BATCH_CHARACTERS = 1000, 2**19  # what is tokenised at a time
LOG_SECONDS = 5.0  # between two lines that say how far it is
NUM_SAMPLED_RECORDS = 4096  # the first ones, whose lengths decide a block size that is left to the data
BLOCK_SIZES = (128, 256, 512, 1024, 2048)  #: longer rows want a decision, and the memory
MAX_JOINED_BLOCK, MIN_BLOCKS = 1024, 100  # tokens of a block of joined texts, and how many the texts should fill


def iter_examples(source: Source) -> Iterator[Example | None]:
    """The records of a source, None for a blank one; UserError names file, row and column."""
    columns, num_left = source.record_format.columns, source.max_records
    if source.split_by is not None and columns is not None:
        columns = (*columns, source.split_by)
    for where, record in source.records(columns):
        try:
            example = source.record_format.render(record)
            if source.split_by is not None:
                example.group = to_text(require(record, source.split_by), source.split_by)
        except (RecordError, RecursionError) as error:
            problem = error if isinstance(error, RecordError) else "nested too deeply; expected flat records"
            raise UserError(f"{source.flag} {where}: {problem}") from None
        if example.conversation is None and not example.completion.strip():
            yield None
            continue
        example.where, example.split = where, source.split
        if example.split == "train":  # by its content alone, whatever stands beside it
            key = example.content(separator="") if example.group is None else example.group
            example.split = split_of(key, *source.fractions)
        yield example
        num_left -= 1
        if not num_left:
            return


def split_of(key: str, val_fraction: float, test_fraction: float = 0.0) -> str:
    """Which split a record belongs to: validation is the lower end of the hashes and the test the upper one, so
    neither moves where the other grows."""
    share = content_hash(key) / 2**64
    return "val" if share < val_fraction else "test" if share >= 1 - test_fraction else "train"


def prepare(
    settings: DataSettings,
    *,
    model: str,
    global_batch: int,
    max_positions: int | None = None,
    log: Callable[[str], None] = lambda line: None,
    heartbeat: Callable[[], None] = lambda: None,
) -> PreparedDataset:
    """The rows of `settings`, from the cache or made now; UserError for a mistake of the user's, before anything slow.
    `max_positions`: bounds a block size that is left to the data; `heartbeat`: called at each record and file."""
    cache_root = store.resolve_cache_dir()
    sources = find_sources(settings)
    has_val = any(source.split == "val" for source in sources)
    fractions = (0.0 if has_val else settings.val_fraction, settings.test_fraction)
    sources = [open_source(replace(source, heartbeat=heartbeat), settings, fractions) for source in sources]
    first = sources[0].record_format
    for other in sources[1:]:  # the loss of one format says nothing of another; what is retained may have its own
        form = other.record_format
        is_apart = form.is_chat != first.is_chat or (not first.is_chat and form.name != first.name)
        if other.split == "retain":
            is_apart = form.is_chat and not first.is_chat
        if is_apart:
            names = [f"{each.name} ({each.meaning})" for each in (first, form)]
            names_both = f"one holds {names[0]}, the other {names[1]}"
            raise UserError(f"{sources[0].where()} and {other.where()}: {names_both}; give both in one format")
    settings = replace(settings, objective=settings.objective or first.objectives[0])
    tokenizer = load_tokenizer(model)
    template = None
    if first.is_chat or settings.chat_template is not None:  # refused where it cannot be read, though unused
        template = load_template(tokenizer, settings.chat_template, model)
    chat = ChatTemplate(tokenizer, template) if template is not None and first.is_chat else None
    if not settings.block_size:
        lengths = list[int]()
        for source in (source for source in sources if source.split == "train"):  # the parts of a mixture
            rows = (row for _, row in _iter_rows(source, tokenizer, chat, False, BLOCK_SIZES[-1]))
            usable = (row for row in rows if isinstance(row, Row))
            lengths += [len(row.ids) for row in islice(usable, NUM_SAMPLED_RECORDS)]
        settings = replace(settings, block_size=block_size_for(lengths, settings.objective, max_positions))
    key = {  # contents and settings: names and places of files do not decide which rows there are
        "version": store.FORMAT_VERSION,
        "sources": [[s.split, s.record_format.name, s.hashes, None, s.notices, s.share] for s in sources],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "fractions": fractions,
        "chat_template": chat.template if chat is not None else None,
        **{name: getattr(settings, name) for name in KEY_SETTINGS},
        **({"allow_leakage": True} if settings.allow_leakage else {}),  # what was refused is not taken from there
    }
    dataset = store.load_or_build(
        cache_root / "prepared" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32],
        lambda folder: write_rows(folder, settings, sources, tokenizer, chat, log),
        source=settings.data,
        log=log,
    )
    _check_sizes(dataset, settings, global_batch)
    return dataset


def open_source(source: Source, settings: DataSettings, fractions: tuple[float, float]) -> Source:
    """The source with its format and the hashes of its files; UserError where its first record has no format."""
    if source.split == "retain":  # texts to join or prompts with references, whatever the training records are
        settings = DataSettings(data=source.spec, block_size=settings.block_size)
    first, split_by = next((record for _, record in source.records()), None), settings.split_by
    if first is None:
        raise UserError(f"{source.where(*source.files[:1])}: holds no record; expected at least one")
    if split_by is not None and split_by not in first:
        expected = f"expected one of {list_columns(tuple(first))}"
        raise UserError(f"--split-by {split_by}: {source.where()} has no such column; {expected}")
    record_format = choose_format(first, settings, source.where())
    max_records = settings.max_samples if source.split == "train" and settings.max_samples else -1
    source = replace(source, split_by=split_by, fractions=fractions, hashes=_hash_files(source))
    return replace(source, record_format=record_format, max_records=max_records)


def _hash_files(source: Source) -> tuple[str, ...]:
    hashes = []
    for file in source.files:
        source.heartbeat()
        try:
            hashes.append(store.sha256(file))
        except OSError as error:
            raise UserError(f"{source.where(file)}: cannot be read ({error.strerror})") from None
    return tuple(hashes)


def block_size_for(lengths: Sequence[int], objective: Objective | None, max_positions: int | None) -> int:
    """For rows of their own the least of BLOCK_SIZES that holds every sampled record; for joined texts the largest of
    which they fill MIN_BLOCKS. `lengths`: tokens of the records; as many as NUM_SAMPLED_RECORDS stand for more."""
    if objective == "completion":
        longest = max(lengths, default=0)
        size = next((size for size in BLOCK_SIZES if size >= longest), BLOCK_SIZES[-1])
    else:
        num_tokens = sum(lengths) if len(lengths) < NUM_SAMPLED_RECORDS else math.inf
        sizes = [size for size in BLOCK_SIZES if size <= MAX_JOINED_BLOCK and num_tokens >= MIN_BLOCKS * size]
        size = max(sizes, default=BLOCK_SIZES[0])
    return min(size, max_positions or size)


def check_records(settings: DataSettings, sources: list[Source]) -> tuple[dict[str, Any], dict[str, list[bool]]]:
    """The first reading, before anything is tokenised: (what run.json says of the records, {evaluation split: whether
    each of its records was seen before}); UserError for a mistake in any row."""
    seen = SeenRecords(settings.split_by, [*SPLITS, *name_val_sets(settings.val_data)])
    notices: list[str] = []
    for source in sources:
        num_records = num_blank = num_unseparated = 0
        for example in iter_examples(source):
            if example is None:
                num_blank += 1
                continue
            num_records += 1
            seen.add(example)
            if example.prompt and not (example.prompt[-1].isspace() or example.completion[:1].isspace()):
                num_unseparated += 1
        if not num_records:
            raise UserError(f"{source.where()}: holds blank lines only; expected at least one record")
        notices += source.notices
        notices += [f"{source.spec}: {num_blank} blank records are left out"] if num_blank else []
        if num_unseparated:
            problem = f"{num_unseparated} of {num_records} records have nothing between prompt and completion"
            notices.append(f"{source.spec}: {problem}; begin the completion with a blank, or end the prompt with one")
    seen.find(example for source in sources for example in iter_examples(source) if example is not None)
    num_seen = {split: sum(map(bool, reasons)) for split, reasons in seen.reasons.items()}
    for split, number in num_seen.items():
        if not number:
            continue
        num_records, name, is_val = len(seen.reasons[split]), name_records(split), split.startswith("val")
        problem = f"{number:,} of {num_records:,} {name} records are not new: {seen.describe(split)}"
        limit = ""
        if number > MAX_SHARED_FRACTION * num_records and (not is_val or seen.reasons["test"]):
            limit = f"at most {MAX_SHARED_FRACTION:.0%}: take them out, or name a column of groups by --split-by"
        elif is_val and number >= LEAKAGE_FRACTION * num_records and not settings.allow_leakage:
            limit = f"under {LEAKAGE_FRACTION:.0%}, or --allow-leakage"
        if limit:
            raise UserError(f"{name_split(settings, split)}: {problem}; expected {limit}")
        meaning = "means nothing" if number == num_records else "says little about new ones"
        is_many = number >= WARN_SHARED_FRACTION * num_records
        notices.append(f"warning: {problem}, so the {name} loss {meaning}" if is_many else problem)
    facts = {"num_seen": num_seen, "notices": notices}
    return facts, {split: [bool(reason) for reason in reasons] for split, reasons in seen.reasons.items()}


def write_rows(
    folder: Path,
    settings: DataSettings,
    sources: list[Source],
    tokenizer: Any,
    chat: ChatTemplate | None,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """The second reading: write the rows of all splits into `folder` and return what facts.json holds of them."""
    checked, is_seen = check_records(settings, sources)
    vocabulary = vocabulary_size(tokenizer)
    dtype = "<u2" if vocabulary <= 65_536 else "<u4"
    splits = list(dict.fromkeys([*SPLITS, *name_val_sets(settings.val_data)]))
    retained = [source.record_format.objectives[0] for source in sources if source.split == "retain"]
    objectives = {**dict.fromkeys(splits, settings.objective), "retain": retained[0] if retained else "blocks"}
    options = {"block_size": settings.block_size, "dtype": dtype, "tokenizer": tokenizer, "chat": chat}
    writers = {
        split: SplitWriter(
            folder, split, is_blocks=objectives[split] == "blocks", is_seen=is_seen.get(split, ()), **options
        )
        for split in splits
    }
    is_mixture = sum(source.split == "train" for source in sources) > 1
    try:
        for source in sources:
            is_joined = objectives[source.split] == "blocks"
            rows = _iter_rows(source, tokenizer, chat, is_joined, settings.block_size)
            log_time = time.monotonic() + LOG_SECONDS
            for number, (example, row) in enumerate(rows, start=1):
                writers[example.split].add(example, row)
                if time.monotonic() >= log_time:
                    log_time = time.monotonic() + LOG_SECONDS
                    log(f"tokenising {source.spec}: {number:,} records so far")
            if source.split == "train" and is_mixture:
                writers["train"].end_part(source.spec, source.share)
    finally:
        fingerprints = {split: writer.close() for split, writer in writers.items()}
    for source in sources:
        if _hash_files(source) != source.hashes:
            raise UserError(f"{source.where()}: a file changed while it was read; start again when it is complete")
    used = [split for split in splits if split in ("train", "val") or writers[split].counts["records"]]
    joined_fingerprints = " ".join(fingerprints[split] for split in used if split != "retain")
    notices = [line for writer in writers.values() for line in writer.notices(settings.unusable_records)]
    facts = {
        **checked,
        "source": settings.data,
        "mixture": writers["train"].parts,
        "form": sources[0].record_format.name,
        "form_meaning": sources[0].record_format.meaning,
        "example": writers["train"].example,
        "chat_template": chat.template if chat is not None else None,
        "fingerprint": hashlib.sha256(joined_fingerprints.encode()).hexdigest(),
        **{f"{split}_fingerprint": fingerprints[split] if split in used else None for split in SPLITS},
        "split": f"hash {settings.val_fraction:g}" if sources[0].fractions[0] else "given",
        "split_by": settings.split_by,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "vocabulary": vocabulary,
        "objective": settings.objective,
        "block_size": settings.block_size,
        "train": writers["train"].counts,
        "val_sets": [split.removeprefix("val-") for split in splits if split not in SPLITS],
        **{split: writers[split].counts | writers[split].write_row_info() for split in splits if split != "train"},
        "notices": [*notices, *checked["notices"]],
    }
    return {"dtype": dtype, "facts": facts, "val_texts": list(chain.from_iterable(writers["val"].texts.values()))}


def _iter_rows(
    source: Source, tokenizer: Any, chat: ChatTemplate | None, is_joined: bool, max_tokens: int
) -> Iterator[tuple[Example, Row | MaskError]]:
    """Each record and its tokens: a pair with its end, encoded apart unless `is_joined`: the boundary is exact."""
    batch: list[Example] = []
    num_characters = 0
    for example in iter_examples(source):
        if example is None:
            continue
        if example.conversation is not None and chat is not None:
            try:
                yield example, chat.encode(example.conversation, max_tokens)
            except MaskError as error:
                yield example, error
            continue
        batch.append(example)
        num_characters += len(example.prompt) + len(example.completion)
        if len(batch) >= BATCH_RECORDS or num_characters >= BATCH_CHARACTERS:
            yield from _encode_batch(batch, tokenizer, is_joined)
            batch, num_characters = [], 0
    yield from _encode_batch(batch, tokenizer, is_joined)


def _encode_batch(batch: list[Example], tokenizer: Any, is_joined: bool) -> Iterator[tuple[Example, Row]]:
    texts = [("", e.prompt + e.completion) if is_joined else (e.prompt, e.completion) for e in batch]
    encoded = iter(encode(tokenizer, [text for pair in texts for text in pair]))
    for example in batch:
        prompt_ids, completion_ids = next(encoded), next(encoded)
        ids = np.concatenate([prompt_ids, completion_ids, np.asarray([tokenizer.eos_token_id], dtype=np.uint32)])
        yield example, Row(ids, np.arange(len(ids)) >= len(prompt_ids), example.prompt, example.completion)


def name_split(settings: DataSettings, split: str) -> str:
    """The flag that names the records of a split, and its value; --data where they are taken from there."""
    return " ".join(name_others(settings).get(split, ("--data", settings.data)))


def _check_sizes(dataset: PreparedDataset, settings: DataSettings, global_batch: int) -> None:
    """UserError where a split that is asked for has no row, or training less than a global batch of them."""
    metadata, num_examples = dataset.metadata, dataset.metadata["train"]["examples"]
    for part in metadata["mixture"]:
        if not part["examples"] or part["share"] * num_examples < 1:  # each epoch anew
            share = f"{part['examples']:,} examples and weight make {part['share'] * num_examples:.2g} an epoch"
            raise UserError(f"--data {part['source']}: its {share}; expected at least 1, or leave it out")
    least = {"train": global_batch, **dict.fromkeys(name_val_sets(settings.val_data) or ["val"], 1)}
    least |= {"test": bool(settings.test_data or settings.test_fraction), "retain": bool(settings.retain_data)}
    for split, expected in least.items():
        counts = metadata[split]
        if counts["examples"] < expected:
            made = f"{counts['records']} {name_records(split)} records make {counts['examples']} examples"
            source = name_split(settings, split)
            remedy = "give more, or a smaller --block-size" + " or --global-batch" * (expected > 1)
            remedy += f", or a larger --{split}-fraction" * (split != "train" and source.startswith("--data "))
            needed = f"of {settings.block_size} tokens, and {expected:d} are needed"
            raise UserError(f"{source}: {made} {needed}; {remedy}")
