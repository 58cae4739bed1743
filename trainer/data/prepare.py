"""From `--data` to rows on disk: find the records, check all of them, then tokenise, split, pack and keep."""

import hashlib
import json
import math
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.choices import MAX_SHARED_FRACTION, Objective
from trainer.config.errors import UserError
from trainer.config.settings import DataSettings
from trainer.data import cache as store
from trainer.data import sources
from trainer.data.chat import ChatTemplate, MaskError, load_template
from trainer.data.dataset import SPLITS, PreparedDataset, Row, RowInfo, SplitWriter, load
from trainer.data.formats import DataInput, Example, choose_format, content_hash
from trainer.data.sources import Source
from trainer.data.templates import list_columns
from trainer.data.tokenizer import (
    count_target_bytes,
    encode,
    load_tokenizer,
    mark_targets,
    tokenizer_fingerprint,
)

LogFn = Callable[[str], None]
#: Settings that decide which rows there are, beside the sources, the tokenizer and what follows from them.
KEY_SETTINGS = ("objective", "split_by", "prompt", "completion", "block_size", "unusable_records")
CHAT_FORMATS = ("messages", "conversations", "prompt-completion")  # the last may hold messages or text
SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test", "retain": "retained"}
BATCH_RECORDS, BATCH_CHARACTERS = 1000, 2**19  # what is tokenised at a time
LOG_INTERVAL_SECONDS = 5.0
NUM_SAMPLED_RECORDS = 4096  # the first ones, whose lengths decide a block size that is left to the data
BLOCK_SIZES = (128, 256, 512, 1024, 2048)  #: longer rows want a decision, and the memory
MAX_JOINED_BLOCK, MIN_BLOCKS = 1024, 100  # tokens of a block of joined texts, and how many the texts should fill


def prepare(
    settings: DataSettings,
    *,
    model: str,
    global_batch: int,
    max_positions: int | None = None,
    cache: Path | None = None,
    log: LogFn = lambda line: None,
) -> PreparedDataset:
    """The rows of `settings`, from the cache or made now. One process per node calls it; the others `load`.

    UserError for a mistake of the user's, before anything slow; also where there are fewer training examples
    than one global batch, or no validation example. `max_positions` bounds a block size that is left to the data;
    the one that was taken stands in `metadata`.
    """
    cache_root = store.resolve_cache_dir(cache)
    split_sources = sources.find_sources(settings.data, settings.val_data, settings.test_data, settings.retain_data)
    has_val = any(source.split == "val" for source in split_sources)
    fractions = (0.0 if has_val else settings.val_fraction, settings.test_fraction)
    inputs = [_open_input(source, settings, fractions) for source in split_sources]
    _refuse_mixed_formats(inputs)
    settings = replace(settings, objective=settings.objective or inputs[0].record_format.objectives[0])
    tokenizer = None if inputs[0].record_format.name == "input_ids" else load_tokenizer(model)
    chat = _find_chat_template(settings, inputs, tokenizer, model)
    for data_input in inputs:
        data_input.fingerprints = store.fingerprint_files(data_input.source, cache_root)
    try:
        if not settings.block_size:
            lengths = list(islice(_iter_lengths(inputs[0], tokenizer, chat), NUM_SAMPLED_RECORDS))
            settings = replace(settings, block_size=block_size_for(lengths, settings.objective, max_positions))
        key = {  # contents and settings: names and places of files do not decide which rows there are
            "version": store.FORMAT_VERSION,
            "sources": [
                (
                    data_input.source.split,
                    data_input.source.kind,
                    data_input.record_format.name,
                    [fingerprint.sha256 for fingerprint in data_input.fingerprints],
                    getattr(data_input.source.dataset, "_fingerprint", None),
                    data_input.source.notices,
                )
                for data_input in inputs
            ],
            "tokenizer": tokenizer_fingerprint(tokenizer) if tokenizer is not None else None,
            "fractions": fractions,
            "chat_template": chat.template if chat is not None else None,
            **{name: getattr(settings, name) for name in KEY_SETTINGS},
        }
        dataset = store.load_or_build(
            cache_root / "prepared" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32],
            cache_root,
            lambda folder: load(folder, source=settings.data),
            lambda folder: write_rows(folder, settings, inputs, tokenizer, chat, log),
            log,
        )
    except UserError as error:
        changes = (store.find_change(data_input.source, data_input.fingerprints) for data_input in inputs)
        raise next(filter(None, changes), error) from None  # a file that changed is the cause
    _check_sizes(dataset, settings, global_batch)
    return dataset


# --- what is there ---


