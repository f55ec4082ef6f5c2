"""X-Cache's fingerprint of a block's input (arXiv 2604.20289).

Shape suffixes: B batch, F latent frames, L tokens, N sampled tokens, G view groups, S entries, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from holdover.method import Call, Signal
from holdover.slot import ViewGroup

#: Keeps the deviation finite where the held fingerprint is zero.
EPSILON = 1e-8


@dataclass(frozen=True)
class Fingerprint(Signal):
    """X-Cache's fingerprint of a block's input (arXiv 2604.20289).

    Per view group a spatial entry, about ``tokens`` tokens of each view on a regular grid over frame, row and column,
    and a global entry, the mean over the tokens of the group. Without view groups: one group, tokens uniformly spaced.

    The metrics are ``cosine``, the least cosine of an entry with the held one, and ``deviation``, the largest over the
    groups of ``max|now - held| / mean|held|`` in the spatial entry.
    """

    tokens: int = 32
    reads_layout: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, int) or self.tokens < 1:
            raise ValueError(f"tokens={self.tokens!r}: give a whole number, 1 or more")

    def prepare(self, shape: torch.Size, device: torch.device, view_groups: tuple[ViewGroup, ...]) -> Signal:
        """Precompute for hidden states of one shape, ``[B, ..., C]`` with the tokens between, or ``[L, C]``.

        Raises:
            ValueError: the tokens are not whole frames of the view groups.
        """
        length = torch.Size(shape[1:-1] if len(shape) > 2 else shape[:1]).numel()
        if not view_groups:
            return PreparedFingerprint(shape, device, [uniform(length, self.tokens)], 1, [length])
        per_frame = sum(group.tokens for group in view_groups)
        if length % per_frame:
            raise ValueError(
                f"a hidden state of {length} tokens is not whole frames of the {per_frame} tokens that view_groups "
                f"name; correct them, or pass view_groups=() to sample tokens regardless of their place"
            )
        frames = length // per_frame
        indices, start = [], 0
        for group in view_groups:
            indices.append(_group_tokens(group, frames, per_frame, start, self.tokens))
            start += group.tokens
        return PreparedFingerprint(shape, device, indices, frames, [group.tokens for group in view_groups])


class PreparedFingerprint(Signal):
    """Index tensors for one shape and device. A fingerprint is ``[B, N+G, C]``: sampled tokens by group, then means.

    An entry is a segment of that axis, ``S = 2·G`` in all.
    """

    def __init__(
        self, shape: torch.Size, device: torch.device, indices: list[list[int]], frames: int, group_tokens: list[int]
    ) -> None:
        self._counts = [len(chosen) for chosen in indices]
        self._groups, self._sampled, self._frames = len(indices), sum(self._counts), frames
        self._values = shape[-1] * (shape[0] if len(shape) > 2 else 1)  # per token
        segment = [group for group, chosen in enumerate(indices) for _ in chosen]
        segment += range(self._groups, 2 * self._groups)
        self._index_N = torch.tensor([token for chosen in indices for token in chosen], device=device)
        self._member_SN = torch.nn.functional.one_hot(torch.tensor(segment)).T.to(device, torch.float32)
        self._member_GN = self._member_SN[: self._groups, : self._sampled]
        means = [torch.full((1, tokens), 1 / (tokens * frames)) for tokens in group_tokens]
        self._mean_GL = torch.block_diag(*means).to(device, torch.float32)
        #: Of fingerprints that are held, and so compared with again, what needs no other: then² and abs(then).
        self._of_held = WeakTensorKeyDictionary()

    def read(self, call: Call) -> Tensor:
        """The fingerprint of the span's input, float32 ``[B, N+G, C]``."""
        x = call.x
        x_BLC = (x.flatten(1, -2) if x.dim() > 2 else x[None]).detach()
        sampled_BNC = x_BLC.index_select(1, self._index_N).float()
        over_frames_BLC = x_BLC.unflatten(1, (self._frames, -1)).sum(1, dtype=torch.float32)
        with _in_float32(x.device):
            return torch.cat([sampled_BNC, self._mean_GL @ over_frames_BLC], 1)

    def compare(self, now: Tensor, then: Tensor) -> Tensor:
        """The sums of now·then, now², then² and abs(then), each by entry; after these, per group the largest change."""
        dot = torch.linalg.vecdot
        with _in_float32(now.device):
            held = self._of_held.get(then)
            if held is None:
                held = self._of_held[then] = self._by_entry(dot(then, then), then.abs().sum(-1))
            moved = self._by_entry(dot(now, then), dot(now, now))
        change_N = (now - then).abs_().amax((-3, -1))[..., : self._sampled]
        largest_G = (self._member_GN * change_N[..., None, :]).amax(-1)
        return torch.cat([moved, held, largest_G], -1)

    def _by_entry(self, *sums_BN: Tensor) -> Tensor:
        """Sums over the tokens of each entry, ``[..., 2·S]``."""
        sums_2S = (torch.stack(sums_BN)[..., None, :, :] * self._member_SN[:, None]).sum((-2, -1))
        return sums_2S.movedim(0, -2).flatten(-2)

    def metrics(self, numbers: Sequence[float]) -> dict[str, float]:
        """``cosine`` and ``deviation``, NaN where either fingerprint is not finite."""
        cosines, deviations = [], []
        entries = 2 * self._groups
        dots, now, then, sizes = (numbers[n * entries : (n + 1) * entries] for n in range(4))
        for entry in range(entries):
            cosines.append(_cosine(dots[entry], now[entry], then[entry]))
            if entry < self._groups:
                mean = sizes[entry] / (self._counts[entry] * self._values)
                deviations.append(numbers[4 * entries + entry] / (mean + EPSILON))
        # Python's min and max would pass over a NaN.
        finite = all(map(math.isfinite, numbers))
        return {"cosine": min(cosines) if finite else math.nan, "deviation": max(deviations) if finite else math.nan}


