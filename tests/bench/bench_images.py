"""CPU milliseconds an image by stage, beside transformers' processor.

    python tests/bench/bench_images.py

One core, one thread, in a new random order each round: other load on the machine, and what the step
before left in the caches, then meet every step. Figures are medians of CPU time, not of the clock.
"hand-over" is what worker and contained child each spend to pass the file in and the patches out.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from media import encode, photo  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import Gemma4UnifiedImageProcessor  # noqa: E402

from operators.contain import ENVIRONMENT, Contained  # noqa: E402
from operators.decode_image import decode_image  # noqa: E402
from operators.patchify import PATCH_VALUES, patchify, target_size, tokens  # noqa: E402
from operators.prepare_image import media_hash  # noqa: E402
from operators.settings import ImageSettings  # noqa: E402

SIZES = [(640, 480), (1920, 1080), (4000, 3000)]
# after decode, on one core
GOAL_MS = {(640, 480): 1.5, (1920, 1080): 3.0, (4000, 3000): 9.0}

ROWS = [
    *["decode", "decode, scaled", "decode, Pillow alone", "resize and patchify", "patchify alone"],
    *["hash", "after decode", "transformers after decode", "transformers / ours"],
    *["hand-over, worker", "hand-over, child"],
]


def cpu_ms(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    before = clock()
    work()
    return (clock() - before) * 1e3


def measure(size: tuple[int, int], budget: int, rounds: int, child: Contained) -> dict[str, float]:
    """Median CPU ms by stage."""
    data = encode(photo(*size), "JPEG", quality=90)
    settings = ImageSettings(max_soft_tokens=budget)
    scaled = ImageSettings(max_soft_tokens=budget, scaled_decode=True)
    processor = Gemma4UnifiedImageProcessor(max_soft_tokens=budget)
    pixels = decode_image(data, settings).pixels
    count = tokens(size[1], size[0], budget)
    target = target_size(size[1], size[0], budget)
    resized = np.zeros((*target, 3), np.uint8)
    patches = patchify(pixels, budget)
    opened = Image.fromarray(pixels)

    def hand_over() -> None:
        child.submit(len, data, timeout_s=60).result()
        child.submit(np.zeros, count * PATCH_VALUES, np.uint8, timeout_s=60).result()

    def child_clock() -> float:
        return child.submit(time.process_time, timeout_s=60).result()

    def theirs_decode() -> None:
        Image.open(io.BytesIO(data)).convert("RGB").load()

    def our_patchify() -> None:
        patchify(pixels, budget)

    def our_cut() -> None:
        patchify(resized, budget)

    def our_hash() -> None:
        media_hash(patches.values.data, patches.columns, patches.rows)

    steps: dict[str, Callable[[], object]] = {
        "decode": lambda: decode_image(data, settings),
        "decode, scaled": lambda: decode_image(data, scaled),
        "decode, Pillow alone": theirs_decode,
        "resize and patchify": our_patchify,
        "patchify alone": our_cut,
        "hash": our_hash,
        "hand-over, worker": hand_over,
        "transformers after decode": lambda: processor(opened, return_tensors="pt"),
    }
    taken = defaultdict(list)
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(steps), len(steps)):
            taken[name].append(cpu_ms(steps[name]))
        taken["hand-over, child"].append(cpu_ms(hand_over, child_clock))
    figures = {name: statistics.median(values) for name, values in taken.items()}
    ours = [sum(pair) for pair in zip(taken["resize and patchify"], taken["hash"], strict=True)]
    figures["after decode"] = statistics.median(ours)
    ratios = [
        theirs / mine for theirs, mine in zip(taken["transformers after decode"], ours, strict=True)
    ]
    figures["transformers / ours"] = statistics.median(ratios)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--budget", type=int, default=280)
    asked = parser.parse_args()
    if not ENVIRONMENT.items() <= os.environ.items():
        # both sides as in the contained child; the allocator reads its settings only at the start
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    child = Contained(1 << 30, ["numpy"])
    figures = {size: measure(size, asked.budget, asked.rounds, child) for size in SIZES}
    child.close()
    print(f"CPU ms an image, budget {asked.budget}, median of {asked.rounds} rounds\n")
    print("| stage | " + " | ".join(f"{width}x{height}" for width, height in SIZES) + " |")
    print("|---|" + "---|" * len(SIZES))
    for name in ROWS:
        print(f"| {name} | " + " | ".join(f"{figures[size][name]:.2f}" for size in SIZES) + " |")
    print("| goal after decode | " + " | ".join(f"{GOAL_MS[size]:.1f}" for size in SIZES) + " |")


if __name__ == "__main__":
    main()
