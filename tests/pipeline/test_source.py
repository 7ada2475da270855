"""Prefixes, globs and single files, on local disk and on S3: what is found, and how soon."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from fsspec.registry import _registry

from operators.fetch import Fetch, Ref
from operators.schema import FOUND
from operators.settings import FetchSettings
from operators.stores import filesystem
from pipeline.config import InputConfig
from pipeline.source import Source, SourceError, split_glob

IMAGES = frozenset({".jpg", ".png"})
NAMES = ["a b/ü#1?.jpg", "x//y.jpg", "p%20q+r.JPG", "[1]{2}*.jpg", "deep/er/z.png"]
# botocore's attempts around s3fs's would make each refusal of this test a matter of seconds
QUICK = {"config_kwargs": {"retries": {"total_max_attempts": 1}}}


def source(uri, **given):
    return Source(InputConfig(uri=str(uri), **given), "image", IMAGES)


def found(uri, **given):
    """URIs in their order, and what was skipped."""
    asked = source(uri, **given)
    rows = [row for batch in asked.batches() for row in batch.to_pylist()]
    return [row["uri"] for row in rows], dict(asked.skipped)


def refused(uri, **given):
    with pytest.raises(SourceError) as caught:
        found(uri, **given)
    return str(caught.value)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path, s3):
    """Put files somewhere: `put(names)` gives the prefix and its storage options."""

    def put(*names):
        if request.param == "local":
            touch(tmp_path, *names)
            return str(tmp_path), {}
        prefix = f"{s3.bucket()}/raw"
        for name in names:
            s3.put(f"{prefix}/{name}", name.encode())
        return prefix, s3.options

    return put


# What is found


def test_every_name_survives_and_is_fetched_by_it(place):
    prefix, options = place(*NAMES)
    rows = [
        row
        for batch in source(prefix, storage_options=options).batches()
        for row in batch.to_pylist()
    ]
    local = "://" not in prefix
    expected = {f"{prefix}/{os.path.normpath(name) if local else name}" for name in NAMES}
    assert {row["uri"] for row in rows} == expected
    get = Fetch(FetchSettings(), options)
    for row in rows:
        data = get(Ref(row["fetch_uri"], size_bytes=row["size_bytes"])).data
        assert data.decode() in NAMES
        assert row["size_bytes"] == len(data)
        assert row["version"]
        assert row["modality"] == "image"


def test_only_the_modalitys_types_are_taken_and_the_others_counted(place):
    prefix, options = place("a.JPG", "b.txt", "c.txt", "d", "e/f.png", ".hidden")
    uris, skipped = found(prefix, storage_options=options)
    assert uris == [f"{prefix}/a.JPG", f"{prefix}/e/f.png"]
    assert skipped == {"unknown type .txt": 2, "unknown type (none)": 2}


def test_include_takes_any_type_and_exclude_wins(place):
    prefix, options = place("a.bin", "x/b.bin", "x/c.jpg", "private/d.bin", "x/.h/e.bin")
    uris, skipped = found(
        prefix, include=("**/*.bin",), exclude=("private/**",), storage_options=options
    )
    assert uris == [f"{prefix}/{name}" for name in ("a.bin", "x/.h/e.bin", "x/b.bin")]
    assert skipped == {"not in include": 1, "excluded": 1}


def test_a_star_stays_in_its_folder(place):
    prefix, options = place("a.jpg", "x/b.jpg")
    assert found(prefix, include=("*.jpg",), storage_options=options)[0] == [f"{prefix}/a.jpg"]


def test_a_glob_in_the_uri_is_prefix_and_include(place):
    prefix, options = place("x1/a.jpg", "x2/b.bin", "y/c.jpg")
    uris, skipped = found(f"{prefix}/x*/*.{{jpg,bin}}", storage_options=options)
    assert uris == [f"{prefix}/x1/a.jpg", f"{prefix}/x2/b.bin"]
    assert skipped == {"not in include": 1}
    message = refused(f"{prefix}/*.jpg", include=("*.png",), storage_options=options)
    assert "input.include" in message


def test_a_prefix_is_a_folder_not_the_start_of_a_name(s3):
    bucket = s3.bucket()
    for name in ("raw/a.jpg", "raw2/b.jpg", "raw/", "/c.jpg"):
        s3.put(f"{bucket}/{name}", b"1")
    assert found(f"{bucket}/raw", storage_options=s3.options)[0] == [f"{bucket}/raw/a.jpg"]
    assert found(f"{bucket}/raw/", storage_options=s3.options)[0] == [f"{bucket}/raw/a.jpg"]
    assert len(found(bucket, storage_options=s3.options)[0]) == 3


def test_a_single_file_has_its_version(place):
    prefix, options = place("a.jpg", "b.odd")
    (batch,) = source(f"{prefix}/a.jpg", storage_options=options).batches()
    assert batch.schema == FOUND
    (listed, *_) = source(prefix, storage_options=options, include=("a.jpg",)).batches()
    assert batch.to_pylist() == listed.to_pylist()
    assert found(f"{prefix}/b.odd", kind="file", storage_options=options)[0] == [f"{prefix}/b.odd"]
    assert "does not exist" in refused(f"{prefix}/no.jpg", storage_options=options)


def test_new_bytes_are_a_new_asset_and_the_same_bytes_the_same(place, s3, tmp_path):
    prefix, options = place("a.jpg")

    def ids():
        (batch,) = source(prefix, storage_options=options).batches()
        return batch.column("asset_id").to_pylist()

    first = ids()
    assert ids() == first
    if options:
        s3.put(f"{prefix}/a.jpg", b"other")
    else:
        (tmp_path / "a.jpg").write_bytes(b"other")
    assert ids() != first


def test_a_local_folder_is_one_asset_however_it_is_spelled(tmp_path, monkeypatch):
    touch(tmp_path, "pics/a.jpg")
    monkeypatch.chdir(tmp_path)
    expected = [f"{tmp_path}/pics/a.jpg"]
    for uri in ("pics", "./pics/", f"file://{tmp_path}/pics", "pics/*.jpg", "pics/a.jpg"):
        assert found(uri)[0] == expected


def test_links_are_followed_once_and_dead_ones_keep_their_row(tmp_path):
    touch(tmp_path, "a.jpg")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "dead.jpg").symlink_to(tmp_path / "no.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    rows = [row for batch in source(tmp_path).batches() for row in batch.to_pylist()]
    assert [row["uri"] for row in rows] == [f"{tmp_path}/a.jpg", f"{tmp_path}/dead.jpg"]
    assert (rows[1]["version"], rows[1]["size_bytes"]) == ("", None)
    assert found(tmp_path)[1] == {"link to a folder above it": 1, "not a regular file": 1}


def test_a_link_that_leads_nowhere_costs_its_own_row(tmp_path):
    touch(tmp_path, "a.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "long.jpg").symlink_to("x" * 300)
    names = ["a.jpg", "long.jpg", "loop.jpg"]
    assert found(tmp_path) == ([f"{tmp_path}/{name}" for name in names], {})


def test_a_folder_that_goes_while_it_is_listed_is_counted(tmp_path):
    touch(tmp_path, "b/c.jpg", *[f"a/{number}.jpg" for number in range(256)])
    listing = source(tmp_path)
    batches = listing.batches()
    first = next(batches)
    shutil.rmtree(tmp_path / "b")
    assert (first.num_rows, list(batches)) == (256, [])
    assert listing.skipped == {"folder that went while it was listed": 1}


def test_a_file_whose_disk_gives_no_status_stops_the_listing(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "list.csv").write_text("uri\na.jpg\nb.jpg\n")
    assets = {uri: list(source(uri).batches()) for uri in (tmp_path, tmp_path / "list.csv")}
    stat, asked = os.stat, []

    def faulty(code, times):
        asked.clear()

        def faulty_stat(path, **given):
            if str(path).endswith("b.jpg"):
                asked.append(path)
                if len(asked) <= times:
                    raise OSError(code, os.strerror(code))
            return stat(path, **given)

        monkeypatch.setattr(os, "stat", faulty_stat)

    for uri, before in assets.items():
        faulty(errno.EIO, 2)
        assert list(source(uri).batches()) == before
        faulty(errno.EIO, 1000)
        assert f"{tmp_path}/b.jpg: cannot be reached" in refused(uri)
        assert len(asked) == 4
        faulty(errno.EACCES, 1000)  # this one's own: the fetch gives it its code
        assert len(found(uri)[0]) == 2
    assert found(tmp_path, exclude=("b.*",))[0] == [f"{tmp_path}/a.jpg"]


def test_a_name_that_is_no_utf8_is_counted(tmp_path):
    touch(tmp_path, "a.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).write_bytes(b"1")
    assert found(tmp_path) == ([f"{tmp_path}/a.jpg"], {"file name is not UTF-8": 1})


def test_reasons_stay_few_however_many_types_there_are(tmp_path):
    touch(tmp_path, *[f"a.x{number}" for number in range(100)], "b." + "y" * 50)
    skipped = found(tmp_path)[1]
    assert len(skipped) <= 41
    assert sum(skipped.values()) == 101


def test_other_stores_are_walked_folder_by_folder():
    store, _ = filesystem("memory://walk", {})
    for name in ("b.jpg", "sub/a.jpg", "sub/c.txt"):
        store.pipe_file(f"/walk/{name}", b"1")
    uris, skipped = found("memory://walk")
    assert uris == ["memory:///walk/b.jpg", "memory:///walk/sub/a.jpg"]
    assert skipped == {"unknown type .txt": 1}


# Inputs that are empty or cannot be listed


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
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        assert "may not be read" in refused(tmp_path)
        uris, skipped = found(tmp_path, exclude=("locked/**",))
    finally:
        if root:
            os.seteuid(0)
        for path, mode in modes:
            path.chmod(mode)
        (tmp_path / "locked").chmod(0o755)
    assert (uris, skipped) == ([f"{tmp_path}/a.jpg"], {"excluded": 1})


# How it streams


def test_s3_is_asked_for_one_page_before_the_first_batch(s3):
    uri = s3.bucket()
    names = [f"{place:05d}.jpg" for place in range(3_000)]
    s3.fill(f"{uri}/", names)
    s3.requests.clear()
    batches = source(uri, storage_options=s3.options).batches()
    pages = f"/{uri.removeprefix('s3://')}"

    def asked():
        return sum(path == pages for _, path, _ in s3.requests)

    sizes = [next(batches).num_rows]
    assert asked() == 1
    rest = [batch.column("uri").to_pylist() for batch in batches]
    sizes += [len(part) for part in rest]
    assert sizes == [256, 2744]
    assert asked() == 3
    assert rest[-1][-1] == f"{uri}/{names[-1]}"


def test_memory_does_not_grow_with_the_listing(tmp_path):
    for folder in range(50):
        (tmp_path / f"{folder:03d}").mkdir()
        for number in range(200):
            (tmp_path / f"{folder:03d}" / f"{number}.jpg").touch()

    def peak(uri):
        tracemalloc.start()
        rows = sum(batch.num_rows for batch in source(uri).batches())
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return rows, most

    peak(tmp_path / "000")
    rows, most = peak(tmp_path)
    # 3.4 MiB were measured: one batch of 8192 rows, as values and then as Arrow
    assert rows == 10_000
    assert most < 6 << 20


# The URI itself


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("s3://b/x/*.jpg", ("s3://b/x/", "*.jpg")),
        ("s3://b/x/**/y?.jpg", ("s3://b/x/", "**/y?.jpg")),
        ("s3://b/[x]/*.jpg", ("s3://b/", "[x]/*.jpg")),
        ("s3://b/s-{000..099}.tar", ("s3://b/", "s-{000..099}.tar")),
        ("s3://b/a[1]?.jpg", ("s3://b/a[1]?.jpg", "")),
        ("*.jpg", (".", "*.jpg")),
        ("/data/*.jpg", ("/data/", "*.jpg")),
        ("https://h/a.jpg?x=*", ("https://h/a.jpg?x=*", "")),
    ],
)
def test_only_stars_and_braces_make_a_glob(uri, parts):
    assert split_glob(uri) == parts
