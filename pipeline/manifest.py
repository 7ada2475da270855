"""Manifests: a Parquet, CSV or JSONL file (text also as .gz) that names files, read as a stream.

Every row of it is an asset, whatever its type and whether or not the file exists: the fetch gives a
missing one its code. Values become strings; CSV cells are strings from the start, so an id of 007
stays 007.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from operators.stores import HTTP, LOCAL, SCHEME, filesystem, local_path, protocol, redact
from pipeline.config import InputConfig
from pipeline.source_list import entries, opened, stat_asset
from pipeline.source_rows import (
    Asset,
    Skipped,
    SourceError,
    listing_faults,
    normalise,
    refusal,
)

PARQUET = (".parquet", ".pq")
CSV = (".csv", ".csv.gz")
JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
MANIFESTS = (*PARQUET, *CSV, *JSON_LINES)
STAT_THREADS = 32
STAT_AT_ONCE = 256
PARQUET_ROWS = 1024
# A day of speech is about 150,000 words; csv's own limit is 131,072 characters.
MAX_TEXT_CHARS = 1 << 28
EXTRA_CELLS = (
    "more cells than the first line has columns; a value with a comma must stand in quotes"
)

Row = Mapping[str, object]


def manifest_assets(config: InputConfig, skipped: Skipped) -> Iterator[Asset]:
    """The manifest's rows in order. SourceError where it cannot be read or lacks a column."""
    assets = _assets(config, skipped)
    if not config.stat or config.version_column is not None:
        yield from assets
        return
    with ThreadPoolExecutor(STAT_THREADS, thread_name_prefix="stat") as pool:
        while some := list(itertools.islice(assets, STAT_AT_ONCE)):
            yield from pool.map(lambda asset: stat_asset(asset, config.storage_options), some)


def _assets(config: InputConfig, skipped: Skipped) -> Iterator[Asset]:
    for uri in _files(config):
        manifest = redact(uri)
        for place, row in _rows(uri, config):
            where = f"{manifest}: {place}"
            named = _cell(row, config.uri_column, where)
            if named is None or not named.strip():
                skipped.add("no uri in manifest row")
                continue
            if "\0" in named:
                message = f"{where}: {config.uri_column}: holds a NUL character, which no name may"
                raise SourceError(message)
            variables = None
            if config.variable_columns:
                values = {name: _cell(row, name, where) for name in config.variable_columns}
                given = {name: value for name, value in values.items() if value is not None}
                variables = json.dumps(given, sort_keys=True, ensure_ascii=False)
            yield Asset(
                fetch_uri=resolve(named, uri),
                version=_cell(row, config.version_column, where) or "",
                source_id=_cell(row, config.id_column, where),
                variables=variables,
            )


def _cell(row: Row, column: str | None, where: str) -> str | None:
    """The row's value of `column` as text; None without one, or where the job names no column."""
    try:
        return None if column is None else value_text(row.get(column))
    except ValueError as error:
        raise SourceError(f"{where}: {column}: {error}") from error


def resolve(named: str, manifest: str) -> str:
    """The URI that a row means: relative ones start from the manifest's folder."""
    if SCHEME.match(named):
        return normalise(named)
    if protocol(manifest) in HTTP:
        if named.startswith("/"):
            return "/".join(manifest.split("/")[:3]) + named
        manifest = manifest.partition("?")[0]
    if named.startswith("/"):
        return normalise(named)
    if protocol(manifest) in LOCAL:
        return normalise(f"{local_path(manifest).rpartition('/')[0]}/{named}")
    # Not urljoin and not normpath: they would take a // out of a key.
    folder = manifest.rpartition("/")[0]
    while named.startswith(("./", "../")):
        if named.startswith("../"):
            folder = folder.rpartition("/")[0]
        named = named.partition("/")[2]
    return f"{normalise(folder)}/{named}"


def text_of(file: IO[bytes], name: str) -> io.TextIOWrapper:
    """The lines of a CSV or JSONL file, unpacked where its name ends in .gz."""
    plain = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
    # utf-8-sig: spreadsheets put a mark before the first column's name
    return io.TextIOWrapper(plain, encoding="utf-8-sig", newline="")


def csv_rows(text: io.TextIOWrapper) -> csv.DictReader[str]:
    """Rows by column. The limit of a cell is one for the whole process."""
    csv.field_size_limit(MAX_TEXT_CHARS)
    return csv.DictReader(text, strict=True)


