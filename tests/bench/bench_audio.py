"""CPU seconds an hour of sound: probe, decode, voice detection, cuts and frames; and peak memory.

    python tests/bench/bench_audio.py --hours 1
    python tests/bench/bench_audio.py --hours 10 --formats mp3 --spans 12

The recording is ten minutes of espeak-ng's words with pauses, repeated. Each span is prepared on its
own, as workers do; with --spans so many, evenly spread. The goal is 60 times real time on one core.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from sound import spoken, write  # noqa: E402

from operators.frames import frames  # noqa: E402
from operators.media_audio import hear, read_tiles  # noqa: E402
from operators.probe import probe_audio  # noqa: E402
from operators.settings import AudioSettings  # noqa: E402
from operators.voice import speech_probabilities  # noqa: E402
from operators.windows import LEADS, grid  # noqa: E402

GOAL = 60
PIECE_S = 600
FORMATS = {
    "wav": ("-ar", "44100", "-ac", "2"),
    "flac": ("-ar", "44100", "-ac", "2"),
    "mp3": ("-ar", "44100", "-ac", "2", "-b:a", "128k"),
    "m4a": ("-ar", "44100", "-ac", "2", "-b:a", "128k"),
    "opus": ("-c:a", "libopus", "-b:a", "48k", "-ac", "2"),
}


def cpu_s(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def mb(who: int) -> float:
    return resource.getrusage(who).ru_maxrss / 1024


def measure(path: Path, settings: AudioSettings, spans: int) -> dict[str, float]:
    """CPU seconds an hour of sound for each stage, over the spans asked for."""
    sound = probe_audio(str(path), settings)
    found = grid(sound.duration_s, settings)
    chosen = range(0, found.spans, max(1, found.spans // spans)) if spans else range(found.spans)
    taken = dict.fromkeys(("probe", "decode", "voice", "cuts, zeros", "frames"), 0.0)
    heard_s = windows = tokens = 0
    for index in chosen:
        started = cpu_s(resource.RUSAGE_CHILDREN)
        probe_audio(str(path), settings)
        probed = cpu_s(resource.RUSAGE_CHILDREN)
        own = time.process_time()
        pieces = read_tiles(str(path), sound, found, found.span(index), settings, "mix")
        read = time.process_time() - own
        decoded = cpu_s(resource.RUSAGE_CHILDREN)
        own = time.process_time()
        for tile, _ in product(pieces.tiles.values(), LEADS):
            speech_probabilities(tile.samples)
        voice = time.process_time() - own
        own = time.process_time()
        heard = hear(pieces, found, found.span(index), settings)
        cuts = time.process_time() - own
        own = time.process_time()
        for window in heard.windows:
            tokens += len(frames(window.samples))
        taken["frames"] += time.process_time() - own
        taken["probe"] += probed - started
        # reading the pipe is ours, voice detection is within it as well
        taken["decode"] += decoded - probed + max(0.0, read - voice)
        taken["voice"] += voice
        taken["cuts, zeros"] += cuts
        windows += len(heard.windows)
        heard_s += len(found.span(index)) * found.step * 512 / 16_000
    figures = {name: seconds / heard_s * 3600 for name, seconds in taken.items()}
    figures["all"] = sum(figures.values())
    figures["x real time"] = 3600 / figures["all"]
    figures["tokens a minute"] = tokens / heard_s * 60
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=1)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--spans", type=int, default=0, help="0: all")
    parser.add_argument("--span-s", type=float, default=300)
    asked = parser.parse_args()
    settings = AudioSettings(span_s=asked.span_s)
    names = asked.formats.split(",")
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        sound = spoken(PIECE_S).samples
        for name in names:
            piece = write(Path(folder) / f"piece.{name}", sound, *FORMATS[name])
            path = Path(folder) / f"a.{name}"
            loops = str(round(asked.hours * 3600 / PIECE_S) - 1)
            looped = ["-stream_loop", loops, "-i", str(piece), "-c", "copy", str(path)]
            subprocess.run(["ffmpeg", "-v", "error", *looped], check=True)
            before = mb(resource.RUSAGE_SELF)
            figures[name] = measure(path, settings, asked.spans)
            figures[name]["MB more at its peak"] = mb(resource.RUSAGE_SELF) - before
            path.unlink()
    rows = list(next(iter(figures.values())))
    print(f"CPU s an hour of sound; {asked.hours:g} h, spans of {asked.span_s:g} s\n")
    print("| stage | " + " | ".join(names) + " |")
    print("|---|" + "---|" * len(names))
    for row in rows:
        print(f"| {row} | " + " | ".join(f"{figures[name][row]:.1f}" for name in names) + " |")
    print(f"\nthis process at most {mb(resource.RUSAGE_SELF):.0f} MB")
    slowest = min(found["x real time"] for found in figures.values())
    if slowest < GOAL:
        sys.exit(f"{slowest:.0f} times real time; the goal is {GOAL}")


if __name__ == "__main__":
    main()
