"""Dataframes in folders of Parquet files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import daft
import pyarrow as pa
import pyarrow.parquet as pq

# Small row groups let a scan go side by side and keep little of the texts in memory. Daft ends a group only between the
# rows that it hands on together, which by itself would be 131,072.
SIZES = {"parquet_target_filesize": 64 << 20, "parquet_target_row_group_size": 8 << 20, "default_morsel_size": 2048}
ROWS = 4096  # of a row group that Daft does not write


def write(documents: daft.DataFrame, folder: Path, compression: str = "none", **options: Any) -> None:
    """Write a dataframe to a folder that is not there yet, or to folders in it by `partition_cols`.

    What a worker has begun that died is removed: Daft has another one write it again, and does not list it.
    """
    with daft.execution_config_ctx(**SIZES):
        written = documents.write_parquet(str(folder), compression=compression, **options)
    whole = {Path(path) for path in written.to_pydict()["path"]}
    for path in folder.rglob("*.parquet"):
        if path not in whole:
            path.unlink()


def read(paths: Sequence[Path], columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of Parquet files, all in memory."""
    names = None if columns is None else list(columns)
    return pa.concat_tables([pq.read_table(path, columns=names) for path in paths])


def replace(folder: Path, rows: pa.Table, compression: str) -> None:
    """Have a folder hold these rows in the place of those that it has."""
    for path in files(folder):
        path.unlink()
    pq.write_table(rows, folder / "rows.parquet", row_group_size=ROWS, compression=compression)


def files(folder: Path) -> list[Path]:
    """The Parquet files of a folder, in the order of their names."""
    return sorted(folder.glob("*.parquet"))


def scan(paths: Sequence[Path]) -> daft.DataFrame:
    """The rows of Parquet files; lazy."""
    return daft.read_parquet([str(path) for path in paths])
