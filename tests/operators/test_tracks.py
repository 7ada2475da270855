"""Tracks: what of an asset a span is about."""

from __future__ import annotations

import pytest

from operators.settings import AudioSettings
from operators.tracks import FRAMES, IMAGE, SUMMARY, channel, kind, sound_tracks


@pytest.mark.parametrize(
    ("track", "given", "own"),
    [
        (IMAGE, "image", None),
        (FRAMES, "video", None),
        (SUMMARY, "text", None),
        ("mix", "audio", None),
        ("left", "audio", None),
        ("right", "audio", None),
        ("c0", "audio", 0),
        ("c11", "audio", 11),
    ],
)
def test_a_track_says_what_the_model_is_given(track: str, given: str, own: int | None) -> None:
    assert kind(track) == given
    assert channel(track) == own


def test_each_channel_is_a_track() -> None:
    assert sound_tracks(2, AudioSettings()) == ["mix"]
    assert sound_tracks(1, AudioSettings(channel="right")) == ["right"]
    assert sound_tracks(3, AudioSettings(channel="each")) == ["c0", "c1", "c2"]
