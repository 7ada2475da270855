"""`polyscribe evaluate`: outputs of the real writers, what is printed, and a sweep without an engine."""

from __future__ import annotations

import argparse
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import S3Server
from rich.console import Console

from jobs import evaluate
from jobs.evaluate import add_command
from jobs.exits import FINISHED, REFUSED
from operators.schema import RESULTS
from pipeline.assemble import Assembly, write_marker
from pipeline.config import ConfigError, Job
from pipeline.parts import parquet_bytes, part
from pipeline.references import EvaluateError, read_references
from pipeline.report import write_latest, write_run
from pipeline.run import Finished, folder_store
from pipeline.source import Source
from pipeline.source_rows import asset_id
from pipeline.store import Store
from pipeline.sweep import sample_of, sweep, swept_jobs


def make_job(source: str, target: str, **sections: Any) -> Job:
    fields: dict[str, Any] = {
        "task": "transcribe",
        "input": {"uri": source},
        "output": {"uri": target},
        "model": {"id": "some/model"},
    }
    return Job.model_validate(fields | sections)


def write_output(job: Job, rows: list[dict[str, Any]]) -> Store:
    """A finished fingerprint with these results, by the writers of a run."""
    folder = folder_store(job)
    full = [{"status": "ok", "modality": "audio", **row} for row in rows]
    table = pa.Table.from_pylist(full, schema=RESULTS)
    data = parquet_bytes(table)
    folder.write("results/r-000000.parquet", data)
    states = ("ok", "empty", "partial", "failed")
    assets = {state: sum(row["status"] == state for row in full) for state in states}
    accounts = {"assets": {"found": len(full), **assets}}
    parts = (part("results/r-000000.parquet", table, data),)
    write_run(folder, job, "r", "finished", {"vllm": "0.32.0"}, accounts)
    write_marker(folder, "r", Assembly(parts, accounts, ("r",), True))
    write_latest(Store(job.output.uri, job.output.storage_options), job, "r")
    return folder


def answers(**texts: str | None) -> list[dict[str, Any]]:
    return [
        {
            "asset_id": asset_id(f"/in/{name}.wav"),
            "uri": f"/in/{name}.wav",
            "text": text,
            "status": "ok" if text else "failed" if text is None else "empty",
            "error_code": "decode.corrupt" if text is None else None,
        }
        for name, text in texts.items()
    ]


@pytest.fixture
def refs(tmp_path: Path) -> str:
    path = tmp_path / "refs.csv"
    path.write_text("uri,text\na.wav,hello big world\nb.wav,one apple\nz.wav,gone\n")
    return str(path)


def go(*words: str, **how: Any) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers(required=True))
    options = parser.parse_args(["evaluate", *words])
    said = io.StringIO()
    code = options.command(options, Console(file=said, width=160, markup=False, emoji=False), **how)
    return code, re.sub(r"[│┃ ]+", " ", said.getvalue())


def test_rates_and_counts_of_an_output(tmp_path: Path, refs: str) -> None:
    job = make_job("/in", str(tmp_path / "out"))
    folder = write_output(job, answers(a="Hello, world!", b=None, c="not asked"))
    before = sorted(tmp_path.rglob("*"))
    code, said = go(str(tmp_path / "out"), "--references", refs)
    assert code == FINISHED
    assert " WER 60.00% 2 3 0 0 3 5 " in said
    assert "3 references of" in said
    assert "by column uri (2 by file name, not by the whole uri)" in said
    assert "1 references without result (for example z.wav), 1 results without reference" in said
    assert "1 failed assets count as all deletions" in said
    worst = said[said.index("worst first") :]
    assert worst.index("/in/b.wav decode.corrupt 100.00%") < worst.index("/in/a.wav ok 33.33%")
    assert sorted(tmp_path.rglob("*")) == before

    _, said = go(folder.url(), "--references", refs, "--only-finished", "--show", "0")
    assert " WER 33.33% 1 1 0 0 1 3 " in said
    assert "1 failed assets left out" in said
    assert "worst" not in said


def test_out_writes_a_row_an_asset(tmp_path: Path, refs: str) -> None:
    write_output(make_job("/in", str(tmp_path / "out")), answers(a="hello", b="one apple"))
    name = str(tmp_path / "new" / "rates.parquet")
    go(str(tmp_path / "out"), "--references", refs, "--out", name)
    rows = {row["uri"]: row for row in pq.read_table(name).to_pylist()}
    assert rows["/in/a.wav"]["wer"] == 2 / 3
    assert rows["/in/b.wav"]["answer"] == "one apple"
    code, _ = go(str(tmp_path / "out"), "--references", refs, "--out", "rates.csv")
    assert code == REFUSED


