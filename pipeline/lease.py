"""One writer at a time: `lease.json` in OUTPUT/<fingerprint> names the run that may write there.

    Lease         taken at the first write, renewed by a thread, ended when the run ends
    LeasedStore   the output folder as the driver of a run writes it: each write first asks the lease

How lease.json is replaced by one writer alone is in pipeline/lease_slot.py; a store without conditional
writes gets write, wait, read back, and the run says so. A run that died is taken over when its time is
up; that compares two machines' clocks, so a skew shortens or lengthens the ten minutes. Write tasks on
workers go on under the driver's lease: a part's name holds the run's id, so a late one never replaces
another run's.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from operators.stores import faults_of
from pipeline.lease_slot import NAME, Found, open_slot
from pipeline.store import Store

# Three renewals fit in: two may fail before the lease is gone. Long against a store's hiccup, short
# against a night that waits for a run that died.
TTL_S = 600.0
# Where a store has no conditional write: long enough for another writer's PUT to arrive.
SETTLE_S = 2.0
# How often a run that waits for another one's lease looks again.
LOOK_S = 3.0


class LeaseError(Exception):
    """Another run holds the output. The message says who, since when and until when."""


class OutdatedError(Exception):
    """Another run has changed the output since this one looked at it: plan again, the lease is held."""


@dataclass(frozen=True)
class Claim:
    """What lease.json says. Times are ISO 8601, UTC; `expires` in the past: nobody holds it."""

    holder: str
    host: str
    since: str
    expires: str

    def json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    def over(self) -> bool:
        return datetime.fromisoformat(self.expires) <= datetime.now(UTC)


class Lease:
    """Context manager around a run. `on_lost` is called once, from a thread, when it is taken away.

    `wait_s`: how long to wait for another run's lease to end before giving up.
    """

    def __init__(
        self,
        uri: str,
        storage_options: Mapping[str, Any],
        holder: str,
        say: Callable[[str], None],
        on_lost: Callable[[], None] = lambda: None,
        ttl_s: float = TTL_S,
        wait_s: float = 0.0,
    ) -> None:
        self._store = Store(uri, storage_options)
        self._slot = open_slot(uri, storage_options)
        self._faults = faults_of(uri)
        self._holder = holder
        self._host = f"{platform.node()} (process {os.getpid()})"
        self._say = say
        self._on_lost = on_lost
        self._ttl_s = ttl_s
        self._wait_s = wait_s
        self._since = ""
        self._lock = threading.Lock()
        self._mine: bytes | None = None  # what we wrote last; None: nothing held
        self._lost = ""
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._ends.set()
        if self._thread is not None:
            self._thread.join(timeout=self._ttl_s)
        if self._lost and not isinstance(error, LeaseError):
            # Whatever stopped the run, this is why.
            raise LeaseError(self._lost) from error
        self._release()

    def hold(self) -> bool:
        """Take the lease, or look that it is still ours. True: taken now. Raises LeaseError."""
        with self._lock:
            if self._lost:
                raise LeaseError(self._lost)
            taken = self._mine is None
            if taken:
                self._take()
            elif not self._is_ours(found := self._slot.read()):
                self._lose(found)
                raise LeaseError(self._lost)
        if self._thread is None:
            self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
            self._thread.start()
        return taken

    def free(self) -> bool:
        """Whether it is ours, or nobody's now."""
        with self._lock:
            if self._mine is not None:
                return True
            found = self._slot.read()
            return found is None or _claim(found[0]).over()

    def _take(self) -> None:
        until, said = time.monotonic() + self._wait_s, False
        while True:
            try:
                return self._try()
            except LeaseError as error:
                left_s = until - time.monotonic()
                if left_s <= 0:
                    raise
                if not said:
                    self._say(f"{error}. Waiting for it, at most {self._wait_s:g} s")
                    said = True
            time.sleep(min(LOOK_S, left_s))

    def _try(self) -> None:
        self._since = _text(datetime.now(UTC))
        found = self._slot.read()
        if found is not None and not (claim := _claim(found[0])).over():
            raise LeaseError(self._held_by(claim))
        mine = self._claimed()
        if not self._swap(mine, found):
            found = self._slot.read()
            raise LeaseError(self._held_by(_claim(found[0]) if found else None))
        if not self._slot.conditional():
            self._say(
                "this store knows no conditional write: two runs that start within a"
                f" second or two may both go on; waiting {SETTLE_S:g} s to see one"
            )
            time.sleep(SETTLE_S)
            if (found := self._slot.read()) is None or found[0] != mine:
                raise LeaseError(self._held_by(_claim(found[0]) if found else None))
        self._mine = mine

    def _renew(self) -> None:
        until = time.monotonic() + self._ttl_s
        while not self._ends.wait(self._ttl_s / 3):
            with self._lock:
                if self._lost:
                    return
                try:
                    found = self._slot.read()
                    renewed = self._claimed()
                    if self._is_ours(found) and self._swap(renewed, found):
                        self._mine = renewed
                        until = time.monotonic() + self._ttl_s
                    elif not self._is_ours(found := self._slot.read()):
                        self._lose(found)
                except self._faults:
                    pass  # tried again, while there is time
                if not self._lost and time.monotonic() >= until:
                    self._lost = f"{self._store.url()}: the lease could not be renewed in time"
                if self._lost:
                    self._on_lost()
                    return

    def _release(self) -> None:
        """Leave the claim as the record of who wrote last, with its end set to now."""
        with self._lock:
            if self._mine is None or self._lost:
                return
            try:
                found = self._slot.read()
                if self._is_ours(found):
                    self._swap(self._claimed(ttl_s=0), found)
            except self._faults:
                self._say(
                    f"the lease of {self._store.url()} could not be given back; it ends by"
                    f" itself at {_claim(self._mine).expires}"
                )
            self._mine = None

    def _is_ours(self, found: Found | None) -> bool:
        """Told by the holder and not by the bytes: a renewal whose answer was lost may have arrived."""
        if found is None:
            return False
        try:
            return _claim(found[0]).holder == self._holder
        except LeaseError:
            return False

    def _swap(self, data: bytes, found: Found | None) -> bool:
        self._slot.put(data, None if found is None else found[1])
        # A retried PUT is refused although its first try arrived: what counts is what is there.
        now = self._slot.read()
        return now is not None and now[0] == data

    def _claimed(self, ttl_s: float | None = None) -> bytes:
        ends = datetime.now(UTC) + timedelta(seconds=self._ttl_s if ttl_s is None else ttl_s)
        return Claim(self._holder, self._host, self._since, _text(ends)).json()

    def _lose(self, found: Found | None) -> None:
        claim = None
        if found is not None:
            with contextlib.suppress(LeaseError):
                claim = _claim(found[0])
        self._lost = self._held_by(claim, "has taken over")

    def _held_by(self, claim: Claim | None, does: str = "is at work on") -> str:
        if claim is None:
            return f"{self._store.url()}: another run {does} this output"
        return (
            f"{self._store.url()}: run {claim.holder} on {claim.host} {does} this output since"
            f" {claim.since}; its lease ends at {claim.expires} unless renewed. Wait for it or stop"
            " it; where it died, run the job again after that time"
        )


