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
from trainer.data.preprocess import Input, Maker, Say
from trainer.data.token_dataset import Rows
from trainer.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from trainer.data.validate_files import scan


@dataclass(frozen=True, eq=False)
class Prepared:
    """Data ready to train on. facts: the `data` block of run.json; val_texts: the first validation records as
    (prompt, completion); pad_id: any id will do, since padding is masked by position."""

    train: Rows
    val: Rows
    facts: dict[str, Any]
    val_texts: tuple[tuple[str, str], ...]
    pad_id: int
    folder: Path


def prepare(
    settings: DataSettings, *, model: str, global_batch: int, cache: Path | None = None, say: Say = lambda line: None
) -> Prepared:
    """The rows of `settings`, from the cache or made now. One process per node calls it; the others `load`.

    UserError for whatever the user can mend, before anything slow; also where there are fewer training examples
    than one global batch, or no validation example.
    """
    folder = store.root(cache)
    inputs = [_input(settings.data, "--data", settings)]
    if settings.val_data is not None:
        inputs.append(_input(settings.val_data, "--val-data", settings))
    if len({one.form.name == "input_ids" for one in inputs}) > 1:
        raise UserError(
            "--val-data: one of --data and --val-data holds token ids and the other text; give both in one form"
        )
    tokenizer = None if inputs[0].form.name == "input_ids" else load_tokenizer(model)
    for one in inputs:
        one.files = scan(one.source, folder)
    key = {
        "sources": [_contents(one) for one in inputs],
        "tokenizer": tokenizer_fingerprint(tokenizer) if tokenizer is not None else None,
        "val_fraction": settings.val_fraction if len(inputs) == 1 else None,
        **{name: getattr(settings, name) for name in ("prompt", "completion", "objective", "block_size")},
    }
    place = folder / "prepared" / store.key_of(key)
    try:
        prepared = load(place, source=settings.data)
    except ValueError:
        maker = Maker(settings, inputs, tokenizer, key["tokenizer"], say, folder)
        store.build(place, maker.fill)
        prepared = load(place, source=settings.data)
    _enough(prepared, settings, global_batch)
    return prepared


def load(folder: Path, *, source: str | None = None) -> Prepared:
    """What `prepare` left in `folder`, mapped, not read; ValueError where it is not whole.

    `source`: what the user typed this time; equal contents under another name share a folder.
    """
    stored, train, val = store.read(folder)
    facts = {**stored["facts"], **({"source": source} if source is not None else {})}
    texts = tuple((prompt, completion) for prompt, completion in stored["val_texts"])
    return Prepared(train=train, val=val, facts=facts, val_texts=texts, pad_id=stored["pad_id"], folder=folder)


def _input(typed: str, flag: str, settings: DataSettings) -> Input:
    source = sources.find(typed, flag)
    where = f"{flag} {typed}"
    return Input(source, formats.choose_form(sources.columns(source), settings, where))


def _contents(one: Input) -> list[Any]:
    """What stands for the contents of a source in the key; names and places of files do not."""
    if one.source.kind == "demo":
        digest = hashlib.sha256()
        for _, _, record in sources.records(one.source):
            digest.update(json.dumps(record, sort_keys=True).encode())
        return ["demo", digest.hexdigest()]
    hashes = [facts.sha256 for facts in one.files]
    return [one.source.kind, one.form.name, hashes or one.source.dataset._fingerprint]


def _enough(prepared: Prepared, settings: DataSettings, global_batch: int) -> None:
    unit = f"blocks of {settings.block_size} tokens" if settings.objective == "blocks" else "examples"
    train, val = prepared.facts["train"], prepared.facts["val"]
    shorter = ", lower --block-size" if settings.objective == "blocks" else ""
    if train["examples"] < global_batch:
        raise UserError(
            f"--data {settings.data}: {train['records']} training records make {train['examples']} {unit}, fewer than "
            f"one global batch of {global_batch}; lower --global-batch{shorter}, or give more data"
        )
    if val["examples"] == 0:
        remedy = "give more of it" if settings.val_data is not None else "raise --val-fraction, give --val-data"
        raise UserError(
            f"{'--val-data ' + settings.val_data if settings.val_data is not None else '--data ' + settings.data}: "
            f"{val['records']} validation records make 0 {unit}; {remedy}{shorter or ', or raise --block-size'}"
        )
