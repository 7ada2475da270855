"""Headers of remote files by ranges: what is planned is what the whole file says, for less."""

from __future__ import annotations

import pickle
import wave
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import sound
import video
from conftest import S3Server, WebServer

from operators import probe, ranged
from operators.divide import Divide, speech_tracks, video_tracks
from operators.errors import MediaError
from operators.fetch import Fetch, Fetched, Ref
from operators.ffmpeg_child import Done
from operators.local_files import LocalFiles
from operators.probe import probe_audio
from operators.ranged import Ranges, WholeFileError
from operators.schema import FOUND
from operators.settings import AudioSettings, FetchSettings, VideoSettings

AUDIO = AudioSettings(timeout_s=60)
VIDEO = VideoSettings(timeout_s=60, transcribe=True)
Row = dict[str, object]


@pytest.fixture
def divide(tmp_path: Path, s3: S3Server) -> Callable[..., list[Row]]:
    """Rows of a file by its URI, and what was read whole lies in `tmp_path`/cache."""

    def divide(uri: str, size: int | None, *, pictures: bool = False) -> list[Row]:
        fetch = Fetch(FetchSettings(attempts=1), s3.options if uri.startswith("s3:") else {})
        files = LocalFiles(
            fetch, str(tmp_path / "cache"), max_file_bytes=1 << 30, max_bytes=1 << 30
        )
        tracks = partial(speech_tracks, audio=AUDIO)
        if pictures:
            tracks = partial(video_tracks, video=VIDEO, audio=AUDIO)
        row = {"asset_id": "a", "uri": uri, "fetch_uri": uri, "size_bytes": size, "version": "1"}
        call = pickle.loads(
            pickle.dumps(Divide(Ranges(fetch, max_file_bytes=1 << 30), files, tracks, "mix"))
        )
        rows: list[Row] = call(pa.Table.from_pylist([row], schema=FOUND)).to_pylist()
        return rows

    return divide


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of some hundred kB are read by ranges, and not in one block."""
    monkeypatch.setattr(ranged, "LEAST_BYTES", 1)
    monkeypatch.setattr(ranged, "BLOCK_BYTES", 1 << 14)


def read_whole(folder: Path) -> bool:
    cache = folder / "cache"
    return cache.exists() and any(len(path.name) == 32 for path in cache.iterdir())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", sound.FORMATS)
def test_sound_in_every_format(
    name: str, divide: Callable[..., list[Row]], s3: S3Server, tmp_path: Path
) -> None:
    path = sound.write(tmp_path / name, sound.spoken(40).samples, *sound.FORMATS[name])
    same_as_here(path, divide, s3)
    # its frames stand one behind the other
    assert read_whole(tmp_path) == (name == "a.aac")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("name", "whole"),
    [
        *(("a.mp4", False), ("fast.mov", False), ("a.mkv", False), ("a.avi", False)),
        *(("a.wmv", False), ("a.mxf", False)),
        # their clocks may start again anywhere
        *(("a.ts", True), ("a.mpg", True)),
    ],
)
def test_pictures_in_formats_of_every_kind(
    name: str, whole: bool, divide: Callable[..., list[Row]], s3: S3Server, tmp_path: Path
) -> None:
    path = video.numbered_video(tmp_path / name, 200, *video.FORMATS[name])
    same_as_here(path, divide, s3, pictures=True)
    assert read_whole(tmp_path) == whole


def same_as_here(
    path: Path, divide: Callable[..., list[Row]], s3: S3Server, *, pictures: bool = False
) -> None:
    here = divide(str(path), path.stat().st_size, pictures=pictures)
    assert here[0]["span_end_s"] is not None
    uri = f"{s3.bucket()}/{path.name}"
    s3.put(uri, path.read_bytes())
    assert divide(uri, path.stat().st_size, pictures=pictures) == here


def long_wav(path: Path) -> bytes:
    """12 MB."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(12_000_000))
    return path.read_bytes()


def test_of_a_long_recording_a_block_is_read(
    divide: Callable[..., list[Row]], s3: S3Server, tmp_path: Path
) -> None:
    data = long_wav(tmp_path / "long.wav")
    uri = f"{s3.bucket()}/long.wav"
    s3.put(uri, data)
    s3.requests.clear()
    rows = divide(uri, len(data))
    assert rows[-1]["span_end_s"] == 375.0
    assert [method for method, *_ in s3.asked(uri)] == ["GET"]
    assert not read_whole(tmp_path)


def test_a_file_that_is_too_large_is_one_fault_and_not_one_a_span(s3: S3Server) -> None:
    ranges = Ranges(Fetch(FetchSettings(), s3.options), max_file_bytes=ranged.LEAST_BYTES)
    for size, asked in ((ranged.LEAST_BYTES, True), (ranged.LEAST_BYTES + 1, False)):
        with ranges(Ref("s3://bucket/a.wav", size_bytes=size)) as remote:
            assert (remote is not None) == asked


