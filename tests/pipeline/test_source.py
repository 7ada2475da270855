"""Prefixes, globs and single files, on local disk and on S3: what is found, and how soon."""

from __future__ import annotations

import errno
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
from listing import found, listed, refused, source, touch

from operators.fetch import Fetch, Ref
from operators.schema import FOUND
from operators.settings import FetchSettings
from operators.stores import filesystem
from pipeline.source import split_glob

NAMES = ["a b/ü#1?.jpg", "x//y.jpg", "p%20q+r.JPG", "[1]{2}*.jpg", "deep/er/z.png"]


# What is found


def test_every_name_survives_and_is_fetched_by_it(place):
    prefix, options = place(*NAMES)
    rows, _ = listed(prefix, storage_options=options)
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
    rows, skipped = listed(tmp_path)
    assert [row["uri"] for row in rows] == [f"{tmp_path}/a.jpg", f"{tmp_path}/dead.jpg"]
    assert (rows[1]["version"], rows[1]["size_bytes"]) == ("", None)
    assert skipped == {"link to a folder above it": 1, "not a regular file": 1}


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
