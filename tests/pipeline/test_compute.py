"""What each stage gets on clusters of many sizes, and that no share makes another stage wait for ever."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.compute import Compute, Lengths, Node, compute
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
    return compute(job(resources=resources), nodes, 1_000_000, megapixels)


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
    some = shares(HEAD, Node(64, 0), Node(0, 1), accelerator="gpu", engines=8)
    assert "1 GPUs are there now, the rest comes with the autoscaler" in some.reasons[0]
    without = shares(Node(64, 8), accelerator="cpu")
    assert (without.engines, without.engine_gpus) == (1, 0.0)
    fewer = shares(Node(64, 8), engines=2)
    assert "2 (resources.engines, of 8 GPUs)" in fewer.reasons[0]


@pytest.mark.parametrize(("spans", "engines"), [(1, 1), (20_000, 2), (50_000, 4), (10**6, 8)])
def test_gpus_that_are_not_there_yet_are_asked_for_as_far_as_the_work_is_worth(
    spans: int, engines: int
) -> None:
    """A night with ten new pictures must not start eight GPUs for ten minutes each."""
    elastic = job(resources={"accelerator": "gpu", "engines": 8})
    got = compute(elastic, [HEAD, Node(64, 0)], spans)
    assert got.engines == engines
    assert ("not 8: the work is some" in got.reasons[0]) == (engines < 8)
    # Those that are there cost nothing more.
    assert compute(elastic, [HEAD, Node(64, 0), Node(0, 8)], spans).engines == 8


def test_an_engine_on_the_cpu_of_a_cluster_is_said_to_be_for_trials() -> None:
    (warning,) = shares(HEAD, Node(16, 0)).warnings
    assert "set resources.accelerator to gpu and resources.engines" in warning
    assert shares(HEAD, Node(16, 0), accelerator="cpu").warnings == ()
    assert shares(Node(16, 0)).warnings == ()  # one machine: there is nothing else


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


@pytest.mark.parametrize(
    ("task", "unit", "cpus"),
    [("transcribe", "hours of sound an hour", 3), ("describe-video", "hours of video an hour", 6)],
)
def test_so_it_is_of_sound_and_of_video(task: str, unit: str, cpus: int) -> None:
    """Cores that one engine wants: sound 180 times real time a core, 485 an engine; video 32 and 193."""
    one = job(task=task, engine={"max_num_batched_tokens": 8192})
    enough = compute(one, [HEAD, Node(cpus, 0), Node(0, 1)], 1000)
    assert enough.warnings == ()
    assert unit in enough.reasons[-1]
    (warning,) = compute(one, [HEAD, Node(cpus - 1, 0), Node(0, 1)], 1000).warnings
    assert f"1 engines need some {cpus} CPUs for media, there are {cpus - 1} now" in warning


@pytest.mark.parametrize(
    ("gpus", "cpus", "spans", "said"),
    [
        (1, 16, 1_000_000, "11.7 hours of 1 GPUs"),
        (8, 16, 1_000_000, "1.5 hours of 8 GPUs"),
        (8, 1, 1_000_000, "3.2 hours of 8 GPUs"),  # the CPU prepares 87 a second
        (8, 16, 100, "0.1 hours of 8 GPUs"),
    ],
)
def test_the_plan_says_what_the_job_takes(gpus: int, cpus: int, spans: int, said: str) -> None:
    got = compute(job(), [HEAD, Node(cpus, 0), Node(0, gpus)], spans, megapixels=2.0)
    assert f"in all some {said}" in got.reasons[-1]


def test_a_plan_of_sound_goes_by_its_lengths() -> None:
    nodes = [HEAD, Node(16, 0), Node(0, 1)]
    lengths = Lengths(total_s=4850 * 3600.0, mean_s=5.0, longest_s=300.0)
    got = compute(job(task="transcribe"), nodes, 10**6, lengths=lengths)
    assert "in all some 10.1 hours of 1 GPUs" in got.reasons[-1]


def test_sound_of_videos_is_work_as_well() -> None:
    nodes = [HEAD, Node(3, 0), Node(0, 1)]
    silent, heard = (
        compute(job(task="describe-video", video={"transcribe": asked}), nodes, 1000).reasons[-1]
        for asked in (False, True)
    )
    assert silent != heard


def test_a_segment_has_no_more_frames_than_it_may_and_a_whole_video_is_one() -> None:
    """A thousand films of an hour, a caption each: 5.2 hours of a GPU were said, and 8 asked for."""
    nodes = [HEAD, Node(16, 0), Node(0, 1)]
    films = Lengths(total_s=1000 * 3600.0, mean_s=3600.0, longest_s=3600.0)

    def plan(engines: int | None = None, **video: object) -> Compute:
        resources = {"accelerator": "gpu", "engines": engines}
        one = job(task="describe-video", video=video, resources=resources)
        return compute(one, nodes, 1000, lengths=films)

    whole = plan(segment="whole")
    assert "(720p, single frames decoded)" in whole.reasons[-1]
    assert "in all some 0.1 hours of 1 GPUs" in whole.reasons[-1]
    (warning,) = whole.warnings
    assert "1 engines need some 32 CPUs for media, there are 16 now" in warning
    assert plan(8, segment="whole").engines == 1
    # 32 frames of a segment, however many fps would give
    assert plan(fps=30).reasons[-1] == plan(fps=2).reasons[-1]
    assert plan(segment="fixed", max_s=60).reasons[-1] != plan(segment="fixed").reasons[-1]


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


def test_rows_in_flight_fit_the_memory_of_the_engines_own_node() -> None:
    """Their tensors lie in the actor and in the engine's process: 37 GB there for a pod of 44 GiB."""
    fine = job(
        task="describe-video",
        video={"max_soft_tokens": 140},
        model={"id": "google/gemma-4-12B-it", "max_model_len": 8192},
    )
    row_bytes = 120 * 140 * 6912
    many = [HEAD, *[Node(16, 0, 9e9)] * 8, Node(0, 1, 13e9)]
    got = compute(fine, many, 1000)
    assert got.calls_per_engine == int(13e9 / 4 / row_bytes) == 27
    # an engine among eight on one machine has an eighth of it
    got = compute(fine, [HEAD, *[Node(16, 0, 9e9)] * 40, Node(8, 8, 104e9)], 10**6)
    assert got.calls_per_engine == 27
    # pictures are small
    assert "no room" not in " ".join(compute(job(), many, 1000).reasons)


