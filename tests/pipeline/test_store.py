"""The output folder: whole or not at all, and never a stale answer."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from operators.stores import classify, reason
from pipeline import store as store_module
from pipeline.store import Store


@pytest.fixture(params=["local", "s3", "memory"])
def store(request, tmp_path, s3):
    if request.param == "local":
        return Store(f"{tmp_path}/out put/", {})
    if request.param == "s3":
        return Store(f"{s3.bucket()}/out put/", s3.options)
    return Store(f"memory://{tmp_path.name}/out", {})


def test_reads_back_what_was_written_and_replaces_it(store):
    store.write("ledger/a.parquet", b"one")
    store.write("ledger/a.parquet", b"two")
    store.write("empty", b"")
    assert store.read("ledger/a.parquet") == b"two"
    assert store.read("empty") == b""


def test_a_missing_name_is_file_not_found(store):
    with pytest.raises(FileNotFoundError):
        store.read("no/such")
    store.write("no/such", b"1")
    assert store.read("no/such") == b"1"


def test_names_are_sorted_recursive_relative_to_the_root_and_fresh(store):
    assert store.names("ledger") == []
    for name in ("ledger/b.parquet", "ledger/sub/a.parquet", "ledger/c.json", "ledger-2/x.parquet"):
        store.write(name, b"1")
    assert store.names("ledger", ".parquet") == ["ledger/b.parquet", "ledger/sub/a.parquet"]
    assert store.names("ledger") == ["ledger/b.parquet", "ledger/c.json", "ledger/sub/a.parquet"]
    assert len(store.names()) == 4
    store.delete(["ledger/b.parquet", "ledger/was/never/there"])
    assert store.names("ledger", ".parquet") == ["ledger/sub/a.parquet"]


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path):
    store = Store(str(tmp_path), {})
    store.write("ledger/a.parquet", b"1")
    (tmp_path / "ledger").rename(tmp_path / "before")
    (tmp_path / "ledger").symlink_to("ledger")
    with pytest.raises(OSError, match="symbolic links"):
        store.names("ledger")


def test_a_second_store_sees_the_write_of_the_first(store):
    other = pickle.loads(pickle.dumps(store))
    assert other.names() == []
    with pytest.raises(FileNotFoundError):
        other.read("a/b")
    store.write("a/b", b"1")
    assert other.names() == ["a/b"]
    assert other.read("a/b") == b"1"


def test_pyarrow_reads_what_the_store_wrote(store, tmp_path):
    pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "x.parquet")
    store.write("results/x.parquet", (tmp_path / "x.parquet").read_bytes())
    filesystem, root = store.arrow()
    rows = pads.dataset(f"{root}/results", filesystem=filesystem).to_table()
    assert rows.column("x").to_pylist() == [1, 2]
    assert pq.read_table(f"{root}/results/x.parquet", filesystem=filesystem).num_rows == 2
    assert pickle.loads(pickle.dumps(filesystem)).get_file_info(f"{root}/results/x.parquet").is_file


def test_more_names_than_a_page_and_a_delete_request_hold(s3):
    uri = f"{s3.bucket()}/many"
    store = Store(uri, s3.options)
    names = [f"p/{place:05d}" for place in range(1003)]
    s3.fill(f"{uri}/", names)
    assert store.names("p") == names
    store.delete(names)
    assert store.names() == []


def test_a_small_object_is_one_put(s3):
    store = Store(f"{s3.bucket()}/out", s3.options)
    s3.requests.clear()
    store.write("part", b"x" * (1 << 20))
    assert [method for method, _, _ in s3.requests] == ["PUT"]


def test_a_failed_put_leaves_the_old_object(s3):
    store = Store(f"{s3.bucket()}/out", s3.options)
    store.write("part", b"old")
    s3.fault = lambda method, path, query: (403, "AccessDenied") if method == "PUT" else None
    with pytest.raises(PermissionError):
        store.write("part", b"new")
    assert store.read("part") == b"old"


def test_a_refused_delete_is_an_error(s3):
    store = Store(f"{s3.bucket()}/out", s3.options)
    store.write("part", b"old")
    s3.fault = lambda method, path, query: (403, "AccessDenied") if method == "POST" else None
    with pytest.raises(PermissionError):
        store.delete(["part"])


@pytest.mark.parametrize(
    ("codes", "left", "said"),
    [
        (["SlowDown", "InternalError"], [], None),  # S3 counts each of a request's objects
        (["SlowDown"] * 9, ["b"], ("fetch.unavailable", True, "SlowDown")),
        (["SlowDown", "AccessDenied"], ["b"], ("fetch.forbidden", False, "AccessDenied")),
        (["MalformedXML"], ["b"], ("fetch.unavailable", False, "MalformedXML")),
    ],
)
def test_what_a_request_did_not_delete_is_tried_again_where_that_may_help(
    monkeypatch, codes, left, said
):
    """A folded ledger of 10,000 parts: the finished run ended with a traceback, and without latest.json."""

    class Busy:
        def __init__(self):
            self.there = ["a", "b", "c"]

        def call_s3(self, method, Bucket, Delete):
            faults = []
            for item in Delete["Objects"]:
                if item["Key"] == "b" and codes:
                    faults.append({"Key": "b", "Code": codes.pop(0)})
                elif item["Key"] in self.there:
                    self.there.remove(item["Key"])
            return {"Errors": faults}

    monkeypatch.setattr(store_module, "DELETE_WAITS_S", (0.001, 0.001))
    busy = Busy()
    if said is None:
        store_module._delete_s3(busy, ["bucket/a", "bucket/b", "bucket/c"])
    else:
        with pytest.raises(OSError, match=r"s3://bucket/b: not deleted: \w+") as refused:
            store_module._delete_s3(busy, ["bucket/a", "bucket/b", "bucket/c"])
        assert (*classify(refused.value), reason(refused.value)) == said
    assert busy.there == left


def test_a_large_object_shows_only_when_its_upload_is_complete(s3):
    store = Store(f"{s3.bucket()}/out", s3.options)
    data = b"x" * (101 << 20)
    seen = []

    def watch(method, path, query):
        if method in ("PUT", "POST"):
            seen.append((method, query.partition("=")[0], Path(path).name))
        return None

    s3.fault = watch
    store.write("big", data)
    assert seen[0][:2] == ("POST", "uploads")
    assert [kind for kind, _, _ in seen] == ["POST", "PUT", "PUT", "PUT", "POST"]
    assert store.names() == ["big"]


def test_an_upload_that_fails_half_way_leaves_nothing(s3):
    uri = s3.bucket()
    store = Store(f"{uri}/out", s3.options)

    def second_part(method, path, query):
        return (403, "AccessDenied") if method == "PUT" and "partNumber=2" in query else None

    s3.fault = second_part
    with pytest.raises(PermissionError):
        store.write("big", b"x" * (101 << 20))
    assert store.names() == []
    open_uploads = s3.fs.call_s3("list_multipart_uploads", Bucket=uri.removeprefix("s3://"))
    assert "Uploads" not in open_uploads


def test_a_local_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    store = Store(str(tmp_path), {})
    store.write("a/part.parquet", b"old")
    with pytest.raises(TypeError):
        store.write("a/part.parquet", "no bytes")  # type: ignore[arg-type]
    assert store.read("a/part.parquet") == b"old"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["part.parquet"]


def test_a_left_over_temporary_file_is_no_part(tmp_path):
    store = Store(str(tmp_path), {})
    store.write("ledger/a.parquet", b"1")
    (tmp_path / "ledger" / ".b.parquet.0123.tmp").write_bytes(b"half")
    assert store.names("ledger") == ["ledger/a.parquet"]


def test_readers_never_see_half_a_file(tmp_path):
    store = Store(str(tmp_path), {})
    contents = [bytes([value]) * 200_000 for value in (1, 2)]
    store.write("part", contents[0])
    done = threading.Event()
    seen = set()

    def look():
        while not done.is_set():
            seen.add(store.read("part"))

    reader = threading.Thread(target=look)
    reader.start()
    for turn in range(30):
        store.write("part", contents[turn % 2])
    done.set()
    reader.join()
    assert seen <= set(contents)


def test_url_names_the_file_without_credentials(tmp_path):
    assert Store("s3://bucket/out/", {}).url("a b") == "s3://bucket/out/a b"
    assert Store(f"file://{tmp_path}", {}).url("x") == f"{tmp_path}/x"
    assert "hunter2" not in Store("https://me:hunter2@host/out", {}).url("x")
