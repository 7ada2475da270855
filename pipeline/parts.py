"""Parquet parts: rows in tables of bounded size, a table's bytes, and its entry in _SUCCESS."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

# Of results, and of a ledger that is folded.
ROWS_A_PART = 65_536
# A part ends here, or with its number of rows: a recording of hours has 100 kB of text and times.
PART_BYTES = 64 << 20
# A batch of DuckDB's must not hold more than 2 GiB of text.
ROWS_A_BATCH = 256


@dataclass(frozen=True)
class Part:
    """An object as _SUCCESS lists it."""

    name: str
    rows: int
    bytes: int
    sha256: str


def batches(query: duckdb.DuckDBPyRelation) -> Iterator[pa.RecordBatch]:
    """The rows of a query in their order, in batches of ROWS_A_BATCH."""
    yield from query.to_arrow_reader(ROWS_A_BATCH)


def tables(batches: Iterable[pa.RecordBatch], most_rows: int) -> Iterator[pa.Table]:
    """Batches put together, each table with `most_rows`, or just over PART_BYTES, or the rest."""
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        held.append(batch)
        rows += batch.num_rows
        size += batch.nbytes
        if rows >= most_rows or size >= PART_BYTES:
            yield pa.Table.from_batches(held)
            held, rows, size = [], 0, 0
    if held:
        yield pa.Table.from_batches(held)


def parquet_bytes(table: pa.Table) -> bytes:
    """A Parquet file in memory; the store then writes it whole."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


def part(name: str, table: pa.Table, data: bytes) -> Part:
    return Part(name, table.num_rows, len(data), hashlib.sha256(data).hexdigest())
