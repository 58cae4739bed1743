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


def write_records(path: Path, records: Sequence[Any]) -> Path:
    """The records in the format of the file's ending; text and bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(records, str | bytes):
        path.write_bytes(records if isinstance(records, bytes) else records.encode())
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def find_source(spec: Any, flag: str = "--data") -> Any:
    """The source that one flag names by itself."""
    from trainer.data import sources

    return sources.choose_split(sources.find_splits(str(spec), flag), str(spec), flag)


def read_records(spec: Any) -> list[Any]:
    """The records of a file or folder, as `--data` reads them."""
    return [record for _, record in find_source(spec).records()]
