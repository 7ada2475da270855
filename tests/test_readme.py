"""README.md is the map: its paths exist, its list of files is complete, its commands are real.

The list of files is a fenced block tagged `map`, one file a line: path, two spaces or more, text.
"""

import json
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.schema import FAILED, RESULTS
from pipeline.job_file import load_job

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
LISTED_FOLDERS = ("operators", "pipeline", "jobs", "deploy", "k8s")
LISTED_SUFFIXES = {".py", ".sh", ".yaml", ".yml", ""}
NOT_LISTED = ("deploy/samples/", "deploy/nano/checkpoint/")
REPOSITORY_PATH = re.compile(r"\.?/?(?:operators|pipeline|jobs|deploy|k8s|tests|\.ci)/[\w./-]*")


def blocks(*tags: str) -> list[str]:
    found = re.findall(r"^```([^\n]*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [text for tag, text in found if tag.strip() in tags]


def file_map() -> dict[str, str]:
    entries: dict[str, str] = {}
    for line in "\n".join(blocks("map")).splitlines():
        if line.strip():
            parts = re.split(r"\s{2,}", line.strip(), maxsplit=1)
            assert len(parts) == 2, f"not `path  text`: {line}"
            assert parts[0] not in entries, f"twice in the map: {parts[0]}"
            entries[parts[0]] = parts[1]
    return entries


def commands() -> list[str]:
    """Each shell command of the README, without prompt, comment and continuation."""
    lines = "\n".join(blocks("bash", "sh", "console")).replace("\\\n", " ").splitlines()
    plain = [re.sub(r"^\$ ", "", line.strip()) for line in lines]
    return [line for line in plain if line and not line.startswith("#")]


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def polyscribe_calls() -> list[list[str]]:
    """The arguments of each `polyscribe ...` and `python -m jobs ...`, pipes and redirects cut."""
    calls = []
    for command in commands():
        for part in re.split(r"&&|\|\||[|;<>]", command):
            found = words(part)
            while found and re.fullmatch(r"[A-Z_]+=.*", found[0]):
                found.pop(0)
            if found and Path(found[0]).name == "polyscribe":
                calls.append(found[1:])
            elif found[1:3] == ["-m", "jobs"]:
                calls.append(found[3:])
    return calls


def tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [path for path in listed.stdout.split("\0") if path]


def test_every_path_of_the_map_exists() -> None:
    missing = [path for path in file_map() if not (ROOT / path).exists()]
    assert file_map()
    assert not missing


def test_the_map_is_complete() -> None:
    wanted = {
        path
        for path in tracked()
        if path.startswith(tuple(f"{folder}/" for folder in LISTED_FOLDERS))
        and Path(path).suffix in LISTED_SUFFIXES
        and Path(path).name != "__init__.py"
        and not path.startswith(NOT_LISTED)
    }
    assert not wanted - set(file_map())


def test_every_path_in_a_command_exists() -> None:
    named = {word for command in commands() for word in words(command)}
    paths = {word for word in named if REPOSITORY_PATH.fullmatch(word)}
    missing = sorted(path for path in paths if not (ROOT / path).exists())
    assert paths
    assert not missing


def test_every_link_into_the_repository_exists() -> None:
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", README)
    assert not [target for target in targets if not (ROOT / target).exists()]


@pytest.mark.parametrize("call", polyscribe_calls(), ids=" ".join)
def test_every_polyscribe_command_is_one(call: list[str]) -> None:
    if call[0].startswith("-"):
        return
    helped = subprocess.run(
        [sys.executable, "-m", "jobs", call[0], "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert helped.returncode == 0, helped.stderr
    for word in call[1:]:
        if word.startswith("--"):
            assert word.split("=")[0] in helped.stdout


@pytest.mark.parametrize("call", polyscribe_calls(), ids=" ".join)
def test_every_job_of_a_command_loads_with_its_overrides(call: list[str]) -> None:
    jobs = [word for word in call if REPOSITORY_PATH.fullmatch(word) and word.endswith(".yaml")]
    overrides = [value for option, value in pairwise(call) if option == "--set"]
    for job in jobs:
        load_job(ROOT / job, overrides)


def test_the_sql_reads_the_newest_answers_alone(tmp_path: Path) -> None:
    """Two questions were asked of one output; a row of each would be one asset twice."""
    for fingerprint in ("older", "newer"):
        for name, schema, codes in (
            ("results", RESULTS, {"a": None, "b": "decode.corrupt"}),
            ("failures", FAILED, {"b": "decode.corrupt"}),
        ):
            rows = [
                {"uri": uri, "text": fingerprint, "status": "failed" if code else "ok"}
                | {"error_code": code}
                for uri, code in codes.items()
            ]
            part = tmp_path / fingerprint / name / "part.parquet"
            part.parent.mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), part)
    (tmp_path / "latest.json").write_text(json.dumps({"fingerprint": "newer"}))
    text = "".join(blocks("sql"))
    assert "out/demo" in text
    with duckdb.connect() as db:
        said = [
            db.execute(statement).fetchall()
            for statement in text.replace("out/demo", str(tmp_path)).split(";")
            if statement.strip()
        ]
    assert said[1:] == [[("a", "newer")], [("decode.corrupt", 1)]]
