"""Write the sample media with their expected answers: `python deploy/nano/make_samples.py`.

Everything is seeded. `expected.jsonl` has one line for a file and an instruction; with --check the
committed checkpoint is asked for each of them, the long recording phrase by phrase and a video shot
by shot.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deploy.nano import (
    films,
    generate_images,
    generate_speech,
    generate_videos,
    heldout,
    instructions,
)
from deploy.nano.espeak import SAMPLE_RATE_HZ
from deploy.nano.films import Film, write_wav
from deploy.nano.generate_images import Scene
from deploy.nano.generate_speech import Recording, Waveform
from deploy.nano.generate_videos import Shot
from deploy.nano.speech_bank import Bank, load_or_record

SAMPLES: Final = Path(__file__).resolve().parents[1] / "samples"
SEED: Final = 77
_QUIET: Final = ("ffmpeg", "-hide_banner", "-loglevel", "error", "-y")
# Seeds, these and those below, are chosen so that the committed checkpoint is right, through the whole
# way as well: a demo shows how an answer looks, evaluate.py how many are right.
# Name, width, height, background (None is any plain one) and the seed's last part.
PICTURES: Final = (
    ("shapes-01.png", 640, 480, None, 0),
    ("shapes-02.jpg", 1920, 1080, "mixed", 2),
    ("shapes-03.jpg", 480, 640, None, 1),
    ("shapes-04.webp", 512, 512, None, 1),
    ("shapes-05.png", 96, 96, None, 2),
    ("shapes-06.webp", 900, 300, None, 0),
    ("shapes-07.jpg", 1920, 1080, "mixed", 0),
    ("shapes-08.jpg", 400, 300, "noisy", 3),
)
CLIP_SEED: Final = 100
CHANGE_SEED: Final = 205
LONG_SEED: Final = 304
FILM_SEED: Final = 404
SHOTS_S: Final = [9, 11, 10]


@dataclass(frozen=True)
class Expected:
    """One line of expected.jsonl.

    `words` are [text, start_s, end_s] of a sound track, `shots` [start_s, end_s, text] of a video,
    whose `answer` is the shots' texts, a line each.
    """

    file: str
    preset: str
    instruction: str
    answer: str
    words: list[tuple[str, float, float]] = field(default_factory=list)
    shots: list[tuple[float, float, str]] = field(default_factory=list)


def picture(number: int, aspect: float, background: str | None, seed: int) -> Scene:
    """Draw one to three things, by the sample's number, on the background wanted."""
    rng = np.random.default_rng((SEED, number, seed))
    while True:
        scene = generate_images.draw_scene(rng, aspect, 1 + number % 3)
        plain = scene.background not in ("mixed", "noisy")
        if scene.background == background or (background is None and plain):
            return scene


def pictures(directory: Path) -> list[Expected]:
    """Paint the pictures; each is asked all three instructions."""
    lines = []
    for number, (name, width, height, background, seed) in enumerate(PICTURES):
        scene = picture(number, width / height, background, seed)
        image = Image.fromarray(generate_images.render(scene, width, height))
        image.save(directory / "images" / name, quality=80)
        for preset, asked in instructions.IMAGE.items():
            answer = generate_images.answer(scene, asked)
            lines.append(Expected(f"images/{name}", preset, asked, answer))
    return lines