class LeasedStore(Store):
    """The output folder, written to only while the lease is ours. For the driver, never for workers.

    Planning takes no lease, so another run may come and go between the plan and the first write. Hence
    `look` before planning: the write that takes the lease raises OutdatedError where one of the
    `watched` folders holds other names than then.
    """

    def __init__(
        self,
        uri: str,
        storage_options: Mapping[str, Any],
        lease: Lease,
        watched: Sequence[str] = (),
    ) -> None:
        super().__init__(uri, storage_options)
        self._lease = lease
        self._watched = watched
        self._seen: list[str] = []

    def look(self) -> None:
        """What is there now is what the next plan is made from."""
        self._seen = self._names()

    def write(self, name: str, data: bytes) -> None:
        self._hold()
        super().write(name, data)

    def delete(self, names: Iterable[str]) -> None:
        self._hold()
        super().delete(names)

    def free(self) -> bool:
        """Whether no other run holds the lease now."""
        return self._lease.free()

    def held(self) -> Store:
        """The same folder for writes that follow at once, from many threads: the lease is asked here."""
        self._hold()
        return Store(self._uri, self._options)

    def _hold(self) -> None:
        if self._lease.hold() and self._names() != self._seen:
            raise OutdatedError

    def _names(self) -> list[str]:
        return [name for folder in self._watched for name in self.names(folder)]


def _claim(data: bytes) -> Claim:
    try:
        return Claim(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise LeaseError(
            f"{NAME} cannot be read; remove it if no run is at work: {error}"
        ) from error


def _text(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds")
