"""A node-local file for every reference: read once a node, bounded, whole or not there."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import S3Server

from operators import local_files
from operators.errors import MediaError
from operators.fetch import Fetch, Ref
from operators.local_files import LocalFiles
from operators.settings import FetchSettings

DATA = os.urandom(300_000)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def files(s3: S3Server, cache: Path, **options: int) -> LocalFiles:
    fetch = Fetch(FetchSettings(attempts=2, timeout_s=10), s3.options)
    return LocalFiles(fetch, s3.options, str(cache), **options)


def entries(cache: Path) -> list[str]:
    return [name for name in os.listdir(cache) if not name.endswith(".lock")]


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(MediaError) as error:
        call()
    return error.value.code


def read(given: LocalFiles, ref: Ref, version: str | None = "v1") -> bytes:
    with given(ref, version) as file:
        return Path(file.path).read_bytes()


def test_read_once_and_then_used(s3: S3Server, cache: Path) -> None:
    uri = s3.bucket() + "/a.wav"
    s3.put(uri, DATA)
    given = files(s3, cache)
    ref = Ref(uri, size_bytes=len(DATA))
    assert read(given, ref) == DATA
    asked = len(s3.asked(uri))
    assert read(pickle.loads(pickle.dumps(given)), ref) == DATA
    assert len(s3.asked(uri)) == asked
    with given(ref, "v1") as file:
        assert file.attempts == 0
    assert read(given, ref, "v2") == DATA
    assert len(entries(cache)) == 2


def test_large_objects_in_parts(s3: S3Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_files, "PART_BYTES", 100_000)
    uri = s3.bucket() + "/a.wav"
    s3.put(uri, DATA)
    assert read(files(s3, cache), Ref(uri, size_bytes=len(DATA))) == DATA
    gets = [asked for asked in s3.asked(uri) if asked[0] == "GET"]
    assert len(gets) == 3
    assert read(files(s3, cache), Ref(uri)) == DATA  # of unknown size


def test_a_member_of_a_tar(s3: S3Server, cache: Path) -> None:
    uri = s3.bucket() + "/a.tar"
    s3.put(uri, DATA)
    ref = Ref(uri, offset=1000, length=5000, size_bytes=len(DATA))
    assert read(files(s3, cache), ref) == DATA[1000:6000]


def test_a_member_of_a_local_tar(tmp_path: Path, s3: S3Server, cache: Path) -> None:
    tar = tmp_path / "a.tar"
    tar.write_bytes(DATA)
    assert read(files(s3, cache), Ref(str(tar), offset=5, length=20)) == DATA[5:25]


def test_local_files_stay_where_they_are(tmp_path: Path, s3: S3Server, cache: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(DATA)
    for uri in (str(path), f"file://{path}"):
        with files(s3, cache)(Ref(uri, size_bytes=len(DATA)), "v") as file:
            assert file.path == str(path)
    assert not cache.exists()

    def use(ref: Ref) -> None:
        read(files(s3, cache), ref)

    assert code_of(lambda: use(Ref(str(path), size_bytes=5))) == "fetch.changed"
    assert code_of(lambda: use(Ref(str(tmp_path / "gone")))) == "fetch.not_found"
    assert code_of(lambda: use(Ref(str(tmp_path)))) == "fetch.not_found"
    path.write_bytes(b"")
    assert code_of(lambda: use(Ref(str(path)))) == "decode.empty"


def test_what_cannot_be_had(s3: S3Server, cache: Path) -> None:
    bucket = s3.bucket()
    s3.put(bucket + "/empty", b"")
    s3.put(bucket + "/a", DATA)
    given = files(s3, cache, max_file_bytes=1000)
    assert code_of(lambda: read(given, Ref(bucket + "/gone"))) == "fetch.not_found"
    assert code_of(lambda: read(given, Ref(bucket + "/gone", size_bytes=5))) == "fetch.not_found"
    assert code_of(lambda: read(given, Ref(bucket + "/empty", size_bytes=0))) == "decode.empty"
    assert code_of(lambda: read(given, Ref(bucket + "/empty"))) == "decode.empty"
    large = Ref(bucket + "/a", size_bytes=len(DATA))
    assert code_of(lambda: read(given, large)) == "fetch.too_large"
    assert code_of(lambda: read(given, Ref(bucket + "/a"))) == "fetch.too_large"
    assert entries(cache) == []


def test_an_object_that_changes_under_the_reader(
    s3: S3Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_files, "PART_BYTES", 100_000)
    uri = s3.bucket() + "/a.wav"
    s3.put(uri, DATA)
    fetch = Fetch(FetchSettings(attempts=1), s3.options)

    def changing(ref: Ref) -> object:
        got = fetch(ref)
        s3.put(uri, bytes(len(DATA)))
        return got

    given = LocalFiles(changing, s3.options, str(cache))
    assert code_of(lambda: read(given, Ref(uri, size_bytes=len(DATA)))) == "fetch.changed"
    assert entries(cache) == []


def test_two_workers_read_it_once(s3: S3Server, cache: Path) -> None:
    uri = s3.bucket() + "/a.wav"
    s3.put(uri, DATA)
    given = files(s3, cache)
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda _: read(given, Ref(uri, size_bytes=len(DATA))), range(6)))
    assert got == [DATA] * 6
    assert len([asked for asked in s3.asked(uri) if asked[0] == "GET"]) == 1


def test_the_least_recently_used_go_but_not_those_in_use(s3: S3Server, cache: Path) -> None:
    bucket = s3.bucket()
    refs = [Ref(f"{bucket}/{name}", size_bytes=len(DATA)) for name in "abcd"]
    for ref in refs:
        s3.put(ref.uri, DATA)
    given = files(s3, cache, max_bytes=2 * len(DATA))
    with given(refs[0], "v") as first:
        for age_s, ref in zip((30, 20), refs[1:3], strict=True):
            read(given, ref, "v")
            with given(ref, "v") as file:
                os.utime(file.path, (time.time() - age_s, time.time() - age_s))
        os.utime(first.path, (0, 0))  # the oldest, but in use
        read(given, refs[3], "v")
        assert os.path.exists(first.path)
        assert len(entries(cache)) == 2


def test_what_a_killed_reader_left_is_removed(s3: S3Server, cache: Path) -> None:
    cache.mkdir()
    left, fresh = cache / "x.part-1", cache / "y.part-2"
    left.write_bytes(b"half")
    fresh.write_bytes(b"half")
    os.utime(left, (0, 0))
    uri = s3.bucket() + "/a"
    s3.put(uri, DATA)
    read(files(s3, cache), Ref(uri, size_bytes=len(DATA)))
    assert not left.exists()
    assert fresh.exists()


def test_a_reader_waits_for_the_one_that_reads(s3: S3Server, cache: Path) -> None:
    uri = s3.bucket() + "/a"
    s3.put(uri, DATA)
    fetch = Fetch(FetchSettings(), s3.options)
    begun, calls = threading.Event(), []

    def slow(ref: Ref) -> object:
        calls.append(ref)
        begun.set()
        time.sleep(0.3)
        return fetch(ref)

    given = LocalFiles(slow, s3.options, str(cache))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(read, given, Ref(uri, size_bytes=len(DATA)))
        begun.wait(5)
        second = pool.submit(read, given, Ref(uri, size_bytes=len(DATA)))
        assert first.result() == second.result() == DATA
    assert len(calls) == 1