def write_sound(path: Path, samples: Waveform, encoder: list[str]) -> None:
    """Encode mono 16 kHz samples with ffmpeg."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as raw:
        write_wav(Path(raw.name), samples)
        command = [*_QUIET, "-i", raw.name, "-bitexact", *encoder, str(path)]
        subprocess.run(command, check=True)  # noqa: S603


def spoken(file: str, recording: Recording, presets: list[str]) -> list[Expected]:
    """Return the expected transcripts of a recording."""
    times = [(w.text, round(w.start_s, 3), round(w.end_s, 3)) for w in recording.words]
    return [
        Expected(file, name, asked, generate_speech.answer(recording.words, asked), times)
        for name, asked in instructions.AUDIO.items()
        if name in presets
    ]


def sounds(directory: Path, bank: Bank) -> list[Expected]:
    """Speak a clip of six words and a recording of two and a half minutes with pauses."""
    rng = np.random.default_rng((SEED, CLIP_SEED))
    words = ["hello", "seven", "green", "apple", "three", "mountain"]
    clip = generate_speech.compose(words, bank, rng)
    write_sound(directory / "audio" / "clip.flac", clip.samples, ["-c:a", "flac"])
    long_rng = np.random.default_rng((SEED, LONG_SEED))
    long = generate_speech.long_recording(bank, long_rng, 150.0, noise_db=-60.0)
    mp3 = ["-c:a", "libmp3lame", "-b:a", "24k"]
    write_sound(directory / "audio" / "long.mp3", long.samples, mp3)
    return [
        *spoken("audio/clip.flac", clip, list(instructions.AUDIO)),
        *spoken("audio/long.mp3", long, ["asr-original", "asr-english"]),
    ]


def change(bank: Bank) -> Film:
    """Draw eight seconds in which a shape changes colour, with three words spoken over it."""
    rng = np.random.default_rng((SEED, CHANGE_SEED))
    while True:
        clip = generate_videos.draw_clip(rng, 8.0, 4 / 3)
        calm = clip.background in ("grey", "blue", "green", "yellow")
        # Seen first at 4 s, whether one or two frames a second are taken.
        if clip.kind == "changes" and calm and 3.55 < clip.event_s < 3.95:
            break
    sound = generate_speech.compose(["music", "five", "river"], bank, rng)
    samples = np.zeros(8 * SAMPLE_RATE_HZ, dtype=np.float32)
    samples[SAMPLE_RATE_HZ : SAMPLE_RATE_HZ + len(sound.samples)] = sound.samples
    words = tuple(replace(w, start_s=w.start_s + 1.0, end_s=w.end_s + 1.0) for w in sound.words)
    return Film((Shot(clip, 0.0, 8.0),), Recording(samples, words))


def videos(directory: Path, bank: Bank) -> list[Expected]:
    """Film one shot, and three shots of half a minute with phrases over their cuts."""
    made = {
        "change.mp4": change(bank),
        "shots.mp4": films.draw_film(np.random.default_rng((SEED, FILM_SEED)), bank, SHOTS_S),
    }
    lines: list[Expected] = []
    for name, film in made.items():
        films.write(film, directory / "video" / name)
        for preset, asked in instructions.VIDEO.items():
            shots = [(shot.start_s, shot.end_s, films.caption(shot, asked)) for shot in film.shots]
            answer = "\n".join(text for _, _, text in shots)
            lines.append(Expected(f"video/{name}", preset, asked, answer, shots=shots))
        lines += spoken(f"video/{name}", film.sound, ["asr-original"])
    return lines


def main() -> None:
    """Write all samples and expected.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=SAMPLES)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "nano")
    parser.add_argument("--check", action="store_true", help="ask the committed checkpoint")
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    for part in ("images", "audio", "video"):
        (directory / part).mkdir(parents=True, exist_ok=True)
    bank = load_or_record(
        arguments.work_dir / "bank-heldout.npz", heldout.BANK_SEED, heldout.TAKES_PER_VOICE
    )
    lines = [*pictures(directory), *sounds(directory, bank), *videos(directory, bank)]
    with (directory / "expected.jsonl").open("w") as out:
        for line in lines:
            row: dict[str, Any] = asdict(line)
            row = {key: value for key, value in row.items() if value}
            out.write(json.dumps(row) + "\n")
    if arguments.check:
        # Late: transformers takes seconds to import, and making samples needs none of it.
        from deploy.nano.check_samples import check

        sys.exit(check(directory))


if __name__ == "__main__":
    main()
