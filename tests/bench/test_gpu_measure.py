"""Which measures are still to be taken, and what an engine that dies or does not start costs."""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bench.gpu import plan
from bench.gpu.measure import PATHS, Results, environment, open_measures, startable, take_each
from bench.gpu.plan import MEASURES, SETUPS, Measure


def asked(*, retry: bool = False) -> argparse.Namespace:
    return argparse.Namespace(only=None, retry=retry)


def results(folder: Path, *lines: dict[str, object]) -> Results:
    found = Results(folder / "results.jsonl")
    for line in lines:
        found.add(line)
    return found


def names(found: list[Measure]) -> set[str]:
    return {measure.name for measure in found}


def test_an_engine_that_did_not_start_leaves_its_measures_for_retry(tmp_path: Path) -> None:
    failed = results(tmp_path, {"measure": "start/base", "error": "no"})
    # base's failure is that of its variations; another's is its own
    assert names(open_measures(asked(), failed)) == {"device/rates", "device/embedder"}
    again = open_measures(asked(retry=True), failed)
    assert "image-280/ceiling" in names(again)
    failed.add({"measure": "start/base"})
    failed.add({"measure": "start/fp8", "error": "no"})
    left = names(open_measures(asked(), failed))
    assert "image-280/ceiling" in left
    assert "setting/fp8" not in left


def test_an_engine_whose_module_is_missing_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = results(tmp_path)
    monkeypatch.setitem(plan.SETUPS, "fa4", replace(SETUPS["fa4"], needs="no_such_module"))
    assert not startable("fa4", empty, retry=True)
    assert "setting/fa4" not in names(open_measures(asked(), empty))
    monkeypatch.setitem(plan.SETUPS, "fa4", replace(SETUPS["fa4"], needs="json"))
    assert startable("fa4", empty, retry=False)


def test_what_an_engine_that_died_has_not_taken_is_left_for_the_next_one() -> None:
    taken: list[str] = []

    async def one(measure: Measure) -> None:
        taken.append(measure.name)

    left = asyncio.run(take_each(MEASURES[2:6], one, lambda: len(taken) == 2))
    assert taken == [measure.name for measure in MEASURES[2:4]]
    assert left == MEASURES[4:6]


def test_only_an_engine_that_is_asked_for_raw_media_on_threads_prepares_tokenizers_for_them() -> (
    None
):
    # each copy takes a second of a start
    for name, setup in SETUPS.items():
        raw = [each.threads for each in MEASURES if each.setup == name and each.form == "raw"]
        assert setup.tokenizers <= max(raw, default=1)


def test_our_threads_have_one_of_torchs_each_as_vllms_own_processor_has(tmp_path: Path) -> None:
    assert environment(tmp_path)["OMP_NUM_THREADS"] == "1"
    # which torch reads when it is first imported: not before the variables are set
    code = f"import sys; sys.path[:0] = {PATHS}; import bench.gpu.measure; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
