"""Fetch against real files, an S3 server and an HTTP server: bytes, codes, attempts, limits."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fsspec import AbstractFileSystem
from fsspec.registry import known_implementations, register_implementation

from operators.errors import MediaError
from operators.fetch import Fetch, FetchError, Ref
from operators.settings import FetchSettings
from operators.stores import StoreError, filesystem, redact, unsigned

NAMES = ["a b/ü#1?.jpg", "x//y.jpg", "p%20q+r.jpg", "[1]{2}*.jpg", "a::b.jpg", "v?versionId=7.jpg"]


def fetch(settings=None, options=None, **limits):
    return Fetch(settings or FetchSettings(**limits), options or {})


def failure(ref, options=None, **limits):
    with pytest.raises(FetchError) as caught:
        fetch(options=options, **limits)(ref)
    return caught.value


def answer(*bodies, status=200, length=True):
    """A route that sends one body after the other, the last one for ever; an int is a status."""
    left = list(bodies)

    def route(handler):
        body = left.pop(0) if len(left) > 1 else left[0]
        code, data = (body, b"") if isinstance(body, int) else (status, body)
        handler.send_response(code)
        if length:
            handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return route


@contextlib.contextmanager
def without_root():
    """Permissions do not bind root, and CI often is root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# Local files


@pytest.mark.parametrize("name", NAMES)
def test_local_names_survive_exactly(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(name.encode())
    for uri in (f"{tmp_path}/{name}", f"file://{tmp_path}/{name}"):
        assert fetch()(Ref(uri)).data == name.encode()


def test_a_range_is_read_from_its_offset(tmp_path):
    (tmp_path / "shard.tar").write_bytes(b"0123456789")
    got = fetch()(Ref(f"{tmp_path}/shard.tar", offset=3, length=4, size_bytes=4))
    assert (got.data, got.attempts) == (b"3456", 1)


def test_local_faults_have_their_codes_after_one_attempt(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("missing", "folder", "pipe", "loop", "x" * 300, "nul\0byte"):
        error = failure(Ref(f"{tmp_path}/{name}"))
        assert (error.code, error.attempts) == ("fetch.not_found", 1), name


def test_an_unreadable_file_is_forbidden(tmp_path):
    path = tmp_path / "secret.jpg"
    path.write_bytes(b"1")
    path.chmod(0)
    with without_root():
        error = failure(Ref(str(path)))
    assert (error.code, error.attempts) == ("fetch.forbidden", 1)


def test_a_file_of_another_size_than_listed_has_changed(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"12345")
    assert fetch()(Ref(str(path), size_bytes=5)).data == b"12345"
    for planned in (4, 6):
        error = failure(Ref(str(path), size_bytes=planned))
        assert error.code == "fetch.changed"
        assert error.transient
    assert failure(Ref(str(path), offset=3, length=4)).code == "fetch.changed"


def test_too_large_is_known_before_the_file_is_touched(tmp_path):
    error = failure(Ref(f"{tmp_path}/missing", size_bytes=11), max_bytes=10)
    assert (error.code, error.attempts) == ("fetch.too_large", 0)
    (tmp_path / "a").write_bytes(b"x" * 11)
    assert failure(Ref(f"{tmp_path}/a"), max_bytes=10).code == "fetch.too_large"
    assert len(fetch(max_bytes=11)(Ref(f"{tmp_path}/a")).data) == 11


def test_an_empty_member_needs_no_request():
    assert fetch()(Ref("s3://nowhere/shard.tar", offset=512, length=0)).data == b""


# S3


@pytest.mark.parametrize("name", NAMES)
def test_s3_keys_survive_exactly(s3, name):
    uri = f"{s3.bucket()}/{name}"
    s3.put(uri, name.encode())
    assert fetch(options=s3.options)(Ref(uri, size_bytes=len(name.encode()))).data == name.encode()


def test_s3_ranges_empty_objects_and_sizes(s3):
    bucket = s3.bucket()
    s3.put(f"{bucket}/shard.tar", b"0123456789")
    s3.put(f"{bucket}/empty", b"")
    get = fetch(options=s3.options)
    assert get(Ref(f"{bucket}/shard.tar", offset=3, length=4)).data == b"3456"
    assert get(Ref(f"{bucket}/empty")).data == b""
    for ref in (
        Ref(f"{bucket}/shard.tar", offset=8, length=4),
        Ref(f"{bucket}/shard.tar", offset=20, length=4),
        Ref(f"{bucket}/shard.tar", size_bytes=9),
        Ref(f"{bucket}/shard.tar", size_bytes=11),
    ):
        assert failure(ref, s3.options).code == "fetch.changed", ref
    assert failure(Ref(f"{bucket}/shard.tar"), s3.options, max_bytes=9).code == "fetch.too_large"


def test_s3_missing_objects_folders_and_buckets_are_not_found(s3):
    bucket = s3.bucket()
    s3.put(f"{bucket}/folder/a.jpg", b"1")
    for uri in (
        f"{bucket}/no.jpg",
        f"{bucket}/folder",
        bucket,
        "s3://no-such-bucket/a",
        "s3://_/a",
    ):
        error = failure(Ref(uri), s3.options)
        assert (error.code, error.attempts) == ("fetch.not_found", 1), uri


def test_s3_forbidden_is_not_tried_again(s3):
    s3.fault = lambda *asked: (403, "AccessDenied")
    error = failure(Ref("s3://bucket/a.jpg"), s3.options)
    assert (error.code, error.attempts) == ("fetch.forbidden", 1)
    assert len(s3.asked("s3://bucket/a.jpg")) == 1


@pytest.mark.parametrize("fault", [(503, "SlowDown"), (500, "InternalError"), (429, "TooMany")])
def test_s3_faults_that_pass_are_tried_again(s3, fault):
    uri = f"{s3.bucket()}/a.jpg"
    s3.put(uri, b"1")
    s3.requests.clear()
    s3.fault = lambda *asked: fault if len(s3.asked(uri)) == 1 else None
    got = fetch(options=s3.options)(Ref(uri))
    assert (got.data, got.attempts) == (b"1", 2)
    assert len(s3.asked(uri)) == 2


def test_a_store_that_keeps_failing_is_unavailable_after_as_many_requests_as_attempts(s3):
    s3.fault = lambda *asked: (503, "SlowDown")
    error = failure(Ref("s3://bucket/a.jpg"), s3.options, attempts=2)
    assert (error.code, error.attempts, error.transient) == ("fetch.unavailable", 2, True)
    assert "HTTP 503 SlowDown" in error.message
    assert len(s3.asked("s3://bucket/a.jpg")) == 2


def test_one_fetch_serves_many_threads(s3):
    bucket = s3.bucket()
    s3.fill(f"{bucket}/", [f"{place}.jpg" for place in range(40)])
    get = fetch(options=s3.options, concurrency=16)
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda place: get(Ref(f"{bucket}/{place}.jpg")).data, range(40)))
    assert got == [b"x"] * 40


