"""A node-local file for every reference: read once a node, bounded, whole or not there."""

from __future__ import annotations

import fcntl
import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from conftest import S3Server, WebServer

from operators import local_files
from operators.errors import MediaError
from operators.fetch import DiskError, Fetch, Fetched, Ref
from operators.local_files import LocalFiles
from operators.settings import FetchSettings

DATA = os.urandom(300_000)
ROOM = {"max_file_bytes": 1 << 30, "max_bytes": 1 << 30}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def files(s3: S3Server, cache: Path, **options: int) -> LocalFiles:
    fetch = Fetch(FetchSettings(attempts=2, timeout_s=10), s3.options)
    return LocalFiles(fetch, str(cache), **ROOM | options)


class Watched(Fetch):
    """Calls `seen` with each reference before it is read."""

    def __init__(self, s3: S3Server, seen: Callable[[Ref], object]) -> None:
        super().__init__(FetchSettings(attempts=1), s3.options)
        self._seen = seen

    def __call__(self, ref: Ref) -> Fetched:
        self._seen(ref)
        return super().__call__(ref)


def entries(cache: Path) -> list[str]:
    return [name for name in os.listdir(cache) if name not in ("bytes", "turn")]


def on_disk(cache: Path) -> int:
    return sum((cache / name).stat().st_size for name in entries(cache))


def key(cache: Path) -> Path:
    (name,) = entries(cache)
    return cache / name


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
    given = LocalFiles(Watched(s3, lambda ref: s3.put(uri, bytes(len(DATA)))), str(cache), **ROOM)
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


def test_reads_in_progress_count(s3: S3Server, cache: Path) -> None:
    """Eight readers once left 80 MB in a folder of 15."""
    bucket = s3.bucket()
    refs = [Ref(f"{bucket}/{number}", size_bytes=len(DATA)) for number in range(12)]
    for ref in refs:
        s3.put(ref.uri, DATA)
    found: list[int] = []

    def look(ref: Ref) -> None:
        time.sleep(0.02)  # so that the readers meet
        found.append(on_disk(cache))

    given = LocalFiles(Watched(s3, look), str(cache), **ROOM | {"max_bytes": 2 * len(DATA)})
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(lambda ref: read(given, ref), refs)] == [DATA] * len(refs)
    assert max(found) == 2 * len(DATA)


def test_a_file_larger_than_the_folder_waits_until_no_other_is_in_use(
    s3: S3Server, cache: Path
) -> None:
    bucket = s3.bucket()
    small, large = Ref(f"{bucket}/small", size_bytes=1000), Ref(f"{bucket}/large", size_bytes=9000)
    s3.put(small.uri, DATA[:1000])
    s3.put(large.uri, DATA[:9000])
    given = files(s3, cache, max_bytes=5000)
    with ThreadPoolExecutor(2) as pool:
        with given(small, "v"):
            waiting = [pool.submit(read, given, large), pool.submit(read, given, small, "v2")]
            time.sleep(0.3)
            assert on_disk(cache) <= 5000
        assert [done.result(10) for done in waiting] == [DATA[:9000], DATA[:1000]]


def test_a_folder_with_room_is_not_looked_through(s3: S3Server, cache: Path) -> None:
    """With 100,000 files in it, each look cost 3.7 s of CPU."""
    bucket = s3.bucket()
    refs = [Ref(f"{bucket}/{name}", size_bytes=len(DATA)) for name in "abc"]
    for ref in refs:
        s3.put(ref.uri, DATA)
    given = files(s3, cache, max_bytes=2 * len(DATA))
    read(given, refs[0])
    left = cache / "x.part"
    left.touch()
    read(given, refs[1])
    assert left.exists()
    read(given, refs[2])
    assert not left.exists()


def test_no_trace_stays_of_what_is_gone(s3: S3Server, cache: Path) -> None:
    bucket = s3.bucket()
    for name in "abc":
        s3.put(f"{bucket}/{name}", DATA)
        read(files(s3, cache, max_bytes=len(DATA)), Ref(f"{bucket}/{name}", size_bytes=len(DATA)))
    gone = Ref(f"{bucket}/gone", size_bytes=5)
    assert code_of(lambda: read(files(s3, cache), gone)) == "fetch.not_found"
    assert sorted(os.listdir(cache)) == sorted(["bytes", "turn", key(cache).name])


def test_a_file_that_goes_while_somebody_waits_for_it_is_read_anew(
    s3: S3Server, cache: Path
) -> None:
    uri = s3.bucket() + "/a"
    s3.put(uri, DATA)
    given = files(s3, cache)
    ref = Ref(uri, size_bytes=len(DATA))
    read(given, ref)
    path = key(cache)
    with ThreadPoolExecutor(1) as pool:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            waiting = pool.submit(read, given, ref)
            time.sleep(0.1)
            path.unlink()
        assert waiting.result(10) == DATA


def test_what_a_killed_reader_left_is_removed(s3: S3Server, cache: Path) -> None:
    cache.mkdir()
    left, being_read = cache / "x.part", cache / "y.part"
    left.write_bytes(b"half")
    being_read.write_bytes(b"half")
    uri = s3.bucket() + "/a"
    s3.put(uri, DATA)
    with being_read.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        read(files(s3, cache), Ref(uri, size_bytes=len(DATA)))
        assert not left.exists()
        assert being_read.exists()


