"""Parquet parts: Arrow in, the bytes of one object and its entry in _SUCCESS out."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Part:
    """An object as _SUCCESS lists it."""

    name: str
    rows: int
    bytes: int
    sha256: str

    def json(self) -> dict[str, Any]:
        return asdict(self)


def parquet_bytes(table: pa.Table) -> bytes:
    """A Parquet file in memory; the store then writes it whole."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


def part(name: str, table: pa.Table, data: bytes) -> Part:
    return Part(name, table.num_rows, len(data), hashlib.sha256(data).hexdigest())
