"""References: what was really said, and which result each of them means.

read_references  Parquet, CSV or JSONL: a key, the text, perhaps the language
matched          references to results: by key, or by the end of the path
"""

from __future__ import annotations

import csv
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from operators.stores import HTTP, protocol, reason, redact, unsigned
from pipeline.manifest import (
    CSV,
    EXTRA_CELLS,
    MANIFESTS,
    PARQUET,
    csv_rows,
    has_extra_cells,
    resolve,
    text_of,
    value_text,
)
from pipeline.source_list import opened
from pipeline.source_rows import listing_faults, path_in

# The most exact first: the first one that the references have is the key.
KEYS = ("asset_id", "source_id", "uri")
NAMED_AT_MOST = 5

Row = dict[str, Any]


class EvaluateError(Exception):
    """Nothing to compare as asked. The message names file and column and says what is allowed."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What was said in one asset."""

    key: str
    text: str
    language: str | None = None
    uri: str = ""  # key uri: as seen from the folder of the references


@dataclass(frozen=True)
class References:
    """Rows of one file, keyed by one of its columns."""

    name: str
    key: str
    rows: tuple[Reference, ...]
    without_text: int = 0


def read_references(
    uri: str, storage_options: Mapping[str, Any], key: str | None = None
) -> References:
    """The file's rows. An empty text means that nothing is said; a row without any is left out."""
    name = redact(uri)
    columns, rows = _read(uri, storage_options)
    chosen = key or next((one for one in KEYS if one in columns), None)
    for column, allowed in ((chosen, ", ".join(KEYS)), ("text", "text")):
        if column is None or column not in columns:
            raise EvaluateError(
                f"{name}: no column {column or 'that names the asset'}; needed: {allowed};"
                f" there are {', '.join(columns) or 'none'}"
            )
    known: dict[str, Reference] = {}
    without_text = 0
    for number, row in enumerate(rows, 1):
        value, text, language = (
            _cell(row, column, f"{name}: row {number}")
            for column in (str(chosen), "text", "language")
        )
        if value is None or not value.strip():
            raise EvaluateError(f"{name}: row {number}: column {chosen} is empty")
        if text is None:
            without_text += 1
            continue
        where = unsigned(resolve(value, uri)) if chosen == "uri" else ""
        reference = Reference(value, text, language, where)
        if known.setdefault(value, reference) != reference:
            raise EvaluateError(f"{name}: row {number}: {chosen} {value} comes twice and differs")
    if not known:
        raise EvaluateError(f"{name}: column text: no row has one")
    return References(name, str(chosen), tuple(known.values()), without_text)


def _read(uri: str, options: Mapping[str, Any]) -> tuple[list[str], list[Row]]:
    name = uri.lower().partition("?")[0]
    if not name.endswith(MANIFESTS):
        raise EvaluateError(f"{redact(uri)}: must end in one of {', '.join(MANIFESTS)}")
    try:
        with opened(uri, options) as file:
            if name.endswith(PARQUET):
                parquet = pq.ParquetFile(file)
                there = list(parquet.schema_arrow.names)
                wanted = [one for one in (*KEYS, "text", "language") if one in there]
                return there, parquet.read(columns=wanted).to_pylist()
            text = text_of(file, name)
            if name.endswith(CSV):
                reader = csv_rows(text)
                columns, cells = list(reader.fieldnames or ()), list(reader)
                for number, row in enumerate(cells, 1):
                    if has_extra_cells(row):
                        raise EvaluateError(f"{redact(uri)}: row {number}: {EXTRA_CELLS}")
                return columns, cells
            rows = [json.loads(line) for line in text if line.strip()]
    except (ValueError, csv.Error, pa.ArrowException, EOFError, zlib.error) as error:
        raise EvaluateError(f"{redact(uri)}: not a whole file of its kind: {error}") from error
    except listing_faults(uri) as error:
        raise EvaluateError(f"{redact(uri)}: cannot be read: {reason(error)}") from error
    if any(not isinstance(row, dict) for row in rows):
        raise EvaluateError(f"{redact(uri)}: every line must be an object with columns")
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def _cell(row: Row, column: str, where: str) -> str | None:
    value = row.get(column)
    if isinstance(value, dict | list):
        raise EvaluateError(
            f"{where}: column {column}: must be one text, and is a list or an object"
        )
    try:
        return value_text(value)
    except ValueError as error:
        raise EvaluateError(f"{where}: column {column}: {error}") from error