def test_a_reader_waits_for_the_one_that_reads(s3: S3Server, cache: Path) -> None:
    uri = s3.bucket() + "/a"
    s3.put(uri, DATA)
    begun, calls = threading.Event(), []

    def slow(ref: Ref) -> None:
        calls.append(ref)
        begun.set()
        time.sleep(0.3)

    given = LocalFiles(Watched(s3, slow), str(cache), **ROOM)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(read, given, Ref(uri, size_bytes=len(DATA)))
        begun.wait(5)
        second = pool.submit(read, given, Ref(uri, size_bytes=len(DATA)))
        assert first.result() == second.result() == DATA
    assert len(calls) == 1


# HTTP


class Route:
    """A file on a web server that is out of order for its first `faults` requests."""

    def __init__(self, *, faults: int = 0, ranges: bool = True, length: bool = True) -> None:
        self.data, self.etag = DATA, "1"
        self.asked: list[str | None] = []
        self._faults, self._ranges, self._length = faults, ranges, length

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range")
        self.asked.append(asked)
        if len(self.asked) <= self._faults:
            handler.send_error(503)
            return
        data, status = self.data, 200
        if asked and self._ranges:
            first, last = (int(place) for place in asked.removeprefix("bytes=").split("-"))
            data, status = data[first : last + 1], 206 if first < len(data) else 416
        handler.send_response(status)
        handler.send_header("ETag", self.etag)
        if status == 206:
            handler.send_header("Content-Range", f"bytes {first}-{last}/{len(self.data)}")
        if self._length:
            handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)


def from_web(cache: Path, **options: int) -> LocalFiles:
    fetch = Fetch(FetchSettings(attempts=3, timeout_s=5), {})
    return LocalFiles(fetch, str(cache), **ROOM | options)


@pytest.mark.parametrize("version", ["v1", ""])
@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("ranges", [True, False])
def test_http_files_of_every_kind_of_server(
    web: WebServer,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    length: bool,
    ranges: bool,
) -> None:
    """One without ranges once gave fetch.changed for every file of more than a part."""
    monkeypatch.setattr(local_files, "PART_BYTES", 100_000)
    web.routes["/a.mp4"] = route = Route(ranges=ranges, length=length)
    assert read(from_web(cache), Ref(f"{web.url}/a.mp4"), version) == DATA
    parts = ["bytes=0-99999", "bytes=100000-199999", "bytes=200000-299999"]
    assert route.asked[1:4] == (parts if ranges else [None])
    assert on_disk(cache) == len(DATA)


def test_objects_of_unknown_size_are_bounded_too(web: WebServer, cache: Path) -> None:
    given = from_web(cache, max_bytes=2 * len(DATA))
    for name in "abcd":
        web.routes[f"/{name}"] = Route(ranges=False, length=False)
        read(given, Ref(f"{web.url}/{name}"))
    web.routes["/e"] = Route()
    read(given, Ref(f"{web.url}/e"))
    assert on_disk(cache) <= 2 * len(DATA)
    small = from_web(cache, max_file_bytes=1000)
    assert code_of(lambda: read(small, Ref(f"{web.url}/a"), "v2")) == "fetch.too_large"


def test_a_server_out_of_order_is_asked_again(web: WebServer, cache: Path) -> None:
    web.routes["/a"] = Route(faults=2)
    assert read(from_web(cache), Ref(f"{web.url}/a")) == DATA
    web.routes["/b"] = Route(faults=100)
    assert code_of(lambda: read(from_web(cache), Ref(f"{web.url}/b"))) == "fetch.unavailable"
    assert code_of(lambda: read(from_web(cache), Ref(f"{web.url}/c"))) == "fetch.not_found"
    assert code_of(lambda: read(from_web(cache), Ref("http://a..b/c"))) == "fetch.not_found"


def test_an_http_file_is_empty_only_where_reading_it_gives_nothing(
    web: WebServer, cache: Path
) -> None:
    def head(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    web.routes["HEAD /a"], web.routes["/a"] = head, Route()
    assert read(from_web(cache), Ref(f"{web.url}/a")) == DATA
    web.routes["/b"] = empty = Route()
    empty.data = b""
    assert code_of(lambda: read(from_web(cache), Ref(f"{web.url}/b"))) == "decode.empty"


def test_without_a_version_the_server_is_asked_for_it(web: WebServer, cache: Path) -> None:
    web.routes["/a"] = route = Route()
    ref = Ref(f"{web.url}/a")
    assert read(from_web(cache), ref, "") == DATA
    assert read(from_web(cache), ref, "") == DATA
    assert route.asked == ["bytes=0-0", None, "bytes=0-0"]
    route.data, route.etag = DATA[::-1], "2"
    assert read(from_web(cache), ref, "") == DATA[::-1]


def test_a_full_disk_is_no_fault_of_the_server(web: WebServer) -> None:
    web.routes["/a"] = Route()
    with open("/dev/full", "r+b", buffering=0) as full, pytest.raises(DiskError):
        Fetch(FetchSettings(), {}).stream(Ref(f"{web.url}/a"), full, 1 << 30)
