"""Every column of the way, once: its Arrow type, its unit, and who writes it.

    FOUND     an asset as the listing or the manifest names it          pipeline/source.py
    DIVIDED   an asset's spans                                          operators/divide.py
    PLAN      a span of work, from the plan to the ledger               pipeline/plan.py
    PREPARED  what the media stage adds; payload columns leave early    operators/media.py
    ANSWERS   what the engine adds                                      operators/generate.py
    LEDGER    a finished span                                           operators/parse.py
    RESULTS   one row an asset                                          pipeline/assemble.py
    FAILED    one row a failed span                                     pipeline/assemble.py

A span has one or more windows (an image: one); columns named `window_*` are lists with one entry each.
"""

from __future__ import annotations

import pyarrow as pa

SEGMENT = pa.struct(
    [
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("text", pa.string()),
        # with audio.channel: each, the channel that it was said on, from 0; else null
        ("channel", pa.int32()),
    ]
)

# The version of a file that a manifest names and the store does not have.
MISSING = "missing"

FOUND = pa.schema(
    [
        # 32 hex digits: hash of uri, version and, where a manifest gives them, source_id and variables
        ("asset_id", pa.string()),
        # as results show it; a tar member is `tar://member::shard`
        ("uri", pa.string()),
        # where the bytes are: the uri itself, or a tar shard with offset and length (bytes)
        ("fetch_uri", pa.string()),
        ("fetch_offset", pa.int64()),
        ("fetch_length", pa.int64()),
        # etag, or "size-mtime", or "" where the source gives neither
        ("version", pa.string()),
        ("size_bytes", pa.int64()),
        ("modality", pa.string()),
        # the manifest's id column, null without one
        ("source_id", pa.string()),
        # prompt variables of the manifest as a JSON object of strings, null without any
        ("variables", pa.string()),
    ]
)

SPAN = [
    # among all spans of the asset
    ("span_index", pa.int32()),
    ("span_count", pa.int32()),
    # how many spans each track has, as in 2+3
    ("division", pa.string()),
    # what of the asset the span is about (operators/tracks.py), and its place among the track's
    ("track", pa.string()),
    ("track_index", pa.int32()),
    ("track_count", pa.int32()),
    # nominal; the cut lies in the best pause nearby
    ("span_start_s", pa.float64()),
    ("span_end_s", pa.float64()),
]

DIVIDED = pa.schema([("asset_id", pa.string()), *SPAN])

PLAN = pa.schema(
    [
        # asset_id-index-division: another division is another span
        ("span_id", pa.string()),
        *SPAN,
        *FOUND,
    ]
)

ERROR = [("error_code", pa.string()), ("error_stage", pa.string()), ("error_message", pa.string())]

PREPARED = pa.schema(
    [
        *PLAN,
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
        ("duration_s", pa.float64()),
        *ERROR,
        ("attempts", pa.int32()),
        # where each window lies in the source's own time line; no windows: nothing was said
        ("window_start_s", pa.list_(pa.float64())),
        ("window_end_s", pa.list_(pa.float64())),
        # CPU-worker seconds: fetch waits for the store, the others are busy time
        ("fetch_s", pa.float64()),
        ("decode_s", pa.float64()),
        ("prepare_s", pa.float64()),
        # the payload. prompt token ids with expanded placeholders
        ("window_tokens", pa.list_(pa.list_(pa.int32()))),
        # image, video: uint8 [n, 6912] patches, row-major. audio: float32 [frames, 640] at 16 kHz.
        # render=engine: the file's own bytes.
        # A binary, not Ray's ragged tensor: as fast (3.4 against 3.3 GB/s), one form in every block,
        # and a list of them per row is plain Arrow.
        ("window_media", pa.list_(pa.large_binary())),
        # image: the patch grid. audio: frames, 1
        ("window_columns", pa.list_(pa.int32())),
        ("window_rows", pa.list_(pa.int32())),
        ("window_media_hash", pa.list_(pa.string())),
    ]
)

PAYLOAD = ["window_tokens", "window_media", "window_columns", "window_rows", "window_media_hash"]

ANSWER = pa.struct(
    [
        ("text", pa.string()),
        ("finish_reason", pa.string()),  # stop | length | repetition, null where refused
        ("prompt_tokens", pa.int32()),
        ("media_tokens", pa.int32()),
        ("output_tokens", pa.int32()),
        # a window that the engine refused
        ("error_code", pa.string()),
        ("error_message", pa.string()),
    ]
)

ANSWERS = pa.schema(
    [
        *[field for field in PREPARED if field.name not in PAYLOAD],
        ("window_answers", pa.list_(ANSWER)),
        # seconds from hand-over to the last window's last token; queueing in the engine included
        ("generate_s", pa.float64()),
    ]
)

ANSWER_FIELDS = [
    ("status", pa.string()),
    ("text", pa.string()),
    ("language", pa.string()),
    ("segments", pa.list_(SEGMENT)),
    ("structured", pa.string()),
    ("finish_reason", pa.string()),
    ("prompt_tokens", pa.int64()),
    ("media_tokens", pa.int64()),
    ("output_tokens", pa.int64()),
]

LEDGER = pa.schema(
    [
        # without fetch_uri, which may hold a signature, and without the answers as they came
        *[
            field
            for field in ANSWERS
            if not field.name.startswith(("fetch_uri", "fetch_offset", "fetch_length", "window_"))
            and field.name != "variables"
        ],
        *ANSWER_FIELDS,
        # a failed span may keep a part of its text
        ("has_text", pa.bool_()),
        # false: failed for a reason that may pass; the next run asks again
        ("sealed", pa.bool_()),
        ("run_id", pa.string()),
        ("finished_at", pa.timestamp("us", tz="UTC")),
    ]
)

RESULTS = pa.schema(
    [
        ("asset_id", pa.string()),
        ("uri", pa.string()),
        ("source_id", pa.string()),
        ("version", pa.string()),
        ("modality", pa.string()),
        ("status", pa.string()),  # ok | empty | partial | failed
        ("text", pa.string()),
        # as the job or the manifest says; nothing tells it from the sound
        ("language", pa.string()),
        ("segments", pa.list_(SEGMENT)),
        # a video's sound; of a recording, text and segments are that
        ("transcript", pa.string()),
        ("transcript_segments", pa.list_(SEGMENT)),
        # JSON: the list of tags (preset tags), or translations with their times (audio.translate_to)
        ("structured", pa.string()),
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
        ("duration_s", pa.float64()),
        ("model", pa.string()),
        ("model_revision", pa.string()),
        ("prompt_name", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("media_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
        # of the first span that failed; the message is that of all of them
        *ERROR,
        # the most that a span's file took
        ("attempts", pa.int32()),
        # the newest that worked on it
        ("run_id", pa.string()),
    ]
)

FAILED = pa.schema(
    [
        ("span_id", pa.string()),
        ("asset_id", pa.string()),
        ("uri", pa.string()),
        ("source_id", pa.string()),
        ("track", pa.string()),
        ("span_index", pa.int32()),
        ("span_start_s", pa.float64()),
        ("span_end_s", pa.float64()),
        *ERROR,
        ("attempts", pa.int32()),
        ("sealed", pa.bool_()),
        ("run_id", pa.string()),
    ]
)
