"""Manifests: every row is an asset, whatever the file's form and the row's faults."""

from __future__ import annotations

import gzip
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from listing import listed, refused

from operators.fetch import Fetch, FetchError, Ref
from operators.settings import FetchSettings
from pipeline.config import InputConfig
from pipeline.source import Source

ROWS = [
    {"uri": "a b.jpg", "id": "007", "topic": "Ärzte", "v": "1"},
    {"uri": "sub/../b.jpg", "id": "8", "topic": "", "v": "2"},
]


def as_csv(rows):
    lines = [",".join(rows[0]), *[",".join(f'"{cell}"' for cell in row.values()) for row in rows]]
    return ("\ufeff" + "\r\n".join(lines)).encode()


def as_lines(rows):
    return "\n\n".join(json.dumps(row) for row in rows).encode()


def as_parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


FORMS = {
    "list.csv": as_csv,
    "list.csv.gz": lambda rows: gzip.compress(as_csv(rows)),
    "list.jsonl": as_lines,
    "list.ndjson.gz": lambda rows: gzip.compress(as_lines(rows)),
    "list.parquet": as_parquet,
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(FORMS[name](ROWS))
    rows, skipped = listed(
        tmp_path / name, id_column="id", variable_columns=("topic", "id"), version_column="v"
    )
    assert [row["uri"] for row in rows] == [f"{tmp_path}/a b.jpg", f"{tmp_path}/b.jpg"]
    assert [row["source_id"] for row in rows] == ["007", "8"]
    assert [row["version"] for row in rows] == ["1", "2"]
    assert rows[0]["variables"] == '{"id": "007", "topic": "Ärzte"}'
    assert rows[1]["variables"] == '{"id": "8", "topic": ""}'
    assert len({row["asset_id"] for row in rows}) == 2
    assert skipped == {}


@pytest.mark.parametrize("name", FORMS)
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path, name):
    (tmp_path / name).write_bytes(FORMS[name](ROWS))
    message = refused(tmp_path / name, uri_column="url")
    assert "input.uri_column: no column 'url'; there are uri, id, topic, v" in message
    assert "input.id_column" in refused(tmp_path / name, id_column="nr")
    assert "input.variable_columns[1]" in refused(tmp_path / name, variable_columns=("id", "x"))


def test_a_row_without_uri_is_counted_and_values_become_strings(tmp_path):
    rows = [
        {"uri": None, "id": 1, "x": True},
        {"uri": " ", "id": 2, "x": 1.5},
        {"uri": "a.jpg", "id": 3, "x": None},
        {"uri": "b.jpg", "id": None, "x": [1, "ä"]},
    ]
    (tmp_path / "list.jsonl").write_bytes(as_lines(rows))
    found, skipped = listed(tmp_path / "list.jsonl", id_column="id", variable_columns=("x",))
    assert [row["source_id"] for row in found] == ["3", None]
    assert [row["variables"] for row in found] == ["{}", '{"x": "[1, \\"ä\\"]"}']
    assert skipped == {"no uri in manifest row": 2}


def test_the_same_file_under_two_ids_is_two_assets(tmp_path):
    (tmp_path / "list.csv").write_text("uri,id\na.jpg,1\na.jpg,2\na.jpg,1\n")
    rows, _ = listed(tmp_path / "list.csv", id_column="id")
    assert len(rows) == 3
    assert len({row["asset_id"] for row in rows}) == 2


def test_versions_come_from_the_store_and_missing_files_keep_their_rows(tmp_path, s3):
    bucket = s3.bucket()
    s3.put(f"{bucket}/x//y#?.jpg", b"123")
    (tmp_path / "a.jpg").write_bytes(b"12")
    uris = [f"{bucket}/x//y#?.jpg", "a.jpg", "no.jpg", f"{bucket}/no.jpg", "foo://x/y", "s3://no/y"]
    (tmp_path / "list.jsonl").write_bytes(as_lines([{"uri": uri} for uri in uris]))
    rows, _ = listed(tmp_path / "list.jsonl", storage_options=s3.options)
    assert [row["size_bytes"] for row in rows] == [3, 2, None, None, None, None]
    assert [row["version"] for row in rows[2:]] == ["missing", "missing", "", "missing"]
    assert all(row["version"] for row in rows[:2])
    get = Fetch(FetchSettings(), s3.options)
    assert get(Ref(rows[0]["fetch_uri"])).data == b"123"
    for row in rows[2:]:
        with pytest.raises(FetchError):
            get(Ref(row["fetch_uri"]))
    rows, _ = listed(tmp_path / "list.jsonl", storage_options=s3.options, stat=False)
    assert [row["version"] for row in rows] == [""] * 6


