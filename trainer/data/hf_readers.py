"""The door to `datasets` and to Arrow's own files: saved data sets, Parquet and Arrow, zstd streams."""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from trainer.config.errors import UserError, first_line


def import_datasets() -> Any:
    """`datasets`, without its progress bars and log lines: we say what there is to say."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def load_saved_dataset(folder: Path, flag: str) -> Mapping[str, Any]:
    """{split: data set} of such a folder, "" for one without splits; UserError where it is not whole."""
    try:
        loaded = import_datasets().load_from_disk(str(folder))
    except IndexError:
        raise UserError(f"{flag} {folder}: a saved data set, or a split of it, is empty; expected records") from None
    except Exception as error:  # damaged files raise many kinds, from several packages
        raise UserError(f"{flag} {folder}: not a whole saved data set ({first_line(error)}); save it again") from None
    splits: Mapping[str, Any] = loaded if isinstance(loaded, dict) else {"": loaded}
    for name in (cache_file["filename"] for dataset in splits.values() for cache_file in dataset.cache_files):
        if not Path(os.path.abspath(name)).is_relative_to(os.path.abspath(folder)):
            raise UserError(f"{flag} {folder}: its state.json names {name}, outside of the folder; save it again")
    return splits


def open_zstd(file: Path) -> BinaryIO:
    """The decompressed bytes of a .zst file."""
    import pyarrow

    return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd")))


def arrow_columns(file: Path, kind: str, where: str) -> tuple[str, ...]:
    """The columns of a Parquet or Arrow file; UserError, naming `where`, where it is not whole or has no row."""
    try:
        if kind == "Parquet":
            parquet_file = _open_parquet(file)
            names, has_rows = parquet_file.schema_arrow.names, bool(parquet_file.metadata.num_rows)
        else:
            with _open_arrow(file) as reader:
                names = reader.schema.names
            has_rows = any(table.num_rows for table in iter_arrow(file, kind, names, 1))
    except (ValueError, OSError) as error:
        raise UserError(f"{where}: not a whole {kind} file ({first_line(error)}); write it again") from None
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{where}: has column {duplicates[0]!r} twice; rename one")
    if not has_rows:
        raise UserError(f"{where}: has columns but no row; expected at least one record")
    return tuple(names)


def iter_arrow(file: Path, kind: str, names: Sequence[str], batch_size: int) -> Iterator[Any]:
    """The record batches of a Parquet or Arrow file, of at most `batch_size` rows."""
    if kind == "Parquet":
        yield from _open_parquet(file).iter_batches(batch_size=batch_size, columns=list(names))
        return
    with _open_arrow(file) as reader:
        is_stream = hasattr(reader, "read_next_batch")
        for batch in reader if is_stream else map(reader.get_batch, range(reader.num_record_batches)):
            for start in range(0, batch.num_rows, batch_size):
                yield batch.select(list(names)).slice(start, batch_size)


def _open_parquet(file: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file)


@contextmanager
def _open_arrow(file: Path) -> Iterator[Any]:
    """A stream, which `datasets` writes, or Arrow's file format, which Feather is."""
    import pyarrow.ipc

    with open(file, "rb") as stream:
        is_file_format = stream.read(6) == b"ARROW1"
    if is_file_format:
        with pyarrow.ipc.open_file(str(file)) as reader:
            yield reader
    else:
        with open(file, "rb") as stream, pyarrow.ipc.open_stream(stream) as reader:
            yield reader
