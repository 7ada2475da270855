"""Status, logs and stop, at a scripted job server: watching a job, and a server that is away."""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import os
import subprocess
import sys
import threading
from base64 import b64encode
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from conftest import WebServer
from job_server import ENVIRONMENT, JOB, VERSION, answer, polyscribe
from ports import free_ports
from rich.console import Console

from jobs.__main__ import main
from jobs.exits import (
    BROKEN,
    FINISHED,
    REFUSED,
    TERMINATED,
    TOO_MANY_FAILED,
    UNFINISHED,
    Terminated,
)
from jobs.submit import _watch, _with_server, exit_code
from pipeline.submit import JobServer, State, SubmitError


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("submit", "mine.yaml", "--id", "one"), "it goes on, and `polyscribe stop one --address"),
        (("logs", "one"), "it goes on, and `polyscribe stop one --address"),
        (("stop", "one"), "it was told to stop"),
    ],
)
def test_sigterm_ends_the_watching_and_not_the_job(
    words: tuple[str, ...], said: str, web: WebServer, bucket_job: Path
) -> None:
    running = {**JOB, "status": "RUNNING"}
    watches = threading.Event()

    def state(handler: BaseHTTPRequestHandler) -> None:
        watches.set()
        answer(handler, 200, running)

    web.routes |= {
        "/api/version": lambda handler: answer(handler, 200, VERSION),
        "/api/jobs/": lambda handler: answer(handler, 200, [running]),
        "/api/jobs/one": state,
        "/api/jobs/one/logs": lambda handler: answer(handler, 200, {"logs": ""}),
        "/api/jobs/one/stop": lambda handler: answer(handler, 200, {"stopped": True}),
    }
    watching = subprocess.Popen(
        [sys.executable, "-m", "jobs", *words, "--wait", "--address", web.url],
        env={**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=bucket_job.parent,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watches.wait(60)
    watching.terminate()
    printed = watching.communicate(timeout=60)[1]
    assert watching.returncode == TERMINATED
    assert f"no longer watching one: {said}" in printed
    assert "committed" not in printed


def test_a_terminal_that_is_gone_changes_no_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "no terminal")

    class Server:
        def wait(self, job_id: str) -> State:
            raise Terminated

    def waits(server: object, options: object, console: object) -> int:
        raise Terminated

    monkeypatch.setattr(sys, "stderr", Gone())
    options = argparse.Namespace(follow=False, wait=True, address="http://127.0.0.1:8265")
    assert _watch(Server(), "one", options) == TERMINATED  # type: ignore[arg-type]
    assert _with_server(waits)(options, Console()) == TERMINATED


def test_a_server_that_is_away_for_a_moment_is_not_the_end_of_the_job(web: WebServer) -> None:
    web.routes["/api/version"] = lambda handler: answer(handler, 200, VERSION)
    turns = iter(["RUNNING", "502", "gone", "SUCCEEDED"])

    def ask(handler: BaseHTTPRequestHandler) -> None:
        turn = next(turns)
        if turn == "gone":
            handler.connection.close()
        elif turn == "502":
            answer(handler, 502, {})
        else:
            answer(handler, 200, {**JOB, "status": turn, "driver_exit_code": 0})

    web.routes["/api/jobs/one"] = ask
    assert JobServer(web.url).wait("one") == State("SUCCEEDED", "", 0)
    assert list(turns) == []
    with pytest.raises(SubmitError, match="404"):
        JobServer(web.url).wait("another")


def test_no_job_server_is_said_in_a_line() -> None:
    (port,) = free_ports(1)
    ended = polyscribe("stop", "any", "--address", f"http://127.0.0.1:{port}")
    assert ended.returncode == BROKEN
    assert ended.stderr.count("\n") == 1
    assert "no Ray job server" in ended.stderr


def test_the_address_that_is_given_wins(
    web: WebServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray's client asks the cluster of its variables instead, without a word."""
    web.routes |= {
        "/api/version": lambda handler: answer(handler, 200, VERSION),
        "/api/jobs/one": lambda handler: answer(handler, 200, {**JOB, "status": "RUNNING"}),
    }
    (port,) = free_ports(1)
    elsewhere = f"http://127.0.0.1:{port}"
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.setenv(name, elsewhere)
    assert main(["status", "one", "--address", web.url]) == UNFINISHED
    assert os.environ["RAY_ADDRESS"] == elsewhere
    assert main(["status", "one"]) == BROKEN
    assert f"{elsewhere}: no Ray job server" in capsys.readouterr().err
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", web.url)
    assert main(["status", "one"]) == UNFINISHED
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # for ray.init, and no dashboard's
    main(["status", "one"])
    assert "http://127.0.0.1:8265" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=str(REFUSED)):
        main(["status", "one", "--address", "127.0.0.1:8265"])
    assert "'127.0.0.1:8265' is no URL such as http://" in capsys.readouterr().err


def test_a_token_that_changes_while_a_job_is_watched_is_said(
    web: WebServer, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([(200, {**JOB, "status": "RUNNING"}), (403, {})])
    web.routes |= {
        "/api/version": lambda handler: answer(handler, 200, VERSION),
        "/api/jobs/one": lambda handler: answer(handler, *next(answers)),
        "/api/jobs/one/logs": lambda handler: answer(handler, 200, {"logs": ""}),
    }
    assert main(["logs", "one", "--wait", "--address", web.url]) == BROKEN
    assert "the cluster wants its token" in capsys.readouterr().err


def first_line_of_many(handler: BaseHTTPRequestHandler) -> None:
    """A log that is followed: a WebSocket that sends a line and goes on."""
    key = handler.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    accept = b64encode(hashlib.sha1(key.encode()).digest()).decode()
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(101)
    for name, value in (("Upgrade", "websocket"), ("Connection", "upgrade")):
        handler.send_header(name, value)
    handler.send_header("Sec-WebSocket-Accept", accept)
    handler.end_headers()
    handler.wfile.write(b"\x81\x05line\n")
    handler.rfile.read(1)  # until the follower is gone


@pytest.mark.parametrize("words", [("--follow",), ()])
def test_a_reader_that_has_enough_ends_the_following(
    words: tuple[str, ...], web: WebServer
) -> None:
    """`logs ID --follow | head -1`: to be taken for a broken connection, it went on to the job's end."""
    web.routes |= {
        "/api/version": lambda handler: answer(handler, 200, VERSION),
        "/api/jobs/one": lambda handler: answer(handler, 200, {**JOB, "status": "RUNNING"}),
        "/api/jobs/one/logs": lambda handler: answer(handler, 200, {"logs": "line\n"}),
        "/api/jobs/one/logs/tail": first_line_of_many,
    }
    reads, writes = os.pipe()
    os.close(reads)
    try:
        following = subprocess.run(
            [sys.executable, "-m", "jobs", "logs", "one", *words, "--address", web.url],
            env={**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=writes,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    finally:
        os.close(writes)
    assert (following.returncode, following.stderr) == (1, "")


def test_each_state_of_a_job_has_its_exit_code() -> None:
    assert exit_code(State("PENDING", "", None)) == UNFINISHED
    assert exit_code(State("RUNNING", "", None)) == UNFINISHED
    assert exit_code(State("SUCCEEDED", "", 0)) == FINISHED
    assert exit_code(State("STOPPED", "", None)) == TERMINATED
    assert exit_code(State("FAILED", "", TOO_MANY_FAILED)) == TOO_MANY_FAILED
    assert exit_code(State("FAILED", "the node died", None)) == BROKEN
