"""Videos of many shots with words spoken over them: every cut, event and word at a known time.

film = draw_film(np.random.default_rng(1), bank, [8, 12, 10])
write(film, Path("film.mp4"))
[(shot.start_s, shot.end_s, caption(shot)) for shot in film.shots]
"""

import subprocess
import tempfile
import wave
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from deploy.nano import generate_speech, generate_videos, instructions
from deploy.nano.espeak import SAMPLE_RATE_HZ
from deploy.nano.generate_speech import Recording, Waveform
from deploy.nano.generate_videos import EVENTFUL, Shot
from deploy.nano.speech_bank import Bank
from operators.sample_frames import sample_times

# A cut must change the picture's hue: from grain to a photographed look one shot might go on.
_BACKGROUNDS: Final = ("grey", "green", "blue", "yellow", "red", "purple", "orange")
_QUIET: Final = ("ffmpeg", "-hide_banner", "-loglevel", "error", "-y")


@dataclass(frozen=True)
class Film:
    """Shots one after another from 0 s on, and a sound track of the same length."""

    shots: tuple[Shot, ...]
    sound: Recording


def draw_film(
    rng: np.random.Generator,
    bank: Bank,
    durations_s: list[int],
    aspect: float = 4 / 3,
    kinds: tuple[str, ...] = EVENTFUL,
) -> Film:
    """Draw a shot of each duration (whole seconds, 2 or more), and phrases with pauses over all.

    Neighbours differ in background. Events fall on whole seconds of the film, so frames taken at the
    half seconds, as one or two a second are, show them clearly before or after.
    """
    shots: list[Shot] = []
    start_s = 0
    for duration_s in durations_s:
        while True:
            clip = generate_videos.draw_clip(rng, float(duration_s), aspect, kinds)
            seen_before = bool(shots) and shots[-1].clip.background == clip.background
            if clip.background in _BACKGROUNDS and not seen_before:
                break
        if clip.event_s:
            clip = replace(clip, event_s=float(rng.integers(1, duration_s)))
        shots.append(Shot(clip, float(start_s), float(start_s + duration_s)))
        start_s += duration_s
    return Film(tuple(shots), draw_sound(rng, bank, float(start_s)))


def draw_sound(rng: np.random.Generator, bank: Bank, duration_s: float) -> Recording:
    """Speak phrases with pauses; the last phrase that would not end in time is left out."""
    long = generate_speech.long_recording(bank, rng, duration_s, noise_db=-60.0)
    end_s = 0.0
    for kind, _, region_end_s in long.regions:
        if kind == "speech" and region_end_s <= duration_s:
            end_s = region_end_s
    samples = np.zeros(round(duration_s * SAMPLE_RATE_HZ), dtype=np.float32)
    held = round(end_s * SAMPLE_RATE_HZ)
    samples[:held] = long.samples[:held]
    words = tuple(word for word in long.words if word.end_s <= end_s)
    return Recording(samples, words, tuple(r for r in long.regions if r[2] <= end_s))


def caption(
    shot: Shot,
    instruction: str = instructions.VIDEO_DESCRIBE,
    fps: float = 1.0,
    max_frames: int = 32,
) -> str:
    """Return the right answer about a shot, seen as the product samples a segment's frames."""
    stamps_s = sample_times(shot.start_s, shot.end_s, fps, max_frames)
    return generate_videos.answer(shot.clip, instruction, stamps_s, shot.start_s)


def write_wav(path: Path, samples: Waveform) -> None:
    """Write mono int16 WAV at 16 kHz."""
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(SAMPLE_RATE_HZ)
        out.writeframes((samples * 32767).astype(np.int16).tobytes())


def write(film: Film, path: Path, width: int = 320, height: int = 240, fps: int = 10) -> None:
    """Encode H.264 and AAC into the container that the name asks for; frames go through a pipe.

    Raises subprocess.CalledProcessError where ffmpeg fails.
    """
    with tempfile.NamedTemporaryFile(suffix=".wav") as raw, tempfile.TemporaryFile() as pixels:
        write_wav(Path(raw.name), film.sound.samples)
        for frame in generate_videos.frames(list(film.shots), width, height, fps):
            pixels.write(frame.tobytes())
        pixels.seek(0)
        command = [*_QUIET, "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
        command += ["-r", str(fps), "-i", "-", "-i", raw.name, "-bitexact", "-c:v", "libx264"]
        command += ["-pix_fmt", "yuv420p", "-crf", "23", "-threads", "1", "-c:a", "aac"]
        command += ["-b:a", "48k", "-movflags", "+faststart", str(path)]
        subprocess.run(command, stdin=pixels, check=True)  # noqa: S603