def _open_input(source: Source, settings: DataSettings, fractions: tuple[float, float]) -> DataInput:
    where, columns = f"{source.flag} {source.spec}", sources.columns(source)
    if source.split == "retain":  # plain text, whatever the training records are
        settings = replace(
            settings, prompt=None, completion=None, format=None, split_by=None, objective="blocks", packing=False
        )
    if settings.split_by is not None and settings.split_by not in columns:
        raise UserError(
            f"--split-by {settings.split_by}: {where} has no such column; expected one of {list_columns(columns)}"
        )
    record_format = choose_format(columns, settings, where)
    for file in source.files[1:] if source.dataset is None else ():
        columns = sources.columns(source, file)
        if not set(record_format.needs) <= set(columns):
            raise UserError(
                f"{source.flag} {file}: another format than {source.files[0].name}, whose records are "
                f"{record_format.name} (columns: {list_columns(columns)}); give files of one format"
            )
    return DataInput(source=source, record_format=record_format, split_by=settings.split_by, fractions=fractions)


def _refuse_mixed_formats(inputs: list[DataInput]) -> None:
    """The loss of one format says nothing of another; what is retained is plain text, whatever is trained on."""
    first = inputs[0]
    for other in inputs[1:]:
        names = {first.record_format.name, other.record_format.name}
        is_apart = "input_ids" in names if other.source.split == "retain" else not names <= set(CHAT_FORMATS)
        if len(names) > 1 and is_apart:
            where = " and ".join(f"{i.source.flag} {i.source.spec} ({i.source.split})" for i in (first, other))
            raise UserError(
                f"{where}: one holds {first.record_format.name}, the other {other.record_format.name}; give both in "
                "one format"
            )


def _find_chat_template(
    settings: DataSettings, inputs: list[DataInput], tokenizer: Any, model: str
) -> ChatTemplate | None:
    """The chat template, None where no record can be a conversation."""
    inputs = [data_input for data_input in inputs if data_input.source.split != "retain"]
    names = {data_input.record_format.name for data_input in inputs}
    is_chat = bool(names & set(CHAT_FORMATS))
    if "prompt-completion" in names and settings.chat_template is None:
        values = (record.get("completion") for i in inputs for _, _, record in sources.records(i.source))
        is_chat = isinstance(next(values, None), list)
    if not is_chat and settings.chat_template is None:
        return None
    template = load_template(tokenizer, settings.chat_template, model)  # refused where it cannot be read, though unused
    return ChatTemplate(tokenizer, template) if is_chat else None


# --- the block size that the lengths of the records ask for, where none is given ---


def block_size_for(lengths: Sequence[int], objective: Objective | None, max_positions: int | None) -> int:
    """For rows of their own the least of BLOCK_SIZES that holds every sampled record; for joined texts
    MAX_JOINED_BLOCK, or less where the texts would fill fewer than MIN_BLOCKS of them. Never more than the model's
    positions. `lengths`: tokens of the sampled records; as many as NUM_SAMPLED_RECORDS stand for more."""
    if objective == "completion":
        longest = max(lengths, default=0)
        size = next((size for size in BLOCK_SIZES if size >= longest), BLOCK_SIZES[-1])
    else:
        num_tokens = sum(lengths) if len(lengths) < NUM_SAMPLED_RECORDS else math.inf
        sizes = [size for size in BLOCK_SIZES if size <= MAX_JOINED_BLOCK and num_tokens >= MIN_BLOCKS * size]
        size = max(sizes, default=BLOCK_SIZES[0])
    return min(size, max_positions or size)


def _iter_lengths(data_input: DataInput, tokenizer: Any, chat: ChatTemplate | None) -> Iterator[int]:
    """Tokens of each record, with the end of its text; conversations that cannot be trained on are left out."""
    for batch in _iter_batches(data_input):
        yield from (len(example.ids) for example in batch if example.ids is not None)
        if tokenizer is not None:
            rows = (row for _, row in _encode_rows(batch, tokenizer, chat))
            yield from (len(row.ids) for row in rows if isinstance(row, Row))


# --- the first reading: every record is checked before one is tokenised ---