def _in_float32(device: torch.device) -> AbstractContextManager[object]:
    """Autocast would take products in half precision, which moves cosines past thresholds."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _cosine(dot: float, now: float, then: float) -> float:
    """From a dot product and squared norms. Two zero vectors are alike, one zero vector is like nothing."""
    norm = math.sqrt(now) * math.sqrt(then)
    return dot / norm if norm else float(now == then)


def uniform(length: int, count: int) -> list[int]:
    """``count`` whole numbers uniformly spaced over 0..length-1, all of them if there are no more."""
    if length <= count:
        return list(range(length))
    if count == 1:
        return [0]
    return [round(Fraction(i * (length - 1), count - 1)) for i in range(count)]


def grid_counts(dims: tuple[int, int, int], tokens: int) -> tuple[int, int, int]:
    """How many indices to take per axis of a frames x rows x columns grid: in its proportions, ``tokens`` at most."""
    volume = dims[0] * dims[1] * dims[2]
    if volume <= tokens:
        return dims
    share = (tokens / volume) ** (1 / 3)
    counts = [min(max(round(dim * share), 1), dim) for dim in dims]
    while counts[0] * counts[1] * counts[2] > tokens:
        counts[counts.index(max(counts))] -= 1
    return counts[0], counts[1], counts[2]


def _group_tokens(group: ViewGroup, frames: int, per_frame: int, start: int, tokens: int) -> list[int]:
    """Places of a group's sampled tokens in the token axis; ``tokens`` counts per view."""
    dims = frames, group.height, group.width
    at_frame, at_row, at_column = (uniform(dim, n) for dim, n in zip(dims, grid_counts(dims, tokens), strict=True))
    return [
        frame * per_frame + start + (view * group.height + row) * group.width + column
        for view in range(group.views)
        for frame in at_frame
        for row in at_row
        for column in at_column
    ]
