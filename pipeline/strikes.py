"""Which rows were in an engine when it died: kept in an actor of its own, so that it outlives the engine.

A restarted engine actor registers under its old id; the rows that were open are charged a strike.
An actor that comes back on another node lost its node, not its engine: nobody is charged.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import ray


class StrikeBook:
    """The book itself; plain Python, run as a Ray actor by `open_book`."""

    def __init__(self) -> None:
        self._open: defaultdict[str, set[str]] = defaultdict(set)
        self._node: dict[str, str] = {}
        self._strikes: Counter[str] = Counter()
        self._restarts = 0

    def register(self, actor_id: str, node_id: str) -> None:
        """An engine actor starts or starts again."""
        left = self._open.pop(actor_id, set())
        if actor_id in self._node:
            self._restarts += 1
            if self._node[actor_id] == node_id:
                self._strikes.update(left)
        self._node[actor_id] = node_id

    def begin(self, actor_id: str, span_ids: Sequence[str]) -> None:
        self._open[actor_id].update(span_ids)

    def end(self, actor_id: str, span_ids: Sequence[str]) -> None:
        self._open[actor_id].difference_update(span_ids)

    def counts(self, span_ids: Sequence[str]) -> list[int]:
        return [self._strikes[span_id] for span_id in span_ids]

    def restarts(self) -> int:
        """How many engines died so far."""
        return self._restarts


class ActorStrikes:
    """`operators.generate.Strikes` over a book, for the engine actor that this runs in."""

    def __init__(self, book: ray.actor.ActorHandle) -> None:
        context = ray.get_runtime_context()
        self._book = book
        self._actor_id: str = context.get_actor_id() or context.get_worker_id()
        ray.get(book.register.remote(self._actor_id, context.get_node_id()))

    def counts(self, span_ids: Sequence[str]) -> list[int]:
        counts: list[int] = ray.get(self._book.counts.remote(list(span_ids)))
        return counts

    def begin(self, span_ids: Sequence[str]) -> None:
        # Waited for: the rows must be in the book before the engine can die of them.
        ray.get(self._book.begin.remote(self._actor_id, list(span_ids)))

    def end(self, span_ids: Sequence[str]) -> None:
        self._book.end.remote(self._actor_id, list(span_ids))


def open_book() -> ray.actor.ActorHandle:
    """A book on the driver's node; it needs no CPU of its own."""
    return ray.remote(StrikeBook).options(num_cpus=0, **beside_driver()).remote()


def beside_driver() -> dict[str, Any]:
    """Options of an actor that must live as long as the driver: worker nodes come and go."""
    return {"label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}}
