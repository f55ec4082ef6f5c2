"""ST-LPIPS: a learned perceptual distance between pictures (Ghildyal and Liu, ECCV 2022, arXiv 2207.13686).

The network is an AlexNet made tolerant to shifts (stride 1 and blurred down-sampling with reflected borders), with a
learned weight per channel. The weights come from a file of the `stlpips_pytorch` package. The package is not imported,
because that needs torchvision. The values cannot be compared with those of LPIPS (Zhang et al., 2018).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

_WEIGHTS = "weights/vST0.0/alex_shift_tolerant.pth"
_CONVOLUTIONS = ("slice1.0", "slice2.5", "slice3.9", "slice4.11", "slice5.13")


def weights_path() -> Path:
    """The file of AlexNet weights in the installed `stlpips_pytorch` package.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = find_spec("stlpips_pytorch")  # finds a package without importing it
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (path := Path(folder) / _WEIGHTS).is_file():
            return path
    raise ModuleNotFoundError("ST-LPIPS needs its weight file: pip install stlpips_pytorch==0.0.2")


class StLpips:
    """The distance of two pictures: 0 if they are equal, larger if they are less similar.

    Args:
        path: the weight file; by default that of the installed package.
    """

    def __init__(self, path: Path | None = None) -> None:
        tensors: Mapping[str, Tensor] = torch.load(path or weights_path(), map_location="cpu", weights_only=True)
        self._convolutions = [(tensors[f"net.{n}.weight"], tensors[f"net.{n}.bias"]) for n in _CONVOLUTIONS]
        self._channel_weights = [tensors[f"lin{i}.model.1.weight"] for i in range(len(_CONVOLUTIONS))]
        self._shift, self._scale = tensors["scaling_layer.shift"], tensors["scaling_layer.scale"]

    @torch.inference_mode()
    def __call__(self, first: NDArray[Any], second: NDArray[Any]) -> list[float]:
        """Distances of two videos, frame by frame, both ``uint8 [T, height, width, 3]``."""
        if first.shape != second.shape or first.ndim != 4 or first.shape[-1] != 3:
            raise ValueError(f"videos of shapes {first.shape} and {second.shape}; give two of one shape [T, H, W, 3]")
        return [self._distance(torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(first, second, strict=True)]

    @torch.inference_mode()
    def embedding(self, video: NDArray[Any]) -> NDArray[np.float64]:
        """The mean features of the last stage for each frame: ``[T, 256]`` from ``uint8 [T, height, width, 3]``."""
        features: NDArray[np.float64] = self._features(torch.from_numpy(video))[-1].mean((2, 3)).double().numpy()
        return features

    def _distance(self, first: Tensor, second: Tensor) -> float:
        if torch.equal(first, second):
            return 0.0
        total = 0.0
        for features, weight in zip(self._features(torch.stack([first, second])), self._channel_weights, strict=True):
            unit = features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
            total += float(F.conv2d((unit[:1] - unit[1:]).square(), weight).mean())
        return total

    def _features(self, frames: Tensor) -> list[Tensor]:
        """The outputs of the five stages for ``uint8 [B, H, W, 3]``."""
        (w1, b1), (w2, b2), (w3, b3), (w4, b4), (w5, b5) = self._convolutions
        x = (frames.permute(0, 3, 1, 2).float() / 127.5 - 1 - self._shift) / self._scale
        one = F.relu(_blur_down(F.conv2d(x, w1, b1, padding=2)))
        two = F.relu(F.conv2d(_blur_down(F.max_pool2d(one, 3, 1)), w2, b2, padding=2))
        three = F.relu(F.conv2d(_blur_down(F.max_pool2d(two, 3, 1)), w3, b3, padding=1))
        four = F.relu(F.conv2d(three, w4, b4, padding=1))
        five = F.relu(F.conv2d(four, w5, b5, padding=1))
        return [one, two, three, four, five]


def _blur_down(x: Tensor) -> Tensor:
    """Halve the size after a binomial blur, with a reflected border of two."""
    line = torch.tensor([0.25, 0.5, 0.25])
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])
