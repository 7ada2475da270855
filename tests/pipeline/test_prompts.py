"""Jobs whose prompt no checkpoint can be asked, told before anything is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster import BrokenRunError
from pipeline.config import ConfigError, Job
from pipeline.prompts import job_prompts


def job(nano: Path, task: str = "caption", **sections: Any) -> Job:
    model = {"id": str(nano)} | sections.pop("model", {})
    fields = {"task": task, "input": {"uri": "s3://b/i"}, "output": {"uri": "s3://b/o"}}
    return Job.model_validate(fields | {"model": model} | sections)


@pytest.mark.parametrize(
    ("task", "medium"),
    [("custom", "280 of a picture"), ("transcribe", "375 of a window of speech")],
)
def test_a_prompt_that_leaves_no_room_for_the_media_is_refused(
    nano: Path, task: str, medium: str
) -> None:
    asked = {"prompt": {"text": "red circle " * 700}}
    with pytest.raises(ConfigError, match=rf"model\.max_model_len: 1500 .* {medium} beside"):
        job_prompts(job(nano, task, model={"max_model_len": 1500}, **asked))
    prompt = job_prompts(job(nano, task, model={"max_model_len": 8192}, **asked))
    assert set(prompt) == {"image" if task == "custom" else "audio"}


def test_a_checkpoint_without_the_medium_is_refused(nano: Path, tmp_path: Path) -> None:
    for file in nano.glob("*.json"):
        text = file.read_text().replace("image_token", "no_token").replace("<|image|>", "<|none|>")
        (tmp_path / file.name).write_text(text)
    for file in nano.glob("*.jinja"):
        (tmp_path / file.name).write_text(file.read_text())
    with pytest.raises(ConfigError, match=r"^model: .*model\.render: engine"):
        job_prompts(job(tmp_path))


def test_a_checkpoint_that_is_not_there_is_refused_and_a_silent_hub_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.id: /no/where: no folder here, and at revision main"
    ):
        job_prompts(job(Path("/no/where")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BrokenRunError, match=r"model\.id: nobody/none: We couldn't connect"):
        job_prompts(job(Path("nobody/none")))
