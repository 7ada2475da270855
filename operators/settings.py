"""What is asked: the settings that change an answer, each with its unit, default and reason.

Everything here except the fields marked `asks=False` enters the fingerprint (pipeline/config.py).
Where the work runs and how much of it is in pipeline/config.py.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SOFT_TOKEN_BUDGETS = (70, 140, 280, 560, 1120)

# A limit or a resource: it can turn an answer into a failure, never into another answer,
# so it stays out of the fingerprint.
LIMIT: dict[str, Any] = {"asks": False}


class Settings(BaseModel):
    """Frozen, and strict about unknown fields: a typing error in a job must not pass silently."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(Settings):
    """The checkpoint and the form in which it is loaded."""

    id: str = Field(min_length=1, description="hub id or directory of the checkpoint")
    revision: str = Field(
        "main", description="hub revision; pin a commit so that a moved branch is no surprise"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="auto: the checkpoint's own, or float32 on a CPU that only emulates bfloat16",
    )
    quantization: str | None = Field(None, description="as vLLM names it, for example fp8")
    adapter: str | None = Field(None, description="directory or hub id of a LoRA adapter")
    max_model_len: int = Field(
        4096, ge=256, le=262_144, description="tokens; 4096 holds every task of the 12B"
    )
    render: Literal["prepared", "engine"] = Field(
        "prepared",
        description="prepared: tensors from CPU workers; engine: raw media into vLLM's own processor,"
        " for models with encoder towers and as the yardstick",
    )


class PromptSettings(Settings):
    """A preset by name, or a text of one's own with {variables} from the manifest."""

    preset: str | None = Field(
        None, description="default: caption-dense, or video-describe; speech has none"
    )
    text: str | None = Field(
        None,
        min_length=1,
        max_length=8000,
        description="instead of a preset, and of what the section audio asks; {name} is the manifest's"
        " column of that name",
    )
    max_variable_chars: int = Field(
        1000,
        ge=1,
        le=8000,
        json_schema_extra=LIMIT,
        description="of a column's value; a row with a longer one fails, it is not cut",
    )

    @model_validator(mode="after")
    def _one_of(self) -> PromptSettings:
        if self.preset is not None and self.text is not None:
            raise ValueError("give preset or text, not both")
        return self


class ImageSettings(Settings):
    """From bytes to patches."""

    max_soft_tokens: int = Field(
        280, description=f"visual tokens an image may take, one of {SOFT_TOKEN_BUDGETS}"
    )
    background: str = Field(
        "#ffffff",
        pattern=r"^#[0-9a-fA-F]{6}$",
        description="laid under transparent pixels; white is what a page shows",
    )
    scaled_decode: bool = Field(
        False,
        description="let libjpeg drop whole octaves of a large JPEG while decoding: 34 instead of 53 ms"
        " at 12 MP, 46 dB from the full decode, so not the same answer",
    )
    max_pixels: int = Field(
        300_000_000, ge=1, json_schema_extra=LIMIT, description="a larger picture fails undecoded"
    )
    timeout_s: float = Field(
        60.0,
        gt=0,
        json_schema_extra=LIMIT,
        description="of one picture, from decoding to its patches",
    )
    max_memory_bytes: int = Field(
        4 << 30,
        ge=1 << 28,
        json_schema_extra=LIMIT,
        description="of a worker's decoder process; a picture that needs more fails alone",
    )

    @field_validator("max_soft_tokens")
    @classmethod
    def _budget(cls, value: int) -> int:
        if value not in SOFT_TOKEN_BUDGETS:
            raise ValueError(f"must be one of {SOFT_TOKEN_BUDGETS}")
        return value


class AudioSettings(Settings):
    """From bytes to windows of speech."""

    window_s: float = Field(
        15.0,
        ge=2,
        le=30,
        description="at most so many seconds a request; the 12B takes 30 but understands speech only"
        " in its first few hundred tokens (25 a second)",
    )
    channel: Literal["mix", "left", "right", "each"] = Field(
        "mix", description="each: every channel is a transcript of its own, as in recorded calls"
    )
    language: str | None = Field(
        None,
        description="as in English, or a {variable} of the manifest; None: the model is told that it"
        " is the original language",
    )
    translate_to: str | None = Field(
        None,
        pattern=r"^[^{}\n]+$",
        description="a language: transcribe first, then translate into it",
    )
    digits: bool = Field(True, description="write 3, not three")
    vocabulary: tuple[str, ...] = Field(
        (), description="names and terms to expect; they cost prompt tokens of every window"
    )
    speech_threshold: float = Field(
        0.5, gt=0, lt=1, description="voice activity above it is speech; Silero's own default"
    )
    span_s: float = Field(
        300.0,
        ge=30,
        le=3600,
        json_schema_extra=LIMIT,
        description="seconds of a recording that one worker prepares and one row commits; the"
        " transcript does not depend on it",
    )
    max_memory_bytes: int = Field(
        2 << 30, ge=1 << 28, json_schema_extra=LIMIT, description="of one decoder process"
    )
    timeout_s: float = Field(
        300.0, gt=0, json_schema_extra=LIMIT, description="of one run of the decoder"
    )