# HTTP


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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


# URIs, options and errors


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


def test_other_stores_are_read_too():
    store, path = filesystem("memory://fetch/a.jpg", {})
    store.pipe_file(path, b"0123")
    assert fetch()(Ref("memory://fetch/a.jpg")).data == b"0123"
    assert fetch()(Ref("memory://fetch/a.jpg", offset=1, length=2)).data == b"12"
    assert failure(Ref("memory://fetch/b.jpg")).code == "fetch.not_found"


def test_a_store_nobody_can_open_fails_the_row_and_says_why():
    assert "unknown scheme foo://" in failure(Ref("foo://bucket/a.jpg")).message
    assert "needs gcsfs, install it" in failure(Ref("gs://bucket/a.jpg")).message
    assert failure(Ref("gs://bucket/a.jpg")).code == "fetch.unavailable"


@pytest.mark.parametrize("scheme", ["data", "dir", "tar", "zip"])
def test_what_is_no_store_fails_the_row(scheme):
    uri = f"{scheme}://x/y.jpg"
    error = failure(Ref(uri))
    assert (error.code, error.attempts) == ("fetch.unavailable", 0)
    assert error.message.startswith(f"{uri}: unknown scheme {scheme}://")


class Refused(Exception):
    """What ftp, sftp and Azure raise derives from Exception alone, like this."""


class BlockStore(AbstractFileSystem):
    protocol = "blockstore"

    def open(self, path, mode="rb"):
        raise Refused


def test_whatever_an_unknown_store_raises_fails_the_row(monkeypatch):
    monkeypatch.setitem(known_implementations, "blockstore", {"class": f"{__name__}.BlockStore"})
    register_implementation("blockstore", BlockStore, clobber=True)
    error = failure(Ref("blockstore://x/y.jpg"))
    assert (error.code, error.attempts) == ("fetch.unavailable", 1)
    assert error.message == "blockstore://x/y.jpg: refused"


