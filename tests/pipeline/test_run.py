"""The whole way through Ray Data, with an engine that echoes: what is counted, kept and done again."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import media
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import ray
from conftest import S3Server
from fakes import EchoEngine
from PIL import Image
from rich.console import Console

from operators.media import media_hash
from operators.patchify import patchify
from operators.schema import FAILED, LEDGER, RESULTS
from pipeline.assemble import read_marker
from pipeline.cluster import BrokenRunError
from pipeline.config import Job
from pipeline.run import Finished, run
from pipeline.source_rows import SourceError
from pipeline.store import Store
from pipeline.verify import verify

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def make_job(nano: Path, source: str, target: str, **sections: Any) -> Job:
    fields: dict[str, Any] = {
        "task": "caption",
        "input": {"uri": source},
        "output": {"uri": target},
        "model": {"id": str(nano)},
        "engine": {"max_num_seqs": 8},
        "image": {"max_soft_tokens": 70},
    }
    for name, values in sections.items():
        fields[name] = values if isinstance(values, str) else {**fields.get(name, {}), **values}
    return Job.model_validate(fields)


def go(job: Job, **echo: Any) -> tuple[Finished, str]:
    said = io.StringIO()
    finished = run(
        job, Console(file=said, width=200), engine=lambda job: partial(EchoEngine, **echo)
    )
    return finished, said.getvalue()


def plain(color: tuple[int, int, int], size: tuple[int, int] = (96, 48)) -> bytes:
    return media.encode(Image.new("RGB", size, color), "PNG")


def results(finished: Finished) -> pd.DataFrame:
    table = pq.read_table(finished.folder.url("results"))
    assert table.schema.equals(RESULTS)
    return pd.DataFrame(table.to_pylist(), columns=table.column_names, dtype=object)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(plain((200, 0, 0)))
    (folder / "b.png").write_bytes(plain((0, 200, 0)))
    (folder / "sub" / "c.png").write_bytes(plain((0, 0, 200)))
    return folder


@pytest.fixture
def job(nano: Path, pictures: Path, tmp_path: Path) -> Callable[..., Job]:
    return partial(make_job, nano, str(pictures), str(tmp_path / "out"))


def bad_files() -> dict[str, tuple[bytes, str]]:
    picture = media.encode(media.photo(300, 200), "JPEG")
    return {
        "empty.jpg": (b"", "decode.empty"),
        "truncated.jpg": (picture[: len(picture) // 2], "decode.corrupt"),
        "text.jpg": (b"Dear reader, this is no picture at all.", "decode.unsupported"),
        "bomb.png": (media.png_bomb(), "decode.too_large"),
    }


def test_a_bad_file_of_each_kind_costs_its_own_row(job: Callable[..., Job], pictures: Path) -> None:
    expected = {}
    for name, (data, code) in bad_files().items():
        (pictures / name).write_bytes(data)
        expected[name] = code
    (pictures / "animated.gif").write_bytes(media.animated("GIF"))
    (pictures / "notes.txt").write_text("not a picture")
    (pictures / "unreadable.png").mkdir()  # a folder with a picture's name
    finished, _ = go(job())
    rows = results(finished)
    codes = {Path(uri).name: code for uri, code in zip(rows.uri, rows.error_code, strict=True)}
    assert {name: code for name, code in codes.items() if code} == expected
    assert rows[rows.uri.str.endswith("animated.gif")].text.item().endswith(" 255 0 0")
    assets = finished.accounts["assets"]
    assert assets == {"found": 8, "ok": 4, "empty": 0, "partial": 0, "failed": 4}
    assert finished.accounts["failures_by_code"] == dict.fromkeys(expected.values(), 1)
    failures = pq.read_table(finished.folder.url("failures"))
    assert failures.schema.equals(FAILED)
    assert sorted(failures["error_code"].to_pylist()) == sorted(expected.values())
    assert all(len(message) > 10 for message in failures["error_message"].to_pylist())
    assert finished.accounts["skipped"] == {"unknown type .txt": 1}
    assert verify(str(Path(finished.folder.url("")).parent), {})[0] == []


def test_a_missing_and_a_forbidden_file_of_a_manifest_fail_alone(
    nano: Path, s3: S3Server, tmp_path: Path
) -> None:
    bucket = s3.bucket()
    s3.put(f"{bucket}/good.png", plain((9, 9, 9)))
    s3.put(f"{bucket}/closed.png", plain((8, 8, 8)))
    s3.fault = lambda method, path, query: (
        (403, "AccessDenied") if path.endswith("closed.png") else None
    )
    manifest = tmp_path / "list.csv"
    manifest.write_text(
        "image,sku\n"
        + "".join(f"{bucket}/{name}.png,{name}\n" for name in ("good", "gone", "closed", "good"))
    )
    finished, said = go(
        make_job(
            nano,
            str(manifest),
            str(tmp_path / "out"),
            input={"uri_column": "image", "id_column": "sku", "storage_options": s3.options},
            fetch={"attempts": 2},
        )
    )
    rows = results(finished).set_index("source_id")
    assert rows.error_code.to_dict() == {
        "good": None,
        "gone": "fetch.not_found",
        "closed": "fetch.forbidden",
    }
    assert finished.accounts["duplicates"] == 1
    assert "1 duplicate rows counted once" in said
    # A refusal may pass, so it alone is asked again.
    s3.fault = None
    again, _ = go(
        make_job(
            nano,
            str(manifest),
            str(tmp_path / "out"),
            input={"uri_column": "image", "id_column": "sku", "storage_options": s3.options},
        )
    )
    assert results(again).set_index("source_id").error_code["closed"] is None
    assert (again.accounts["done_now"], again.accounts["assets"]["failed"]) == (1, 1)
    secret = s3.options["secret"]
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes()


def test_again_does_nothing_and_new_files_do_only_themselves(
    job: Callable[..., Job], pictures: Path, tmp_path: Path
) -> None:
    first, _ = go(job())
    assert first.accounts["assets"]["ok"] == 3
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")}

    again, _ = go(job(), deadly=frozenset({"any"}))
    assert not again.did_work
    assert again.accounts["assets"] == first.accounts["assets"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")} == written

    (pictures / "d.png").write_bytes(plain((7, 7, 7)))
    (pictures / "a.png").write_bytes(plain((100, 100, 100), (48, 96)))
    third, _ = go(job())
    assert (third.accounts["done_now"], third.accounts["done_before"]) == (2, 2)
    rows = results(third)
    assert sorted(Path(uri).name for uri in rows.uri) == ["a.png", "b.png", "c.png", "d.png"]
    assert rows[rows.uri.str.endswith("a.png")].text.item().endswith("100 100 100")
    assert verify(str(tmp_path / "out"), {})[0] == []

    # A file that is gone from the input keeps its answer, and the accounts say so.
    (pictures / "b.png").unlink()
    fourth, _ = go(job())
    assert fourth.accounts["assets"]["found"] == 3
    assert fourth.accounts["result_rows"] == 4


def test_another_question_is_another_folder(job: Callable[..., Job], tmp_path: Path) -> None:
    first, _ = go(job())
    other, _ = go(job(prompt={"preset": "tags"}))
    assert first.folder.url("") != other.folder.url("")
    assert json.loads((tmp_path / "out" / "latest.json").read_text())["fingerprint"] in (
        other.folder.url("")
    )
    assert set(results(other).prompt_name) == {"tags"}
    assert json.loads(results(other).structured.iloc[0])


def test_a_row_that_kills_its_engine_twice_is_given_up_and_nobody_else(
    job: Callable[..., Job], pictures: Path
) -> None:
    for number in range(20):
        (pictures / f"n{number}.png").write_bytes(plain((number, 0, 0)))
    patches = patchify(np.full((48, 96, 3), (200, 0, 0), np.uint8), 70)
    poison = media_hash(patches.values, patches.columns, patches.rows)
    finished, _ = go(job(resources={"rows_per_block": 4}), deadly=frozenset({poison}))
    rows = results(finished)
    failed = rows[rows.status == "failed"]
    assert [Path(uri).name for uri in failed.uri] == ["a.png"]
    assert failed.error_code.item() == "generate.engine_killed"
    assert (rows.status == "ok").sum() == 22
    report = json.loads(finished.folder.read("report.json"))
    assert report["engine"]["restarts"] == 2


def test_an_engine_that_dies_of_everything_stops_the_run_and_no_row_is_blamed(
    job: Callable[..., Job], pictures: Path
) -> None:
    one = job(resources={"rows_per_block": 1})

    class Sick(EchoEngine):
        def submit(self, request: Any) -> Any:
            os._exit(1)

    with pytest.raises(BrokenRunError, match=r"(?s)an engine died 5 times.*run the job again"):
        run(one, Console(file=io.StringIO()), engine=lambda job: Sick)
    store = Store(f"{one.output.uri}/{one.fingerprint}", {})
    assert not list(store.names("ledger"))


def test_a_run_that_breaks_keeps_what_was_finished(job: Callable[..., Job], pictures: Path) -> None:
    """A marker is only written for a whole run; what a broken one committed is not asked again."""
    for number in range(200):
        (pictures / f"n{number:03d}.png").write_bytes(plain((number, 1, 1)))
    one = job(resources={"rows_per_block": 8})

    class Breaks(EchoEngine):
        count = 0

        def submit(self, request: Any) -> Any:
            type(self).count += 1
            if type(self).count > 150:
                raise RuntimeError("the disk is full")
            return super().submit(request)

    with pytest.raises(BrokenRunError, match=r"(?s)the disk is full.*run the job again"):
        run(one, Console(file=io.StringIO()), engine=lambda job: Breaks)
    store = Store(f"{one.output.uri}/{one.fingerprint}", {})
    assert read_marker(store) is None
    kept = sum(pq.read_metadata(store.url(name)).num_rows for name in store.names("ledger"))
    finished, _ = go(one)
    assert finished.accounts["done_before"] == kept
    assert finished.accounts["assets"]["ok"] == 203
    assert len(results(finished)) == 203


def test_input_and_output_on_s3(nano: Path, s3: S3Server) -> None:
    bucket = s3.bucket()
    for number in range(5):
        s3.put(f"{bucket}/raw/x y/{number}.png", plain((number, 0, 0)))
    s3.put(f"{bucket}/raw/bad.png", b"no")
    options = {"storage_options": s3.options}
    job = make_job(nano, f"{bucket}/raw/", f"{bucket}/out/", input=options, output=options)
    finished, _ = go(job)
    assert finished.accounts["assets"]["ok"] == 5
    problems, accounts = verify(f"{bucket}/out/", s3.options)
    assert (problems, accounts["result_rows"]) == ([], 6)
    # nothing is renamed or copied on an object store
    writes = [
        method for method, path, query in s3.requests if path.startswith(f"/{bucket[5:]}/out")
    ]
    assert "PUT" in writes
    assert not go(job)[0].did_work


def test_what_others_read(job: Callable[..., Job]) -> None:
    finished, _ = go(job())
    pattern = finished.folder.url("results/*.parquet")
    assert duckdb.sql(f"SELECT count(*) FROM '{pattern}' WHERE status = 'ok'").fetchall() == [(3,)]
    frame = pd.read_parquet(finished.folder.url("results"))
    assert list(frame.width_px) == [96, 96, 96]
    rows = ray.data.read_parquet(finished.folder.url("results")).take_all()
    assert sorted(row["text"] for row in rows) == ["11x5 0 0 200", "11x5 0 200 0", "11x5 200 0 0"]
    ledger = pq.read_table(finished.folder.url("ledger"))
    assert ledger.schema.equals(LEDGER)
    assert ledger["decode_s"].null_count == 0


def test_prompt_variables_come_from_the_manifest(
    nano: Path, pictures: Path, tmp_path: Path
) -> None:
    manifest = tmp_path / "list.jsonl"
    rows = [
        {"uri": "in/a.png", "title": "red"},
        {"uri": "in/a.png", "title": "<turn|>"},
        {"uri": "in/b.png", "title": "a red circle"},
    ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    finished, _ = go(
        make_job(
            nano,
            str(manifest),
            str(tmp_path / "out"),
            task="custom",
            input={"variable_columns": ["title"]},
            prompt={"text": "Is it {title}?"},
        )
    )
    rows = results(finished)
    assert list(rows.error_code) == [None, "prepare.bad_variable", None]
    assert rows.prompt_tokens.iloc[2] > rows.prompt_tokens.iloc[0]


def test_an_input_without_files_is_refused_unless_allowed(
    job: Callable[..., Job], tmp_path: Path
) -> None:
    (tmp_path / "void").mkdir()
    (tmp_path / "void" / "x.txt").write_text("x")
    void = {"uri": str(tmp_path / "void")}
    with pytest.raises(SourceError, match=r"no file matches.*1 unknown type \.txt"):
        go(job(input=void))
    finished, _ = go(job(input={**void, "allow_empty": True}))
    assert finished.accounts["assets"]["found"] == 0


def test_failures_are_asked_again_only_on_demand(job: Callable[..., Job], pictures: Path) -> None:
    (pictures / "bad.png").write_bytes(b"no picture")
    assert go(job())[0].accounts["assets"]["failed"] == 1
    assert not go(job())[0].did_work
    again, _ = go(job(limits={"retry_failed": True}))
    assert again.accounts["done_now"] == 1
    assert len(results(again)) == 4


def test_verify_finds_what_was_tampered_with(job: Callable[..., Job], tmp_path: Path) -> None:
    finished, _ = go(job())
    (part,) = (Path(finished.folder.url("results"))).glob("*.parquet")
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + b"x")
    assert "not those that were written" in verify(str(tmp_path / "out"), {})[0][0]
    part.unlink()
    assert "missing" in verify(str(tmp_path / "out"), {})[0][0]
    part.write_bytes(whole)
    (part.parent / "stray.parquet").write_bytes(whole)
    assert "not listed" in verify(str(tmp_path / "out"), {})[0][0]
    assert "no run has finished" in verify(str(tmp_path / "in"), {})[0][0]
