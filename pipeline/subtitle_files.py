"""Transcripts and captions as files: OUTPUT/<fingerprint>/subtitles, a few small objects an asset.

    NAME.json          the asset's texts with their times
    NAME.vtt, .srt     what is said; with audio.channel: each a pair a channel, NAME.c0.vtt and so on
    NAME.chapters.vtt  a video's captions

NAME is the file's own and the start of asset_id, so that files of one name in two folders both fit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from operators.stitch import Segment
from operators.subtitles import chapters, cues, srt, webvtt
from pipeline.lease import LeasedStore
from pipeline.source_rows import path_in
from pipeline.store import Store

FOLDER = "subtitles"
ID_CHARS = 12
# Of 255 that a file's name may have; the longest ending and a temporary name's take 64.
STEM_BYTES = 160
# A store takes some milliseconds for each object. The lease, which is one more, is asked for so many
# assets at once: some seconds.
THREADS, ASSETS_A_LEASE = 16, 256
# The columns of results that they are made of, and that the JSON file holds.
SUBTITLED = ["asset_id", "uri", "source_id", "modality", "status", "language", "duration_s"]
SUBTITLED += ["text", "segments", "transcript", "transcript_segments"]


def write_subtitles(store: LeasedStore, results: pa.Table) -> None:
    """The files of every asset that says or shows something."""
    with ThreadPoolExecutor(THREADS) as pool:
        for batch in results.to_batches(ASSETS_A_LEASE):
            rows = [r for r in batch.to_pylist() if r["segments"] or r["transcript_segments"]]
            for _ in pool.map(partial(_write, store.held()), rows):
                pass


def drop_subtitles(store: Store, assets: Set[str]) -> None:
    """Away with the files of assets whose results are replaced."""
    if assets:
        gone = {asset_id[:ID_CHARS] for asset_id in assets}
        found = store.names(FOLDER)
        store.delete([name for name in found if name.rpartition("-")[2].partition(".")[0] in gone])


def _write(store: Store, row: dict[str, Any]) -> None:
    stem = re.sub(r"[^\w.-]", "_", PurePosixPath(path_in(row["uri"])).stem)
    stem = stem.encode()[:STEM_BYTES].decode(errors="ignore")
    name = f"{FOLDER}/{stem}-{row['asset_id'][:ID_CHARS]}"
    store.write(f"{name}.json", json.dumps(row, ensure_ascii=False, indent=1).encode())
    spoken = row["segments"]
    if row["modality"] == "video":
        spoken = row["transcript_segments"]
        if row["segments"]:
            captions = [_segment(segment) for segment in row["segments"]]
            store.write(f"{name}.chapters.vtt", chapters(captions).encode())
    channels: dict[int | None, list[Segment]] = {}
    for segment in spoken or ():
        channels.setdefault(segment["channel"], []).append(_segment(segment))
    for channel, segments in channels.items():
        made = cues(segments)
        whole = name if channel is None else f"{name}.c{channel}"
        store.write(f"{whole}.vtt", webvtt(made).encode())
        store.write(f"{whole}.srt", srt(made).encode())


def _segment(row: dict[str, Any]) -> Segment:
    return Segment(row["start_s"], row["end_s"], row["text"])
