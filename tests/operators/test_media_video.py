"""The video stage: a span's windows hold the right frames, and what is missing is named."""

from __future__ import annotations

import pickle
import re
import tracemalloc
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from video import FORMATS, HEIGHT, WIDTH, X264, number_of, numbered_video, write_video
from video import numbered as shown

from operators.divide import divided, video_tracks
from operators.errors import MediaError
from operators.fetch import Ref
from operators.local_files import LocalFile
from operators.media_files import FileMedia
from operators.media_video import PrepareFrames
from operators.prepare_video import unpack_video
from operators.prompt_video import VideoPrompt, load_video_prompt
from operators.schema import PAYLOAD, PLAN, PREPARED
from operators.settings import AudioSettings, ModelSettings, PromptSettings, VideoSettings

FPS = 10
COLUMNS, ROWS = 9, 7  # of 192x144 at 70 tokens


@pytest.fixture(scope="module")
def prompt(nano: Path) -> VideoPrompt:
    model = ModelSettings(id=str(nano))
    return load_video_prompt(model, PromptSettings(), "What is it?", 100, as_images=False)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "a.mp4"
    return numbered_video(path, 40 * FPS, *X264, "-g", "30", fps=FPS)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "a.mp4"
    options = ("-vf", "scale=1920:1080", "-c:v", "libx264", "-preset", "ultrafast", "-g", "4")
    return numbered_video(path, 32, *options, fps=1)


def files(ref: Ref, version: str | None) -> AbstractContextManager[LocalFile]:
    return nullcontext(LocalFile(ref.uri, 1))


def run(
    path: Path, prompt: VideoPrompt, video: VideoSettings, **limits: int
) -> list[dict[str, Any]]:
    try:
        tracks = video_tracks(str(path), video, AudioSettings())
    except MediaError:
        tracks = []
    rows = [
        row | {"span_id": f"a-{row['span_index']}", "fetch_uri": str(path)}
        for row in divided("a", tracks)
    ]
    prepare = PrepareFrames(video, prompt, **limits)
    stage = pickle.loads(pickle.dumps(FileMedia(files, {"video": prepare})))
    table = stage(pa.Table.from_pylist(rows, schema=PLAN))
    assert table.schema == PREPARED
    found: list[dict[str, Any]] = table.to_pylist()
    return found


def numbers(row: dict[str, Any], window: int) -> list[int]:
    """The numbers that a window's frames show."""
    patches = unpack_video(row["window_media"][window], COLUMNS, ROWS)
    grid = patches.reshape(-1, ROWS, COLUMNS, 48, 48, 3).transpose(0, 1, 3, 2, 4, 5)
    return [number_of(frame) for frame in grid.reshape(-1, ROWS * 48, COLUMNS * 48, 3)]


