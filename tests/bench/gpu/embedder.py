"""Prototype of a better picture embedder in vLLM: uint8 patches in, one product for all pictures.

vLLM embeds picture after picture, from bf16 values that its front process made. `Embedders` is a
worker extension (vLLM's worker_extension_cls) by which a running engine changes its way, so that all
ways are measured in one engine. The functions take what vLLM's own model has: a vision embedder
(patches, positions -> features) and a projection. uint8 and 1/255 in float32, then bf16, give the same
bits as the front process does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

WAYS = ("stock", "loop", "batched")


def scaled(patches: Tensor, dtype: torch.dtype) -> Tensor:
    """Patches in 0..1 of `dtype`; uint8 is rescaled here, on the device."""
    if patches.dtype == torch.uint8:
        return (patches.float() * (1 / 255)).to(dtype)
    return patches.to(dtype)


def embed_loop(
    model: Any,
    pictures: Sequence[Tensor],
    positions: Sequence[Tensor],
) -> list[Tensor]:
    """One product a picture, as vLLM does. pictures: [n, 6912] each; positions: [n, 2] each."""
    found = []
    for picture, places in zip(pictures, positions, strict=True):
        values = scaled(picture, model.dtype)
        found.append(model.project(model.embed(values[None], places[None]))[0])
    return found


def embed_batched(
    model: Any,
    pictures: Sequence[Tensor],
    positions: Sequence[Tensor],
) -> list[Tensor]:
    """One product for all pictures: the patches of all stand one below the other."""
    values = scaled(torch.cat(list(pictures)), model.dtype)
    together = model.project(model.embed(values[None], torch.cat(list(positions))[None]))[0]
    return list(together.split([len(picture) for picture in pictures]))


class Embedder(nn.Module):
    """The 12B's embedder with random weights, for device.py: norm, product, norm, positions, norm."""

    def __init__(self, values: int, hidden: int, places: int = 1120) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(values), nn.LayerNorm(hidden)
        self.dense, self.norm_dense = nn.Linear(values, hidden), nn.LayerNorm(hidden)
        self.table = nn.Parameter(torch.randn(places, 2, hidden))
        self.projection = nn.Linear(hidden, hidden, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.table.dtype

    def embed(self, values: Tensor, positions: Tensor) -> Tensor:
        features = self.norm_dense(self.dense(self.norm_in(values)))
        x, y = positions.unbind(-1)
        return self.norm_out(features + self.table[x, 0] + self.table[y, 1])

    def project(self, features: Tensor) -> Tensor:
        return self.projection(features)


class _Engines:
    """vLLM's own modules behind the same names."""

    def __init__(self, model: Any) -> None:
        self.embed, self.project = model.vision_embedder, model.embed_vision
        self.dtype = model.embed_vision.embedding_projection.weight.dtype


class Embedders:
    """Mixed into vLLM's worker: `collective_rpc("use_embedder", args=("batched",))`."""

    def use_embedder(self, way: str) -> None:
        """stock: vLLM's own code. loop, batched: ours; both take uint8 and bf16."""
        if way not in WAYS:
            raise ValueError(f"an embedder is one of {', '.join(WAYS)}; got {way!r}")
        model: Any = self.get_model()  # type: ignore[attr-defined]
        # an attribute of the object hides the method of its class
        model.__dict__.pop("_process_image_input", None)
        if way == "stock":
            return
        embed = embed_loop if way == "loop" else embed_batched
        engines = _Engines(model)

        def process(image_input: Any) -> list[Tensor]:
            pictures, positions = image_input["pixel_values"], image_input["pixel_position_ids"]
            return embed(engines, list(pictures), list(positions))

        model.__dict__["_process_image_input"] = process