def test_two_outputs_side_by_side(tmp_path: Path, refs: str) -> None:
    a = make_job("/in", str(tmp_path / "out"))
    b = make_job("/in", str(tmp_path / "out"), audio={"window_s": 10})
    one = write_output(a, answers(a="hello world", b="one apple"))
    other = write_output(b, answers(a="hello big world", b="pears", c="x"))
    code, said = go(one.url(), "--against", other.url(), "--references", refs)
    assert code == FINISHED
    assert " audio.window_s 15.0 10.0 " in said
    assert "output.uri" not in said
    assert "2 assets that both have (0 only in A, 0 only in B: not compared)" in said
    assert re.search(r" WER 20\.00% 40\.00% \+20\.00% too few assets ", said)
    assert re.search(r"1 worse in B.*?/in/b\.wav 0\.00% 100\.00% \+2", said, re.DOTALL)
    assert re.search(r"1 better in B.*?/in/a\.wav 33\.33% 0\.00% -1", said, re.DOTALL)
    name = str(tmp_path / "both.parquet")
    go(one.url(), "--against", other.url(), "--references", refs, "--out", name)
    assert pq.read_table(name)["output"].to_pylist() == [one.url()] * 2 + [other.url()] * 2


def test_without_references_the_second_is_held_against_the_first(tmp_path: Path) -> None:
    a = make_job("/in", str(tmp_path / "a"))
    write_output(a, answers(a="hello big world", b=None))
    write_output(make_job("/in", str(tmp_path / "b")), answers(a="hello big word", b="more"))
    code, said = go(str(tmp_path / "a"), "--against", str(tmp_path / "b"))
    assert code == FINISHED
    assert "no setting differs" in said
    assert "as if the finished answers of A were right" in said
    assert " WER 33.33% 1 1 1 0 0 3 " in said


def test_an_output_on_s3(s3: S3Server, refs: str) -> None:
    output = {"uri": f"{s3.bucket()}/out", "storage_options": s3.options}
    write_output(make_job("/in", "", output=output), answers(a="hello big world", b="one apple"))
    options = ("--storage-options", yaml.safe_dump(s3.options))
    code, said = go(output["uri"], "--references", refs, *options)
    assert code == FINISHED
    assert " WER 0.00% " in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "OUTPUT is missing"),
        (["OUT"], "--references FILE or --against OUTPUT"),
        (["OUT", "--references", "none.csv"], "none.csv: cannot be read"),
        (["nowhere", "--references", "REFS"], "no run has finished here"),
        (["--sweep", "audio.window_s=5,10"], "--sweep needs --job JOB.yaml and --references"),
        (["OUT", "--sweep", "a.b=1,2", "--job", "j", "--references", "REFS"], "leave OUTPUT and"),
        (["OUT", "--references", "REFS", "--key", "source_id"], "no column source_id"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    tmp_path: Path, refs: str, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    write_output(make_job("/in", str(tmp_path / "out")), answers(a="x"))
    known = {"OUT": str(tmp_path / "out"), "REFS": refs, "nowhere": str(tmp_path / "nowhere")}
    code, _ = go(*(known.get(word, word) for word in words))
    assert code == REFUSED
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "why"),
    [("REFS/r.parquet", "File exists"), ("s4://b/r.parquet", "unknown scheme s4://")],
)
def test_an_out_that_cannot_be_written_is_refused_after_the_rates(
    tmp_path: Path, refs: str, capsys: pytest.CaptureFixture[str], out: str, why: str
) -> None:
    write_output(make_job("/in", str(tmp_path / "out")), answers(a="hello big world"))
    target = out.replace("REFS", refs)
    code, said = go(str(tmp_path / "out"), "--references", refs, "--out", target)
    assert (code, "WER" in said) == (REFUSED, True)
    told = capsys.readouterr().err
    assert f"--out {target}: cannot be written" in told
    assert why in told


