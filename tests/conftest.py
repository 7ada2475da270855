"""Servers on loopback: S3 (moto, over HTTP) and scripted plain HTTP; Ray; the checkpoint; rights."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class _Quiet(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


@dataclass
class S3Server:
    """`uri = server.bucket()`; `requests` is what was asked, `fault` may answer instead of moto."""

    endpoint: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    # (method, path, query) -> (HTTP status, S3 error code), or None for moto's own answer
    fault: Callable[[str, str, str], tuple[int, str] | None] | None = None
    _count: Iterator[int] = field(default_factory=itertools.count)

    @property
    def options(self) -> dict[str, Any]:
        """storage_options; nothing is read from the environment."""
        return {"endpoint_url": self.endpoint, "key": "test-key", "secret": "test-secret"}

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return fsspec.filesystem("s3", use_listings_cache=False, **self.options)

    def bucket(self) -> str:
        """A new empty bucket, as s3://name."""
        name = f"bucket-{next(self._count)}"
        self.fs.call_s3("create_bucket", Bucket=name)
        return f"s3://{name}"

    def put(self, uri: str, data: bytes) -> None:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        self.fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data)

    def asked(self, uri: str) -> list[tuple[str, str, str]]:
        """The requests for one URI: an upload that failed elsewhere may still be sending parts."""
        return [asked for asked in self.requests if asked[1] == uri.removeprefix("s3:/")]

    def fill(self, uri: str, names: Iterable[str]) -> None:
        """Many small objects, past HTTP: a thousand a second there, forty times that here."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        for name in names:
            backend.put_object(bucket, prefix + name, b"x")


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[S3Server]:
    state = S3Server()
    moto = DomainDispatcherApplication(create_backend_app)

    def serve(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        asked = (environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"])
        state.requests.append(asked)
        fault = state.fault(*asked) if state.fault else None
        if fault is None:
            return moto(environ, start)
        status, code = fault
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start(f"{status} fault", [("Content-Type", "application/xml")])
        return [body.encode()]

    server = make_server("127.0.0.1", 0, serve, threaded=True, request_handler=_Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def s3(_s3_server: S3Server) -> Iterator[S3Server]:
    _s3_server.requests.clear()
    yield _s3_server
    _s3_server.fault = None


class WebServer(ThreadingHTTPServer):
    """Answers with `routes[path]`, a function of the request handler; 404 elsewhere.

    HEAD is answered by `routes["HEAD path"]`, or not known.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _WebHandler)
        self.routes: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that hangs up early is part of the tests


class _WebHandler(BaseHTTPRequestHandler):
    server: WebServer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(self.path)
        route = self.server.routes.get(path)
        if route is None:
            self.send_error(404)
        else:
            route(self)

    def do_HEAD(self) -> None:
        route = self.server.routes.get(f"HEAD {self.path}")
        if route is None:
            self.send_error(501)
        else:
            route(self)

    do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[WebServer]:
    server = WebServer()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


CHECKPOINT = Path(__file__).parent.parent / "deploy" / "nano" / "checkpoint"


@pytest.fixture(scope="session")
def nano() -> Path:
    """The nano checkpoint: Gemma 4 Unified's architecture, and answers that can be checked."""
    assert (CHECKPOINT / "model.safetensors").exists()
    return CHECKPOINT


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray of two CPUs for all tests: starting it costs 4 s."""
    import fakes
    import ray

    ray.init(
        # never a cluster that happens to run on this machine
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=1 << 30,
    )
    # Workers do not have tests/ on their path.
    ray.cloudpickle.register_pickle_by_value(fakes)
    yield
    ray.shutdown()


@contextmanager
def without_root() -> Iterator[None]:
    """Permissions do not bind root, and CI often is root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
