"""From `--data` to rows on disk: find, check everything, tokenise once, split, pack, keep."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.config.schema import DataSettings
from trainer.data import cache as store
from trainer.data import formats, sources
from trainer.data.preprocess import DataInput, LogFn, Preprocessor
from trainer.data.row_info import RowInfo, read_row_info
from trainer.data.token_dataset import TokenDataset
from trainer.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from trainer.data.validate_files import scan

#: Settings that decide which rows there are, beside the sources and the tokenizer.
KEY_SETTINGS = ("test_fraction", "split_by", "prompt", "completion", "objective", "block_size")


@dataclass(frozen=True, eq=False)
class PreparedDataset:
    """Data ready to train on. metadata: the `data` block of run.json; val_texts: the first validation records as
    (prompt, completion); pad_id: any id will do, since padding is masked by position; test: without a row where there
    is no test split."""

    train: TokenDataset
    val: TokenDataset
    metadata: dict[str, Any]
    val_texts: tuple[tuple[str, str], ...]
    pad_id: int
    folder: Path
    test: TokenDataset = field(default_factory=TokenDataset.empty)

    def row_info(self, split: str) -> RowInfo:
        """Who the rows of "val" or "test" are; read from the folder. ValueError where that is not whole."""
        return read_row_info(self.folder, split)

    def num_target_bytes(self, split: str) -> int:
        """UTF-8 bytes of the targets of "val" or "test", 0 where the text is not known."""
        return int(self.metadata[split].get("target_bytes", 0))


def prepare(
    settings: DataSettings, *, model: str, global_batch: int, cache: Path | None = None, log: LogFn = lambda line: None
) -> PreparedDataset:
    """The rows of `settings`, from the cache or made now. One process per node calls it; the others `load`.

    UserError for whatever the user can mend, before anything slow; also where there are fewer training examples
    than one global batch, or no validation example.
    """
    cache_root = store.resolve_cache_dir(cache)
    inputs = [_find_input(settings.data, "--data", settings)]
    for flag, spec in (("--val-data", settings.val_data), ("--test-data", settings.test_data)):
        if spec is not None:
            inputs.append(_find_input(spec, flag, settings))
            if len({data_input.record_format.name == "input_ids" for data_input in inputs}) > 1:
                raise UserError(
                    f"{flag}: one of --data and {flag} holds token ids and the other text; give both in one form"
                )
    tokenizer = None if inputs[0].record_format.name == "input_ids" else load_tokenizer(model)
    for data_input in inputs:
        data_input.file_fingerprints = scan(data_input.source, cache_root)
    key = {
        "sources": [_content_key(data_input) for data_input in inputs],
        "tokenizer": tokenizer_fingerprint(tokenizer) if tokenizer is not None else None,
        "flags": [data_input.source.flag for data_input in inputs],
        "val_fraction": settings.val_fraction if settings.val_data is None else None,
        **{name: getattr(settings, name) for name in KEY_SETTINGS},
    }
    dataset_folder = cache_root / "prepared" / store.cache_key(key)
    try:
        dataset = load(dataset_folder, source=settings.data)
    except ValueError:
        preprocessor = Preprocessor(settings, inputs, tokenizer, key["tokenizer"], log, cache_root)
        store.build(dataset_folder, preprocessor.write_dataset)
        dataset = load(dataset_folder, source=settings.data)
    _check_sizes(dataset, settings, global_batch)
    return dataset


def load(folder: Path, *, source: str | None = None) -> PreparedDataset:
    """What `prepare` left in `folder`, mapped, not read; ValueError where it is not whole.

    `source`: what the user typed this time; equal contents under another name share a folder.
    """
    manifest, datasets = store.read(folder)
    metadata = {**manifest["facts"], **({"source": source} if source is not None else {})}
    texts = tuple((prompt, completion) for prompt, completion in manifest["val_texts"])
    return PreparedDataset(**datasets, metadata=metadata, val_texts=texts, pad_id=manifest["pad_id"], folder=folder)


def _find_input(spec: str, flag: str, settings: DataSettings) -> DataInput:
    source = sources.find(spec, flag)
    where, columns = f"{flag} {spec}", sources.columns(source)
    if settings.split_by is not None and settings.split_by not in columns:
        raise UserError(
            f"--split-by {settings.split_by}: {where} has no such column; expected one of {', '.join(columns)}"
        )
    return DataInput(source, formats.choose_format(columns, settings, where))


def _content_key(data_input: DataInput) -> list[Any]:
    """What stands for the contents of a source in the key; names and places of files do not."""
    if data_input.source.kind == "demo":
        digest = hashlib.sha256()
        for _, _, record in sources.records(data_input.source):
            digest.update(json.dumps(record, sort_keys=True).encode())
        return ["demo", digest.hexdigest()]
    hashes = [fingerprint.sha256 for fingerprint in data_input.file_fingerprints]
    return [data_input.source.kind, data_input.record_format.name, hashes or data_input.source.dataset._fingerprint]


def _check_sizes(dataset: PreparedDataset, settings: DataSettings, global_batch: int) -> None:
    unit = f"blocks of {settings.block_size} tokens" if settings.objective == "blocks" else "examples"
    train, val = dataset.metadata["train"], dataset.metadata["val"]
    hint = ", lower --block-size" if settings.objective == "blocks" else ""
    if train["examples"] < global_batch:
        raise UserError(
            f"--data {settings.data}: {train['records']} training records make {train['examples']} {unit}, fewer than "
            f"one global batch of {global_batch}; lower --global-batch{hint}, or give more data"
        )
    if (settings.test_data is not None or settings.test_fraction) and dataset.metadata["test"]["examples"] == 0:
        spec = settings.test_data if settings.test_data is not None else settings.data
        raise UserError(
            f"{'--test-data' if settings.test_data is not None else '--data'} {spec}: "
            f"{dataset.metadata['test']['records']} test records make 0 {unit}; give more of them{hint}"
        )
    if val["examples"] == 0:
        remedy = "give more of it" if settings.val_data is not None else "raise --val-fraction, give --val-data"
        raise UserError(
            f"{'--val-data ' + settings.val_data if settings.val_data is not None else '--data ' + settings.data}: "
            f"{val['records']} validation records make 0 {unit}; {remedy}{hint or ', or raise --block-size'}"
        )
