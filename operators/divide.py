"""How an asset is cut into spans, track by track: its headers, on a CPU worker. The last step of the plan."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any, NamedTuple

import pyarrow as pa

from operators.errors import MediaError
from operators.fetch import Ref
from operators.local_files import LocalFile
from operators.probe import probe_audio
from operators.probe_video import probe_video
from operators.ranged import Ranged, WholeFileError
from operators.schema import DIVIDED
from operators.settings import AudioSettings, VideoSettings
from operators.shots import spans as video_spans
from operators.tracks import FRAMES, SUMMARY, sound_tracks
from operators.windows import spans


class Track(NamedTuple):
    """A track and its spans' nominal (start_s, end_s)."""

    name: str
    spans: list[tuple[float | None, float | None]]


# Stands for pictures that cannot be read.
UNREAD = Track(FRAMES, [(None, None)])
# There is no sound to transcribe, and nothing wrong with that.
SILENT = frozenset({"decode.no_audio", "decode.too_short"})


class Divide:
    """Batch callable: FOUND -> DIVIDED, one row a span.

    `tracks` reads a header: of a remote file as far as its blocks go, else of the whole, node-local one.
    What it cannot read is one span of the track `unread`: the media stage then meets the same fault, and
    gives it its code.
    """

    def __init__(
        self,
        ranges: Callable[[Ref], AbstractContextManager[Ranged | None]],
        files: Callable[[Ref, str | None], AbstractContextManager[LocalFile]],
        tracks: Callable[[str | Ranged], list[Track]],
        unread: str,
    ) -> None:
        self._ranges = ranges
        self._files = files
        self._tracks = tracks
        self._unread = unread

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = [row for asset in table.to_pylist() for row in self._rows(asset)]
        return pa.Table.from_pylist(rows, schema=DIVIDED)

    def _rows(self, asset: dict[str, Any]) -> list[dict[str, Any]]:
        return divided(asset["asset_id"], self._read(Ref.of(asset), asset["version"]))

    def _read(self, ref: Ref, version: str | None) -> list[Track]:
        # A fault is told by the whole file alone.
        with suppress(MediaError, WholeFileError), self._ranges(ref) as remote:
            if remote is not None:
                return self._tracks(remote)
        try:
            with self._files(ref, version) as file:
                return self._tracks(file.path)
        except MediaError:
            return [Track(self._unread, [(None, None)])]


def divided(asset_id: str, tracks: list[Track]) -> list[dict[str, Any]]:
    """Rows of DIVIDED."""
    count = sum(len(track.spans) for track in tracks)
    division = "+".join(str(len(track.spans)) for track in tracks)
    rows: list[dict[str, Any]] = []
    for track in tracks:
        for index, (start_s, end_s) in enumerate(track.spans):
            row = {
                "asset_id": asset_id,
                "span_index": len(rows),
                "span_count": count,
                "division": division,
                "track": track.name,
                "track_index": index,
                "track_count": len(track.spans),
                "span_start_s": start_s,
                "span_end_s": end_s,
            }
            rows.append(row)
    return rows


def speech_tracks(file: str | Ranged, audio: AudioSettings) -> list[Track]:
    """The tracks of a recording: one, or one a channel. Raises as probe_audio."""
    sound = probe_audio(file, audio)
    return [
        Track(name, [*spans(sound.duration_s, audio)])
        for name in sound_tracks(sound.channels, audio)
    ]


def video_tracks(file: str | Ranged, video: VideoSettings, audio: AudioSettings) -> list[Track]:
    """The tracks of a video: its pictures, where asked its sound, and a summary of both.

    A video without sound has no sound track. One without pictures has a span of them, which fails
    with its code, beside its sound. Raises MediaError where neither can be read, and WholeFileError.
    """
    seen: MediaError | None = None
    try:
        tracks = [Track(FRAMES, [*video_spans(probe_video(file, video).duration_s, video)])]
    except MediaError as error:
        seen, tracks = error, [UNREAD]
    if video.transcribe:
        try:
            tracks += speech_tracks(file, audio)
        except MediaError as error:
            if seen is not None:
                raise seen from error
            if error.code not in SILENT:
                tracks += [Track(name, [(None, None)]) for name in sound_tracks(1, audio)]
    elif seen is not None:
        raise seen
    if video.summary:
        tracks.append(Track(SUMMARY, [(None, None)]))
    return tracks
