"""From `--data` to rows on disk: find, check everything, tokenise once, split, pack, keep."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.config.schema import DataSettings
from trainer.data import cache as store
from trainer.data import formats, sources
from trainer.data.preprocess import DataInput, LogFn, Preprocessor
from trainer.data.token_dataset import TokenDataset
from trainer.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from trainer.data.validate_files import scan


@dataclass(frozen=True, eq=False)
class PreparedDataset:
    """Data ready to train on. metadata: the `data` block of run.json; val_texts: the first validation records as
    (prompt, completion); pad_id: any id will do, since padding is masked by position."""

    train: TokenDataset
    val: TokenDataset
    metadata: dict[str, Any]
    val_texts: tuple[tuple[str, str], ...]
    pad_id: int
    folder: Path


def prepare(
    settings: DataSettings, *, model: str, global_batch: int, cache: Path | None = None, log: LogFn = lambda line: None
) -> PreparedDataset:
    """The rows of `settings`, from the cache or made now. One process per node calls it; the others `load`.

    UserError for whatever the user can mend, before anything slow; also where there are fewer training examples
    than one global batch, or no validation example.
    """
    cache_root = store.resolve_cache_dir(cache)
    inputs = [_find_input(settings.data, "--data", settings)]
    if settings.val_data is not None:
        inputs.append(_find_input(settings.val_data, "--val-data", settings))
    if len({data_input.record_format.name == "input_ids" for data_input in inputs}) > 1:
        raise UserError(
            "--val-data: one of --data and --val-data holds token ids and the other text; give both in one form"
        )
    tokenizer = None if inputs[0].record_format.name == "input_ids" else load_tokenizer(model)
    for data_input in inputs:
        data_input.file_fingerprints = scan(data_input.source, cache_root)
    key = {
        "sources": [_content_key(data_input) for data_input in inputs],
        "tokenizer": tokenizer_fingerprint(tokenizer) if tokenizer is not None else None,
        "val_fraction": settings.val_fraction if len(inputs) == 1 else None,
        **{name: getattr(settings, name) for name in ("prompt", "completion", "objective", "block_size")},
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
    manifest, train, val = store.read(folder)
    metadata = {**manifest["facts"], **({"source": source} if source is not None else {})}
    texts = tuple((prompt, completion) for prompt, completion in manifest["val_texts"])
    return PreparedDataset(
        train=train, val=val, metadata=metadata, val_texts=texts, pad_id=manifest["pad_id"], folder=folder
    )


def _find_input(spec: str, flag: str, settings: DataSettings) -> DataInput:
    source = sources.find(spec, flag)
    where = f"{flag} {spec}"
    return DataInput(source, formats.choose_format(sources.columns(source), settings, where))


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
    if val["examples"] == 0:
        remedy = "give more of it" if settings.val_data is not None else "raise --val-fraction, give --val-data"
        raise UserError(
            f"{'--val-data ' + settings.val_data if settings.val_data is not None else '--data ' + settings.data}: "
            f"{val['records']} validation records make 0 {unit}; {remedy}{hint or ', or raise --block-size'}"
        )
