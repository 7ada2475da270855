"""Which files of transcripts lie beside the results, and what they are called."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable

from nights import Night, Row, answered
from rich.console import Console

from jobs.table import print_answers
from pipeline.run import Finished
from pipeline.subtitle_files import FOLDER


def spoken(row: Row) -> Row:
    said = answered(row)
    return said | {"segments": [{"start_s": 0.0, "end_s": 2.0, "text": said["text"]}]}


def stems(night: Night) -> list[str]:
    """Without the ids behind them."""
    names = (name.rpartition("/")[2] for name in night.folder.names(FOLDER, ".vtt"))
    return sorted(name.rpartition("-")[0] for name in names)


def test_members_of_a_shard_have_their_own_names(night: Night, go: Callable[..., Finished]) -> None:
    with tarfile.open(night.source / "shard-000.tar", "w") as shard:
        for name in ("talks/one.wav", "talks/two.wav"):
            shard.addfile(tarfile.TarInfo(name))
    packed = {"input": {"uri": str(night.source / "shard-000.tar")}}
    go(spoken, **packed)
    assert stems(night) == ["one", "two"]
    shown = Console(file=io.StringIO(), width=100)
    print_answers(night.job(**packed), shown, 20)
    assert "two.wav" in shown.file.getvalue()  # type: ignore[attr-defined]


def test_files_of_a_replaced_answer_go_also_where_none_are_written_anymore(
    night: Night, go: Callable[..., Finished]
) -> None:
    silent = {"output": {"uri": str(night.output), "subtitles": False}}
    go(spoken)
    (night.source / "a.wav").write_bytes(b"changed")
    (night.source / "b.wav").unlink()
    go(spoken, **silent)
    assert stems(night) == ["b", "c", "d"]