def check_records(settings: DataSettings, inputs: list[DataInput]) -> tuple[dict[str, int], set[int], int]:
    """Render and count every record, so that a mistake in the last row is found before the first one is tokenised.

    Returns ({split: its records that equal a training record}, their hashes, training records that equal another).
    """
    hashes = {split: array("Q") for split in (*SPLITS, "joined train")}
    for data_input in inputs:
        for example in data_input.examples():
            if example is None:
                data_input.num_blank += 1
                continue
            split = data_input.split_of(example)
            data_input.count(example, split)
            hashes[split].append(content_hash(example.content("" if split == "retain" else "\0")))
            if split == "train" and settings.retain_data is not None:  # a text that is a pair's, joined
                hashes["joined train"].append(content_hash(example.content("")))
        where, has_chat = f"{data_input.source.flag} {data_input.source.spec}", data_input.num_conversations > 0
        if not data_input.num_records:
            raise UserError(f"{where}: holds blank lines only; expected at least one record")
        if data_input.source.split == "retain" and has_chat:
            raise UserError(f"{where}: holds conversations; expected text")
        if data_input.source.split != "retain" and has_chat != (inputs[0].num_conversations > 0):
            raise UserError(f"{where}: one of the splits holds conversations and another text; expected one")
    if inputs[0].num_conversations and settings.objective == "blocks":
        raise UserError(
            "--objective blocks: conversations are trained on turn by turn; expected --objective completion"
        )
    _refuse_empty_splits(settings, inputs[0], hashes)
    num_shared, shared_hashes = {}, set()
    for split in ("val", "test", "retain"):
        is_shared = np.isin(hashes[split], hashes["joined train" if split == "retain" else "train"])
        num_shared[split], num_records = int(is_shared.sum()), len(hashes[split])
        shared_hashes |= set(np.asarray(hashes[split])[is_shared].tolist())
        if (len(hashes["test"]) or split == "retain") and num_shared[split] > MAX_SHARED_FRACTION * num_records:
            remedy = "take them out"
            if split != "retain":
                remedy = f"or a test says nothing of new records: {remedy}, or split by a column that they share"
            raise UserError(
                f"--data {settings.data}: {num_shared[split]} of {num_records} {SPLIT_NAMES[split]} records also stand "
                f"in the training data; expected at most {MAX_SHARED_FRACTION:.0%}, {remedy}"
                + (" (--split-by)" if split != "retain" else "")
            )
    return num_shared, shared_hashes, len(hashes["train"]) - len(np.unique(hashes["train"]))


def _refuse_empty_splits(settings: DataSettings, train_input: DataInput, hashes: Mapping[str, Sequence[int]]) -> None:
    """What is certain before tokenising: an empty split, for records; more is known when they are packed."""
    fractions = dict(zip(("val", "test"), train_input.fractions, strict=True))
    split_off = [split for split, fraction in fractions.items() if fraction]
    empty_split = next((split for split in ("train", *split_off) if not train_input.split_sizes[split]), None)
    if not split_off or empty_split is None:
        return
    number = train_input.num_records
    if number > 1 and len({record for split in ("train", *split_off) for record in hashes[split]}) == 1:
        raise UserError(
            f"--data {settings.data}: all {number} records are equal, so none can be split off; give others"
        )
    flag, remedy = (split_off[0], "lower") if empty_split == "train" else (empty_split, "raise")
    name = {"train": "training", "val": "validation", "test": "the test"}[empty_split]
    raise UserError(
        f"--data {settings.data}: the split by hash leaves 0 of {number} records for {name} at "
        f"--{flag}-fraction {fractions[flag]:g}; {remedy} --{flag}-fraction or give --{flag}-data"
    )


# --- the second reading: tokenise and write ---


