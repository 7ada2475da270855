"""The media stage keeps every row, in order, with a payload or a code."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

import fakes
import numpy as np
import pyarrow as pa
import pytest
from media import animated, encode, photo, png_bomb
from PIL import Image

from operators.decode_image import decode_image
from operators.errors import MediaError
from operators.fetch import Fetched, FetchError, Ref
from operators.media import Media
from operators.patchify import PATCH_VALUES, patchify, tokens
from operators.prompt import Prompt
from operators.schema import PAYLOAD, PLAN, PREPARED
from operators.settings import ImageSettings

PROMPT = replace(fakes.PROMPT, text="Describe {what}.")
IMAGE = ImageSettings(max_soft_tokens=70, max_memory_bytes=1 << 30)


class Store:
    """A fetch over a dict. A value that is an exception is raised."""

    def __init__(self, files: Mapping[str, bytes | Exception], delay_s: float = 0.0) -> None:
        self.files = files
        self.delay_s = delay_s
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()

    def __call__(self, ref: Ref) -> Fetched:
        with self.lock:
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        time.sleep(self.delay_s)
        with self.lock:
            self.busy -= 1
        value = self.files[ref.uri]
        if isinstance(value, Exception):
            raise value
        if ref.offset is not None and ref.length is not None:
            value = value[ref.offset : ref.offset + ref.length]
        return Fetched(value, 2)


def plan(uris: list[str], **columns: list[object]) -> pa.Table:
    rows = {field.name: [None] * len(uris) for field in PLAN}
    rows |= {"span_id": [f"span-{uri}" for uri in uris], "uri": uris, "fetch_uri": uris}
    rows |= columns
    return pa.table({field.name: pa.array(rows[field.name], field.type) for field in PLAN})


def run(files: Mapping[str, bytes | Exception], **options: object) -> list[dict[str, object]]:
    table = Media(Store(files), options.pop("image", IMAGE), PROMPT, **options)(plan(list(files)))
    assert table.schema == PREPARED
    table.validate(full=True)
    return table.to_pylist()


def test_a_row() -> None:
    data = encode(photo(640, 480), "JPEG")
    (row,) = run({"a.jpg": data})
    picture = decode_image(data, IMAGE)
    patches = patchify(picture.pixels, 70)
    count = tokens(480, 640, 70)
    assert row["window_media"] == [patches.values.tobytes()]
    assert (row["window_columns"], row["window_rows"]) == ([patches.columns], [patches.rows])
    assert len(row["window_media"][0]) == count * PATCH_VALUES
    assert row["window_tokens"] == [PROMPT.window(count)]
    assert [len(digest) for digest in row["window_media_hash"]] == [32]
    assert (row["width_px"], row["height_px"], row["duration_s"]) == (640, 480, None)
    assert (row["error_code"], row["error_stage"], row["error_message"]) == (None, None, None)
    assert row["attempts"] == 2
    assert row["span_id"] == "span-a.jpg"
    assert row["decode_s"] > 0
    assert row["prepare_s"] > 0
    assert row["fetch_s"] >= 0


def test_a_bad_file_of_each_kind_costs_its_own_row() -> None:
    good = encode(photo(320, 240), "JPEG")
    files: dict[str, bytes | Exception] = {
        "first.jpg": good,
        "empty.jpg": b"",
        "truncated.jpg": good[:-500],
        "text.jpg": b"this is a text\n",
        "bomb.png": png_bomb(60_000),
        "missing.jpg": FetchError("fetch.not_found", "gone", 1),
        "forbidden.jpg": FetchError("fetch.forbidden", "403", 1),
        "other.jpg": MediaError("fetch.changed", "another size"),
        "ribbon.png": encode(Image.new("L", (10_000, 10)), "PNG"),
        "animated.gif": animated("GIF"),
        "last.jpg": good,
    }
    rows = run(files)
    assert [row["uri"] for row in rows] == list(files)
    assert {row["uri"]: row["error_code"] for row in rows} == {
        "first.jpg": None,
        "empty.jpg": "decode.empty",
        "truncated.jpg": "decode.corrupt",
        "text.jpg": "decode.unsupported",
        "bomb.png": "decode.too_large",
        "missing.jpg": "fetch.not_found",
        "forbidden.jpg": "fetch.forbidden",
        "other.jpg": "fetch.changed",
        "ribbon.png": None,
        "animated.gif": None,
        "last.jpg": None,
    }
    for row in rows:
        failed = row["error_code"] is not None
        assert all((row[name] is None) == failed for name in PAYLOAD)
        assert row["fetch_s"] is not None
        assert (row["error_stage"] is not None) == failed == (row["error_message"] is not None)
    assert rows[0]["window_media_hash"] == rows[-1]["window_media_hash"]
    assert len({row["window_media_hash"][0] for row in rows if row["window_media_hash"]}) == 3


def test_failures_of_the_contained_process() -> None:
    large = encode(Image.new("L", (12_000, 12_000)), "PNG")  # 576 MB as RGB
    small = ImageSettings(max_memory_bytes=1 << 28)
    rows = run({"large.png": large, "good.png": encode(photo(64, 64), "PNG")}, image=small)
    assert [row["error_code"] for row in rows] == ["decode.out_of_memory", None]
    hasty = ImageSettings(max_memory_bytes=1 << 30, timeout_s=0.3)
    rows = run({"good.png": encode(photo(64, 64), "PNG"), "large.png": large}, image=hasty)
    assert [row["error_code"] for row in rows] == [None, "decode.timeout"]


def test_too_unequal_sides_and_too_long_prompts() -> None:
    image = ImageSettings(max_soft_tokens=1120, max_memory_bytes=1 << 30)
    rows = run({"large.png": encode(Image.new("L", (1920, 1080)), "PNG")}, image=image)
    assert rows[0]["error_code"] == "prepare.too_long"
    assert (rows[0]["width_px"], rows[0]["height_px"]) == (1920, 1080)
    assert rows[0]["window_media"] is None


def test_order_holds_and_the_next_files_are_fetched_meanwhile() -> None:
    sizes = {f"{index}.png": (50 + index, 40) for index in range(24)}
    store = Store({uri: encode(photo(*size), "PNG") for uri, size in sizes.items()}, 0.05)
    media = Media(store, IMAGE, PROMPT, concurrency=4)
    table = media(plan(list(sizes)))
    assert store.most_busy == 4
    assert table["uri"].to_pylist() == list(sizes)
    assert table["width_px"].to_pylist() == [width for width, _ in sizes.values()]


def test_part_of_a_shard() -> None:
    data = encode(photo(64, 64), "PNG")
    table = plan(["shard.tar"], fetch_offset=[512], fetch_length=[len(data)])
    out = Media(Store({"shard.tar": bytes(512) + data + bytes(512)}), IMAGE, PROMPT)(table)
    assert out["error_code"].to_pylist() == [None]


def test_variables_reach_the_prompt() -> None:
    class Asked(Prompt):
        def window(
            self, media_tokens: int, variables: Mapping[str, str] | None = None
        ) -> list[int]:
            return [len((variables or {}).get("what", ""))]

    prompt = Asked(**{name: getattr(PROMPT, name) for name in Prompt.__dataclass_fields__})
    data = encode(photo(64, 64), "PNG")
    table = plan(["a", "b"], variables=[json.dumps({"what": "seven.."}), None])
    out = Media(Store({"a": data, "b": data}), IMAGE, prompt)(table)
    assert out["window_tokens"].to_pylist() == [[[7]], [[0]]]


def test_render_engine_hands_the_file_on() -> None:
    data = encode(photo(640, 480), "JPEG")
    rows = run({"a.jpg": data, "cut.jpg": data[:-100], "text.jpg": b"text"}, render="engine")
    assert [row["error_code"] for row in rows] == [None, None, "decode.unsupported"]
    assert rows[0]["window_media"] == [data]
    assert rows[0]["window_tokens"] == [[]]
    assert (rows[0]["window_columns"], rows[0]["window_rows"]) == ([0], [0])
    assert (rows[0]["width_px"], rows[0]["height_px"]) == (640, 480)
    assert rows[0]["window_media_hash"] != rows[1]["window_media_hash"]


def test_a_broken_machine_is_no_failed_row() -> None:
    with pytest.raises(ZeroDivisionError):
        run({"a": ZeroDivisionError("not a row's doing")})


def test_no_rows_and_columns_without_a_value() -> None:
    media = Media(Store({"a": b""}), IMAGE, PROMPT)
    assert media(plan([])).equals(PREPARED.empty_table())
    table = plan(["a"])
    untyped = table.set_column(table.schema.get_field_index("version"), "version", pa.nulls(1))
    assert media(untyped).schema == PREPARED


def test_pickled_after_use_and_run_elsewhere() -> None:
    media = Media(Plain(encode(photo(64, 64), "PNG")), IMAGE, PROMPT)
    media(plan(["a"]))
    copy = pickle.loads(pickle.dumps(media))
    assert copy(plan(["a"])).num_rows == 1


class Plain:
    """Any reference gives the same bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __call__(self, ref: Ref) -> Fetched:
        return Fetched(self.data, 1)


def test_the_worker_itself_imports_neither_torch_nor_ray() -> None:
    check = "import sys, operators.media; print([m for m in ('torch', 'ray') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, env=environment, check=True
    )
    assert done.stdout.strip() == b"[]"


def test_payload_is_what_the_engine_can_view() -> None:
    data = encode(photo(64, 64), "PNG")
    table = Media(Plain(data), IMAGE, PROMPT)(plan(["a", "b"]))
    media = table["window_media"].combine_chunks().flatten()
    grid = np.frombuffer(media[1].as_buffer(), np.uint8).reshape(-1, PATCH_VALUES)
    assert len(grid) == 64
