"""What the benchmark's engine is told, and what it does without."""

from __future__ import annotations

import pytest
from bench.gpu import kit, serving


@pytest.mark.engine
def test_the_engine_samples_without_flashinfer_which_the_kit_leaves_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On CUDA vLLM 0.26 imports it for its sampler unless told not to, at the end of loading.
    assert "flashinfer-python" not in kit.pins(kit.REQUIREMENTS)
    for name, value in serving.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    from vllm.envs import environment_variables

    assert environment_variables["VLLM_USE_FLASHINFER_SAMPLER"]() is False
