"""Job files: what they may say, what the fingerprint sees, what leaks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from pipeline.config import ConfigError, Job
from pipeline.job_file import load_job

MINIMAL = """
task: caption
input: {uri: s3://bucket/raw/}
output: {uri: s3://bucket/captions/}
model: {id: google/gemma-4-12B-it}
"""


def job_file(tmp_path: Path, text: str = MINIMAL) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def test_four_lines_are_a_job_and_the_defaults_are_the_12bs(tmp_path: Path) -> None:
    job = load_job(job_file(tmp_path))
    assert job.image.max_soft_tokens == 280
    assert job.model.max_model_len == 4096
    assert job.engine.max_num_batched_tokens >= 2560


def test_every_field_says_what_it_is() -> None:
    """The README sends people to them."""

    def silent(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
        for name, field in section.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                assert kind.__doc__
                yield from silent(kind, f"{prefix}{name}.")
            elif not field.description:
                yield prefix + name

    assert [*silent(Job)] == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "task: captoin\n",
            ["task", "'caption', 'transcribe', 'describe-video' or 'custom'", "'captoin'"],
        ),
        (MINIMAL + "image: {max_soft_tokens: 300}\n", ["image.max_soft_tokens", "280", "300"]),
        (MINIMAL + "image: {max_soft_token: 280}\n", ["image.max_soft_token", "no such field"]),
        (MINIMAL + "sampling: {temperature: hot}\n", ["sampling.temperature", "number", "'hot'"]),
        (MINIMAL + "sampling: {seed: -1}\n", ["sampling.seed", "-1", "0"]),
        (MINIMAL + f"sampling: {{seed: {2**63}}}\n", ["sampling.seed", str(2**63 - 1)]),
        (MINIMAL + "prompt: {preset: tags, text: x}\n", ["prompt", "not both"]),
        ("task: caption\n", ["input: missing", "output: missing", "model: missing"]),
        (MINIMAL.replace("caption\n", "custom\n", 1), ["prompt.text"]),
        ("- a\n- b\n", ["must hold fields"]),
        ("task: [", ["not YAML"]),
    ],
)
def test_an_error_names_field_value_and_what_is_allowed(
    tmp_path: Path, text: str, said: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        load_job(job_file(tmp_path, text))
    for word in said:
        assert word in str(error.value)


def test_a_job_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_job(tmp_path / "none.yaml")


def test_set_overrides_one_field_with_a_yaml_value(tmp_path: Path) -> None:
    path = job_file(tmp_path)
    job = load_job(path, ["image.max_soft_tokens=70", "input.include=['*.png']", "model.id=x"])
    assert (job.image.max_soft_tokens, job.input.include, job.model.id) == (70, ("*.png",), "x")
    for wrong, said in [
        ("image.max_soft_tokens", "section.field=value"),
        ("task.x=1", "not a section"),
        ("image.max_soft_tokens=[", "not YAML"),
        ("image.max_soft_tokens=71", "image.max_soft_tokens"),
    ]:
        with pytest.raises(ConfigError, match=said):
            load_job(path, [wrong])


def test_the_fingerprint_sees_what_changes_an_answer_and_nothing_else(tmp_path: Path) -> None:
    path = job_file(tmp_path)
    base = load_job(path).fingerprint
    assert load_job(path).fingerprint == base
    for same in [
        "input.uri=s3://other/",
        "output.uri=/tmp/x",
        "engine.max_num_seqs=8",
        "engine.load_format=auto",
        "fetch.timeout_s=1",
        "image.timeout_s=1",
        "image.max_pixels=1000",
        "video.max_pixels=1000",
        "limits.max_assets=3",
        "prompt.preset=caption-dense",
    ]:
        assert load_job(path, [same]).fingerprint == base, same
    others = {
        load_job(path, [other]).fingerprint
        for other in [
            "model.id=x",
            "model.revision=abc",
            "model.quantization=fp8",
            "model.adapter=lora",
            "model.render=engine",
            "prompt.preset=tags",
            "prompt.text=What is it?",
            "image.max_soft_tokens=140",
            "image.background='#000000'",
            "image.scaled_decode=true",
            "sampling.temperature=1",
            "sampling.max_tokens=9",
            "engine.load_format=dummy",
        ]
    }
    assert len(others | {base}) == 14


def test_secrets_are_in_no_output(tmp_path: Path) -> None:
    text = MINIMAL.replace("s3://bucket/raw/}", "'https://me:pass@host/raw/?X-Amz-Signature=abc', ")
    text = text.replace(
        "?X-Amz-Signature=abc', ",
        "?X-Amz-Signature=abc', storage_options: {key: AKIA, secret: s3cr3t,"
        " client_kwargs: {aws_session_token: t0ken}, endpoint_url: 'http://minio:9000'}}",
    )
    shown = str(load_job(job_file(tmp_path, text)).public())
    for secret in ("AKIA", "s3cr3t", "t0ken", "me:pass", "Signature=abc"):
        assert secret not in shown
    assert "http://minio:9000" in shown
    assert "'max_soft_tokens': 280" in shown


def test_only_store_options_known_to_be_harmless_are_shown(tmp_path: Path) -> None:
    options = {
        "endpoint_url": "http://me:h1dden@minio:9000",
        "anon": False,
        "password": 12345678,
        "cookies": {"session": "h1dden"},
        "client_kwargs": {"auth": {"login": "h1dden", "pw": ["h1dden"]}, "region_name": "eu"},
        "headers": {"X-Gate": "h1dden"},
        "config_kwargs": {"s3": {"addressing_style": "path"}, "read_timeout": 9},
    }
    override = f"input.storage_options={json.dumps({'s3': options})}"
    shown = load_job(job_file(tmp_path), [override]).public()["input"]["storage_options"]["s3"]
    assert shown == {
        "endpoint_url": "http://***@minio:9000",
        "anon": False,
        "password": "***",
        "cookies": {"session": "***"},
        "client_kwargs": {"auth": {"login": "***", "pw": ["***"]}, "region_name": "eu"},
        "headers": {"X-Gate": "***"},
        "config_kwargs": {"s3": {"addressing_style": "path"}, "read_timeout": 9},
    }


def test_a_secret_is_not_quoted_in_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_job(job_file(tmp_path), ["input.storage_options=s3cr3t", "input.secret_key=hunter2"])
    assert "hunter2" not in str(error.value)
    assert "s3cr3t" not in str(error.value)


def test_a_video_job_asks_what_its_parts_ask(tmp_path: Path) -> None:
    path = job_file(tmp_path)
    video = ["task=describe-video"]
    job = load_job(path, video)
    assert [*job.instructions] == ["video"]
    assert (job.modality, job.prompt_name) == ("video", "video-describe")
    both = load_job(path, [*video, "video.transcribe=true", "video.summary=true"])
    assert [*both.instructions] == ["video", "audio", "text"]
    same = [
        ["video.span_s=60"],
        ["audio.language=English"],  # nobody asked for a transcript
        ["image.max_soft_tokens=140"],
        ["prompt.preset=video-describe"],
    ]
    assert {load_job(path, [*video, *one]).fingerprint for one in same} == {job.fingerprint}
    others = [
        ["video.fps=2"],
        ["video.segment=fixed"],
        ["video.max_frames=16"],
        ["video.stamps=segment"],
        ["video.summary=true"],
        ["video.transcribe=true"],
        ["video.transcribe=true", "audio.language=English"],
        ["sampling.max_tokens=30"],
    ]
    found = {load_job(path, [*video, *one]).fingerprint for one in others}
    assert len(found | {job.fingerprint}) == 9
    # a transcript keeps its own length where the task's answer is limited
    short = load_job(path, [*video, "video.transcribe=true", "sampling.max_tokens=30"])
    lengths = {kind: asked.max_tokens for kind, asked in short.instructions.items()}
    assert lengths == {"video": 30, "audio": both.instructions["audio"].max_tokens}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["engine.max_num_batched_tokens=2496"], "at least 2560"),
        (["model.render=engine"], "is for images"),
        (["prompt.preset=ocr"], "video-describe, video-dense"),
        (["model.max_model_len=2048"], "no room for an answer"),
        (["video.max_soft_tokens=280"], "no room for an answer"),
        (["video.max_soft_tokens=100"], "70, 140 or 280"),
        (["video.min_s=20"], "more than half of max_s"),
    ],
)
def test_a_video_job_that_cannot_run_is_refused(
    tmp_path: Path, wrong: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_job(job_file(tmp_path), ["task=describe-video", *wrong])