def test_a_server_without_ranges_gives_the_whole_file(
    divide: Callable[..., list[Row]], web: WebServer, tmp_path: Path
) -> None:
    data = long_wav(tmp_path / "long.wav")

    def route(handler: object) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    web.routes["/long.wav"] = route
    for size in (len(data), None):
        rows = divide(f"{web.url}/long.wav", size)
        assert rows[-1]["span_end_s"] == 375.0
        assert read_whole(tmp_path)


def test_of_a_url_whose_size_nobody_listed_a_block_is_read(
    divide: Callable[..., list[Row]], web: WebServer, tmp_path: Path
) -> None:
    """A manifest of URLs has no sizes: each file was read whole to plan, and again to work on it."""
    data = long_wav(tmp_path / "long.wav")
    asked = []

    def route(handler: object) -> None:
        asked.append(handler.headers.get("Range", f"bytes=0-{len(data) - 1}"))
        first, last = map(int, asked[-1].removeprefix("bytes=").split("-"))
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        handler.send_header("Content-Length", str(last + 1 - first))
        handler.end_headers()
        handler.wfile.write(data[first : last + 1])

    web.routes["/long.wav"] = route
    rows = divide(f"{web.url}/long.wav", None)
    assert rows[-1]["span_end_s"] == 375.0
    assert asked == ["bytes=0-0", f"bytes=0-{ranged.BLOCK_BYTES - 1}"]
    assert not read_whole(tmp_path)


def test_a_store_that_fails_on_the_way_gives_no_shorter_file(
    divide: Callable[..., list[Row]], s3: S3Server, tmp_path: Path
) -> None:
    """Its end is not there: MP4 keeps all it says of itself in it."""
    path = sound.write(tmp_path / "a.m4a", sound.spoken(300).samples, "-c:a", "alac")
    data = path.read_bytes()
    assert len(data) > ranged.LEAST_BYTES
    uri = f"{s3.bucket()}/a.m4a"
    s3.put(uri, data)
    s3.requests.clear()
    s3.fault = lambda *asked: (403, "AccessDenied") if len(s3.asked(uri)) > 1 else None
    assert divide(uri, len(data)) == [divide(f"{uri}.none", len(data))[0]]
    s3.fault = lambda *asked: (403, "AccessDenied") if len(s3.asked(uri)) == 2 else None
    s3.requests.clear()
    assert divide(uri, len(data)) == divide(str(path), len(data))
    assert read_whole(tmp_path)


def test_a_store_that_is_too_slow_for_a_header_is_no_fault_of_the_file(
    divide: Callable[..., list[Row]],
    s3: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its pictures could be read, so a plan with a fault in place of its sound would be kept."""
    run = probe.run

    def slow(
        command: list[str], settings: AudioSettings | VideoSettings, *, most_bytes: int
    ) -> Done:
        if settings == AUDIO and command[-1].startswith("http:"):
            raise MediaError("decode.timeout", "no end in 60 s")
        return run(command, settings, most_bytes=most_bytes)

    monkeypatch.setattr(ranged, "LEAST_BYTES", 1)
    monkeypatch.setattr(probe, "run", slow)
    path = video.numbered_video(tmp_path / "a.mp4", 50, *video.FORMATS["a.mp4"])
    same_as_here(path, divide, s3, pictures=True)
    assert read_whole(tmp_path)


@pytest.mark.usefixtures("small_blocks")
def test_a_fault_that_is_not_the_stores_gives_no_shorter_file(tmp_path: Path) -> None:
    """A transport stream has no header: where its sound ends is read from its last packets."""
    path = sound.write(tmp_path / "a.ts", sound.spoken(40).samples, *sound.FORMATS["a.ts"])
    data = path.read_bytes()

    def fetch(ref: Ref) -> Fetched:
        assert ref.offset is not None
        assert ref.length is not None
        if broken and ref.offset > len(data) - 3 * ranged.BLOCK_BYTES:
            raise RuntimeError("this machine is broken")
        return Fetched(data[ref.offset : ref.offset + ref.length], 1)

    with Ranges(fetch, max_file_bytes=1 << 30)(
        Ref("s3://bucket/a.ts", size_bytes=len(data))
    ) as remote:  # type: ignore[arg-type]
        broken = False
        assert probe_audio(remote, AUDIO) == probe_audio(str(path), AUDIO)
    with Ranges(fetch, max_file_bytes=1 << 30)(
        Ref("s3://bucket/a.ts", size_bytes=len(data))
    ) as remote:  # type: ignore[arg-type]
        broken = True
        with pytest.raises(WholeFileError):
            probe_audio(remote, AUDIO)