def _files(config: InputConfig) -> Iterator[str]:
    """The manifest, or the Parquet files of a folder (only where kind says it is a manifest)."""
    uri = config.uri
    folder = uri.endswith("/")
    if config.kind == "manifest" and not folder:
        try:
            store, path = filesystem(uri, config.storage_options)
            folder = protocol(uri) not in HTTP and bool(store.isdir(path))
        except listing_faults(uri) as error:
            raise refusal(uri, error) from error
    if not folder:
        if not uri.lower().partition("?")[0].endswith(MANIFESTS):
            known = ", ".join(MANIFESTS)
            raise SourceError(f"{redact(uri)}: a manifest must end in one of {known}")
        yield uri
        return
    found = False
    for entry in entries(uri, config.storage_options, Skipped(), lambda _: False):
        if entry.name.endswith(PARQUET) and not entry.name.rpartition("/")[2].startswith(
            ("_", ".")
        ):
            found = True
            yield entry.asset.fetch_uri
    if not found:
        raise SourceError(f"{redact(uri)}: a folder given as manifest must hold .parquet files")


def _rows(uri: str, config: InputConfig) -> Iterator[tuple[str, Row]]:
    """Each row with its place, for messages."""
    name = uri.lower().partition("?")[0]
    try:
        with opened(uri, config.storage_options) as file:
            if name.endswith(PARQUET):
                yield from _parquet(file, uri, config)
                return
            text = text_of(file, name)
            yield from (_csv if name.endswith(CSV) else _json_lines)(text, uri, config)
    except UnicodeDecodeError as error:
        raise SourceError(f"{redact(uri)}: the manifest is not UTF-8 text") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"{redact(uri)}: the manifest is damaged gzip: {error}") from error
    except ValueError as error:  # fsspec's way to say it
        message = (
            f"{redact(uri)}: the server knows no ranges; copy the manifest to a store or a disk"
        )
        raise SourceError(message) from error
    except listing_faults(uri) as error:
        raise refusal(uri, error) from error


def _parquet(file: Any, uri: str, config: InputConfig) -> Iterator[tuple[str, Row]]:  # noqa: ANN401
    try:
        parquet = pq.ParquetFile(file)
        wanted = _check(parquet.schema_arrow.names, uri, config)
        count = itertools.count(1)
        for batch in parquet.iter_batches(batch_size=PARQUET_ROWS, columns=wanted):
            yield from ((f"row {next(count)}", row) for row in batch.to_pylist())
    except (ValueError, pa.ArrowException) as error:
        raise SourceError(f"{redact(uri)}: not a whole Parquet file: {error}") from error


def _csv(text: io.TextIOWrapper, uri: str, config: InputConfig) -> Iterator[tuple[str, Row]]:
    reader = csv_rows(text)
    try:
        _check(reader.fieldnames or (), uri, config)
        for row in reader:
            if has_extra_cells(row):
                raise SourceError(f"{redact(uri)}: line {reader.line_num}: {EXTRA_CELLS}")
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise SourceError(f"{redact(uri)}: line {reader.line_num}: not CSV: {error}") from error


def _json_lines(text: io.TextIOWrapper, uri: str, config: InputConfig) -> Iterator[tuple[str, Row]]:
    checked = False
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SourceError(f"{redact(uri)}: line {number}: not JSON: {error.msg}") from error
        except (ValueError, RecursionError) as error:
            message = (
                f"{redact(uri)}: line {number}: a number too long or lists too deep to be read"
            )
            raise SourceError(message) from error
        if not isinstance(row, dict):
            raise SourceError(f"{redact(uri)}: line {number}: must be an object with columns")
        if not checked:
            _check(row, uri, config)
            checked = True
        yield f"line {number}", row


def _check(columns: Iterable[str], uri: str, config: InputConfig) -> list[str]:
    """The columns that the job names; SourceError for one that is not there."""
    there = list(columns)
    fields = {
        "uri_column": config.uri_column,
        "id_column": config.id_column,
        "version_column": config.version_column,
        **{
            f"variable_columns[{place}]": name for place, name in enumerate(config.variable_columns)
        },
    }
    for field, name in fields.items():
        if name is not None and name not in there:
            raise SourceError(
                f"{redact(uri)}: input.{field}: no column {name!r}; there are {', '.join(there)}"
            )
    return list(dict.fromkeys(name for name in fields.values() if name is not None))


def has_extra_cells(row: Mapping[str | None, Any]) -> bool:
    """Whether a line of CSV has EXTRA_CELLS: a value, cut at a comma, may mean something else."""
    return any(row.get(None) or ())


def value_text(value: object) -> str | None:
    """A cell of any column as text; None where it has none.

    Raises ValueError where the text holds what is no character.
    """
    if value is None or value != value:  # NaN is how pandas writes a missing value
        return None
    if isinstance(value, bool | dict | list):
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    elif isinstance(value, bytes):
        text = value.decode("utf-8", "replace")
    else:
        text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a pair, which only JSON's escapes can write
        message = f"holds {error.object[error.start]!a}, which is no character"
        raise ValueError(message) from error
    return text