def write_rows(
    folder: Path,
    settings: DataSettings,
    inputs: list[DataInput],
    tokenizer: Any,
    chat: ChatTemplate | None,
    log: LogFn,
) -> dict[str, Any]:
    """Write the rows of all splits into `folder` and return what facts.json holds of them."""
    num_shared, shared_hashes, num_repeated = check_records(settings, inputs)
    if not inputs[0].num_conversations:
        chat = None
    vocabulary = len(tokenizer) if tokenizer is not None else 1 + max(i.max_token_id for i in inputs)
    dtype = "<u2" if vocabulary <= 65_536 else "<u4"
    writers = {}
    for split in SPLITS:
        has_rows = settings.objective == "completion" and split != "retain"
        writers[split] = SplitWriter(
            folder,
            split,
            is_blocks=not has_rows,
            block_size=settings.block_size,
            dtype=dtype,
            has_mask=has_rows and chat is not None,
        )
    try:
        for data_input in inputs:
            for batch in _iter_batches(data_input, log):
                if settings.objective == "blocks" or data_input.source.split == "retain":
                    _write_texts(data_input, batch, writers, tokenizer)
                else:
                    _write_rows(data_input, batch, writers, shared_hashes, tokenizer, chat)
    finally:
        fingerprints = {split: writer.close() for split, writer in writers.items()}
    for data_input in inputs:
        if change := store.find_change(data_input.source, data_input.fingerprints):
            raise change
    used_splits = [split for split in SPLITS if split in ("train", "val") or writers[split].counts["records"]]
    row_infos = {split: _write_row_info(writers, split, tokenizer) for split in SPLITS if split != "train"}
    notices = [line for writer in writers.values() for line in writer.notices(settings.unusable_records)]
    notices += [line for data_input in inputs for line in data_input.notices()]
    notices += [
        f"{number} of {writers[split].counts['records']} {SPLIT_NAMES[split]} records also stand in the training data"
        for split, number in num_shared.items()
        if number
    ]
    trained_on = " ".join(fingerprints[split] for split in used_splits if split != "retain")
    facts = {
        "source": settings.data,
        "form": inputs[0].record_format.name,
        "form_meaning": inputs[0].record_format.meaning,
        "example": writers["train"].example,
        "chat_template": chat.template if chat is not None else None,
        "fingerprint": hashlib.sha256(trained_on.encode()).hexdigest(),
        **{f"{split}_fingerprint": fingerprints[split] if split in used_splits else None for split in SPLITS},
        "split": f"hash {settings.val_fraction:g}" if inputs[0].fractions[0] else "given",
        "split_by": settings.split_by,
        "equal_to_train": num_shared,
        "repeated_in_train": num_repeated,
        "tokenizer": tokenizer_fingerprint(tokenizer) if tokenizer is not None else None,
        "vocabulary": vocabulary,
        "objective": settings.objective,
        "block_size": settings.block_size,
        "train": writers["train"].counts,
        **{split: writers[split].counts | info for split, info in row_infos.items()},
        "notices": notices,
    }
    pad_id = tokenizer.eos_token_id if tokenizer is not None else 0
    return {"dtype": dtype, "pad_id": pad_id, "facts": facts, "val_texts": writers["val"].texts}


def _iter_batches(data_input: DataInput, log: LogFn = lambda line: None) -> Iterator[list[Example]]:
    batch: list[Example] = []
    num_tokenized, num_characters, last_log_seconds = 0, 0, time.monotonic()
    for example in data_input.examples():
        if example is None:
            continue
        batch.append(example)
        num_tokenized += 1
        num_characters += len(example.prompt) + len(example.completion) + 4 * len(example.ids or ())
        if len(batch) >= BATCH_RECORDS or num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
            if time.monotonic() - last_log_seconds > LOG_INTERVAL_SECONDS:
                last_log_seconds = time.monotonic()
                log(f"tokenising {data_input.source.spec}: {num_tokenized:,} of {data_input.num_records:,} records")
    if batch:
        yield batch


def _encode_rows(
    batch: list[Example], tokenizer: Any, chat: ChatTemplate | None
) -> Iterator[tuple[Example, Row | MaskError]]:
    """Each text or conversation as tokens; prompt and completion are encoded apart, so that the boundary is exact."""
    texts = [example for example in batch if example.ids is None and example.conversation is None]
    prompts = encode(tokenizer, [example.prompt for example in texts])
    completions = encode(tokenizer, [example.completion for example in texts])
    for example, prompt_ids, completion_ids in zip(texts, prompts, completions, strict=True):
        ids = np.concatenate([prompt_ids, completion_ids, np.asarray([tokenizer.eos_token_id], dtype=np.uint32)])
        yield example, Row(ids, np.arange(len(ids)) >= len(prompt_ids), example.prompt, example.completion)
    for example in batch:
        if example.conversation is not None and chat is not None:
            try:
                yield example, chat.encode(example.conversation)
            except MaskError as error:
                yield example, error


def _write_texts(data_input: DataInput, batch: list[Example], writers: dict[str, SplitWriter], tokenizer: Any) -> None:
    """All texts joined, each with its end; ids that came as ids have it already."""
    if batch[0].ids is not None:
        texts = [np.asarray(example.ids, dtype=np.uint32) for example in batch]
    else:
        encoded = encode(tokenizer, [example.prompt + example.completion for example in batch])
        texts = [np.append(ids, np.uint32(tokenizer.eos_token_id)) for ids in encoded]
    splits = [data_input.split_of(example) for example in batch]
    for split in dict.fromkeys(splits):
        split_texts = [ids for ids, text_split in zip(texts, splits, strict=True) if text_split == split]
        writers[split].add_texts(split_texts)
        if tokenizer is not None and not writers[split].example:
            writers[split].example = mark_targets(tokenizer, split_texts[0], np.arange(len(split_texts[0])) > 0)
    for example, split in zip(batch, splits, strict=True):
        if example.ids is None:
            writers[split].keep_text(example.prompt, example.completion)


