"""A Parquet file whose columns have names that are no text."""

from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from tasks.ingestion.errors import DataError
from tasks.ingestion.sources.columnar import WHOLE, read_parquet


def test_a_name_that_is_not_utf8_is_told_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"qöx": ["a"], "output": ["b"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace("qöx".encode(), b"q\xf6ox"))
    with pytest.raises(DataError, match=r"rows\.parquet: not a readable Parquet file .*write it again"):
        list(read_parquet(path, WHOLE))
