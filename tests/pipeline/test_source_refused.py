"""Inputs that are empty, or that cannot be listed: what the refusal says."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import fsspec
import pytest
from conftest import without_root
from fsspec.registry import _registry
from listing import found, refused, source, touch

from pipeline.source_rows import SourceError

# botocore's attempts around s3fs's would make each refusal of this test a matter of seconds
QUICK = {"config_kwargs": {"retries": {"total_max_attempts": 1}}}


def test_an_empty_folder_yields_nothing(tmp_path, s3):
    assert found(tmp_path) == ([], {})
    assert found(s3.bucket(), storage_options=s3.options) == ([], {})
    marked = f"{s3.bucket()}/raw/"
    s3.put(marked, b"")
    assert found(marked, storage_options=s3.options) == ([], {})


def test_a_missing_prefix_is_refused_unless_it_may_be_empty(place):
    prefix, options = place("a.jpg")
    message = refused(f"{prefix}/nothing", storage_options=options)
    assert f"{prefix}/nothing" in message
    assert "does not exist" in message
    if options:
        assert found(f"{prefix}/no", allow_empty=True, storage_options=options) == ([], {})


def test_a_missing_bucket_and_forbidden_listing_are_refused(s3):
    assert "s3://no-such-bucket" in refused("s3://no-such-bucket/x", storage_options=s3.options)
    s3.fault = lambda *asked: (403, "AccessDenied")
    message = refused("s3://bucket/x", storage_options=s3.options)
    assert "credentials" in message
    assert "HTTP 403" in message
    assert "test-" not in message


def test_a_listing_that_breaks_half_way_is_refused(s3):
    uri = s3.bucket()
    s3.fill(f"{uri}/", [f"{place:05d}.jpg" for place in range(1500)])
    s3.fault = lambda method, path, query: (
        (403, "AccessDenied") if "continuation" in query else None
    )
    batches = source(uri, storage_options=s3.options).batches()
    assert next(batches).num_rows == 256
    with pytest.raises(SourceError):
        list(batches)


def test_an_endpoint_nobody_answers_is_refused(s3):
    options = {**s3.options, "endpoint_url": "http://127.0.0.1:1", **QUICK}
    assert "check the endpoint" in refused("s3://bucket/x", storage_options=options)


class Unavailable(Exception):
    """As gcsfs.retry.HttpError: derived from no store's error."""

    code = 503


class Down(fsspec.AbstractFileSystem):
    cachable = False

    def ls(self, path, detail=True, **given):
        raise Unavailable

    def info(self, path, **given):
        raise Unavailable


def test_googles_own_errors_are_refused(tmp_path, monkeypatch):
    auth = SimpleNamespace(GoogleAuthError=Unavailable)
    monkeypatch.setitem(sys.modules, "gcsfs.retry", SimpleNamespace(HttpError=Unavailable))
    monkeypatch.setitem(sys.modules, "google.auth.exceptions", auth)
    monkeypatch.setitem(_registry, "gs", Down)
    (tmp_path / "list.csv").write_text("uri\ngs://bucket/a.jpg\n")
    for uri in ("gs://bucket/x/", "gs://bucket/a.jpg", "gs://bucket/a.tar", tmp_path / "list.csv"):
        assert "check the endpoint and the network (HTTP 503)" in refused(uri)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("foo://bucket/x", "unknown scheme foo://"),
        ("gs://bucket/x", "install it"),
        ("s3://*/x.jpg", "must be named"),
        ("/data/x.tar.gz", "unpack it"),
        ("/no/such/list.parquet", "does not exist"),
        ("/no/such/shard.tar", "does not exist"),
        ("http://127.0.0.1:1/index/", "check the endpoint"),
    ],
)
def test_what_cannot_be_opened_is_refused_with_advice(uri, words):
    assert words in refused(uri)


def test_a_file_of_unknown_type_asks_for_its_kind(tmp_path):
    touch(tmp_path, "a.odd")
    assert "input.kind" in refused(tmp_path / "a.odd")


def test_an_unreadable_folder_stops_the_listing_unless_it_is_excluded(tmp_path):
    touch(tmp_path, "a.jpg", "locked/b.jpg")
    (tmp_path / "locked").chmod(0)
    tmp_path.chmod(0o755)
    outer = [path for path in tmp_path.parents if str(path).startswith("/tmp/")]
    modes = [(path, path.stat().st_mode) for path in outer]
    for path in outer:
        path.chmod(0o755)
    try:
        with without_root():
            assert "may not be read" in refused(tmp_path)
            uris, skipped = found(tmp_path, exclude=("locked/**",))
    finally:
        for path, mode in modes:
            path.chmod(mode)
        (tmp_path / "locked").chmod(0o755)
    assert (uris, skipped) == ([f"{tmp_path}/a.jpg"], {"excluded": 1})
