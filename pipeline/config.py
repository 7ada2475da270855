"""A job as frozen models: what is asked (operators/settings.py) plus where and how much.

`Job.fingerprint` hashes what changes an answer, `Job.public` is the job without its secrets.
pipeline/job_file.py reads one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from operators.frames import SAMPLE_RATE_HZ, frame_count
from operators.prompt import (
    PRESETS,
    VIDEO_PRESETS,
    Preset,
    instruction,
    transcribe_instruction,
    variables_in,
)
from operators.prompt_summary import SUMMARY
from operators.prompt_video import most_tokens
from operators.settings import (
    AudioSettings,
    FetchSettings,
    ImageSettings,
    ModelSettings,
    PromptSettings,
    SamplingSettings,
    Settings,
    VideoSettings,
)
from operators.stores import redact
from operators.tracks import Kind

# Raised whenever our own code changes what an answer means: a new resize, another prompt form.
SEMANTICS_VERSION = 2

# What a task asks where the job names no prompt.
DEFAULT_PRESET = {"caption": "caption-dense", "describe-video": "video-describe"}

# A video's frames with their marks and times go through prefill in one step (a picture's tokens see each
# other), so a step must hold them. vLLM reckons with 2496 tokens; where each character of a time is one,
# there are up to 2550, and such a request would wait for ever, with all behind it.
VIDEO_ITEM_TOKENS = most_tokens(32, 70)

# What a task is done to.
Modality = Literal["image", "audio", "video"]
MODALITY: dict[str, Modality] = {
    "caption": "image",
    "custom": "image",
    "transcribe": "audio",
    "describe-video": "video",
}

# What run.json shows of a store's options. Any name may be that of a secret (a header's, a cookie's),
# so this says what is none.
PUBLIC_OPTIONS = frozenset(
    {"endpoint_url", "region_name", "region", "anon", "use_ssl", "verify", "requester_pays"}
    | {"version_aware", "project", "account_name", "addressing_style", "signature_version"}
    | {"connect_timeout", "read_timeout", "max_pool_connections", "total_max_attempts", "mode"}
)


class ConfigError(Exception):
    """A job that cannot run as written. The message is for the person who wrote it."""


class InputConfig(Settings):
    """Where the assets are listed."""

    uri: str = Field(
        min_length=1, description="prefix, single file, manifest or tar shard; any fsspec URI"
    )
    kind: Literal["auto", "prefix", "file", "manifest", "tar"] = Field(
        "auto", description="auto: by the URI's extension; anything without a known one is a prefix"
    )
    include: tuple[str, ...] = Field(
        (),
        description="globs below the prefix, of tar shards those of members; default: the task's own"
        " file types",
    )
    exclude: tuple[str, ...] = Field(
        (), description="globs likewise, and of the names of tar shards; wins over include"
    )
    uri_column: str = Field("uri", description="manifest: the column that names the file")
    id_column: str | None = Field(None, description="manifest: carried into results as source_id")
    variable_columns: tuple[str, ...] = Field(
        (), description="manifest: columns that prompt.text may use as {name}"
    )
    version_column: str | None = Field(
        None, description="manifest: an etag or a date; a new value makes a new asset"
    )
    stat: bool = Field(
        True,
        description="manifest without version_column: ask the store for each file's version; one"
        " request a file, so turn it off for very long lists of files that never change",
    )
    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="handed to fsspec, for example {endpoint_url: ...}"
    )
    allow_empty: bool = Field(
        False, description="finish quietly where nothing matches, instead of refusing the run"
    )


class OutputConfig(Settings):
    """Where a run writes: a folder a fingerprint, and latest.json beside them."""

    uri: str = Field(min_length=1, description="a folder; any fsspec URI that can be written to")
    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="as those of the input, which are not used here"
    )
    subtitles: bool = Field(
        True,
        description="of recordings and videos also .vtt, .srt and .json files: three or four an asset, of"
        " those that a run writes results of; turned on later, older results get none",
    )


class EngineConfig(Settings):
    """How vLLM is run. Defaults suit the 12B in bf16 on an 80 GB card."""

    max_num_seqs: int = Field(
        256,
        ge=1,
        le=4096,
        description="requests decoded together; KV memory of an 80 GB card holds some 300 captions",
    )
    max_num_batched_tokens: int = Field(
        8192, ge=512, description="prefill tokens a step: about 28 images at 280 tokens"
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="share of a card that vLLM takes for weights and KV cache"
    )
    kv_cache_memory_bytes: int | None = Field(
        None, ge=1 << 20, description="CPU engine: memory of its KV cache; default 1 GiB"
    )
    enforce_eager: bool = Field(
        False, description="no CUDA graphs: a quicker start, slower decoding"
    )
    stall_timeout_s: float = Field(
        600.0,
        gt=0,
        description="no token for so long while requests are open: the actor ends and is replaced;"
        " well above a cold start's graph capture",
    )
    load_format: str = Field(
        "auto",
        description="as vLLM names it, for example dummy in a dry run, whose answers are kept apart",
    )


class ResourcesConfig(Settings):
    """How much of the cluster. None: derived in pipeline/compute.py from cluster and model."""

    accelerator: Literal["auto", "gpu", "cpu"] = Field(
        "auto",
        description="auto: GPUs if the cluster has any now; gpu: also where it has none yet, for a pool"
        " that scales from zero (give resources.engines then); cpu: leave GPUs alone, with vLLM's CPU build",
    )
    engines: int | None = Field(
        None,
        ge=1,
        description="GPU actors; default: one a GPU. Of GPUs that are not there yet, no more than the"
        " work is worth",
    )
    media_workers: int | None = Field(None, ge=1, description="at most so many media tasks at once")
    rows_per_block: int | None = Field(
        None, ge=1, le=4096, description="spans of one media task; default: blocks of some 32 MB"
    )


class LimitsConfig(Settings):
    """When to stop, and what to do again."""

    max_assets: int | None = Field(
        None, ge=1, description="take only the first so many, for a trial"
    )
    max_failed_fraction: float = Field(
        0.05,
        ge=0,
        le=1,
        description="share of assets that may be failed or partial: a run with more of them is finished as"
        " ever, but ends with exit code 3",
    )
    retry_failed: bool = Field(
        False, description="ask again for spans that a former run sealed as failed"
    )
    wait_for_workers_s: float = Field(
        1800.0,
        ge=0,
        description="while the cluster has no node that could do the work: nodes of a cloud come in"
        " minutes, GPUs now and then in half an hour",
    )
    wait_for_lease_s: float = Field(
        0.0,
        ge=0,
        description="while another run is at work on this output; where runs are started again by"
        " themselves, longer than the ten minutes that a dead one's lease still holds",
    )


class Job(Settings):
    """One job file."""

    task: Literal["caption", "transcribe", "describe-video", "custom"] = Field(
        description="custom: a prompt.text of one's own about images"
    )
    input: InputConfig
    output: OutputConfig
    model: ModelSettings
    prompt: PromptSettings = PromptSettings()
    image: ImageSettings = ImageSettings()
    audio: AudioSettings = AudioSettings()
    video: VideoSettings = VideoSettings()
    sampling: SamplingSettings = SamplingSettings()
    fetch: FetchSettings = FetchSettings()
    engine: EngineConfig = EngineConfig()
    resources: ResourcesConfig = ResourcesConfig()
    limits: LimitsConfig = LimitsConfig()

    @model_validator(mode="after")
    def _prompt_fits(self) -> Job:
        """Rules that span sections, so that a wrong job ends here and not on a cluster."""
        if self.task == "custom" and self.prompt.text is None:
            raise ValueError("prompt.text: task custom needs one")
        names = self.input.variable_columns
        if unknown := sorted(variables_in(self.instruction.text) - set(names)):
            raise ValueError(
                f"prompt.text uses {{{unknown[0]}}}, which input.variable_columns does not name;"
                f" allowed: {', '.join(names) or 'none'}"
            )
        if self.answer_tokens + self.window_tokens + 2 >= self.model.max_model_len:
            raise ValueError(
                f"model.max_model_len: {self.model.max_model_len} has no room for an answer of"
                f" {self.answer_tokens} tokens beside {self.window_tokens} of {self.modality}"
            )
        if self.modality == "video" and self.engine.max_num_batched_tokens < VIDEO_ITEM_TOKENS:
            raise ValueError(
                f"engine.max_num_batched_tokens: {self.engine.max_num_batched_tokens}; for video vLLM"
                f" wants at least {VIDEO_ITEM_TOKENS}"
            )
        if self.modality != "image" and self.model.render == "engine":
            raise ValueError("model.render: engine is for images; all else is always prepared")
        return self

    @property
    def modality(self) -> Modality:
        """What an asset is."""
        return MODALITY[self.task]

    @property
    def window_tokens(self) -> int:
        """Media tokens that one request may have."""
        if self.modality == "audio":
            return self.speech_tokens
        if self.modality == "video":
            frames = most_tokens(self.video.max_frames, self.video.max_soft_tokens)
            return max(frames, self.speech_tokens)
        return self.image.max_soft_tokens

    @property
    def soft_tokens(self) -> int:
        """Visual tokens that one picture may have."""
        return (
            self.video.max_soft_tokens if self.modality == "video" else self.image.max_soft_tokens
        )

    @property
    def speech_tokens(self) -> int:
        """Media tokens that one window of speech may have."""
        return frame_count(round(self.audio.window_s * SAMPLE_RATE_HZ))

    @property
    def prompt_name(self) -> str:
        """The preset's or the task's name, or custom."""
        if self.prompt.text:
            return "custom"
        if self.modality == "audio":
            return "translate" if self.audio.translate_to else "transcribe"
        return self.prompt.preset or DEFAULT_PRESET[self.task]

    @property
    def instruction(self) -> Preset:
        """The resolved instruction of the task itself."""
        if self.modality == "audio" and self.prompt.text is None:
            if self.prompt.preset is not None:
                raise ValueError("prompt.preset: task transcribe has none; see the section audio")
            return transcribe_instruction(self.audio)
        presets = VIDEO_PRESETS if self.modality == "video" else PRESETS
        return instruction(self.prompt, DEFAULT_PRESET.get(self.task, ""), presets)

    @property
    def answer_tokens(self) -> int:
        """How long an answer of the task itself may get."""
        return self.sampling.max_tokens or self.instruction.max_tokens

    @property
    def instructions(self) -> dict[Kind, Preset]:
        """What the model is asked, by what it is given; the task itself first."""
        own = Preset(self.instruction.text, self.answer_tokens)
        asked: dict[Kind, Preset] = {self.modality: own}
        if self.modality == "video" and self.video.transcribe:
            asked["audio"] = transcribe_instruction(self.audio)
        if self.modality == "video" and self.video.summary:
            asked["text"] = SUMMARY
        return asked

    @property
    def fingerprint(self) -> str:
        """16 hex digits over everything that changes an answer, and nothing else."""
        sections = ["model", "sampling", *(kind for kind in self.instructions if kind != "text")]
        asked: dict[str, Any] = {name: _asked(getattr(self, name)) for name in sections}
        # The resolved prompts, so that a default and its name are the same question.
        asked["prompt"] = {kind: vars(preset) for kind, preset in self.instructions.items()}
        asked["prompt_name"] = self.prompt_name
        del asked["sampling"]["max_tokens"]
        asked |= {"task": self.task, "semantics": SEMANTICS_VERSION}
        # Other ways to load may mean other weights: dummy draws them, so its answers are noise.
        if self.engine.load_format != "auto":
            asked["load_format"] = self.engine.load_format
        text = json.dumps(asked, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def public(self) -> dict[str, Any]:
        """The resolved job as plain JSON, secrets replaced by `***`."""
        cleaned: dict[str, Any] = _without_secrets(self.model_dump(mode="json"))
        return cleaned


def _asked(settings: Settings) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        extra = field.json_schema_extra
        if not (isinstance(extra, Mapping) and extra.get("asks") is False):
            asked[name] = getattr(settings, name)
    return asked


def _without_secrets(value: Any, name: str = "", options: bool = False) -> Any:  # noqa: ANN401
    """`value` of the field `name`; `options`: it belongs to a store's options."""
    if isinstance(value, dict):
        return {
            key: _without_secrets(item, str(key), options or key == "storage_options")
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_without_secrets(item, name, options) for item in value]
    if options and name not in PUBLIC_OPTIONS:
        return "***"
    return redact(value) if isinstance(value, str) else value