def test_a_wrong_storage_option_is_named_but_not_its_value():
    with pytest.raises(StoreError, match="no option secrret") as caught:
        filesystem("s3://bucket/a", {"secrret": "hunter2"})
    assert "hunter2" not in str(caught.value)


def test_options_may_be_keyed_by_scheme_and_s3_secrets_stay_with_s3(s3, web):
    seen = []

    def route(handler):
        seen.append(dict(handler.headers))
        answer(b"1")(handler)

    web.routes["/a"] = route
    keyed = {"s3": s3.options, "http": {"headers": {"X-Who": "me"}}}
    uri = f"{s3.bucket()}/a"
    s3.put(uri, b"2")
    assert fetch(options=keyed)(Ref(uri)).data == b"2"
    assert fetch(options=keyed)(Ref(f"{web.url}/a")).data == b"1"
    assert fetch(options=s3.options)(Ref(f"{web.url}/a")).data == b"1"
    assert seen[0]["X-Who"] == "me"
    assert "test-secret" not in str(seen)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://me:hunter2@host:8080/a@b.jpg", "https://***@host:8080/a@b.jpg"),
        ("https://me:hunter@2@host/a.jpg", "https://***@host/a.jpg"),
        ("http://127.0.0.1:8080/a@b.jpg", "http://127.0.0.1:8080/a@b.jpg"),
        ("https://host/a.jpg?X-Amz-Signature=hunter2#x", "https://host/a.jpg?***"),
        ("s3://KEY:hun/ter2@bucket/a?.jpg", "s3://***@bucket/a?.jpg"),
        ("s3://bucket/a b/ü#1?.jpg", "s3://bucket/a b/ü#1?.jpg"),
        ("/data/a?b#c@d.jpg", "/data/a?b#c@d.jpg"),
        ("tar://m?.jpg::https://u:p@host/s.tar?sig=x", "tar://m?.jpg::https://***@host/s.tar?***"),
    ],
)
def test_messages_show_the_uri_without_credentials(uri, shown):
    assert redact(uri) == shown


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://u:p@host/a.jpg?id=1&key=b", "https://host/a.jpg?id=1&key=b"),
        ("https://u:p@ss@host/a.jpg", "https://host/a.jpg"),
        ("tar://m.jpg::https://u:p@host/s@1.tar", "tar://m.jpg::https://host/s@1.tar"),
        ("https://host/a?X-Amz-Date=1&w=2&X-Amz-Signature=3", "https://host/a?w=2"),
        ("https://host/a?sv=1&sig=2", "https://host/a"),
        ("s3://KEY:hun/ter2@bucket/a@2x.jpg", "s3://bucket/a@2x.jpg"),
        (
            "tar://m?.jpg::https://u:p@h/s.tar?X-Amz-Signature=x&w=1",
            "tar://m?.jpg::https://h/s.tar?w=1",
        ),
    ],
)
def test_results_show_the_uri_without_what_signs_it(uri, shown):
    assert unsigned(uri) == shown


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/a?sig=1.jpg",
        "s3://bucket/me@corp/a@2x.jpg",
        "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/raw/a@2x.jpg",
        "abfs://raw@account.dfs.core.windows.net/a.jpg",
        "/home/me@corp/x://y@z.jpg",
        "tar://icon@2x.png::/s.tar",
        "tar://1.jpg::/home/me@corp/s.tar",
        "tar://1.jpg::s3://bucket/set@v2.tar",
    ],
)
def test_an_at_sign_in_a_name_is_no_users(uri):
    assert unsigned(uri) == uri


def test_errors_name_no_credentials_and_survive_pickling(web):
    uri = f"{web.url.replace('//', '//me:hunter2@')}/a.jpg?sig=hunter3"
    error = failure(Ref(uri), {"headers": {"Authorization": "hunter4"}})
    assert "hunter" not in error.message
    assert "***@127.0.0.1" in error.message
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, MediaError)
    assert (again.code, again.message, again.attempts) == ("fetch.not_found", error.message, 1)


def test_fetch_pickles(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    assert pickle.loads(pickle.dumps(fetch()))(Ref(f"{tmp_path}/a")).data == b"1"
