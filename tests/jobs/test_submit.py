"""Runs as jobs of a real local cluster with its job server: submit, follow, stop, go on, two at once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from zipfile import ZipFile

import media
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import WebServer
from PIL import Image

from jobs.__main__ import main
from jobs.exits import BROKEN, FINISHED, HELD, REFUSED, TERMINATED, TOO_MANY_FAILED, UNFINISHED
from jobs.submit import exit_code
from pipeline.config import load_job
from pipeline.submit import JobServer, State, SubmitError

PICTURES = 1200
ENVIRONMENT = {
    **os.environ,
    # What the job server calls python must be the one that runs the tests.
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's own is 15: on a machine with other work the engine would not start in minutes.
    "RAY_worker_niceness": "0",
    # Ray asks for a token by itself wherever one lies in the home folder; here it is always one.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "f" * 64,
}


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def polyscribe(
    *words: str, timeout: float = 900, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs", *words],
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def ray_job(*words: str) -> subprocess.CompletedProcess[str]:
    """Ray's own command."""
    return subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "job", *words],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """`ray start --head`, in a place of its own so that no other Ray of this machine finds it."""
    place = mkdtemp(prefix="ps-", dir="/tmp")  # socket paths must be short
    dashboard, agent, client = free_ports(3)
    ray = subprocess.Popen(
        [
            *(shutil.which("ray", path=ENVIRONMENT["PATH"]) or "ray", "start", "--head", "--block"),
            *("--port=0", f"--dashboard-port={dashboard}", f"--temp-dir={place}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
            *("--num-cpus=2", "--object-store-memory=500000000"),
        ],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        until = time.monotonic() + 60
        while "Job unborn does" not in polyscribe("logs", "unborn", "--address", address).stderr:
            assert ray.poll() is None
            assert time.monotonic() < until
        yield address
    finally:
        ray.terminate()  # it stops what it started, in order
        ray.wait(timeout=60)
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def job(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "in").mkdir()
    for number in range(PICTURES):
        color = (number % 256, number // 256 * 40, 90)
        picture = media.encode(Image.new("RGB", (96, 48), color), "PNG")
        (folder / "in" / f"{number:05d}.png").write_bytes(picture)
    (folder / "in" / "00000.png").write_bytes(b"no picture")
    file = folder / "captions of today.yaml"
    sections = {
        "task": "caption",
        "input": {"uri": str(folder / "in")},
        "output": {"uri": str(folder / "out")},
        "model": {"id": str(nano)},
        "image": {"max_soft_tokens": 70},
        "sampling": {"max_tokens": 8},
        "engine": {
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": 64 << 20,
            "enforce_eager": True,
        },
        "resources": {"rows_per_block": 16},
        "limits": {"max_failed_fraction": 1.0},
    }
    file.write_text(yaml.safe_dump(sections))
    return file


def folder_of(job: Path, *overrides: str) -> Path:
    loaded = load_job(job, overrides)
    return Path(loaded.output.uri) / loaded.fingerprint


def committed(folder: Path) -> int:
    return sum(pq.read_metadata(part).num_rows for part in (folder / "ledger").glob("*.parquet"))


def wait_for(folder: Path, name: str, job_id: str, *at: str) -> None:
    asked = time.monotonic()
    until = asked + 900
    while not list(folder.glob(name)):
        time.sleep(0.2)
        if time.monotonic() - asked > 10:  # each call starts a Python, which costs the job its CPU
            running = polyscribe("status", job_id, *at).returncode == UNFINISHED
            assert running, polyscribe("logs", job_id, *at).stdout
            asked = time.monotonic()
        assert asked < until, f"no {name} in {folder}"


@pytest.mark.ray
@pytest.mark.engine
def test_submit_stop_and_go_on(head: str, job: Path) -> None:
    folder, at = folder_of(job), ("--address", head)
    first = polyscribe("submit", str(job), *at)
    assert first.returncode == FINISHED, first.stderr
    job_id = first.stdout.strip()
    assert polyscribe("status", job_id, *at).returncode == UNFINISHED

    # The same output while the first is at it, by the code of the "image".
    wait_for(folder, "lease.json", job_id, *at)
    second = polyscribe("submit", str(job), "--image-code", "--follow", *at)
    assert second.returncode == HELD, second.stdout
    assert "is at work on this output since" in second.stdout

    wait_for(folder, "ledger/*.parquet", job_id, *at)
    began = time.monotonic()
    stopped = polyscribe("stop", job_id, "--wait", *at)
    assert stopped.returncode == TERMINATED, stopped.stdout
    assert time.monotonic() - began < 25
    said = polyscribe("logs", job_id, *at).stdout
    assert "stopped: what is finished is committed" in said
    done = committed(folder)
    assert 0 < done < PICTURES
    assert not (folder / "_SUCCESS").exists()
    lease = json.loads((folder / "lease.json").read_text())
    assert datetime.fromisoformat(lease["expires"]) < datetime.now(UTC)  # given back

    # Two at once: the rest of a part of it, and another question with a failure too many.
    some = ("--set", f"limits.max_assets={done + 40}")
    other = ("--set", "prompt.text=What is 'this', then?", "--set", "limits.max_assets=20")
    none = ("--set", "limits.max_failed_fraction=0")
    resumed = polyscribe("submit", str(job), *some, *at)
    tags = polyscribe("submit", str(job), *other, *none, "--wait", *at)
    assert tags.returncode == TOO_MANY_FAILED, polyscribe("logs", tags.stdout.strip(), *at).stdout
    followed = polyscribe("logs", resumed.stdout.strip(), "--follow", *at)
    assert followed.returncode == FINISHED, followed.stdout
    assert "finished:" in followed.stdout
    accounts = json.loads((folder / "_SUCCESS").read_text())["accounts"]
    assert accounts["assets"]["found"] == done + 40
    assert accounts["done_now"] == committed(folder) - done < done + 40
    whole = polyscribe("verify", str(folder.parent))
    assert whole.returncode == FINISHED, whole.stderr

    # The same again by Ray's own command and the installed code: nothing is asked, nothing written.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    again = ray_job("submit", *at, "--", "python", "-m", "jobs", "run", str(job), *some)
    assert again.returncode == 0, again.stdout
    assert f"nothing new to do: {done + 40:,} assets" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")} == before


@pytest.mark.ray
def test_what_is_refused_here_never_reaches_the_cluster(head: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("{task: caption, input: {uri: in}, output: {uri: s3://b/o}, model: {id: a/b}}")
    at = ("--address", head)
    relative = polyscribe("submit", str(file), *at)
    assert relative.returncode == REFUSED
    assert "input.uri: in is a path relative to this folder" in relative.stderr
    wrong = polyscribe("submit", str(file), "--set", "image.max_soft_tokens=7", *at)
    assert wrong.returncode == REFUSED
    assert "image.max_soft_tokens" in wrong.stderr
    unknown = polyscribe("logs", "raysubmit_none", *at)
    assert unknown.returncode == BROKEN
    assert "raysubmit_none" in unknown.stderr
    stranger = polyscribe("logs", "raysubmit_none", *at, RAY_AUTH_TOKEN="e" * 64)
    assert stranger.returncode == BROKEN
    assert "the cluster wants its token" in stranger.stderr


class Proxy:
    """Between a follower and the job server; `cut` closes every connection that is open."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._open: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes `accept`, which `close` would not
        self._server.close()
        self.cut()
        for one in self._open:
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(self._target)
                self._open += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@pytest.mark.ray
def test_a_connection_that_is_cut_loses_no_line_and_doubles_none(head: str) -> None:
    """A night's run outlives the patience of proxies; its exit code must not be theirs."""
    host, _, port = head.removeprefix("http://").partition(":")
    proxy = Proxy((host, int(port)))
    counts = "for i in $(seq 1 40); do echo line $i; sleep 0.25; done; exit 3"
    submitted = ray_job(
        *("submit", "--address", head, "--no-wait", "--submission-id", "counts"),
        *("--", "bash", "-c", counts),
    )
    assert submitted.returncode == 0, submitted.stderr
    follower = subprocess.Popen(
        [
            *(sys.executable, "-m", "jobs", "logs", "counts", "--follow"),
            *("--address", f"http://127.0.0.1:{proxy.port}"),
        ],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert follower.stdout is not None
        said = [follower.stdout.readline() for _ in range(5)]
        proxy.cut()
        said += follower.stdout.readlines()
        assert follower.wait(timeout=300) == TOO_MANY_FAILED  # the job's own
    finally:
        follower.kill()
        follower.communicate()
        proxy.close()
    printed = [line for line in said if line.startswith("line ")]  # Ray says something first
    assert printed == [f"line {number}\n" for number in range(1, 41)]


@pytest.mark.ray
def test_a_name_is_one_run_at_a_time(head: str, tmp_path: Path) -> None:
    """A scheduler that tries again must find the run that goes on, and not start a second one."""
    at = ("--address", head)
    naps = ray_job("submit", *at, "--no-wait", "--submission-id", "night", "--", "sleep", "600")
    assert naps.returncode == 0, naps.stderr
    file = tmp_path / "job.yaml"
    file.write_text(
        f"{{task: caption, input: {{uri: {tmp_path}}}, output: {{uri: {tmp_path}/out}}}}"
    )
    submit = ("submit", str(file), "--set", "model.id=a/b", "--id", "night", *at)
    watched = polyscribe(*submit)
    assert watched.stdout == "night\n", watched.stderr
    assert polyscribe("stop", "night", "--wait", *at).returncode == TERMINATED
    second = polyscribe(*submit, "--wait")
    assert second.stdout == "night-2\n", second.stderr
    assert second.returncode == REFUSED  # no file matches


def answer(handler: BaseHTTPRequestHandler, code: int, fields: object) -> None:
    data = json.dumps(fields).encode()
    handler.send_response(code)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


VERSION = {"version": "4", "ray_version": "2.60.0", "ray_commit": ""}
JOB = {"type": "SUBMISSION", "entrypoint": "", "submission_id": "one"}


@pytest.fixture
def bucket_job(tmp_path: Path) -> Path:
    """A job that is all URIs, so that it may go to a cluster; under a name that it loses there."""
    file = tmp_path / "mine.yaml"
    file.write_text(
        "{task: caption, input: {uri: s3://b/i}, output: {uri: s3://b/o}, model: {id: a/b}}"
    )
    return file


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
