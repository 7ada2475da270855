"""Tracks: what of an asset a span is about. An asset's spans are those of all its tracks, in order.

image            the picture
frames           a video's pictures
mix, left, right its sound, or a recording's, as one channel
c0, c1, ...      each channel of it as a transcript of its own (audio.channel: each)
summary          one text about a video, from what its other tracks gave
"""

from __future__ import annotations

from typing import Literal

from operators.settings import AudioSettings

IMAGE, FRAMES, SUMMARY = "image", "frames", "summary"

Kind = Literal["image", "video", "audio", "text"]


def kind(track: str) -> Kind:
    """What the model is given for a track."""
    if track == IMAGE:
        return "image"
    if track == FRAMES:
        return "video"
    return "text" if track == SUMMARY else "audio"


def sound_tracks(channels: int, settings: AudioSettings) -> list[str]:
    """The tracks of a sound with so many channels."""
    if settings.channel == "each":
        return [f"c{index}" for index in range(channels)]
    return [settings.channel]


def channel(track: str) -> int | None:
    """The channel that is a track's own transcript, from 0; None for every other track."""
    return int(track[1:]) if track[0] == "c" and track[1:].isdigit() else None
