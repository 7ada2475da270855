"""Submit, at a scripted job server: what it is sent, and what it never gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from conftest import WebServer
from job_server import JOB, VERSION, answer

from jobs.__main__ import main
from jobs.exits import BROKEN, FINISHED, REFUSED
from pipeline.job_file import load_job


class Packages(dict[str, Callable[[BaseHTTPRequestHandler], None]]):
    """Routes of a job server that takes packages, whose paths are hashes."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[bytes] = []

    def get(self, path: str, default: Any = None) -> Any:
        return self._package if path.startswith("/api/packages/") else super().get(path, default)

    def _package(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.command == "PUT":
            self.received.append(body(handler))
        answer(handler, 404 if handler.command == "GET" else 200, {})


def body(handler: BaseHTTPRequestHandler) -> bytes:
    return handler.rfile.read(int(handler.headers["Content-Length"]))


def test_overrides_travel_in_the_job_file_and_not_in_the_command(
    web: WebServer, bucket_job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They may be secrets, and the command is what the dashboard shows."""
    shown: list[bytes] = []

    def submit(handler: BaseHTTPRequestHandler) -> None:
        shown.append(body(handler))
        answer(handler, 200, {"job_id": "one", "submission_id": "one"})

    web.routes = routes = Packages()
    web.routes["/api/version"] = lambda handler: answer(handler, 200, VERSION)
    web.routes["/api/jobs/"] = submit
    overrides = ("output.storage_options.secret=wJalr", 'prompt.text=It\'s a $HOME; `x` "y" é')
    words = [word for override in overrides for word in ("--set", override)]
    assert (
        main(["submit", str(bucket_job), *words, "--image-code", "--address", web.url]) == FINISHED
    )
    assert capsys.readouterr().out == "one\n"
    (asked,) = shown
    assert json.loads(asked)["entrypoint"] == "exec python -m jobs run job.yaml"
    assert b"wJalr" not in asked
    (package,) = routes.received
    (tmp_path / "sent").mkdir()
    with ZipFile(BytesIO(package)) as sent:
        sent.extract("job.yaml", tmp_path / "sent")
    assert load_job(tmp_path / "sent/job.yaml") == load_job(bucket_job, overrides)


@pytest.mark.parametrize("code", [(), ("--image-code",)])
@pytest.mark.parametrize("field", ["input.uri", "output.uri", "model.id", "model.adapter"])
def test_a_relative_path_is_refused_whatever_code_runs(
    field: str,
    code: tuple[str, ...],
    bucket_job: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["submit", str(bucket_job), "--set", f"{field}=here", *code]) == REFUSED
    assert f"{field}: here is a path relative to this folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "captions/today", "what?", "a b", "#1", "50%", "n" * 101])
def test_a_name_that_the_job_server_cannot_keep_is_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of `a/b` it keeps an entry that waits for ever and cannot be asked for."""
    with pytest.raises(SystemExit, match=str(REFUSED)):
        main(["submit", "job.yaml", "--id", name])
    assert "a name has 1 to 100 letters, digits" in capsys.readouterr().err


def test_another_job_of_the_same_name_is_not_taken_for_this_one(
    web: WebServer, bucket_job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A unit file that was copied for a second job: it would watch the first's run, and never run."""
    job = load_job(bucket_job)
    first = {**JOB, "metadata": {"output": "s3://b/o", "fingerprint": job.fingerprint}}
    routes: dict[str, Any] = {
        "/api/version": VERSION,
        "/api/jobs/": [{**first, "status": "RUNNING"}],
        "/api/jobs/one": {**first, "status": "SUCCEEDED", "driver_exit_code": 0},
    }
    for path, fields in routes.items():
        web.routes[path] = lambda handler, fields=fields: answer(handler, 200, fields)
    submit = ["submit", str(bucket_job), "--id", "one", "--wait", "--address", web.url]
    assert main(submit) == FINISHED  # the same job: watched
    for other in ("output.uri=s3://b/other", "prompt.text=What is this?"):
        assert main([*submit, "--set", other]) == BROKEN
        refused = capsys.readouterr().err
        assert "one goes on with another job (output s3://b/o, fingerprint" in refused
        assert "another --id" in refused


def test_a_head_that_starts_again_at_the_hour_of_a_run_does_not_cost_the_night(
    web: WebServer, bucket_job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = iter(["gone", "502"])

    def version(handler: BaseHTTPRequestHandler) -> None:
        turn = next(turns, "up")
        if turn == "gone":
            handler.connection.close()
        else:
            answer(handler, 502 if turn == "502" else 200, VERSION)

    ended = {**JOB, "status": "SUCCEEDED", "driver_exit_code": 0}
    web.routes = Packages()
    web.routes["/api/version"] = version
    web.routes["/api/jobs/one"] = lambda handler: answer(handler, 200, ended)
    web.routes["/api/jobs/"] = lambda handler: (
        body(handler),
        answer(handler, 200, {"job_id": "one", "submission_id": "one"}),
    )[1]
    submit = ["submit", str(bucket_job), "--image-code", "--address", web.url]
    assert main([*submit, "--wait"]) == FINISHED
    told = capsys.readouterr()
    assert told.out == "one\n"
    assert told.err.count("Asking again, at most 300 s") == 1
