"""What the tests of trainer/data share: a tokenizer trained here, and records that we made up."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EVENTS = [
    {
        "event_date": f"2022-01-{1 + i % 28:02d}",
        "event_type": "Protests" if i % 3 else "Battles",
        "sub_event_type": "Peaceful protest" if i % 3 else "Armed clash",
        "actor1": f"Protesters (Land {i % 5})",
        "inter1": "6",
        "location": f"Town {i}",
        "fatalities": str(i % 4),
        "notes": f'On {1 + i % 28} January 2022, people, "many", met in Town {i}. {i % 4} died.',
    }
    for i in range(60)
]


PAIRS = [{"mr": f"name[{i}], area[a, b]", "ref": f'It is "{i}".'} for i in range(40)]
NO_TEMPLATES = {"prompt": None, "completion": None}
EVENT_TEXTS = [" ".join(event.values()) for event in EVENTS]


def make_tokenizer(
    folder: Path,
    texts: Sequence[str] = EVENT_TEXTS,
    *,
    vocab_size: int = 400,
    special_tokens: Sequence[str] = ("<|endoftext|>",),
    template: str | None = None,
) -> Path:
    """A byte-level BPE of GPT-2's kind with a few hundred entries; its end-of-text token is also its padding."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe, end = ByteLevelBPETokenizer(), "<|endoftext|>"
    bpe.train_from_iterator(texts, vocab_size, special_tokens=list(special_tokens), show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=end, pad_token=end)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def write_csv(path: Path, records: Sequence[dict[str, Any]], delimiter: str = ",") -> Path:
    """The records with a header, quoted where they must be."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(records)
    return path


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_parquet(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    """The records with the types that Arrow finds in them."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    return path


def read_records(path: Path) -> list[Any]:
    """The records of a file or folder, as `--data` reads them."""
    from trainer.data import sources

    return [record for _, _, record in sources.records(sources.find(str(path)))]
