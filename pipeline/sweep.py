"""One job at several values of a setting, on a sample of the files that have a reference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import yaml

from operators.stores import unsigned
from pipeline.config import Job
from pipeline.evaluate import Output, Scores, open_output, score
from pipeline.job_file import load_job
from pipeline.parts import parquet_bytes
from pipeline.references import EvaluateError, Reference, References, matched
from pipeline.run import Finished, output_faults
from pipeline.source import Source
from pipeline.store import Store


@dataclass(frozen=True)
class Tried:
    """One value of a sweep."""

    value: str
    scores: Scores
    seconds: float

    def total(self, column: str) -> int:
        return sum(one.row[column] or 0 for one in self.scores.assets)


def swept_jobs(path: str, overrides: Sequence[str], asked: str) -> dict[str, Job]:
    """Value -> job. `asked` is section.field=a,b,c, or =[...] in YAML where a value has commas."""
    field, equals, text = asked.partition("=")
    listed = yaml.safe_load(text) if text.startswith("[") else text.split(",")
    values = [one if isinstance(one, str) else json.dumps(one) for one in listed]
    if not equals or len(values) < 2:
        raise EvaluateError(f"--sweep {asked}: must be section.field=a,b with two values or more")
    jobs = {one: load_job(path, [*overrides, f"{field}={one}"]) for one in values}
    if len({job.fingerprint for job in jobs.values()}) < len(values):
        raise EvaluateError(
            f"--sweep {asked}: some values ask the same question (equal values, or a field that"
            " changes no answer), so there is nothing to compare"
        )
    return jobs


def sweep(
    jobs: Mapping[str, Job],
    references: References,
    sample: int,
    seed: int,
    work: Callable[[Job], Finished],
    only_finished: bool = False,
) -> list[Tried]:
    """Run each job on the same sample, below OUTPUT/sweep, a fingerprint each, and score it.

    A file is taken by the hash of seed and asset_id, so more references keep most of a sample.
    """
    first = next(iter(jobs.values()))
    manifest, sampled = sample_of(first, references, sample, seed)
    folder = f"{first.output.uri.rstrip('/')}/sweep"
    data = parquet_bytes(manifest)
    name = f"sample-{manifest.num_rows}-{hashlib.sha256(data).hexdigest()[:8]}.parquet"
    with output_faults(first):
        Store(folder, first.output.storage_options).write(name, data)
    tried: list[Tried] = []
    with TemporaryDirectory(prefix="polyscribe-") as local:
        # The input's options may not open the output's store: the run reads its list from here.
        listed = Path(local) / name
        listed.write_bytes(data)
        for value, job in jobs.items():
            finished = work(_on_sample(job, str(listed), folder))
            output = open_output(f"{folder}/{job.fingerprint}", job.output.storage_options)
            like = tried[0].scores if tried else None
            scores = score(output.label, output.rows(), sampled, only_finished, like)
            tried.append(Tried(value, scores, _seconds(finished, output)))
    return tried


def _seconds(finished: Finished, output: Output) -> float:
    """Of the run that did the work, which may have been an earlier one."""
    if not finished.did_work:
        with suppress(FileNotFoundError):
            return float(json.loads(output.folder.read("report.json"))["seconds"])
    return finished.seconds


def sample_of(
    job: Job, references: References, count: int, seed: int
) -> tuple[pa.Table, References]:
    """A manifest of some referenced files of the job's input, and their references by asset_id."""
    source = Source(job.input, job.modality)
    found = (row for batch in source.batches() for row in batch.to_pylist())
    pairs = matched(references, found).pairs
    if not pairs:
        raise EvaluateError(
            f"{references.name}: column {references.key}: none of {len(references.rows)} values, for"
            f" example {references.rows[0].key}, is a file of {job.public()['input']['uri']}"
        )
    chosen = sorted(pairs, key=lambda pair: _draw(seed, pair[1]["asset_id"]))[:count]
    rows = [row for _, row in chosen]
    uris = [row["fetch_uri"] for row in rows]
    if any(row["fetch_offset"] is not None for row in rows) or uris != [*map(unsigned, uris)]:
        raise EvaluateError("--sweep: members of tar shards and signed URLs cannot be sampled")
    said = [json.loads(row["variables"] or "{}") for row in rows]
    columns = {
        **{name: [one.get(name) for one in said] for name in job.input.variable_columns},
        "_uri": uris,
        "_version": [row["version"] for row in rows],
        "_source_id": [row["source_id"] for row in rows],
    }
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    asked = (Reference(row["asset_id"], one.text, one.language) for one, row in chosen)
    return table, References(references.name, "asset_id", tuple(asked), references.without_text)


def _draw(seed: int, asset_id: str) -> bytes:
    return hashlib.sha256(f"{seed} {asset_id}".encode()).digest()


def _on_sample(job: Job, manifest: str, folder: str) -> Job:
    columns = {"uri_column": "_uri", "id_column": "_source_id", "version_column": "_version"}
    listed = {"uri": manifest, "kind": "manifest", "include": (), "exclude": (), **columns}
    return job.model_copy(
        update={
            "input": job.input.model_copy(update=listed),
            "output": job.output.model_copy(update={"uri": folder}),
            "limits": job.limits.model_copy(update={"max_assets": None}),
        }
    )
