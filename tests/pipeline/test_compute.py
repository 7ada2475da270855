"""What each stage gets on clusters of many sizes, and that no share makes another stage wait for ever."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.compute import Compute, Node, compute
from pipeline.config import ConfigError, Job


def job(**sections: Any) -> Job:
    fields = {
        "task": "caption",
        "input": {"uri": "s3://b/in"},
        "output": {"uri": "s3://b/out"},
        "model": {"id": "google/gemma-4-12B-it"},
    }
    return Job.model_validate(fields | sections)


def shares(*nodes: Node, megapixels: float | None = None, **resources: Any) -> Compute:
    return compute(job(resources=resources), nodes, 100_000, megapixels)


HEAD = Node(cpus=0, gpus=0)
STORE = 64e9


@pytest.mark.parametrize(
    ("nodes", "engines", "engine_cpus"),
    [
        ((Node(1, 0),), 1, 0.0),
        ((Node(2, 0),), 1, 0.5),
        ((Node(16, 0),), 1, 0.5),
        ((Node(2, 1),), 1, 0.75),
        ((Node(1, 1),), 1, 0.0),
        ((Node(16, 1),), 1, 0.75),
        ((Node(4, 8),), 8, 0.25),
        ((Node(128, 8),), 8, 0.75),
        ((HEAD, *[Node(96, 8)] * 8), 64, 0.75),
        ((HEAD, *[Node(96, 0)] * 8, *[Node(0, 8)] * 8), 64, 0.0),
        ((HEAD, *[Node(96, 0)] * 8, *[Node(4, 8)] * 8), 64, 0.5),
    ],
)
def test_engines_and_their_cpus(nodes: tuple[Node, ...], engines: int, engine_cpus: float) -> None:
    got = shares(*nodes)
    assert (got.engines, got.engine_cpus) == (engines, engine_cpus)
    assert got.engine_gpus == (1.0 if any(node.gpus for node in nodes) else 0.0)
    # the rule behind them: engines fit beside their GPUs, and somewhere a whole CPU stays
    if got.engine_gpus:
        left = [node.cpus - node.gpus * got.engine_cpus for node in nodes]
    else:
        left = [max(node.cpus for node in nodes) - got.engines * got.engine_cpus]
    assert min(left) >= 0
    assert max(left) >= 1
    assert len(got.reasons) >= 4


@pytest.mark.parametrize("engines", [1, 2, 4, 16])
@pytest.mark.parametrize("cpus", [1, 2, 3, 16])
def test_engines_on_the_cpu_never_take_the_last_one(cpus: int, engines: int) -> None:
    got = shares(Node(cpus, 0), engines=engines)
    assert got.engines == engines
    assert cpus - engines * got.engine_cpus >= 1
    assert got.engine_cpus != 1  # equal to the media stage's share, it would be fused into it


@pytest.mark.parametrize("nodes", [(), (HEAD,), (Node(0, 1),), (Node(0.5, 0), Node(0.5, 0))])
def test_a_cluster_without_a_cpu_to_give_is_refused(nodes: tuple[Node, ...]) -> None:
    with pytest.raises(ConfigError, match="no node with a whole one"):
        shares(*nodes)


def test_more_engines_than_gpus_only_where_the_autoscaler_brings_them() -> None:
    with pytest.raises(ConfigError, match=r"resources\.engines is 9; the cluster has 8 GPUs"):
        shares(Node(64, 8), engines=9)
    with pytest.raises(ConfigError, match=r"resources\.engines: say how many"):
        shares(Node(64, 0), accelerator="gpu")
    from_zero = shares(HEAD, Node(64, 0), accelerator="gpu", engines=8)
    assert (from_zero.engines, from_zero.engine_gpus) == (8, 1.0)
    assert "0 GPUs are there now, the rest comes with the autoscaler" in from_zero.reasons[0]
    without = shares(Node(64, 8), accelerator="cpu")
    assert (without.engines, without.engine_gpus) == (1, 0.0)


def test_a_cpu_pool_that_cannot_feed_its_gpus_is_said() -> None:
    # 8 engines want about 180 captions/s; at 12 MP a core prepares 17 images/s.
    enough = shares(HEAD, Node(32, 0), Node(8, 8), megapixels=2.0)
    assert enough.warnings == ()
    small = shares(HEAD, Node(4, 0), Node(6, 8), megapixels=12.0)
    assert len(small.warnings) == 1
    assert "the CPUs cannot feed the GPUs" in small.warnings[0]
    assert "there are 4" in small.warnings[0]
    limited = shares(Node(64, 8), media_workers=1)
    assert "(resources.media_workers)" in limited.warnings[0]
    assert shares(Node(2, 0), megapixels=12.0).warnings == ()  # no GPU, nothing to starve


def test_more_pixels_need_more_cpus() -> None:
    nodes = (HEAD, Node(4, 0), Node(8, 8))
    assert not shares(*nodes, megapixels=0.3).warnings
    assert shares(*nodes, megapixels=12.0).warnings


def test_rows_in_flight_keep_the_engine_full_and_fit_the_object_store() -> None:
    roomy = compute(job(), [Node(64, 8, STORE * 8)], 1000)
    assert roomy.calls_per_engine * roomy.rows_per_block > job().engine.max_num_seqs
    tight = compute(job(), [Node(64, 8, 4e9)], 1000)
    row_bytes = 280 * 6912
    assert tight.calls_per_engine * tight.rows_per_block * row_bytes * 8 <= 4e9 / 2
    assert "the object store has no room for more" in " ".join(tight.reasons)


def test_parts_stay_few_enough_to_list() -> None:
    assert compute(job(), [Node(2, 0)], 1000).rows_per_part == 64
    assert compute(job(), [Node(2, 0)], 10**9).rows_per_part == 100_000
