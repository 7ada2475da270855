"""The roofline's counts against what is known of the 12B, and against counting one by one."""

from __future__ import annotations

import json

import pytest
from bench.gpu import roofline
from bench.gpu.checkpoint import config
from bench.gpu.plan import MEASURES, SETUPS
from bench.gpu.table import MISSING, TASKS, tables

MODEL = roofline.model_of(config())
H200 = roofline.Machine(flops_s=790e12, bytes_s=4.3e12)
KIB = 1024


def test_the_matrices_are_nearly_all_of_the_published_parameters() -> None:
    counted = MODEL.layer_parameters + MODEL.head_parameters + MODEL.embedder_parameters
    # 11.96e9; norms, position tables and the audio projection are not matrices that count
    assert counted == pytest.approx(11_959_730_176, rel=2e-3)


def test_keys_and_values_take_what_the_cache_takes() -> None:
    # 40 sliding layers of 8 x 256 and 8 full ones of 1 x 512, keys and values, two bytes
    assert roofline.kv_bytes(MODEL, 1) == 336 * KIB
    assert roofline.kv_bytes(MODEL, 2024) == 1024 * 336 * KIB + 1000 * 16 * KIB


@pytest.mark.parametrize(("tokens", "window"), [(1, None), (7, None), (7, 3), (3, 3), (2, 3)])
def test_keys_seen_are_counted_as_one_by_one(tokens: int, window: int | None) -> None:
    each = [min(at + 1, window or at + 1) for at in range(tokens)]
    assert roofline.seen(tokens, window) == sum(each)


def test_a_prompt_costs_two_flops_a_parameter_and_token_and_little_else() -> None:
    dense = 2 * MODEL.layer_parameters * 300
    assert 1.0 < roofline.prefill_flops(MODEL, 300, 264) / dense < 1.03


def test_a_small_batch_is_bound_by_bytes_and_a_step_grows_with_the_sequences() -> None:
    one = roofline.decode_step_s(MODEL, H200, 1, 400)
    assert one == pytest.approx(23.9e9 / 4.3e12, rel=0.02)
    assert roofline.decode_step_s(MODEL, H200, 512, 400) > 3 * one
    assert roofline.decode_step_s(MODEL, H200, 1, 400, weight_bytes=1) < 0.6 * one


def test_transformers_form_of_the_configuration_gives_the_same_sizes() -> None:
    published = config()
    own = json.loads(json.dumps(published))
    full = own["text_config"]["layer_types"].index("full_attention")
    own["text_config"]["per_layer_config"] = {
        str(full): {
            "head_dim": own["text_config"].pop("global_head_dim"),
            "num_key_value_heads": own["text_config"].pop("num_global_key_value_heads"),
        }
    }
    assert roofline.model_of(own) == MODEL


def test_every_measure_is_named_once_and_fits_into_a_command() -> None:
    names = [measure.name for measure in MEASURES]
    assert len(names) == len(set(names))
    assert all(measure.setup is None or measure.setup in SETUPS for measure in MEASURES)
    assert {measure.task for measure in MEASURES} == set(TASKS)


def line(name: str, **figures: object) -> dict[str, object]:
    return {
        "measure": name,
        **{"date": "d", "gpu": None, "cpus": 2, "python": "3.12", "versions": {"vllm": "0.26.0"}},
        **figures,
    }


def streamed(name: str, items_s: float, **figures: object) -> dict[str, object]:
    known = {"front_cpu_s_item": 1e-3, "engine_cpu_s_item": 2e-3, "kv_used": 0.5, "running": 500.0}
    known |= {"prefill_tokens_s": 1.0, "decode_tokens_s": 1.0, "duration_s": 0.0, "threads": 1}
    known |= {"prompt_tokens": 300, "patches": 264, "output_tokens": 100}
    return line(name, items_s=items_s, **known | figures)


def test_the_tables_put_ratios_beside_figures_and_dashes_where_there_are_none() -> None:
    lines = [
        line("device/rates", flops_s=790e12, bytes_s=4.3e12),
        streamed("image-280/ceiling", 40.0),
        streamed("image-280/prepared", 38.0),
        streamed("image-280/raw-1", 19.0),
        streamed("image-280/raw-8", 25.0, threads=8),
        streamed("audio-15/ceiling", 10.0, duration_s=15),
    ]
    shown = tables({str(each["measure"]): each for each in lines}, MODEL)
    images = next(row for row in shown.splitlines() if row.startswith("| image-280, a second"))
    assert images.split(" | ")[1:9] == ["40.0", "38.0", "19.0", "25.0", "8", "2.00", "1.52", "0.95"]
    assert "| audio-15, hours an hour | 150.0 | - |" in shown
    assert f"| setting/fp8 | {MISSING} |" in shown


def test_the_tables_of_nothing_are_all_dashes() -> None:
    assert tables({}, MODEL).startswith("nothing measured")