def test_a_part_that_is_gone_is_named(
    tmp_path: Path, refs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_output(make_job("/in", str(tmp_path / "out")), answers(a="x")).delete(
        ["results/r-000000.parquet"]
    )
    code, _ = go(str(tmp_path / "out"), "--references", refs)
    assert code == REFUSED
    assert "results/r-000000.parquet: cannot be read (" in capsys.readouterr().err


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[str, str]:
    """A job file over eight recordings, and references of seven of them."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    names = [f"sub/{number}.wav" for number in range(8)]
    for name in names:
        (tmp_path / "in" / name).write_bytes(b"RIFF" + name.encode())
    refs = tmp_path / "refs.csv"
    refs.write_text("uri,text\n" + "".join(f"in/{name},one apple pie\n" for name in names[:7]))
    sections = make_job(str(tmp_path / "in"), str(tmp_path / "out")).model_dump(mode="json")
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({name: sections[name] for name in ("task", "input", "output")}))
    with file.open("a") as more:
        more.write("model: {id: some/model}\nlimits: {max_assets: 3}\n")
    return str(file), str(refs)


def transcribe(job: Job) -> Finished:
    """In a run's place: lists the job's input as it does; long windows lose words."""
    source = Source(job.input, job.modality)
    found = [row for batch in source.batches() for row in batch.to_pylist()]
    assert job.limits.max_assets is None
    text = " ".join(["one", "apple", "pie"][: int(30 / job.audio.window_s)])
    rows = [
        {name: row[name] for name in ("asset_id", "uri", "source_id", "version")}
        | {"text": text, "output_tokens": 4, "media_tokens": 250}
        for row in found
    ]
    return Finished(write_output(job, rows), {}, True, 12.5)


def test_a_sweep_runs_every_value_on_the_same_sample(
    tmp_path: Path, corpus: tuple[str, str]
) -> None:
    job, refs = corpus
    jobs = swept_jobs(job, (), "audio.window_s=10,15,20,28")
    references = read_references(refs, {})
    tried = sweep(jobs, references, 5, 0, transcribe)
    assert [one.value for one in tried] == ["10", "15", "20", "28"]
    assert [one.scores.words.rate for one in tried] == [0, 1 / 3, 2 / 3, 2 / 3]
    assert {one.total("media_tokens") for one in tried} == {1250}
    folders = {path.name for path in (tmp_path / "out" / "sweep").iterdir() if path.is_dir()}
    assert folders == {one.fingerprint for one in jobs.values()}
    (manifest,) = (tmp_path / "out" / "sweep").glob("sample-5-*.parquet")
    uris = pq.read_table(manifest)["_uri"].to_pylist()
    assert all(uri.startswith(f"{tmp_path}/in/sub/") for uri in uris)
    # the ids are those of the job's own runs, and the sample repeats and grows
    first = next(iter(jobs.values()))
    source = Source(first.input, "audio")
    ids = {row["asset_id"] for batch in source.batches() for row in batch.to_pylist()}
    assert {one.key for one in tried[0].scores.assets} <= ids
    again, _ = sample_of(first, references, 5, 0)
    more, _ = sample_of(first, references, 7, 0)
    assert again["_uri"].to_pylist() == uris == more["_uri"].to_pylist()[:5]
    assert sample_of(first, references, 5, 1)[0]["_uri"].to_pylist() != uris

    said = io.StringIO()
    evaluate.print_sweep(
        Console(file=said, width=160, markup=False, emoji=False),
        "audio.window_s",
        references,
        tried,
    )
    assert "a sample of 5 of 7 references of" in said.getvalue()
    assert re.search(
        r" 10 0\.00% 0\.00% 15 0 20 1,250 12\.5 ", re.sub(r"[│ ]+", " ", said.getvalue())
    )


def test_a_sample_of_a_manifest_keeps_its_columns(tmp_path: Path, corpus: tuple[str, str]) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_text("uri,id,lang\nin/sub/1.wav,x1,German\nin/sub/2.wav,x2,\n")
    listed = {"uri": str(manifest), "id_column": "id", "variable_columns": ["lang"]}
    (tmp_path / "r.jsonl").write_text(
        '{"source_id": "x1", "text": "a"}\n{"source_id": "x2", "text": ""}'
    )
    references = read_references(str(tmp_path / "r.jsonl"), {})
    options = {"endpoint_url": "http://elsewhere", "key": "k", "secret": "s"}
    job = make_job("", str(tmp_path / "out"), input=listed | {"storage_options": options})
    seen: list[Job] = []

    def work(job: Job) -> Finished:
        seen.append(job)
        return replace(transcribe(job), did_work=False, seconds=0.5)

    (tried,) = sweep({"only": job}, references, 9, 0, work)
    assert {one.row["source_id"] for one in tried.scores.assets} == {"x1", "x2"}
    assert seen[0].input.variable_columns == ("lang",)
    assert seen[0].fingerprint == job.fingerprint


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("audio.window_s=10", "two values or more"),
        ("audio.window_s", "two values or more"),
        ("audio.span_s=60,120", "changes no answer"),
        ("audio.window_s=10,10.0", "equal values"),
    ],
)
def test_a_sweep_without_a_question_is_refused(
    corpus: tuple[str, str], asked: str, message: str
) -> None:
    with pytest.raises(EvaluateError, match=message):
        swept_jobs(corpus[0], (), asked)
    with pytest.raises(ConfigError, match=r"audio\.window_s.*got 99"):
        swept_jobs(corpus[0], (), "audio.window_s=10,99")


def test_values_with_commas_are_a_yaml_list(corpus: tuple[str, str]) -> None:
    jobs = swept_jobs(corpus[0], ("audio.digits=false",), "audio.vocabulary=[[Ada, Bo], []]")
    assert [job.audio.vocabulary for job in jobs.values()] == [("Ada", "Bo"), ()]
    assert not any(job.audio.digits for job in jobs.values())


def test_a_sweep_whose_references_are_not_in_the_input_is_refused(
    tmp_path: Path, corpus: tuple[str, str]
) -> None:
    (tmp_path / "r.csv").write_text("uri,text\nelsewhere.wav,x\n")
    references = read_references(str(tmp_path / "r.csv"), {})
    with pytest.raises(
        EvaluateError, match=r"none of 1 values.*elsewhere\.wav, is a file of .*/in"
    ):
        sweep(swept_jobs(corpus[0], (), "audio.window_s=5,10"), references, 5, 0, transcribe)