@pytest.mark.parametrize("scaled", [False, True])
def test_windows_hold_the_frames_of_their_segments(
    numbered: Path, prompt: VideoPrompt, scaled: bool
) -> None:
    video = VideoSettings(segment="fixed", max_s=16, scaled_decode=scaled)
    (row,) = run(numbered, prompt, video)
    assert (row["width_px"], row["height_px"]) == (WIDTH, HEIGHT)
    assert row["duration_s"] == pytest.approx(40)
    assert row["window_start_s"] == [0, 16, 32]
    assert row["window_end_s"] == pytest.approx([16, 32, 40])
    assert (row["window_columns"], row["window_rows"]) == ([COLUMNS] * 3, [ROWS] * 3)
    for window, start_s in enumerate((0, 16, 32)):
        seconds = range(start_s, min(start_s + 16, 40))
        assert numbers(row, window) == [second * FPS + FPS // 2 for second in seconds]
    ids = row["window_tokens"][2]
    assert ids.count(prompt.media_id) == 8 * COLUMNS * ROWS
    assert row["error_message"] is None


def test_frames_of_a_picture_that_stands_have_the_times_at_which_it_is_seen(
    tmp_path: Path, prompt: VideoPrompt
) -> None:
    """As in a recorded talk: its own time is that of another segment."""
    expression = "if(lt(N,20),N/10,24+(N-20)/10)/TB"
    path = numbered_video(
        *(tmp_path / "slide.mkv", 40, "-vf", f"settb=1/1000,setpts='{expression}'"),
        *("-fps_mode", "passthrough", "-enc_time_base", "1/1000", *X264, "-g", "10"),
        fps=FPS,
    )
    (row,) = run(path, prompt, VideoSettings(segment="fixed", max_s=8, min_s=1))
    assert numbers(row, 0) == [5, 15, 19, 19, 19, 19, 19, 19]
    assert numbers(row, 1) == [19] * 8
    for window, times_s in enumerate(
        ([0, 1, 1, 3, 4, 5, 6, 7], range(8, 16), range(16, 24), [24, 25])
    ):
        assert row["window_tokens"][window] == prompt.window(COLUMNS * ROWS, times_s)


def test_many_large_frames_are_decoded_some_at_a_time(numbered: Path, prompt: VideoPrompt) -> None:
    video = VideoSettings(segment="fixed", max_s=4, min_s=1)
    (whole,) = run(numbered, prompt, video)
    (parts,) = run(numbered, prompt, video, most_pixel_bytes=5 * WIDTH * HEIGHT * 3)
    assert parts["window_media_hash"] == whole["window_media_hash"]
    assert len(parts["window_media_hash"]) == 10


def test_a_segment_of_large_frames_is_not_held_whole(large: Path, prompt: VideoPrompt) -> None:
    """32 frames of 1920x1080 are 199 MB; four of them at a time, and what becomes of all."""
    width, height = 1920, 1080
    video = VideoSettings(segment="whole", min_s=1)
    tracemalloc.start()
    try:
        (parts,) = run(large, prompt, video, most_pixel_bytes=4 * width * height * 3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 150e6
    (whole,) = run(large, prompt, video)
    assert parts["window_media_hash"] == whole["window_media_hash"]
    assert parts["error_message"] is None


def test_a_file_that_ends_early_names_its_gaps(prompt: VideoPrompt, tmp_path: Path) -> None:
    data = numbered_video(tmp_path / "a.mkv", 40 * FPS, *X264, "-g", "30", fps=FPS).read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(data[: len(data) // 2])
    (row,) = run(cut, prompt, VideoSettings(segment="fixed", max_s=8, min_s=1))
    assert (row["error_code"], row["error_stage"]) == (None, "decode")
    assert "pictures are missing: " in row["error_message"]
    assert 2 <= len(row["window_tokens"]) < 5
    assert numbers(row, 0) == [second * FPS + FPS // 2 for second in range(8)]


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.ts", (*X264, "-g", "30")), ("a.mpg", FORMATS["a.mpg"])],
)
def test_of_joined_recordings_the_first_is_seen_and_the_rest_is_named(
    prompt: VideoPrompt, tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    """One file behind the other, and each has its own clock."""
    first = numbered_video(tmp_path / f"first-{name}", 8 * 25, *options)
    later = write_video(tmp_path / f"later-{name}", map(shown, range(1000, 1200)), *options)
    path = tmp_path / f"both, {name}"
    path.write_bytes(first.read_bytes() + later.read_bytes())
    (row,) = run(path, prompt, VideoSettings(segment="fixed", max_s=4, min_s=1))
    found = [number for window in (0, 1) for number in numbers(row, window)]
    # MPEG-PS has not a time for every picture
    assert found == pytest.approx([second * 25 + 12 for second in range(8)], abs=1)
    assert row["duration_s"] == pytest.approx(8, abs=0.1)
    assert row["error_stage"] == "decode"
    message = r"all after 0:00:0[78]\.\d is missing, where the file's clock starts again"
    assert re.fullmatch(message, row["error_message"])
    (alone,) = run(first, prompt, VideoSettings(segment="fixed", max_s=4, min_s=1))
    assert alone["error_message"] is None


def test_a_span_of_another_file_and_one_without_pictures(
    numbered: Path, prompt: VideoPrompt, tmp_path: Path
) -> None:
    stage = FileMedia(files, {"video": PrepareFrames(VideoSettings(), prompt)})
    text = tmp_path / "text.avi"
    text.write_text("no video\n" * 50)
    rows = [
        {"track": "frames", "track_index": 0, "track_count": 1, "fetch_uri": str(text)},
        {"track": "frames", "track_index": 3, "track_count": 9, "fetch_uri": str(numbered)},
    ]
    for row in rows:
        row["span_start_s"] = 0.0
    found = stage(pa.Table.from_pylist(rows, schema=PLAN)).to_pylist()
    assert [row["error_code"] for row in found] == ["decode.unsupported", "fetch.changed"]
    assert all(row[name] is None for row in found for name in PAYLOAD)
