"""How right the nano checkpoint's answers are on long material, and whether spans change them.

    python tests/bench/bench_accuracy.py recording --hours 2
    python tests/bench/bench_accuracy.py films --count 12 --shots 24 --shortest 5 --longest 6

recording   a generated recording among noise and silence, at spans of 30, 120 and 300 s: word errors, words
            outside of their segment by more than 0.3 s, and whether the transcripts are the same
films       generated videos with words over them: captions that are right, and with times within a
            sampling step; word errors

Both end with 1 where more than 5 % of the words or captions are wrong, spans change an answer, or a word lies
outside.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from answers import go, outside, rows, same, words  # noqa: E402

from deploy.nano import films, generate_speech  # noqa: E402
from deploy.nano.speech_bank import record  # noqa: E402
from operators.score import Edits  # noqa: E402

CHECKPOINT = ROOT / "deploy" / "nano" / "checkpoint"
# Words of training have other seeds.
BANK_SEED = 4711
LEAST = 0.95
MOST_ERRORS = 0.05


def told(edits: Edits) -> str:
    return (
        f"{edits.rate:.2%} errors in {edits.reference} words ({edits.substitutions} wrong,"
        f" {edits.deletions} missing, {edits.insertions} never said)"
    )


def recording(asked: argparse.Namespace, folder: Path) -> bool:
    bank = record(seed=BANK_SEED, per_voice=1)
    rng = np.random.default_rng(asked.seed)
    between = generate_speech.WITH_MUSIC if asked.music else generate_speech.BETWEEN
    talk = generate_speech.long_recording(bank, rng, asked.hours * 3600, between=between)
    (folder / "in").mkdir()
    films.write_wav(folder / "in" / "talk.wav", talk.samples)
    print(f"{talk.duration_s:.0f} s, {len(talk.words)} words", flush=True)
    found, well = [], True
    for span_s in (30, 120, 300):
        started = time.monotonic()
        finished = go(
            CHECKPOINT,
            task="transcribe",
            input={"uri": str(folder / "in")},
            output={"uri": str(folder / f"out-{span_s}")},
            audio={"span_s": span_s, "window_s": asked.window_s},
        )
        (row,) = rows(finished)
        edits = words(talk, row["text"])
        lost = outside(talk.words, row["segments"])
        well = well and edits.rate <= MOST_ERRORS and not lost and row["status"] == "ok"
        found.append((row["text"], row["segments"]))
        print(
            f"spans of {span_s} s: {row['status']}, {finished.accounts['spans']['planned']} spans,"
            f" {told(edits)}, {len(lost)} outside {lost},"
            f" {time.monotonic() - started:.0f} s",
            flush=True,
        )
    unchanged = all(other == found[0] for other in found)
    print("the same whatever the spans" if unchanged else "spans CHANGE the transcript")
    return well and unchanged


def of_films(asked: argparse.Namespace, folder: Path) -> bool:
    bank = record(seed=BANK_SEED, per_voice=1)
    (folder / "in").mkdir()
    drawn = {}
    for seed in range(asked.seed, asked.seed + asked.count):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(asked.shortest, asked.longest + 1, asked.shots)
        film = films.draw_film(rng, bank, [int(length) for length in lengths])
        drawn[f"{seed}.mp4"] = film
        films.write(film, folder / "in" / f"{seed}.mp4")
    finished = go(
        CHECKPOINT,
        task="describe-video",
        input={"uri": str(folder / "in")},
        output={"uri": str(folder / "out")},
        video={"transcribe": True},
        audio={"window_s": asked.window_s},
    )
    shots, exact, near, edits = 0, 0, 0, Edits()
    for row in rows(finished):
        film = drawn[Path(row["uri"]).name]
        if len(row["segments"]) != len(film.shots):
            print(f"{row['uri']}: {len(row['segments'])} segments of {len(film.shots)} shots")
            return False
        for segment, shot in zip(row["segments"], film.shots, strict=True):
            caption = films.caption(shot)
            shots += 1
            exact += segment["text"] == caption
            near += same(segment["text"], caption)
            if segment["text"] != caption:
                print(f"{row['uri']} {segment['start_s']:.1f} s: {segment['text']} | {caption}")
        edits += words(film.sound, row["transcript"])
    print(f"{shots} shots: {exact} exact, {near} with times within a step; {told(edits)}")
    return near >= LEAST * shots and edits.rate <= MOST_ERRORS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(required=True)
    one = kinds.add_parser("recording")
    one.add_argument("--hours", type=float, default=2.0)
    one.add_argument(
        "--music", action="store_true", help="between phrases, beside noise and silence"
    )
    one.set_defaults(run=recording, seed=77)
    other = kinds.add_parser("films")
    other.add_argument("--count", type=int, default=12)
    other.add_argument("--shots", type=int, default=24)
    other.add_argument("--shortest", type=int, default=5)
    other.add_argument("--longest", type=int, default=6)
    other.set_defaults(run=of_films, seed=21)
    for kind in (one, other):
        kind.add_argument("--window-s", type=float, default=15.0)
        kind.add_argument("--seed", type=int, default=argparse.SUPPRESS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        sys.exit(0 if asked.run(asked, Path(name)) else 1)


if __name__ == "__main__":
    main()
