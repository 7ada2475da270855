"""One writer at a time: who gets the lease, who is refused, and what happens when it is lost."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import media
import pytest
from conftest import S3Server
from fakes import EchoEngine
from PIL import Image
from rich.console import Console

from pipeline.assemble import read_marker
from pipeline.config import Job
from pipeline.lease import Lease, LeasedStore, LeaseError, OutdatedError
from pipeline.lease_slot import NAME
from pipeline.run import folder_store, run
from pipeline.store import Store

Make = Callable[..., Lease]


@pytest.fixture(params=["local", "s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3")
        yield f"{server.bucket()}/out/f00", server.options
    elif request.param == "memory":
        yield f"memory://{tmp_path.name}/f00", {}
    else:
        yield str(tmp_path / "f00"), {}


@pytest.fixture
def make(place: tuple[str, dict[str, Any]]) -> Make:
    said: list[str] = []

    def one(holder: str = "run-1", **settings: Any) -> Lease:
        return Lease(*place, holder, settings.pop("say", said.append), **settings)

    return one


def other_claim(minutes: float = 5) -> bytes:
    ends = (datetime.now(UTC) + timedelta(minutes=minutes)).isoformat()
    return json.dumps(
        {"holder": "other", "host": "elsewhere", "since": ends, "expires": ends}
    ).encode()


def claim(place: tuple[str, dict[str, Any]]) -> dict[str, str]:
    found: dict[str, str] = json.loads(Store(*place).read(NAME))
    return found


def test_nothing_is_written_until_it_is_needed(make: Make, place: Any) -> None:
    with make():
        pass
    assert Store(*place).names() == []


def test_the_second_is_told_who_holds_it_since_when_and_until_when(make: Make, place: Any) -> None:
    with make("run-1") as first:
        first.hold()
        held = claim(place)
        with pytest.raises(LeaseError, match="run run-1 on ") as refused:
            make("run-2").hold()
        assert f"since {held['since']}; its lease ends at {held['expires']}" in str(refused.value)
        first.hold()  # still ours
    assert claim(place)["holder"] == "run-1"


def test_it_is_given_back_at_the_end_also_of_a_run_that_fails(make: Make) -> None:
    def stopped() -> None:
        with make("run-1") as first:
            first.hold()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with make("run-2") as second:
        second.hold()


@pytest.mark.parametrize("place", ["local", "s3"], indirect=True)
def test_a_dead_holder_is_taken_over_after_its_time(make: Make, place: Any) -> None:
    dead = make("dead", ttl_s=0.6)
    dead.hold()
    dead._ends.set()  # as SIGKILL leaves it: no renewal, no release
    with pytest.raises(LeaseError, match="run dead"):
        make("early").hold()
    time.sleep(0.7)
    with make("late") as late:
        late.hold()
        assert claim(place)["holder"] == "late"
        with pytest.raises(LeaseError, match=r"run late on .* has taken over"):
            dead.hold()


def test_it_is_renewed_for_as_long_as_the_run_lasts(make: Make, place: Any) -> None:
    with make("run-1", ttl_s=0.9) as lease:
        lease.hold()
        first = claim(place)
        time.sleep(1.4)
        now = claim(place)
        assert now["since"] == first["since"]
        assert datetime.fromisoformat(now["expires"]) > datetime.now(UTC)
        with pytest.raises(LeaseError):
            make("run-2").hold()


def test_a_run_whose_lease_was_taken_is_stopped_and_writes_no_more(make: Make, place: Any) -> None:
    lost = threading.Event()

    def loses() -> None:
        with make("run-1", ttl_s=0.6, on_lost=lost.set) as lease:
            LeasedStore(*place, lease).write("_SUCCESS", b"first")
            Store(*place).write(NAME, other_claim())
            assert lost.wait(5)
            with pytest.raises(LeaseError):
                LeasedStore(*place, lease).write("_SUCCESS", b"second")
            with pytest.raises(LeaseError):
                LeasedStore(*place, lease).delete(["_SUCCESS"])
            with pytest.raises(LeaseError):
                LeasedStore(*place, lease).held()

    with pytest.raises(LeaseError, match="run other on elsewhere has taken over"):
        loses()
    assert Store(*place).read("_SUCCESS") == b"first"
    assert claim(place)["holder"] == "other"


@pytest.mark.parametrize("place", ["local", "s3"], indirect=True)
@pytest.mark.parametrize("before", ["nothing", "a dead run"])
def test_of_many_at_once_one_gets_it(make: Make, place: Any, before: str) -> None:
    if before == "a dead run":
        Store(*place).write(NAME, other_claim(minutes=-1))
    start = threading.Barrier(8)

    def attempt(number: int) -> str:
        lease = make(f"run-{number}")
        start.wait()
        try:
            lease.hold()
        except LeaseError:
            return "refused"
        return f"run-{number}"

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(attempt, range(8)))
    winners = [outcome for outcome in outcomes if outcome != "refused"]
    assert winners == [claim(place)["holder"]]


def test_only_a_store_without_conditional_writes_is_said_to_be_one(s3: S3Server) -> None:
    uri = f"{s3.bucket()}/out"
    said: list[str] = []
    with Lease(uri, s3.options, "run-1", said.append) as lease:
        lease.hold()
    assert said == []
    # A store that refuses the headers: as older S3-compatible ones do.
    refusals: list[int] = []

    def refuse(method: str, path: str, query: str) -> tuple[int, str] | None:
        if method == "PUT" and not refusals:
            refusals.append(501)
            return 501, "NotImplemented"
        return None

    s3.fault = refuse
    with Lease(uri, s3.options, "run-2", said.append) as lease:
        lease.hold()
    assert len(said) == 1
    assert "no conditional write" in said[0]
    assert refusals


def test_a_store_that_is_down_for_a_renewal_costs_nothing(s3: S3Server) -> None:
    uri = f"{s3.bucket()}/out"
    down = threading.Event()
    s3.fault = lambda method, path, query: (403, "AccessDenied") if down.is_set() else None
    with Lease(uri, s3.options, "run-1", lambda text: None, ttl_s=1.5) as lease:
        lease.hold()
        down.set()
        time.sleep(0.8)
        down.clear()
        time.sleep(0.6)
        lease.hold()


@pytest.mark.parametrize("refused", ["the renewal", "the look at it"])
def test_a_renewal_that_failed_beside_nobody_is_tried_again(refused: str, s3: S3Server) -> None:
    """A run that took its own claim for another's, or a conflict with nobody for one, stopped itself.

    The look: the claim arrived but the run was not told. The renewal: S3 may say 409 at any time.
    """
    uri = f"{s3.bucket()}/out"
    puts: list[str] = []
    failed, again = threading.Event(), threading.Event()

    def fault(method: str, path: str, query: str) -> tuple[int, str] | None:
        if method == "PUT":
            puts.append(path)
        if len(puts) > 1:
            again.set()
        if failed.is_set() or not puts or (method == "PUT") != (refused == "the renewal"):
            return None
        failed.set()
        return (409, "ConditionalRequestConflict") if method == "PUT" else (403, "AccessDenied")

    # Renewed each 2 s: room for a slow machine.
    with Lease(uri, s3.options, "run-1", lambda text: None, ttl_s=6) as lease:
        lease.hold()
        s3.fault = fault
        assert failed.wait(30)
        assert again.wait(30)
        lease.hold()
    with Lease(uri, s3.options, "run-2", lambda text: None) as second:
        second.hold()  # it was given back


def test_a_run_may_wait_for_the_lease_of_a_dead_one(make: Make, place: Any) -> None:
    """Runs that are started again by themselves meet what a killed one left: ten minutes of lease."""
    Store(*place).write(NAME, other_claim(minutes=1.2 / 60))
    said: list[str] = []
    with make("run-2", wait_s=30, say=said.append) as lease:
        assert lease.hold()
        assert not lease.hold()
    assert claim(place)["holder"] == "run-2"
    assert "run other on elsewhere is at work on this output since" in said[0]
    assert "Waiting for it, at most 30 s" in said[0]


def test_a_run_waits_no_longer_than_it_was_told(make: Make, place: Any) -> None:
    Store(*place).write(NAME, other_claim())
    began = time.monotonic()
    with pytest.raises(LeaseError, match="run other"):
        make("run-2", wait_s=0.5).hold()
    assert 0.5 <= time.monotonic() - began < 10


def test_the_write_that_takes_the_lease_finds_out_that_the_plan_is_old(
    make: Make, place: Any
) -> None:
    with make("run-2") as lease:
        store = LeasedStore(*place, lease, watched=("ledger",))
        store.look()
        with make("run-1") as first:
            LeasedStore(*place, first).write("ledger/1.parquet", b"rows")
        with pytest.raises(OutdatedError):
            store.write("run.json", b"{}")
        assert Store(*place).names("run.json") == []
        # Now it is ours: nobody can come between the next look and the next write.
        store.look()
        store.write("run.json", b"{}")
        store.write("ledger/2.parquet", b"rows")
        store.write("run.json", b"{}")


@pytest.mark.parametrize("content", [b"", b"{", b'{"holder": 1}', bytes([255, 254, 0])])
def test_a_lease_that_cannot_be_read_is_said_to_be_one(
    make: Make, place: Any, content: bytes
) -> None:
    Store(*place).write(NAME, content)
    with pytest.raises(LeaseError, match=r"lease\.json cannot be read; remove it"):
        make().hold()


def picture_job(nano: Path, tmp_path: Path) -> Job:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        picture = Image.new("RGB", (96, 48), (number * 50, 0, 0))
        (folder / f"{number}.png").write_bytes(media.encode(picture, "PNG"))
    return Job.model_validate(
        {
            "task": "caption",
            "input": {"uri": str(folder)},
            "output": {"uri": str(tmp_path / "out")},
            "model": {"id": str(nano)},
            "image": {"max_soft_tokens": 70},
        }
    )


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_run_takes_the_lease_only_to_write(nano: Path, tmp_path: Path) -> None:
    job = picture_job(nano, tmp_path)
    folder = folder_store(job)
    quiet = Console(file=io.StringIO())
    with Lease(folder.url(), {}, "other", lambda text: None) as other:
        other.hold()
        with pytest.raises(LeaseError, match="run other"):
            run(job, quiet, engine=lambda job: EchoEngine)
        assert folder.names("plan") == folder.names("ledger") == []
    done = run(job, quiet, engine=lambda job: EchoEngine)
    assert done.accounts["assets"]["ok"] == 3
    assert json.loads(folder.read(NAME))["holder"] != "other"
    with Lease(folder.url(), {}, "other", lambda text: None) as other:
        other.hold()
        # Nothing to do, nothing to write, nobody to ask.
        assert not run(job, quiet, engine=lambda job: EchoEngine).did_work


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_run_that_another_one_overtook_asks_for_nothing_twice(nano: Path, tmp_path: Path) -> None:
    """Both plan while nothing is done; the second gets the lease when the first has finished."""
    job = picture_job(nano, tmp_path)
    folder = folder_store(job)
    said = io.StringIO()

    class Overtaken(Console):
        """At its first word about the plan another run does the whole job."""

        def print(self, *words: Any, **settings: Any) -> None:
            super().print(*words, **settings)
            if "3 to do" in str(words) and read_marker(folder) is None:
                first = run(job, Console(file=io.StringIO()), engine=lambda job: EchoEngine)
                assert first.accounts["done_now"] == 3

    second = run(job, Overtaken(file=said), engine=lambda job: EchoEngine)
    assert "another run has worked on this output meanwhile: planning again" in said.getvalue()
    assert not second.did_work
    assert len(folder.names("ledger")) == 1
    assert second.accounts["assets"]["ok"] == 3


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_run_that_lost_its_lease_writes_no_marker(nano: Path, tmp_path: Path) -> None:
    job = picture_job(nano, tmp_path)
    folder = folder_store(job)

    lease, other = Path(folder.url(NAME)), other_claim()

    class Taken(EchoEngine):
        """Another run takes the lease while this one generates."""

        def submit(self, request: Any) -> Any:
            lease.write_bytes(other)
            return super().submit(request)

    with pytest.raises(LeaseError, match="run other on elsewhere has taken over"):
        run(job, Console(file=io.StringIO()), engine=lambda job: Taken)
    assert read_marker(folder) is None
    assert folder.names("ledger")  # what was finished is there for whoever goes on
