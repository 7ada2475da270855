"""Fetch against an HTTP server: lengths, limits, faults that pass, ranges, redirects."""

from __future__ import annotations

import contextlib
import pickle
import socket
import threading
import time

import pytest
from fetching import answer, failure, fetch
from ports import free_ports

from operators.errors import MediaError
from operators.fetch import Ref


def test_http_gives_bytes_with_and_without_a_length(web):
    web.routes["/a.jpg"] = answer(b"1234")
    web.routes["/b.jpg"] = answer(b"1234", length=False)
    for name in ("a.jpg?size=1", "b.jpg"):
        assert fetch()(Ref(f"{web.url}/{name}")).data == b"1234"
    assert web.asked == ["/a.jpg?size=1", "/b.jpg"]


def test_http_stops_reading_at_the_limit(web):
    sent = []

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            while True:
                sent.append(handler.wfile.write(b"x" * 65536))

    web.routes["/endless"] = endless
    web.routes["/big"] = answer(b"x" * 1001)
    assert failure(Ref(f"{web.url}/endless"), max_bytes=1000).code == "fetch.too_large"
    assert failure(Ref(f"{web.url}/big"), max_bytes=1000).code == "fetch.too_large"
    assert sum(sent) < 64 << 20


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (404, "fetch.not_found"),
        (410, "fetch.not_found"),
        (401, "fetch.forbidden"),
        (403, "fetch.forbidden"),
        (400, "fetch.unavailable"),
    ],
)
def test_http_refusals_are_not_tried_again(web, status, code):
    web.routes["/a"] = answer(status)
    error = failure(Ref(f"{web.url}/a"))
    assert (error.code, error.attempts, len(web.asked)) == (code, 1, 1)
    assert f"HTTP {status}" in error.message


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_http_faults_that_pass_are_tried_again(web, status):
    web.routes["/a"] = answer(status, b"1")
    got = fetch()(Ref(f"{web.url}/a"))
    assert (got.data, got.attempts) == (b"1", 2)


def test_a_slow_server_costs_one_time_limit_an_attempt(web):
    stop = threading.Event()
    web.routes["/slow"] = lambda handler: stop.wait(10)
    started = time.monotonic()
    error = failure(Ref(f"{web.url}/slow"), timeout_s=0.2, attempts=2)
    stop.set()
    assert (error.code, error.attempts, len(web.asked)) == ("fetch.timeout", 2, 2)
    assert time.monotonic() - started < 3


def test_a_body_that_stalls_is_a_timeout(web):
    stop = threading.Event()

    def stall(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b"half")
        stop.wait(10)

    web.routes["/stall"] = stall
    error = failure(Ref(f"{web.url}/stall"), timeout_s=0.3, attempts=1)
    stop.set()
    assert error.code == "fetch.timeout"


def test_a_body_that_ends_early_is_tried_again(web):
    turns = []

    def cut(handler):
        turns.append(1)
        handler.send_response(200)
        handler.send_header("Content-Length", "4")
        handler.end_headers()
        handler.wfile.write(b"1234" if len(turns) > 1 else b"12")

    web.routes["/cut"] = cut
    got = fetch()(Ref(f"{web.url}/cut"))
    assert (got.data, got.attempts) == (b"1234", 2)


def test_a_reset_connection_is_tried_again(web):
    turns = []

    def reset(handler):
        turns.append(1)
        if len(turns) <= 2:  # aiohttp itself repeats once, at no time
            handler.connection.shutdown(socket.SHUT_RDWR)
        else:
            answer(b"1")(handler)

    web.routes["/reset"] = reset
    got = fetch()(Ref(f"{web.url}/reset"))
    assert (got.data, got.attempts) == (b"1", 2)


def test_nobody_listening_is_unavailable():
    (port,) = free_ports(1)
    error = failure(Ref(f"http://127.0.0.1:{port}/a"), attempts=2)
    assert (error.code, error.attempts) == ("fetch.unavailable", 2)


def test_http_ranges_need_a_server_that_knows_them(web):
    def ranged(handler):
        start, end = handler.headers["Range"].removeprefix("bytes=").split("-")
        answer(b"0123456789"[int(start) : int(end) + 1], status=206)(handler)

    web.routes["/ranged.tar"] = ranged
    web.routes["/whole.tar"] = answer(b"0123456789")
    ref = Ref(f"{web.url}/ranged.tar", offset=3, length=4)
    assert fetch()(ref).data == b"3456"
    error = failure(Ref(f"{web.url}/whole.tar", offset=3, length=4))
    assert (error.code, error.attempts) == ("fetch.unavailable", 1)


@pytest.mark.parametrize("host", ["www..example.com", "a" * 64 + ".com", ".x"])
def test_a_host_that_cannot_be_one_fails_the_row(web, host):
    """IDNA's UnicodeError once ended the whole run."""

    def send_on(handler):
        handler.send_response(302)
        handler.send_header("Location", f"http://{host}/x.jpg")
        handler.end_headers()

    web.routes["/moved"] = send_on
    for uri in (f"http://{host}/x.jpg", f"{web.url}/moved"):
        error = failure(Ref(uri))
        assert (error.code, error.attempts) == ("fetch.not_found", 1)
        assert error.message.endswith("no valid host name")


def test_errors_name_no_credentials_and_survive_pickling(web):
    uri = f"{web.url.replace('//', '//me:hunter2@')}/a.jpg?sig=hunter3"
    error = failure(Ref(uri), {"headers": {"Authorization": "hunter4"}})
    assert "hunter" not in error.message
    assert "***@127.0.0.1" in error.message
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, MediaError)
    assert (again.code, again.message, again.attempts) == ("fetch.not_found", error.message, 1)
