"""Whom a dead engine is charged to: its open rows, its node, or itself."""

from __future__ import annotations

import pytest

from pipeline.strikes import MAX_DEATHS, SickEngineError, StrikeBook


@pytest.fixture
def alive() -> set[str]:
    return {"here", "there"}


@pytest.fixture
def book(alive: set[str]) -> StrikeBook:
    return StrikeBook(alive.__contains__)


def test_the_open_rows_of_an_engine_that_died_are_charged(book: StrikeBook) -> None:
    book.register("engine", "here", "log")
    book.begin("engine", ["a", "b"])
    book.end("engine", ["b"])
    book.register("engine", "here", "log")
    assert book.counts(["a", "b"]) == [1, 0]
    assert book.restarts() == 1


def test_an_engine_that_comes_back_elsewhere_is_charged_unless_its_node_is_gone(
    book: StrikeBook, alive: set[str]
) -> None:
    book.register("engine", "here", "log")
    book.begin("engine", ["a"])
    book.register("engine", "there", "log")
    assert book.counts(["a"]) == [1]
    book.begin("engine", ["a"])
    alive.remove("there")
    book.register("engine", "here", "log")
    assert book.counts(["a"]) == [1]
    assert book.restarts() == 2


def test_an_engine_that_only_dies_is_sick_and_one_that_finishes_rows_is_not(
    book: StrikeBook,
) -> None:
    book.register("engine", "here", "log")
    book.register("other", "here", "log")
    for _ in range(2):
        for _ in range(MAX_DEATHS - 1):
            book.register("engine", "here", "log")
        book.begin("engine", ["a"])
        book.end("engine", ["a"])
    for _ in range(MAX_DEATHS - 2):
        book.register("engine", "here", "log")
    book.begin("other", ["b"])
    book.end("other", ["b"])
    book.register("engine", "here", "/logs/worker-last-*")
    with pytest.raises(SickEngineError) as error:
        book.register("engine", "there", "/logs/worker-new-*")
    assert f"died {MAX_DEATHS} times, last on node here" in str(error.value)
    assert "/logs/worker-last-* on that node" in str(error.value)
