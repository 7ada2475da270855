"""The media stage for the pictures of a video: a span to one window a segment.

Which segments there are depends on file and settings only (shots.py). A segment's frames are decoded,
patchified and stamped with their times; what it lacks of them is a gap that the span names.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from operators.decode_video import Frame, Missing, decode_frames
from operators.errors import MediaError
from operators.patchify import fit, target_size
from operators.prepare_video import prepare_video
from operators.prepared import Row, Window, check_division
from operators.probe_video import VideoFacts, probe_video
from operators.prompt_video import VideoPrompt
from operators.sample_frames import sample_times
from operators.settings import VideoSettings
from operators.shots import Segment, segments, spans
from operators.stitch import Heard, clock, named

# Of whole pictures held at once: 86 of 1920x1080, 21 of 3840x2160, 5 of 7680x4320.
MOST_PIXEL_BYTES = 1 << 29
# A slide of a talk may have come minutes before its segment, whose frames would all have that one time.
# Times in a prompt are whole seconds: less makes no difference.
STANDING_S = 1.0


class PrepareFrames:
    """A span of a video's pictures to its windows (media_files.Prepare)."""

    def __init__(
        self,
        video: VideoSettings,
        prompt: VideoPrompt,
        *,
        most_pixel_bytes: int = MOST_PIXEL_BYTES,
    ) -> None:
        self._video = video
        self._prompt = prompt
        self._most_pixel_bytes = most_pixel_bytes

    def __call__(self, row: Row, path: str, asked: dict[str, Any]) -> None:
        """Raises MediaError where not one picture of the span can be had."""
        started = time.perf_counter()
        facts = probe_video(path, self._video)
        row.duration_s = facts.duration_s
        row.width_px, row.height_px = facts.display_size
        check_division(asked, len(spans(facts.duration_s, self._video)))
        wanted = segments(path, facts, asked["track_index"], self._video)
        variables = json.loads(asked["variables"] or "null")
        row.prepare_s = 0.0
        gaps = []
        for segment, frames, missing in self._frames(path, facts, wanted):
            prepare_started = time.perf_counter()
            if frames:
                row.windows.append(self._window(facts, segment, frames, variables))
            if missing:
                gaps.append(Heard(*segment, None, missing))
            row.prepare_s += time.perf_counter() - prepare_started
        row.decode_s = time.perf_counter() - started - row.prepare_s
        lacks = [f"pictures are missing: {named(gaps)}"] if gaps else []
        if facts.clock_bytes is not None and asked["track_index"] + 1 == asked["track_count"]:
            end = clock(facts.duration_s)
            lacks.append(f"all after {end} is missing, where the file's clock starts again")
        if lacks:
            row.gap = MediaError("decode.corrupt", "; ".join(lacks))
            if not row.windows:
                raise row.gap

    def _frames(
        self, path: str, facts: VideoFacts, wanted: Sequence[Segment]
    ) -> Iterator[tuple[Segment, list[Frame], str]]:
        """(segment, its frames at the size of their patches, what is missing of them)."""
        for segment, moments in groupby(self._moments(path, facts, wanted), itemgetter(0)):
            found = [one for _, one in moments]
            frames = [one for one in found if isinstance(one, Frame)]
            lost = [one for one in found if not isinstance(one, Frame)]
            missing = f"{len(lost)} of {len(found)}" if lost else ""
            if not frames and isinstance(lost[0], MediaError):
                missing = lost[0].message
            yield segment, frames, missing

    def _moments(
        self, path: str, facts: VideoFacts, wanted: Sequence[Segment]
    ) -> Iterator[tuple[Segment, Frame | Missing | MediaError]]:
        """What there is of each moment, in order. As many are decoded together as may be held."""
        video = self._video
        width, height = self._size(facts)
        together = max(1, self._most_pixel_bytes // (width * height * 3))
        moments = [
            (segment, time_s)
            for segment in wanted
            for time_s in sample_times(*segment, video.fps, video.max_frames)
        ]
        for first in range(0, len(moments), together):
            part = moments[first : first + together]
            found = self._decoded(path, facts, [time_s for _, time_s in part])
            yield from zip([segment for segment, _ in part], found, strict=True)

    def _decoded(
        self, path: str, facts: VideoFacts, times_s: Sequence[float]
    ) -> Sequence[Frame | Missing | MediaError]:
        """The whole pictures are let go when this returns."""
        try:
            decoded = decode_frames(path, facts, times_s, self._video, self._size(facts))
        except MediaError as error:
            if error.code != "decode.corrupt":
                raise
            return [error] * len(times_s)
        width, height = facts.display_size
        budget = self._video.max_soft_tokens
        return [
            Frame(self._seen_s(one, time_s), fit(one.pixels, budget, (height, width)))
            if isinstance(one, Frame)
            else one
            for one, time_s in zip(decoded, times_s, strict=True)
        ]

    def _seen_s(self, frame: Frame, time_s: float) -> float:
        """The picture's own time, or the moment where it has been standing for long. A key frame next to
        the moment need not be what is shown then.
        """
        stands = self._video.exact_times and time_s - frame.time_s >= STANDING_S
        return time_s if stands else frame.time_s

    def _size(self, facts: VideoFacts) -> tuple[int, int]:
        """(width, height) of the decoder's pictures."""
        if not self._video.scaled_decode:
            return facts.display_size
        width, height = facts.display_size
        height, width = target_size(height, width, self._video.max_soft_tokens)
        return width, height

    def _window(
        self,
        facts: VideoFacts,
        segment: Segment,
        frames: Sequence[Frame],
        variables: dict[str, str] | None,
    ) -> Window:
        width, height = facts.display_size
        made = prepare_video(
            [frame.pixels for frame in frames],
            [frame.time_s for frame in frames],
            segment.start_s,
            self._video,
            shown=(height, width),
        )
        return Window(
            tokens=self._prompt.window(made.columns * made.rows, made.stamps_s, variables),
            media=made.media,
            columns=made.columns,
            rows=made.rows,
            media_hash=made.media_hash,
            start_s=segment.start_s,
            end_s=segment.end_s,
        )
