"""Which rows were in an engine when it died: kept in an actor of its own, so that it outlives the engine.

A restarted engine actor registers under its old id; the rows that were open are charged a strike,
unless its node is gone: then it lost its node, not its engine. An engine that dies again and again and
finishes no row in between is sick (a bad GPU, say), and no row is to blame: the run stops.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import ray

from pipeline.cluster import own_log

# A row that kills its engine dies with many the first time and alone the second, so three such rows in
# the engine's first batch are four deaths in a row.
MAX_DEATHS = 5


class SickEngineError(RuntimeError):
    """An engine died MAX_DEATHS times and finished no row in between."""


class StrikeBook:
    """The book itself; plain Python, run as a Ray actor by `open_book`.

    `is_alive` tells whether a node is still in the cluster.
    """

    def __init__(self, is_alive: Callable[[str], bool]) -> None:
        self._is_alive = is_alive
        self._open: defaultdict[str, set[str]] = defaultdict(set)
        self._node: dict[str, str] = {}
        self._log: dict[str, str] = {}
        self._strikes: Counter[str] = Counter()
        self._deaths: Counter[str] = Counter()
        self._restarts = 0

    def register(self, actor_id: str, node_id: str, log: str) -> None:
        """An engine actor starts or starts again, with its output in `log`. Raises SickEngineError."""
        left = self._open.pop(actor_id, set())
        before, log_before = self._node.get(actor_id), self._log.get(actor_id)
        self._node[actor_id], self._log[actor_id] = node_id, log
        if before is None:
            return
        self._restarts += 1
        if before != node_id and not self._is_alive(before):
            return
        self._strikes.update(left)
        self._deaths[actor_id] += 1
        if self._deaths[actor_id] >= MAX_DEATHS:
            raise SickEngineError(
                f"an engine died {MAX_DEATHS} times, last on node {before}, and finished no row in"
                " between, so it is not the rows. Its log says why (a GPU, its driver or its memory,"
                f" model.adapter, engine.*): {log_before} on that node"
            )

    def begin(self, actor_id: str, span_ids: Sequence[str]) -> None:
        self._open[actor_id].update(span_ids)

    def end(self, actor_id: str, span_ids: Sequence[str]) -> None:
        self._open[actor_id].difference_update(span_ids)
        del self._deaths[actor_id]

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
        ray.get(book.register.remote(self._actor_id, context.get_node_id(), own_log()))

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
    return ray.remote(StrikeBook).options(num_cpus=0, **beside_driver()).remote(_is_alive)


def _is_alive(node_id: str) -> bool:
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def beside_driver() -> dict[str, Any]:
    """Options of an actor that must live as long as the driver: worker nodes come and go."""
    return {"label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}}
