"""A query's rows in tables of bounded size."""

from __future__ import annotations

import duckdb
import pyarrow as pa
import pytest

from pipeline import parts
from pipeline.parts import batches, tables


def of(query: str, most_rows: int) -> list[pa.Table]:
    return list(tables(batches(duckdb.connect().sql(query)), most_rows))


def test_a_table_ends_with_its_rows() -> None:
    made = of("SELECT range AS n FROM range(1000) ORDER BY n", 512)
    assert [table.num_rows for table in made] == [512, 488]
    assert pa.concat_tables(made)["n"].to_pylist() == list(range(1000))
    assert of("SELECT 1 AS n WHERE false", 512) == []


def test_a_table_ends_with_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 1 << 20)
    made = of("SELECT repeat('x', 10000) AS text FROM range(1000)", 65_536)
    assert [table.num_rows for table in made] == [256, 256, 256, 232]


def test_rows_of_many_gigabytes_are_read() -> None:
    """65536 rows of 40 kB are more than one batch of text may hold."""
    query = duckdb.connect().sql("SELECT repeat('x', 40000) AS text FROM range(65536)")
    made = tables(batches(query), 65_536)
    rows, most = 0, 0
    for table in made:
        rows, most = rows + table.num_rows, max(most, table.nbytes)
    assert rows == 65_536
    assert most < parts.PART_BYTES + parts.ROWS_A_BATCH * 40_100
