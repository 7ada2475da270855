"""CPU seconds for 32 frames of a video: our way, an fps filter, PyAV with seeks, vLLM's own loader.

    pip install av==18.1.0
    python tests/bench/bench_video.py --codecs h264,hevc,vp9,av1

A clip of 20 s with four moving scenes is encoded and repeated: five minutes of 720p (H.264), an hour of
1080p in each codec. What decodes everything is timed on the first --prefix seconds and scaled (~). Also:
what shots cost over the first --prefix seconds. PyAV is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from vllm.multimodal.video import VideoBackend  # noqa: E402

from operators.decode_video import decode_frames  # noqa: E402
from operators.find_cuts import find_cuts  # noqa: E402
from operators.patchify import target_size  # noqa: E402
from operators.probe_video import probe_video  # noqa: E402
from operators.sample_frames import sample_times  # noqa: E402
from operators.settings import VideoSettings  # noqa: E402

FRAMES = 32
CLIP_S = 20
SETTINGS = VideoSettings(timeout_s=3600)
KEYS = VideoSettings(timeout_s=3600, exact_times=False)
CODECS = {
    "h264": ("mp4", "-c:v", "libx264", "-preset", "veryfast", "-b:v", "1500k"),
    "hevc": ("mp4", "-c:v", "libx265", "-preset", "ultrafast", "-b:v", "1500k"),
    "vp9": (
        "webm",
        "-c:v",
        "libvpx-vp9",
        "-deadline",
        "realtime",
        "-cpu-used",
        "8",
        "-b:v",
        "1500k",
    ),
    "av1": ("mp4", "-c:v", "libsvtav1", "-preset", "12", "-b:v", "1500k"),
}
SCENES = (
    "testsrc2=s=480x270:r=25:d=5",
    "mandelbrot=s=480x270:r=25",
    "smptebars=s=480x270:r=25",
    "life=s=480x270:r=25",
)


def make(folder: Path, codec: str, size: str, length_s: int) -> Path:
    suffix, *options = CODECS[codec]
    # drawn small: at 1080p that took longer than the rest
    inputs = [part for scene in SCENES for part in ("-f", "lavfi", "-i", scene)]
    scaled = f"scale={size.replace('x', ':')},setsar=1,format=yuv420p"
    trims = "".join(f"[{n}:v]trim=duration=5,{scaled}[v{n}];" for n in range(4))
    graph = f"{trims}[v0][v1][v2][v3]concat=n=4[v]"
    clip, path = folder / f"clip.{suffix}", folder / f"{codec}-{size}-{length_s}.{suffix}"
    encode = ["-filter_complex", graph, "-map", "[v]", *options, str(clip)]
    subprocess.run(["ffmpeg", "-v", "error", "-y", *inputs, *encode], check=True, stderr=-3)
    loops = ["-stream_loop", str(length_s // CLIP_S - 1), "-i", str(clip), "-c", "copy", str(path)]
    subprocess.run(["ffmpeg", "-v", "error", "-y", *loops], check=True)
    return path


def ours(path: Path, settings: VideoSettings = SETTINGS) -> None:
    facts = probe_video(str(path), settings)
    width, height = facts.display_size
    rows, columns = target_size(height, width, 70)
    times_s = sample_times(facts.start_s, facts.duration_s, 1, FRAMES)
    found = decode_frames(str(path), facts, times_s, settings, (columns, rows))
    assert len(found) == FRAMES


def fps_filter(path: Path) -> None:
    facts = probe_video(str(path), SETTINGS)
    filters = f"fps={FRAMES / facts.duration_s},scale=528:288:flags=bicubic"
    command = ["ffmpeg", "-v", "error", "-threads", "1", "-i", str(path), "-vf", filters]
    subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], check=True, stdout=-3)


def pyav(path: Path) -> None:
    import av

    facts = probe_video(str(path), SETTINGS)
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        stream.thread_type = "NONE"
        assert stream.time_base is not None
        for time_s in sample_times(facts.start_s, facts.duration_s, 1, FRAMES):
            file.seek(int(time_s / stream.time_base), stream=stream)
            for frame in file.decode(stream):
                if frame.time >= time_s - 0.04:
                    frame.to_ndarray(format="rgb24", width=528, height=288)
                    break


class NoFramesError(Exception):
    """A loader that has no decoder for the file, and does not say so."""


def vllm_loader(path: Path) -> None:
    frames, _ = VideoBackend.load_bytes(path.read_bytes(), num_frames=FRAMES)
    if len(frames) == 0:
        raise NoFramesError


def shots(path: Path) -> None:
    facts = probe_video(str(path), SETTINGS)
    find_cuts(str(path), facts, 0, facts.duration_s, SETTINGS)


def cpu_s() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def timed(function: Callable[[Path], None], path: Path) -> tuple[float, float]:
    started, began = cpu_s(), time.perf_counter()
    function(path)
    return cpu_s() - started, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codecs", default=",".join(CODECS))
    parser.add_argument("--hours", type=float, default=1)
    parser.add_argument("--prefix", type=int, default=60)
    asked = parser.parse_args()
    seeking: dict[str, Callable[[Path], None]] = {
        "ours": ours,
        "ours, key frames": lambda path: ours(path, KEYS),
    }
    try:
        import av  # noqa: F401
    except ImportError:
        print("PyAV is not installed")
    else:
        seeking["PyAV with seeks"] = pyav
    whole = {"fps filter": fps_filter, "vLLM's loader": vllm_loader}
    columns = ["5 min 720p h264"]
    columns += [f"{asked.hours:g} h 1080p {codec}" for codec in asked.codecs.split(",")]
    figures: dict[str, dict[str, str]] = {name: {} for name in [*seeking, *whole, "shots, an hour"]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for column in columns:
            codec = column.split()[-1]
            size, length_s = (
                ("1280x720", 300) if "720p" in column else ("1920x1080", round(asked.hours * 3600))
            )
            path = make(folder, codec, size, length_s)
            for label, function in seeking.items():
                figures[label][column] = f"{timed(function, path)[0]:.1f}"
            path.unlink()
            prefix_s = min(asked.prefix, length_s)
            path = make(folder, codec, size, prefix_s)
            for label, function in whole.items():
                try:
                    taken_s = timed(function, path)[0]
                except NoFramesError:
                    figures[label][column] = "no frames"
                else:
                    figures[label][column] = f"~{taken_s * length_s / prefix_s:.0f}"
            figures["shots, an hour"][column] = f"~{timed(shots, path)[0] * 3600 / prefix_s:.0f}"
            path.unlink()
            print(
                column,
                {label: row[column] for label, row in figures.items() if column in row},
                flush=True,
            )
    print(f"\nCPU seconds for {FRAMES} frames\n")
    print("| | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for label, row in figures.items():
        print(f"| {label} | " + " | ".join(row[column] for column in columns) + " |")
    for column in columns:
        ratio = float(figures["ours"][column]) / float(figures["fps filter"][column].lstrip("~"))
        if ratio > 1:
            sys.exit(f"{column}: our way takes {ratio:.2f} times an fps filter")


if __name__ == "__main__":
    main()