def _write_rows(
    data_input: DataInput,
    batch: list[Example],
    writers: dict[str, SplitWriter],
    shared_hashes: set[int],
    tokenizer: Any,
    chat: ChatTemplate | None,
) -> None:
    """One record a row. A text that is longer than a block is left out, a conversation is cut; what cannot be trained
    on is counted."""
    has_tools = chat is not None and "tools" in chat.template
    for example, row in _encode_rows(batch, tokenizer, chat):
        writer = writers[data_input.split_of(example)]
        if isinstance(row, MaskError):
            writer.add_problem("unusable", f"{example.where}: {row}")
            continue
        num_tokens, size = len(row.ids), writer.block_size
        ids, is_target = row.ids[:size], row.is_target[:size]
        if chat is not None and not is_target[1:].any():
            problem = f"its assistant turns lie beyond --block-size {size} ({num_tokens} tokens)"
            writer.add_problem("unusable", f"{example.where}: {problem}")
            continue
        writer.counts["records"] += 1
        writer.keep_text(row.prompt, row.completion)
        if num_tokens > size:
            writer.add_problem("cut" if chat is not None else "too long", f"{example.where}, {num_tokens} tokens")
            if chat is None:
                continue
        if example.conversation is not None and example.conversation.tools and not has_tools:
            writer.add_problem("tools", example.where)
        writer.add_row(ids, is_target)
        record_hash = content_hash(example.content())
        group = None if example.group is None else f"{content_hash(example.group):016x}"
        writer.row_ids.append((f"{record_hash:016x}", group, record_hash in shared_hashes))
        writer.example = writer.example or mark_targets(tokenizer, ids, is_target)


def _write_row_info(writers: dict[str, SplitWriter], split: str, tokenizer: Any) -> dict[str, int]:
    """Write who the rows of a split are, read back from what was just written; returns the sums of it."""
    writer, dataset = writers[split], writers[split].read_back()
    rows = writer.row_ids
    if writer.is_blocks:  # no single record: a hash of their token ids

        def block_ids(dataset: Any) -> Iterator[str]:
            return (f"{content_hash(dataset.row(i).astype('<u4').tobytes()):016x}" for i in range(len(dataset)))

        is_like_train = writers["train"].is_blocks and len(dataset)
        train_ids = set(block_ids(writers["train"].read_back())) if is_like_train else set()
        rows = [(row_id, None, row_id in train_ids) for row_id in block_ids(dataset)]
    info = RowInfo(
        ids=[row_id for row_id, _, _ in rows],
        groups=[group for _, group, _ in rows],
        targets=dataset.num_target_tokens().tolist(),
        num_bytes=count_target_bytes(tokenizer, dataset),
        in_train=[is_shared for _, _, is_shared in rows],
    )
    info.write(writer.folder, split)
    units = {group or row_id for row_id, group, is_shared in rows if not is_shared}  # which an interval can tell apart
    return {"target_bytes": sum(info.num_bytes), "units": len(units)}


def _check_sizes(dataset: PreparedDataset, settings: DataSettings, global_batch: int) -> None:
    is_blocks = settings.objective == "blocks"
    unit, hint = (f"blocks of {settings.block_size} tokens", ", lower --block-size") if is_blocks else ("examples", "")
    train = dataset.metadata["train"]
    if train["examples"] < global_batch:
        raise UserError(
            f"--data {settings.data}: {train['records']} training records make {train['examples']} {unit}, fewer than "
            f"one global batch of {global_batch}; lower --global-batch{hint}, or give more data"
        )
    more_val = "give more of it" if settings.val_data is not None else "raise --val-fraction, give --val-data"
    for split, name, spec, remedy in (
        ("test", "test ", settings.test_data, f"give more of them{hint}"),
        ("retain", "", settings.retain_data, "give more of them, or lower --block-size"),
        ("val", "validation ", settings.val_data, more_val + (hint or ", or raise --block-size")),
    ):
        is_expected = split == "val" or spec is not None or (split == "test" and settings.test_fraction)
        if is_expected and dataset.metadata[split]["examples"] == 0:
            source = f"--{split}-data {spec}" if spec is not None else f"--data {settings.data}"
            rows = f"blocks of {settings.block_size} tokens" if split == "retain" else unit
            raise UserError(f"{source}: {dataset.metadata[split]['records']} {name}records make 0 {rows}; {remedy}")
