"""Pixels to patches: resize to the token budget, then cut into 48x48x3 squares.

The values are those of transformers' Gemma4UnifiedImageProcessor before its 1/255: that processor
resizes uint8 with torch's antialiased bicubic kernel, cuts 16 px patches and merges them 3x3, which
is a row-major 48 px patch. The same kernel and one numpy reshape give the same bits.
torch is imported where it is used: the planner asks `tokens` and must not pay seconds for that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from operators.errors import MediaError

# 16 px patches pooled 3x3 (FACTS of the checkpoint: patch_size 16, pooling_kernel_size 3)
PATCH_PX = 48
PATCH_VALUES = PATCH_PX * PATCH_PX * 3


@dataclass(frozen=True)
class Patches:
    """values: uint8 [columns * rows, 6912], C-contiguous, row-major over the grid."""

    values: npt.NDArray[np.uint8]
    columns: int
    rows: int


def target_size(height: int, width: int, budget: int) -> tuple[int, int]:
    """(height, width) after the resize: multiples of 48 px, at most `budget` patches.

    The arithmetic, its order and its clamps are those of get_aspect_ratio_preserving_size in
    transformers 5.19. Raises MediaError prepare.aspect_ratio where that one raises.
    """
    limit_px = budget * PATCH_PX**2
    if height < 1 or width < 1:
        raise MediaError("prepare.aspect_ratio", f"a picture of {width}x{height} has no pixels")
    factor = math.sqrt(limit_px / (height * width))
    rows = math.floor(factor * height / PATCH_PX)
    columns = math.floor(factor * width / PATCH_PX)
    if rows == 0 and columns > 0:
        rows, columns = 1, min(width // height, budget)
    elif columns == 0 and rows > 0:
        rows, columns = min(height // width, budget), 1
    if not 0 < rows * columns <= budget:
        raise MediaError(
            "prepare.aspect_ratio",
            f"{width}x{height} would become {columns}x{rows} patches; 1 to {budget} are allowed",
        )
    return rows * PATCH_PX, columns * PATCH_PX


def tokens(height: int, width: int, budget: int) -> int:
    """Visual tokens of a picture: columns * rows of its grid."""
    target_height, target_width = target_size(height, width, budget)
    return target_height * target_width // PATCH_PX**2


def positions(columns: int, rows: int) -> npt.NDArray[np.int64]:
    """int64 [columns * rows, 2]: (x, y) of each patch, row-major."""
    y, x = np.divmod(np.arange(columns * rows, dtype=np.int64), columns)
    return np.stack([x, y], axis=1)


def patchify(
    pixels: npt.NDArray[np.uint8], budget: int, shown: tuple[int, int] | None = None
) -> Patches:
    """Patches of `pixels`, uint8 [height, width, 3].

    `shown` is (height, width) of the whole picture where `pixels` is a scaled decode of it, so that
    the grid does not depend on the decoder's scale. Raises MediaError prepare.aspect_ratio.
    """
    fitted = fit(pixels, budget, shown)
    rows, columns = fitted.shape[0] // PATCH_PX, fitted.shape[1] // PATCH_PX
    grid = fitted.reshape(rows, PATCH_PX, columns, PATCH_PX, 3).transpose(0, 2, 1, 3, 4)
    values = np.ascontiguousarray(grid).reshape(rows * columns, PATCH_VALUES)
    return Patches(values, columns, rows)


def fit(
    pixels: npt.NDArray[np.uint8], budget: int, shown: tuple[int, int] | None = None
) -> npt.NDArray[np.uint8]:
    """`pixels` at the size of its patches, uint8 [rows * 48, columns * 48, 3]; the rest as `patchify`."""
    whole_height, whole_width = shown or (pixels.shape[0], pixels.shape[1])
    height, width = target_size(whole_height, whole_width, budget)
    if pixels.shape[:2] == (height, width):
        return pixels
    return _resize(pixels, height, width)


def _resize(pixels: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    import torch

    old_height, old_width = pixels.shape[:2]
    # torch refuses read-only memory with a warning; what Pillow hands out is often read-only
    source = np.require(pixels, np.uint8, ["C_CONTIGUOUS", "WRITEABLE"])
    # A batch stride of the picture's size marks the tensor as channels_last, which torch otherwise
    # forgets for a batch of one (pytorch issue 68430) and then repacks: 12 MP takes 6 ms instead of
    # 31, and the output, being channels_last as well, is cut in 0.08 ms instead of 1.8.
    batch = (
        torch.from_numpy(source)
        .permute(2, 0, 1)
        .as_strided(
            (1, 3, old_height, old_width), (old_height * old_width * 3, 1, old_width * 3, 3)
        )
    )
    try:
        resized = torch.nn.functional.interpolate(
            batch, size=[height, width], mode="bicubic", antialias=True
        )
    except RuntimeError as error:
        # torch's allocator reports a refused allocation like this, not as MemoryError
        if "can't allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        raise
    result: npt.NDArray[np.uint8] = resized[0].permute(1, 2, 0).numpy()
    return result
