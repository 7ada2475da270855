"""Fetch against real files, an S3 server and other stores: bytes, codes, attempts, limits."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import without_root
from fetching import answer, failure, fetch
from fsspec import AbstractFileSystem
from fsspec.registry import known_implementations, register_implementation

from operators.errors import TRANSIENT
from operators.fetch import Ref
from operators.stores import filesystem

NAMES = ["a b/ü#1?.jpg", "x//y.jpg", "p%20q+r.jpg", "[1]{2}*.jpg", "a::b.jpg", "v?versionId=7.jpg"]


# Local files


@pytest.mark.parametrize("name", NAMES)
def test_local_names_survive_exactly(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(name.encode())
    for uri in (f"{tmp_path}/{name}", f"file://{tmp_path}/{name}"):
        assert fetch()(Ref(uri)).data == name.encode()


def test_a_range_is_read_from_its_offset(tmp_path):
    (tmp_path / "shard.tar").write_bytes(b"0123456789")
    got = fetch()(Ref(f"{tmp_path}/shard.tar", offset=3, length=4, size_bytes=4))
    assert (got.data, got.attempts) == (b"3456", 1)


def test_local_faults_have_their_codes_after_one_attempt(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("missing", "folder", "pipe", "loop", "x" * 300, "nul\0byte"):
        error = failure(Ref(f"{tmp_path}/{name}"))
        assert (error.code, error.attempts) == ("fetch.not_found", 1), name


def test_an_unreadable_file_is_forbidden(tmp_path):
    path = tmp_path / "secret.jpg"
    path.write_bytes(b"1")
    path.chmod(0)
    with without_root():
        error = failure(Ref(str(path)))
    assert (error.code, error.attempts) == ("fetch.forbidden", 1)


def test_a_file_of_another_size_than_listed_has_changed(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"12345")
    assert fetch()(Ref(str(path), size_bytes=5)).data == b"12345"
    for planned in (4, 6):
        error = failure(Ref(str(path), size_bytes=planned))
        assert error.code == "fetch.changed"
        assert error.code in TRANSIENT
    assert failure(Ref(str(path), offset=3, length=4)).code == "fetch.changed"


def test_too_large_is_known_before_the_file_is_touched(tmp_path):
    error = failure(Ref(f"{tmp_path}/missing", size_bytes=11), max_bytes=10)
    assert (error.code, error.attempts) == ("fetch.too_large", 0)
    (tmp_path / "a").write_bytes(b"x" * 11)
    assert failure(Ref(f"{tmp_path}/a"), max_bytes=10).code == "fetch.too_large"
    assert len(fetch(max_bytes=11)(Ref(f"{tmp_path}/a")).data) == 11


def test_an_empty_member_needs_no_request():
    assert fetch()(Ref("s3://nowhere/shard.tar", offset=512, length=0)).data == b""


# S3


@pytest.mark.parametrize("name", NAMES)
def test_s3_keys_survive_exactly(s3, name):
    uri = f"{s3.bucket()}/{name}"
    s3.put(uri, name.encode())
    assert fetch(options=s3.options)(Ref(uri, size_bytes=len(name.encode()))).data == name.encode()


def test_s3_ranges_empty_objects_and_sizes(s3):
    bucket = s3.bucket()
    s3.put(f"{bucket}/shard.tar", b"0123456789")
    s3.put(f"{bucket}/empty", b"")
    get = fetch(options=s3.options)
    assert get(Ref(f"{bucket}/shard.tar", offset=3, length=4)).data == b"3456"
    assert get(Ref(f"{bucket}/empty")).data == b""
    for ref in (
        Ref(f"{bucket}/shard.tar", offset=8, length=4),
        Ref(f"{bucket}/shard.tar", offset=20, length=4),
        Ref(f"{bucket}/shard.tar", size_bytes=9),
        Ref(f"{bucket}/shard.tar", size_bytes=11),
    ):
        assert failure(ref, s3.options).code == "fetch.changed", ref
    assert failure(Ref(f"{bucket}/shard.tar"), s3.options, max_bytes=9).code == "fetch.too_large"


def test_s3_missing_objects_folders_and_buckets_are_not_found(s3):
    bucket = s3.bucket()
    s3.put(f"{bucket}/folder/a.jpg", b"1")
    for uri in (
        f"{bucket}/no.jpg",
        f"{bucket}/folder",
        bucket,
        "s3://no-such-bucket/a",
        "s3://_/a",
    ):
        error = failure(Ref(uri), s3.options)
        assert (error.code, error.attempts) == ("fetch.not_found", 1), uri


def test_s3_forbidden_is_not_tried_again(s3):
    s3.fault = lambda *asked: (403, "AccessDenied")
    error = failure(Ref("s3://bucket/a.jpg"), s3.options)
    assert (error.code, error.attempts) == ("fetch.forbidden", 1)
    assert len(s3.asked("s3://bucket/a.jpg")) == 1


@pytest.mark.parametrize("fault", [(503, "SlowDown"), (500, "InternalError"), (429, "TooMany")])
def test_s3_faults_that_pass_are_tried_again(s3, fault):
    uri = f"{s3.bucket()}/a.jpg"
    s3.put(uri, b"1")
    s3.requests.clear()
    s3.fault = lambda *asked: fault if len(s3.asked(uri)) == 1 else None
    got = fetch(options=s3.options)(Ref(uri))
    assert (got.data, got.attempts) == (b"1", 2)
    assert len(s3.asked(uri)) == 2


def test_a_store_that_keeps_failing_is_unavailable_after_as_many_requests_as_attempts(s3):
    s3.fault = lambda *asked: (503, "SlowDown")
    error = failure(Ref("s3://bucket/a.jpg"), s3.options, attempts=2)
    assert (error.code, error.attempts) == ("fetch.unavailable", 2)
    assert error.code in TRANSIENT
    assert "HTTP 503 SlowDown" in error.message
    assert len(s3.asked("s3://bucket/a.jpg")) == 2


def test_one_fetch_serves_many_threads(s3):
    bucket = s3.bucket()
    s3.fill(f"{bucket}/", [f"{place}.jpg" for place in range(40)])
    get = fetch(options=s3.options, concurrency=16)
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda place: get(Ref(f"{bucket}/{place}.jpg")).data, range(40)))
    assert got == [b"x"] * 40


# Other stores, options and errors


def test_other_stores_are_read_too():
    store, path = filesystem("memory://fetch/a.jpg", {})
    store.pipe_file(path, b"0123")
    assert fetch()(Ref("memory://fetch/a.jpg")).data == b"0123"
    assert fetch()(Ref("memory://fetch/a.jpg", offset=1, length=2)).data == b"12"
    assert failure(Ref("memory://fetch/b.jpg")).code == "fetch.not_found"


def test_a_store_nobody_can_open_fails_the_row_and_says_why():
    assert "unknown scheme foo://" in failure(Ref("foo://bucket/a.jpg")).message
    assert "needs gcsfs, install it" in failure(Ref("gs://bucket/a.jpg")).message
    assert failure(Ref("gs://bucket/a.jpg")).code == "fetch.unavailable"


@pytest.mark.parametrize("scheme", ["data", "dir", "tar", "zip"])
def test_what_is_no_store_fails_the_row(scheme):
    uri = f"{scheme}://x/y.jpg"
    error = failure(Ref(uri))
    assert (error.code, error.attempts) == ("fetch.unavailable", 0)
    assert error.message.startswith(f"{uri}: unknown scheme {scheme}://")


class Refused(Exception):
    """What ftp, sftp and Azure raise derives from Exception alone, like this."""


class BlockStore(AbstractFileSystem):
    protocol = "blockstore"

    def open(self, path, mode="rb"):
        raise Refused


def test_whatever_an_unknown_store_raises_fails_the_row(monkeypatch):
    monkeypatch.setitem(known_implementations, "blockstore", {"class": f"{__name__}.BlockStore"})
    register_implementation("blockstore", BlockStore, clobber=True)
    error = failure(Ref("blockstore://x/y.jpg"))
    assert (error.code, error.attempts) == ("fetch.unavailable", 1)
    assert error.message == "blockstore://x/y.jpg: refused"


def test_options_may_be_keyed_by_scheme_and_s3_secrets_stay_with_s3(s3, web):
    seen = []

    def route(handler):
        seen.append(dict(handler.headers))
        answer(b"1")(handler)

    web.routes["/a"] = route
    keyed = {"s3": s3.options, "http": {"headers": {"X-Who": "me"}}}
    uri = f"{s3.bucket()}/a"
    s3.put(uri, b"2")
    assert fetch(options=keyed)(Ref(uri)).data == b"2"
    assert fetch(options=keyed)(Ref(f"{web.url}/a")).data == b"1"
    assert fetch(options=s3.options)(Ref(f"{web.url}/a")).data == b"1"
    assert seen[0]["X-Who"] == "me"
    assert "test-secret" not in str(seen)


def test_fetch_pickles(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    assert pickle.loads(pickle.dumps(fetch()))(Ref(f"{tmp_path}/a")).data == b"1"