def test_a_videos_window_has_no_more_than_its_frames() -> None:
    """At fps 30 a window of 30 s has 32 frames, not 900: two calls kept 8 of 256 sequences busy."""
    video = {"fps": 30, "max_soft_tokens": 280}
    model = {"id": "google/gemma-4-12B-it", "max_model_len": 16_384}
    quick = job(task="describe-video", video=video, model=model)
    got = compute(quick, [Node(64, 1, STORE)], 1000)
    assert got.calls_per_engine == int(STORE / 8 / (4 * 32 * 280 * 6912))
    whole = job(task="describe-video", video=video | {"segment": "whole"}, model=model)
    got = compute(whole, [Node(64, 1, STORE)], 1000)
    assert got.calls_per_engine == int(STORE / 8 / (32 * 280 * 6912))
    # a film of an hour is one span, and has them at a frame a minute as well
    rare = job(task="describe-video", video={"segment": "whole", "fps": 1 / 60})
    films = Lengths(total_s=3.6e6, mean_s=3600.0, longest_s=3600.0)
    got = compute(rare, [Node(64, 1, STORE)], 1000, lengths=films)
    assert got.rows_per_block == (32 << 20) // (32 * 70 * 6912)
    # the default samples fewer frames than its windows might have
    usual = compute(job(task="describe-video"), [Node(64, 1, STORE)], 1000)
    assert usual.calls_per_engine == min(81, int(STORE / 8 / (120 * 70 * 6912)))


@pytest.mark.parametrize(
    ("task", "rows", "longest_bytes"),
    [("transcribe", 64, 300 * 16_000 * 4), ("describe-video", 13, 120 * 70 * 6912)],
)
def test_short_recordings_and_videos_keep_the_engine_full(
    task: str, rows: int, longest_bytes: int
) -> None:
    """As rows of the longest span they kept 13 of 256 sequences busy, in a block each."""
    nodes = [HEAD, *[Node(16, 0, 9e9)] * 8, Node(0, 1, 13e9)]
    short = Lengths(total_s=5e6, mean_s=5.0, longest_s=5.0)
    got = compute(job(task=task), nodes, 10**6, lengths=short)
    assert got.rows_per_block == rows
    assert got.calls_per_engine * rows > 256
    # One long file among them: a block must hold that, and as many are in flight as there is memory for.
    mixed = Lengths(total_s=5e6, mean_s=5.0, longest_s=300.0)
    got = compute(job(task=task), nodes, 10**6, lengths=mixed)
    assert got.rows_per_block == 1
    assert got.calls_per_engine == int(13e9 / 4 / longest_bytes)


def test_long_ones_are_as_before() -> None:
    """Spans of the full length, and a rest."""
    nodes = [HEAD, *[Node(16, 0, 9e9)] * 8, Node(0, 1, 13e9)]
    for task, span_s in (("transcribe", 300.0), ("describe-video", 120.0)):
        long = Lengths(total_s=1e9, mean_s=span_s - 5, longest_s=span_s + 3)
        got, before = (compute(job(task=task), nodes, 10**6, lengths=one) for one in (long, None))
        assert (got.rows_per_block, got.calls_per_engine) == (
            before.rows_per_block,
            before.calls_per_engine,
        )


def test_gpus_are_worth_what_the_recordings_take_and_not_what_their_spans_might() -> None:
    """2,000 clips of 5 s are half a minute of one GPU: three were started for 10 minutes each."""
    elastic = job(task="transcribe", resources={"accelerator": "gpu", "engines": 8})
    clips = Lengths(total_s=10_000.0, mean_s=5.0, longest_s=5.0)
    assert compute(elastic, [HEAD, Node(64, 0)], 2000, lengths=clips).engines == 1
    hours = Lengths(total_s=2000 * 300.0, mean_s=300.0, longest_s=300.0)
    assert compute(elastic, [HEAD, Node(64, 0)], 2000, lengths=hours).engines == 3


def test_the_object_store_of_nodes_to_come_counts() -> None:
    elastic = job(resources={"accelerator": "gpu", "engines": 8})
    first = [HEAD, Node(16, 0, 9e9), Node(0, 1, 13e9)]
    whole = [HEAD, Node(16, 0, 9e9), *[Node(0, 1, 13e9)] * 8]
    assert (
        compute(elastic, first, 10**6).calls_per_engine
        == compute(elastic, whole, 10**6).calls_per_engine
    )


def test_parts_stay_few_enough_to_list() -> None:
    assert compute(job(), [Node(2, 0)], 1000).rows_per_part == 64
    assert compute(job(), [Node(2, 0)], 10**9).rows_per_part == 100_000