def test_a_scheme_that_is_no_store_costs_its_row_only(tmp_path):
    uris = [f"{scheme}://x/y.jpg" for scheme in ("data", "dir", "tar", "zip")]
    (tmp_path / "list.jsonl").write_bytes(as_lines([{"uri": uri} for uri in uris]))
    rows, _ = listed(tmp_path / "list.jsonl")
    assert [(row["uri"], row["version"]) for row in rows] == [(uri, "") for uri in uris]


def test_a_store_that_fails_while_versions_are_asked_stops_the_listing(tmp_path, s3):
    (tmp_path / "list.csv").write_text("uri\ns3://bucket/a.jpg\n")
    options = {**s3.options, "config_kwargs": {"retries": {"total_max_attempts": 1}}}
    s3.fault = lambda *asked: (500, "InternalError")
    assert "s3://bucket/a.jpg" in refused(tmp_path / "list.csv", storage_options=options)


def test_order_is_kept_over_many_rows(tmp_path):
    names = [f"{place}.jpg" for place in range(700)]
    (tmp_path / "list.csv").write_text("uri\n" + "\n".join(names))
    rows, _ = listed(tmp_path / "list.csv")
    assert [row["uri"] for row in rows] == [f"{tmp_path}/{name}" for name in names]


def test_relative_uris_start_from_the_manifests_folder(s3, web):
    bucket = s3.bucket()
    lines = as_lines(
        [{"uri": uri} for uri in ("a.jpg", "../b//c.jpg", "./d.jpg", "http://h/e.jpg")]
    )
    s3.put(f"{bucket}/lists/one/m.jsonl", lines)
    rows, _ = listed(f"{bucket}/lists/one/m.jsonl", storage_options=s3.options, stat=False)
    assert [row["uri"] for row in rows] == [
        f"{bucket}/lists/one/a.jpg",
        f"{bucket}/lists/b//c.jpg",
        f"{bucket}/lists/one/d.jpg",
        "http://h/e.jpg",
    ]

    def route(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(lines)

    web.routes["/lists/m.jsonl"] = route
    rows, _ = listed(f"{web.url}/lists/m.jsonl?sig=a/b")
    assert [row["uri"] for row in rows[:2]] == [f"{web.url}/lists/a.jpg", f"{web.url}/b//c.jpg"]


def test_a_url_signed_anew_is_the_same_asset_and_results_do_not_show_it(tmp_path):
    def rows(signature):
        signed = f"https://me:pw@host/a.jpg?w=1&X-Amz-Signature={signature}"
        (tmp_path / "list.csv").write_text(f"uri\n{signed}\n")
        found, _ = listed(tmp_path / "list.csv")
        assert found[0]["fetch_uri"] == signed
        return found[0]

    first, second = rows("one"), rows("two")
    assert first["uri"] == "https://host/a.jpg?w=1"
    assert first["asset_id"] == second["asset_id"]


def test_a_folder_of_parquet_is_a_manifest_where_it_is_called_one(tmp_path, s3):
    options = s3.options
    prefix = f"{s3.bucket()}/list"
    for name, uri in (("b.parquet", "2.jpg"), ("a.parquet", "1.jpg"), ("_x.parquet", "no.jpg")):
        (tmp_path / name).write_bytes(as_parquet([{"uri": uri}]))
        s3.put(f"{prefix}/{name}", as_parquet([{"uri": uri}]))
    for folder in (str(tmp_path), prefix):
        rows, _ = listed(folder, kind="manifest", storage_options=options)
        assert [row["uri"] for row in rows] == [f"{folder}/1.jpg", f"{folder}/2.jpg"]
    (tmp_path / "empty").mkdir()
    assert ".parquet" in refused(tmp_path / "empty", kind="manifest")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("m.parquet", b"no parquet at all", "not a whole Parquet file"),
        ("m.parquet", as_parquet(ROWS)[:-20], "not a whole Parquet file"),
        ("m.jsonl", b'{"uri": "a"}\n{"uri": ', "line 2: not JSON"),
        ("m.jsonl", b"[1]", "line 1: must be an object"),
        ("m.csv", b'uri\n"a', "not CSV"),
        ("m.csv", b"uri\n\xff\xfe", "not UTF-8"),
        ("m.csv", b"", "no column 'uri'"),
        ("m.csv", b"uri,id\nhttps://h/a.jpg?w=1,h=2,7", "line 2: more cells"),
        ("m.csv.gz", b"uri\na.jpg", "damaged gzip"),
        ("m.csv.gz", gzip.compress(as_csv(ROWS))[:-9], "damaged gzip"),
    ],
)
def test_a_damaged_manifest_stops_the_run_with_its_name(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    message = refused(tmp_path / name)
    assert f"{tmp_path}/{name}" in message
    assert words in message


NUL = as_parquet([{"uri": "a.jpg", "id": "1"}] * 2000 + [{"uri": "b\0.jpg", "id": "1"}])


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        (
            "m.jsonl",
            b'{"uri": "a.jpg", "id": 1}\n{"uri": "b\\u0000.jpg"}',
            "line 2: uri: holds a NUL",
        ),
        ("m.csv", b"uri,id\na.jpg,1\nb\0.jpg,2", "line 3: uri: holds a NUL"),
        ("m.parquet", NUL, "row 2001: uri: holds a NUL"),
        ("m.jsonl", b'{"uri": "\\ud800.jpg", "id": 1}', "line 1: uri: holds '\\ud800'"),
        ("m.jsonl", b'{"uri": "s3://b/\\ud800.jpg", "id": 1}', "line 1: uri: holds '\\ud800'"),
        ("m.jsonl", b'{"uri": "a.jpg", "id": "\\ud83d"}', "line 1: id: holds '\\ud83d'"),
        ("m.jsonl", b'{"uri": "a", "id": ' + b"9" * 5000 + b"}", "line 1: a number too long"),
        (
            "m.jsonl",
            b'{"uri": "a", "id": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
            "line 1: a number",
        ),
    ],
    ids=range(8),
)
def test_a_row_that_is_no_text_is_named_by_line_and_column(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    message = refused(tmp_path / name, id_column="id", variable_columns=("id",), stat=False)
    assert f"{tmp_path}/{name}: {words}" in message


def test_a_csv_may_hold_long_texts_and_a_comma_at_the_end_of_its_lines(tmp_path):
    (tmp_path / "m.csv").write_text(f"uri,page\na.jpg,{'x' * 200_000},\nb.jpg,y,,\n")
    rows, _ = listed(tmp_path / "m.csv", variable_columns=("page",), stat=False)
    assert [len(row["variables"]) for row in rows] == [200_012, 13]


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_a_manifest_on_a_server_without_ranges_is_refused(web, name):
    rows = [{"uri": f"{number}.jpg", "text": "x" * 1000} for number in range(4000)]
    data = FORMS["list" + name[1:]](rows)

    def route(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(data)

    web.routes[f"/{name}"] = web.routes[f"HEAD /{name}"] = route
    message = refused(f"{web.url}/{name}", stat=False)
    assert f"{web.url}/{name}: the server knows no ranges" in message


def test_a_column_without_a_name_is_nobodys_id(tmp_path):
    # as pandas writes its index
    (tmp_path / "m.csv").write_text(",uri\n0,a.jpg\n")
    rows, _ = listed(tmp_path / "m.csv", stat=False)
    assert (rows[0]["source_id"], rows[0]["version"]) == (None, "")


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_globs_beside_a_manifest_are_refused_not_ignored(tmp_path, field):
    (tmp_path / "m.csv").write_text("uri\na.jpg\n")
    assert "input.include and exclude" in refused(tmp_path / "m.csv", **{field: ("*.jpg",)})


def test_a_manifest_of_unknown_form_names_the_known_ones(tmp_path):
    (tmp_path / "m.txt").write_text("a.jpg")
    assert ".jsonl" in refused(tmp_path / "m.txt", kind="manifest")


def test_skipped_counts_pickle():
    source = Source(InputConfig(uri="x"), "image")
    source.skipped.add("excluded")
    assert pickle.loads(pickle.dumps(source.skipped)) == {"excluded": 1}
