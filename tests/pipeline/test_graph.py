"""What an engine actor starts, where that depends on what it was given."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import Job
from pipeline.graph import vllm_engine


@pytest.fixture
def cuda_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine with vLLM's CUDA build says of it."""
    about = tmp_path / "vllm-0.32.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray", "cuda_build")
def test_an_engine_without_a_gpu_does_not_start_on_one(tmp_path: Path) -> None:
    """Ray 2.60 leaves every GPU visible to an actor that asked for none."""
    job = Job.model_validate(
        {
            "task": "caption",
            "input": {"uri": "s3://b/i"},
            "output": {"uri": "s3://b/o"},
            "model": {"id": str(tmp_path / "none")},
            "resources": {"accelerator": "cpu"},
        }
    )
    with pytest.raises(RuntimeError, match="the vLLM installed here is no build for CPUs"):
        vllm_engine(job)()
