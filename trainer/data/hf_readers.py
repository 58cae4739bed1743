"""The door to `datasets`, which reads every format but a JSON list, and the data sets of the hub.

Files are streamed through it rather than copied into Arrow files first: that keeps memory flat (a mapped file
counts as memory used) and leaves no second copy of the data on the disk.
"""

import glob
from pathlib import Path
from typing import Any


def import_datasets() -> Any:
    """`datasets`, without its progress bars and log lines: we say what there is to say."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def stream_file(file: Path, builder: str, cache: Path | None, **options: Any) -> Any:
    """A stream over one local file; only lock files are left in the cache."""
    cache_dir = str(cache / "datasets") if cache else None
    # the name is taken for a pattern, so its own brackets and stars must be escaped
    files = [glob.escape(str(file.absolute()))]
    return import_datasets().load_dataset(
        builder, data_files=files, split="train", streaming=True, cache_dir=cache_dir, **options
    )


def stream_csv(file: Path, names: list[str], delimiter: str, cache: Path | None) -> Any:
    """Every cell as text, also `NA` (Namibia) and numbers: what is written is what is read."""
    datasets = import_datasets()
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return stream_file(
        file, "csv", cache, sep=delimiter, column_names=names, header=0, features=features, index_col=False,
        keep_default_na=False, encoding="utf-8-sig",
    )  # fmt: skip
