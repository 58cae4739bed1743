"""From `--data` to rows on disk: find, check everything, tokenise once, split, pack, keep."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.config.choices import Objective
from trainer.config.errors import UserError
from trainer.config.schema import DataSettings
from trainer.data import cache as store
from trainer.data import readers, sources
from trainer.data.block_size import choose_block_size
from trainer.data.chat import load_template
from trainer.data.examples import DataInput
from trainer.data.formats import choose_format
from trainer.data.preprocess import LogFn, Preprocessor
from trainer.data.row_info import RowInfo, read_row_info
from trainer.data.sources import Source
from trainer.data.templates import list_columns
from trainer.data.token_dataset import TokenDataset
from trainer.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from trainer.data.validate_files import scan

#: Settings that decide which rows there are, beside the sources, the tokenizer and what follows from them.
KEY_SETTINGS = ("test_fraction", "split_by", "prompt", "completion", "block_size", "unusable_records")
CHAT_FORMATS = ("messages", "conversations", "prompt-completion")  # the last may hold messages or text


@dataclass(frozen=True, eq=False)
class PreparedDataset:
    """Data ready to train on. metadata: the `data` block of run.json; val_texts: the first validation records as
    (prompt, completion); pad_id: any id will do, since padding is masked by position; test, retain: without a row where
    there is no such split."""

    train: TokenDataset
    val: TokenDataset
    metadata: dict[str, Any]
    val_texts: tuple[tuple[str, str], ...]
    pad_id: int
    folder: Path
    test: TokenDataset = field(default_factory=TokenDataset.empty)
    retain: TokenDataset = field(default_factory=TokenDataset.empty)

    def row_info(self, split: str) -> RowInfo:
        """Who the rows of a split other than "train" are; read from the folder. ValueError where that is not whole."""
        return read_row_info(self.folder, split)

    def num_target_bytes(self, split: str) -> int:
        """UTF-8 bytes of the targets of a split other than "train", 0 where the text is not known."""
        return int(self.metadata[split].get("target_bytes", 0))


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

    UserError for whatever the user can mend, before anything slow; also where there are fewer training examples
    than one global batch, or no validation example. `max_positions` bounds a block size that is left to the data;
    the one that was taken stands in `metadata`.

    Parameters: the settings, two of the model, the batch, and where and how to work.
    """
    cache_root = store.resolve_cache_dir(cache)
    split_sources = sources.find_sources(settings.data, settings.val_data, settings.test_data, settings.retain_data)
    inputs = [_find_input(source, settings) for source in split_sources]
    _refuse_mixed_formats(inputs)
    objective = settings.objective or inputs[0].record_format.objectives[0]
    tokenizer = None if inputs[0].record_format.name == "input_ids" else load_tokenizer(model)
    chat_template = _find_chat_template(settings, inputs, tokenizer, model)
    for data_input in inputs:
        data_input.file_fingerprints = scan(data_input.source, cache_root)
    if not settings.block_size:
        block_size = choose_block_size(inputs[0], objective, tokenizer, chat_template, max_positions)
        settings = replace(settings, block_size=block_size)
    folder = cache_root / "prepared" / _cache_key(settings, objective, inputs, tokenizer, chat_template)
    if not _is_whole(folder, cache_root, log):
        preprocessor = Preprocessor(settings, objective, inputs, tokenizer, chat_template, log)
        store.build(folder, preprocessor.write_dataset)
    dataset = load(folder, source=settings.data)
    _check_sizes(dataset, settings, objective, global_batch)
    return dataset


def load(folder: Path, *, source: str | None = None) -> PreparedDataset:
    """What `prepare` left in `folder`, mapped, not read; ValueError where it is not whole.

    `source`: what the user typed this time; equal contents under another name share a folder.
    """
    manifest, datasets = store.read(folder)
    metadata = {**manifest.facts, **({"source": source} if source is not None else {})}
    texts = tuple(manifest.val_texts)
    return PreparedDataset(**datasets, metadata=metadata, val_texts=texts, pad_id=manifest.pad_id, folder=folder)


def _is_whole(folder: Path, cache_root: Path, log: LogFn) -> bool:
    """Whether the folder holds what was written into it; one line where it is there and does not."""
    try:
        store.verify(folder, cache_root)
    except ValueError as error:
        if folder.exists():
            log(f"prepared data are damaged and are made anew ({error})")
        return False
    return True


def _find_input(source: Source, settings: DataSettings) -> DataInput:
    where, columns = f"{source.flag} {source.spec}", readers.columns(source)
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
        columns = readers.file_columns(source, file)
        if not set(record_format.needs) <= set(columns):
            raise UserError(
                f"{source.flag} {file}: another format than {source.files[0].name}, whose records are "
                f"{record_format.name} (columns: {list_columns(columns)}); give files of one format"
            )
    return DataInput(source, record_format)


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


def _find_chat_template(settings: DataSettings, inputs: list[DataInput], tokenizer: Any, model: str) -> str | None:
    """The chat template, None where no record can be a conversation."""
    inputs = [data_input for data_input in inputs if data_input.source.split != "retain"]
    names = {data_input.record_format.name for data_input in inputs}
    if "prompt-completion" in names and settings.chat_template is None:
        values = (
            record.get("completion") for data_input in inputs for _, _, record in readers.records(data_input.source)
        )
        if not isinstance(next(values, None), list):
            return None
    return load_template(tokenizer, settings.chat_template, model) if names & set(CHAT_FORMATS) else None


def _cache_key(
    settings: DataSettings, objective: Objective, inputs: list[DataInput], tokenizer: Any, chat_template: str | None
) -> str:
    has_val = any(data_input.source.split == "val" for data_input in inputs)
    return store.cache_key(
        {
            "sources": [_content_key(data_input) for data_input in inputs],
            "tokenizer": tokenizer_fingerprint(tokenizer) if tokenizer is not None else None,
            "splits": [data_input.source.split for data_input in inputs],
            "val_fraction": None if has_val else settings.val_fraction,
            "objective": objective,
            "chat_template": chat_template,
            **{name: getattr(settings, name) for name in KEY_SETTINGS},
        }
    )


def _content_key(data_input: DataInput) -> list[Any]:
    """What stands for the contents of a source in the key; names and places of files do not."""
    source = data_input.source
    hashes = [fingerprint.sha256 for fingerprint in data_input.file_fingerprints]
    fingerprint = source.dataset._fingerprint if source.dataset is not None else None
    return [source.kind, data_input.record_format.name, hashes or fingerprint, fingerprint, list(source.notices)]


def _check_sizes(dataset: PreparedDataset, settings: DataSettings, objective: Objective, global_batch: int) -> None:
    is_blocks = objective == "blocks"
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
        is_wanted = split == "val" or spec is not None or (split == "test" and settings.test_fraction)
        if is_wanted and dataset.metadata[split]["examples"] == 0:
            source = f"--{split}-data {spec}" if spec is not None else f"--data {settings.data}"
            rows = f"blocks of {settings.block_size} tokens" if split == "retain" else unit
            raise UserError(f"{source}: {dataset.metadata[split]['records']} {name}records make 0 {rows}; {remedy}")
