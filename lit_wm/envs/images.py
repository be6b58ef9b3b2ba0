"""Resizing and graying of (H, W, C) uint8 images, as the official Atari environment does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from lit_wm.errors import EnvError

_GRAY = np.array([0.299, 0.587, 1 - (0.299 + 0.587)])


def check_size(size: int | Sequence[int], where: str) -> tuple[int, int]:
    """(height, width) from a whole number or a pair.

    Raises:
        EnvError: for anything else.
    """
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in pair):
        raise EnvError(f"{where}: size={size!r}; expected a number of pixels, e.g. 64, or [height, width]")
    return pair


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow's bilinear filter (it averages when shrinking).    (H, W, C) -> (*size, C)"""
    if image.shape[:2] == size:
        return image
    if image.shape[-1] == 3:
        return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    planes = [
        Image.fromarray(plane).resize(size[::-1], Image.Resampling.BILINEAR)
        for plane in np.moveaxis(image, -1, 0)
    ]
    return np.stack([np.asarray(plane) for plane in planes], -1)


def to_gray(image: np.ndarray) -> np.ndarray:
    """Luma of red, green and blue, rounded down.    (H, W, 3) -> (H, W, 1)"""
    return (image * _GRAY).sum(-1, keepdims=True).astype(np.uint8)
