"""Ask the committed checkpoint for every sample and compare with expected.jsonl.

Asked under both attention masks: transformers and vLLM on GPUs let a picture's patches see each
other, vLLM on CPUs is causal.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deploy.nano import prepare
from deploy.nano.answers import Transformers
from deploy.nano.espeak import SAMPLE_RATE_HZ
from deploy.nano.generate_speech import Waveform
from deploy.nano.prepare import Prepared
from operators.sample_frames import sample_times

CHECKPOINT = Path(__file__).resolve().parent / "checkpoint"
# As films.write makes videos.
SIZE = (320, 240)
FPS = 10
# A phrase of the long recording ends where the next word is this far away, in s.
PHRASE_GAP_S = 0.75
MARGIN_S = 0.1


def decode_sound(path: Path) -> Waveform:
    """Decode to mono float32 at 16 kHz."""
    command = ["ffmpeg", "-loglevel", "error", "-i", str(path), "-f", "f32le", "-ac", "1"]
    command += ["-ar", str(SAMPLE_RATE_HZ), "-"]
    done = subprocess.run(command, capture_output=True, check=True)  # noqa: S603
    return np.frombuffer(done.stdout, dtype=np.float32).copy()


def decode_frames(path: Path, width: int, height: int, fps: float) -> NDArray[np.uint8]:
    """Decode every frame of a video of `fps` frames a second: RGB [n, height, width, 3]."""
    command = ["ffmpeg", "-loglevel", "error", "-i", str(path), "-r", str(fps)]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True)  # noqa: S603
    return np.frombuffer(done.stdout, dtype=np.uint8).reshape(-1, height, width, 3)


def phrases(words: list[tuple[str, float, float]]) -> list[tuple[float, float]]:
    """Return (start, end) in s of the stretches of speech."""
    spans: list[tuple[float, float]] = []
    for _, start_s, end_s in words:
        if spans and start_s - spans[-1][1] < PHRASE_GAP_S:
            spans[-1] = (spans[-1][0], end_s)
        else:
            spans.append((start_s, end_s))
    return spans


def requests(directory: Path, row: dict[str, Any]) -> list[Prepared]:
    """Return the requests of a line: joined by spaces (shots: lines), their answers are its answer."""
    path, asked = directory / row["file"], row["instruction"]
    if row["preset"].startswith("asr"):
        samples = decode_sound(path)
        cuts = []
        for start_s, end_s in phrases(row["words"]):
            begin = max(0, int((start_s - MARGIN_S) * SAMPLE_RATE_HZ))
            cuts.append(samples[begin : int((end_s + MARGIN_S) * SAMPLE_RATE_HZ)])
        return [prepare.of_audio(cut, asked) for cut in cuts]
    if row["file"].startswith("video"):
        frames = decode_frames(path, *SIZE, FPS)
        prepared = []
        for start_s, end_s, _ in row["shots"]:
            stamps_s = sample_times(start_s, end_s, 1.0, 32)
            shown = [frames[int(stamp_s * FPS)] for stamp_s in stamps_s]
            prepared.append(prepare.of_video(shown, stamps_s, asked))
        return prepared
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return [prepare.of_image(pixels, 280, asked), prepare.of_image(pixels, 70, asked)]


def check(directory: Path) -> int:
    """Print every difference; return how many lines of expected.jsonl differ."""
    models = [Transformers(CHECKPOINT), Transformers(CHECKPOINT, causal=True)]
    wrong = 0
    for line in (directory / "expected.jsonl").read_text().splitlines():
        row = json.loads(line)
        answers = []
        for model in models:
            said = [model.answer(request) for request in requests(directory, row)]
            between = "\n" if "shots" in row else " "
            answers += said if row["file"].startswith("images") else [between.join(said)]
        if any(answer != row["answer"] for answer in answers):
            wrong += 1
            sys.stdout.write(f"{row['file']} {row['preset']}: {row['answer']!r}, got {answers}\n")
    sys.stdout.write(f"{wrong} of the samples' answers differ\n")
    return wrong
