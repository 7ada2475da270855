"""How a recording is cut into spans: its header, on a CPU worker. The last step of the plan."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pyarrow as pa

from operators.errors import MediaError
from operators.fetch import Ref
from operators.local_files import LocalFile
from operators.probe import probe_audio
from operators.schema import DIVIDED
from operators.settings import AudioSettings
from operators.windows import spans


class DivideAudio:
    """Batch callable: FOUND -> DIVIDED, one row a span.

    What cannot be read is one span: the media stage then meets the same fault, and gives it its code.
    """

    def __init__(
        self,
        files: Callable[[Ref, str | None], AbstractContextManager[LocalFile]],
        audio: AudioSettings,
    ) -> None:
        self._files = files
        self._audio = audio

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = [row for asset in table.to_pylist() for row in self._rows(asset)]
        return pa.Table.from_pylist(rows, schema=DIVIDED)

    def _rows(self, asset: dict[str, Any]) -> list[dict[str, Any]]:
        ref = Ref(
            asset["fetch_uri"], asset["fetch_offset"], asset["fetch_length"], asset["size_bytes"]
        )
        found: list[tuple[float | None, float | None]]
        try:
            with self._files(ref, asset["version"]) as file:
                found = [*spans(probe_audio(file.path, self._audio).duration_s, self._audio)]
        except MediaError:
            found = [(None, None)]
        return [
            {
                "asset_id": asset["asset_id"],
                "span_index": index,
                "span_count": len(found),
                "span_start_s": start_s,
                "span_end_s": end_s,
            }
            for index, (start_s, end_s) in enumerate(found)
        ]