class VideoSettings(Settings):
    """From bytes to segments, each a few frames with their times."""

    segment: Literal["shots", "fixed", "whole"] = Field(
        "shots",
        description="shots: cut where the picture changes, then merged and split to min_s and max_s;"
        " fixed: every max_s; whole: one segment, however long, so an hour is max_frames pictures",
    )
    min_s: float = Field(
        4.0,
        gt=0,
        le=60,
        description="a shorter shot joins its neighbour: a cut film has one each 3 to 5 s, and a"
        " caption each costs more than it says",
    )
    max_s: float = Field(
        30.0,
        ge=1,
        le=60,
        description="a longer shot is split; at fps 1 each second of 30 is seen. The 12B takes 60",
    )
    fps: float = Field(
        1.0,
        gt=0,
        le=30,
        description="frames a second; 1 is what the 12B was made for, more only for quick motion",
    )
    max_frames: int = Field(
        32,
        ge=1,
        le=32,
        description="of a segment; where fps gives more, they lie further apart. 32 is vLLM's most,"
        " and 2,500 tokens at 70",
    )
    scaled_decode: bool = Field(
        False,
        description="let the decoder scale frames to their patches: 2.1 instead of 2.9 s of CPU for 20 of"
        " 1080p, 43 to 50 dB from the model's own resize, so not the same answer",
    )
    exact_times: bool = Field(
        True,
        description="false: the key frames nearest to the times asked for, at a third of the CPU",
    )
    max_soft_tokens: Literal[70, 140, 280] = Field(
        70,
        description="visual tokens a frame; 140 and 280 read small text and need model.max_model_len"
        " of 8192 and 16384 at 32 frames",
    )
    stamps: Literal["source", "segment"] = Field(
        "source",
        description="times before the frames count from the start of the file, or of the segment",
    )
    transcribe: bool = Field(
        False, description="also transcribe the sound track, as the section audio says"
    )
    summary: bool = Field(
        False,
        description="one caption for the whole video from its segments' captions and transcript, by a"
        " second, text-only request",
    )
    span_s: float = Field(
        120.0,
        ge=30,
        le=3600,
        json_schema_extra=LIMIT,
        description="seconds of a video that one worker prepares and one row commits: at fps 1 and 70"
        " tokens 58 MB of patches; the segments do not depend on it",
    )
    max_pixels: int = Field(
        70_000_000,
        ge=1,
        json_schema_extra=LIMIT,
        description="of a frame; 8192x8192 is 67 million, and 200 MB for each that a worker holds",
    )
    max_memory_bytes: int = Field(
        4 << 30, ge=1 << 28, json_schema_extra=LIMIT, description="of one decoder process"
    )
    timeout_s: float = Field(
        300.0,
        gt=0,
        json_schema_extra=LIMIT,
        description="of a span's cuts, and of a segment's frames",
    )

    @model_validator(mode="after")
    def _lengths(self) -> VideoSettings:
        # a stretch just over max_s is split into halves, and these must not be too short again
        if self.segment == "shots" and 2 * self.min_s > self.max_s:
            raise ValueError(f"min_s: {self.min_s:g} is more than half of max_s, {self.max_s:g}")
        return self


class SamplingSettings(Settings):
    """How the answer is drawn."""

    temperature: float = Field(
        0.0,
        ge=0,
        le=2,
        description="0: nothing is drawn. On a GPU an answer may still differ from run to run in a word:"
        " vLLM's sums round by what else is asked with it",
    )
    top_p: float = Field(0.95, gt=0, le=1, description="the 12B's own default; unused at 0")
    top_k: int = Field(64, ge=-1, description="the 12B's own default; unused at 0")
    seed: int = Field(
        0,
        ge=0,
        le=2**63 - 1,
        description="of the draw; unused at temperature 0. vLLM takes -1 for none, and dies of a number"
        " that its 64 bits do not hold",
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="an answer that has not ended by then fails its row; default: the preset's, 512 with"
        " prompt.text, and for speech 16 a second of audio.window_s, twice that with a translation",
    )
    detect_repetition: bool = Field(
        True, description="stop an answer that loops and fail its row, instead of paying to the end"
    )


class FetchSettings(Settings):
    """How bytes come from the store. Nothing here changes an answer."""

    max_bytes: int = Field(
        256 << 20,
        ge=1,
        json_schema_extra=LIMIT,
        description="of an image, which is read into memory",
    )
    max_file_bytes: int = Field(
        16 << 30,
        ge=1,
        json_schema_extra=LIMIT,
        description="of a recording or video, which comes onto the node's disk; a day of 16-bit stereo at"
        " 44.1 kHz is 15 GB",
    )
    max_cache_bytes: int = Field(
        32 << 30,
        ge=1,
        json_schema_extra=LIMIT,
        description="of all files on a node's disk, those being read included: a reader waits for room."
        " Two cases go beyond it: one larger file, read when no other is in use, and HTTP objects whose"
        " size the server does not tell, until they are read",
    )
    timeout_s: float = Field(60.0, gt=0, json_schema_extra=LIMIT, description="of one request")
    attempts: int = Field(
        4,
        ge=1,
        le=20,
        json_schema_extra=LIMIT,
        description="of a request, where the store failed in a way that may pass",
    )
    concurrency: int = Field(
        8, ge=1, le=256, json_schema_extra=LIMIT, description="images that a worker reads at once"
    )
