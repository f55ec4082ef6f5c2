"""The few textures of the world, drawn from fixed seeds. Every clip of every scene shows the same ones.

No detail is finer than the small cameras resolve; a window is about 2 m wide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Texture = NDArray[np.uint8]
_SIZE = 64
_GLASS = (62, 78, 100)


def textures() -> dict[str, Texture]:
    """The texture of every material: uint8 ``[64, 64, 3]``, first row on top."""
    return {name: draw() for name, draw in _TEXTURES.items()}


def mean_colour(material: str) -> tuple[float, float, float]:
    """The mean colour of a texture, from 0 to 1."""
    red, green, blue = (_TEXTURES[material]().mean((0, 1)) / 255).tolist()
    return red, green, blue


def _patches(colour: tuple[int, int, int], contrast: float, seed: int, cells: int = 8) -> Texture:
    """Soft patches that tile: ``cells`` random values per side, interpolated."""
    values = np.random.default_rng(seed).uniform(-1.0, 1.0, (cells, cells))
    position = np.arange(_SIZE) * cells / _SIZE
    low, weight = position.astype(int), position % 1.0
    high = (low + 1) % cells
    rows = values[low] * (1 - weight)[:, None] + values[high] * weight[:, None]
    smooth = rows[:, low] * (1 - weight) + rows[:, high] * weight
    return _to_texture(np.asarray(colour) * (1 + contrast * smooth[..., None]))


def _facade(
    wall: tuple[int, int, int], window: tuple[float, float, float, float], trim: tuple[int, int, int]
) -> Texture:
    """One floor with one window; ``window`` is left, right, top, bottom as fractions of the tile."""
    image = np.empty((_SIZE, _SIZE, 3))
    image[:] = wall
    left, right, top, bottom = (round(edge * _SIZE) for edge in window)
    image[top - 3 : bottom + 5, left - 3 : right + 3] = trim
    image[top:bottom, left:right] = _GLASS
    return _to_texture(image)


def _shop() -> Texture:
    image = np.empty((_SIZE, _SIZE, 3))
    image[:] = (112, 100, 92)
    image[6:16] = (176, 62, 52)
    image[20:58, 5:42] = (88, 108, 128)
    image[20:64, 47:60] = (70, 48, 38)
    return _to_texture(image)


def _slabs() -> Texture:
    image = np.full((_SIZE, _SIZE, 3), (172.0, 168.0, 160.0))
    image[: _SIZE // 2, : _SIZE // 2] *= 0.93
    image[_SIZE // 2 :, _SIZE // 2 :] *= 0.93
    return _to_texture(image)


def _stripes(bright: tuple[int, int, int], dark: tuple[int, int, int]) -> Texture:
    image = np.empty((_SIZE, _SIZE, 3))
    image[:, : _SIZE // 2] = bright
    image[:, _SIZE // 2 :] = dark
    return _to_texture(image)


def _to_texture(image: NDArray[np.float64]) -> Texture:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


_TEXTURES: Mapping[str, Callable[[], Texture]] = {
    "asphalt": lambda: _patches((98, 99, 104), 0.10, seed=1),
    "grass": lambda: _patches((112, 142, 72), 0.16, seed=2),
    "slabs": _slabs,
    "zebra": lambda: _stripes((236, 236, 230), (98, 99, 104)),
    "barrier": lambda: _stripes((150, 164, 152), (124, 138, 128)),
    "brick": lambda: _facade((164, 92, 72), (0.27, 0.73, 0.22, 0.78), (218, 200, 176)),
    "sand": lambda: _facade((214, 192, 146), (0.30, 0.70, 0.18, 0.80), (240, 232, 210)),
    "slate": lambda: _facade((142, 154, 170), (0.15, 0.85, 0.25, 0.75), (188, 196, 206)),
    "ochre": lambda: _facade((206, 150, 82), (0.25, 0.75, 0.20, 0.80), (150, 98, 56)),
    "shop": _shop,
}
FACADES = ("brick", "sand", "slate", "ochre")