@dataclass(frozen=True)
class Matches:
    """Which row each reference means."""

    pairs: tuple[tuple[Reference, Row], ...]
    missing: tuple[str, ...]
    unreferenced: int
    by_name: int


def matched(references: References, rows: Iterable[Row]) -> Matches:
    """Rows have asset_id, uri, source_id. Only those that a reference may mean are held.

    Key uri: the same URI, else the file of the same name; of several, the one whose path ends most
    alike. EvaluateError where two are equally near.
    """
    exact = {alias: one for one in references.rows for alias in (one.key, one.uri) if alias}
    names: dict[str, list[Reference]] = defaultdict(list)
    if references.key == "uri":
        for one in references.rows:
            names[_path(one.key)[-1]].append(one)
    hits: dict[str, dict[str, Row]] = defaultdict(dict)
    alike: dict[str, dict[str, Row]] = defaultdict(dict)
    seen = 0
    for row in rows:
        seen += 1
        if reference := exact.get(row[references.key] or ""):
            hits[reference.key][row["asset_id"]] = row
        elif (name := _path(row["uri"])[-1]) in names:
            alike[name][row["asset_id"]] = row
    found = {key: list(many.values()) for key, many in hits.items()}
    for name, many in alike.items():
        left = [one for one in names[name] if one.key not in hits]
        for key, row in _nearest(left, list(many.values())):
            found.setdefault(key, []).append(row)
    if unclear := {key: many for key, many in found.items() if len(many) > 1}:
        told = "; ".join(
            f"{key}: {', '.join(row['uri'] for row in many[:NAMED_AT_MOST])}"
            for key, many in list(unclear.items())[:NAMED_AT_MOST]
        )
        raise EvaluateError(
            f"{references.name}: column {references.key}: {len(unclear)} values mean more than one"
            f" file, for example {told}. Give the full uri, the source_id or the asset_id"
        )
    return Matches(
        tuple((one, found[one.key][0]) for one in references.rows if one.key in found),
        tuple(one.key for one in references.rows if one.key not in found),
        seen - len(found),
        len(found) - len(hits),
    )


def _nearest(left: Sequence[Reference], rows: Sequence[Row]) -> Iterator[tuple[str, Row]]:
    """(key, row) of files of one name; a key twice is ambiguous."""
    claims: dict[str, list[tuple[int, Reference, Row]]] = defaultdict(list)
    for one in left:
        near = [(_common(_path(one.uri), _path(row["uri"])), row) for row in rows]
        most = max(common for common, _ in near)
        for common, row in near:
            if common == most:
                claims[row["asset_id"]].append((common, one, row))
    for many in claims.values():
        most = max(common for common, _, _ in many)
        best = [(one, row) for common, one, row in many if common == most]
        if len(best) > 1:
            asked = ", ".join(one.key for one, _ in best[:NAMED_AT_MOST])
            raise EvaluateError(
                f"{best[0][1]['uri']}: the references {asked} mean this file alike; give the full"
                " uri, the source_id or the asset_id"
            )
        yield best[0][0].key, best[0][1]


def _path(uri: str) -> list[str]:
    path = uri.partition("?")[0] if protocol(uri) in HTTP else path_in(uri)
    return [part for part in path.split("/") if part not in ("", ".")] or [path]


def _common(one: list[str], other: list[str]) -> int:
    """How many last parts are the same."""
    same = (mine == its for mine, its in zip(one[::-1], other[::-1], strict=False))
    return sum(1 for _ in takewhile(bool, same))
