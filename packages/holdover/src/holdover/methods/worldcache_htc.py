"""WorldCache-HTC (arXiv 2603.06331): heterogeneous token caching for multi-modal diffusion world models.

The last three computed outputs y0, y1, y2 lie at steps s0 > s1 > s2; v0 and v1 are the velocities between them, a is
the change of velocity, k the steps since s0.

Shape suffixes: B batch, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from holdover.method import Call, Entry, Policy, Predictor, Trigger, Verdict
from holdover.methods.parts.guards import Protection, at_least_zero, for_steps, one_of
from holdover.methods.parts.predictors import before
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.parts.tokens import TokenLayout

EPSILON = 1e-8

#: Groups of tokens: held, carried on, carried on with damping; and those left out of statistics, which are held.
STABLE, LINEAR, CHAOTIC, PINNED = range(4)


def worldcache_htc(
    *,
    stable: float = 0.30,
    chaotic: float = 0.60,
    n_max: int = 2,
    eta: float | None = None,
    drift_reduction: Literal["chaotic", "all"] = "chaotic",
    retain: int | float = 10,
    relative_epsilon: float = 0.0,
    pinned: int | Sequence[int] = 0,
    modalities: Sequence[int] = (),
    channels: int | None = None,
    patch: Sequence[int] = (),
    modality_channels: Sequence[int] = (),
    protection: Protection = "pass",
) -> Policy:
    """Predict the output of the whole model, each token by the curvature of its path over the last three outputs.

    Tokens whose path hardly bends stay where they are, the next go straight on, the rest go on with damping. Computed
    are the first steps, the last, those before three outputs are known, and those where what the chaotic tokens have
    moved, weighted by their curvature, adds up to ``eta``, or where ``n_max`` steps in a row were predicted. Guidance
    branches keep histories of their own and follow the decision of the first.

    The defaults are the paper's for Aether. Voyager: ``chaotic=0.70, n_max=6, eta=3.33, retain=5``. The presets are the
    settings of the released README for both models and, where it differs, those that the released code defaults to.

    Args:
        stable: p_s, share of the tokens, the least curved, that are held.
        chaotic: p_c, share of the tokens that are not chaotic.
        n_max: steps in a row that may be predicted.
        eta: η, of the summed drift. None is 0.2 over ``"all"`` tokens, which is ``0.2 / (1 - chaotic)`` over the
            ``"chaotic"`` ones; for Voyager 1.0, or 3.33.
        drift_reduction: average the drift over the ``"chaotic"`` tokens, as in the paper, or, as in the released code,
            over ``"all"``, which makes it smaller by the share of chaotic ones.
        retain: warm-up, first steps that are computed, by number or as a share.
        relative_epsilon: keeps tokens that stand still from dominating the drift: ε is 1e-8, as published, and this
            share of the mean squared velocity.
        pinned: tokens of a given condition, which no statistics are taken of: how many first ones, or which.
        modalities: how many tokens each modality has, for quantiles of its own; by default they are pooled.
        channels: the axis of the output that holds channels, such as 1 for ``[B, C, F, H, W]``. It must be given where
            the output has more axes than ``[B, L, C]``.
        patch: the size of a token along each axis but batch and channels, such as ``(1, 2, 2)``; by default 1.
        modality_channels: how many of the channels each modality has, such as ``(16, 16, 24)``, for tokens of its own;
            those of one modality come before those of the next.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    predictor = TokenCurvature(
        stable=stable,
        chaotic=chaotic,
        n_max=n_max,
        drift_reduction=drift_reduction,
        relative_epsilon=relative_epsilon,
        pinned=pinned if isinstance(pinned, int) else tuple(pinned),
        modalities=tuple(modalities),
        layout=TokenLayout(channels, tuple(patch), tuple(modality_channels)),
    )
    if eta is None:
        eta = 0.2 if drift_reduction == "all" else 0.2 / (1 - chaotic) if chaotic < 1 else math.inf
    return Policy(
        name="worldcache_htc",
        spans=ProbeAndTail(0),
        trigger=CurvatureDrift(
            guard=for_steps(retain=retain, last=True, protection=protection) | ThreeOutputs(), eta=eta, n_max=n_max
        ),
        predictor=predictor,
        lifetime="chunk",
        level="model",
        one_for_all_branches=True,
    )


_RELEASED = {"n_max": 2, "eta": 0.2, "retain": 10, "drift_reduction": "all"}
_AETHER = {**_RELEASED, "channels": 2, "modality_channels": (16, 16, 24)}
_VOYAGER = {**_RELEASED, "n_max": 6, "eta": 1.0, "retain": 5, "channels": 1, "patch": (1, 2, 2)}

#: The settings of the released README, and those that its code has where none are given.
PRESETS = {
    "aether": {**_AETHER, "stable": 0.20, "chaotic": 0.80},
    "aether-code": {**_AETHER, "stable": 0.30, "chaotic": 0.60},
    "voyager": {**_VOYAGER, "stable": 0.30, "chaotic": 0.70},
    "voyager-code": {**_VOYAGER, "stable": 0.30, "chaotic": 0.60},
}


@dataclass(frozen=True)
class ThreeOutputs:
    """Computes while fewer than three outputs are known: there is no curvature yet."""

    def __call__(self, call: Call) -> str | None:
        few = call.entry is not None and call.entry.void is None and "s2" not in call.entry.numbers
        return "history" if few else None


@dataclass(frozen=True, kw_only=True)
class CurvatureDrift(Trigger):
    """Reuses until the drift that `TokenCurvature` sums reaches ``eta``, and for ``n_max`` steps in a row at most."""

    eta: float
    n_max: int

    def __post_init__(self) -> None:
        at_least_zero("eta", self.eta)

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        drift, reason = call.known.numbers["drift"], None
        if math.isnan(drift):
            reason = "nan"
        elif drift >= self.eta:
            reason = "drift"
        elif call.step.index - call.known.numbers["s0"] > self.n_max:
            reason = "stale"
        return Verdict(reason, {"drift": drift, "threshold": self.eta})

    def learn(self, call: Call, y: Tensor) -> Mapping[str, float]:
        held, index = _earlier(call, y), float(call.step.index)
        numbers = {"drift": 0.0, "shown": index, "s0": index}
        if held is not None:
            numbers |= {f"s{n + 1}": held.numbers[f"s{n}"] for n in (0, 1) if f"s{n}" in held.numbers}
        return numbers


@dataclass(frozen=True, kw_only=True)
class TokenCurvature(Predictor):
    """Holds, carries on or damps each token by the curvature of its path. Goes with `CurvatureDrift`.

    ``κ = ‖a‖ / (‖v0‖² + ε)``, norms over channels. Stable tokens, ``κ < Q(stable)``, stay at y0; linear ones go to
    ``y0 + k·v0``; chaotic ones, ``κ >= Q(chaotic)``, to ``y0 + k·[(1-α)·v0 + α·v1]``, where ``α = 3x² - 2x³`` and
    ``x = min(k/n_max, 1)``. A reuse adds to the drift the mean of ``κ·‖ŷ_now - ŷ_before‖``. Float32 throughout.

    Attributes:
        stable, chaotic: quantiles of κ that bound the groups.
        n_max: steps after which a chaotic token goes with v1 alone.
        drift_reduction: mean over the ``"chaotic"`` tokens, or over ``"all"`` with the others counted as 0.
        relative_epsilon: ε is 1e-8 and this share of the mean of ``‖v0‖²``.
        pinned: tokens left out of statistics and held: the first so many, or these.
        modalities: how many tokens each has, for quantiles of its own; pooled over all tokens if empty.
        layout: what the tokens of an output are.
    """

    stable: float
    chaotic: float
    n_max: int
    drift_reduction: Literal["chaotic", "all"]
    relative_epsilon: float
    pinned: int | tuple[int, ...]
    modalities: tuple[int, ...]
    layout: TokenLayout = field(default_factory=TokenLayout)
    adds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.stable <= self.chaotic <= 1:
            raise ValueError(f"stable={self.stable}, chaotic={self.chaotic}: give shares, 0 <= stable <= chaotic <= 1")
        if not isinstance(self.n_max, int) or self.n_max < 1:
            raise ValueError(f"n_max={self.n_max!r}: give a whole number of steps, 1 or more")
        one_of("drift_reduction", self.drift_reduction, ("chaotic", "all"))
        at_least_zero("relative_epsilon", self.relative_epsilon)
        if min((self.pinned,) if isinstance(self.pinned, int) else self.pinned, default=0) < 0:
            raise ValueError(f"pinned={self.pinned} is negative; give how many first tokens, or which")
        if min(self.modalities, default=1) < 1:
            raise ValueError(f"modalities={self.modalities}: give how many tokens each modality has, 1 or more")

    def remember(self, call: Call, y: Tensor, spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.layout.check(y.shape)
        held, kept = _earlier(call, y), {"y0": y.clone()}
        if held is not None:
            kept |= {f"y{n + 1}": held.tensors[f"y{n}"] for n in (0, 1) if f"y{n}" in held.tensors}
        if held is not None and "y2" in kept:
            times = float(call.step.index), held.numbers["s0"], held.numbers["s1"]
            kept["kappa"], kept["group"] = self.groups(kept, times)
        return kept

    def predict(self, call: Call) -> Tensor:
        return self.layout.join(self._at(call.known, call.step.index), call.known.tensors["y0"].shape)

    def reused(self, call: Call, y: Tensor) -> Mapping[str, Tensor | float]:
        held, index = call.known, call.step.index
        group_BL = held.tensors["group"]
        now, shown = (self._at(held, at) for at in (index, held.numbers["shown"]))
        chosen_BL = group_BL == CHAOTIC
        counted_BL = chosen_BL if self.drift_reduction == "chaotic" else group_BL != PINNED
        # A product, so that what is not a number anywhere shows in the sum.
        error = (self.drift(held.tensors["kappa"], now, shown) * chosen_BL).sum() / counted_BL.sum()
        return {"drift": held.numbers["drift"] + float(error), "shown": float(index)}

    def drift(self, kappa_BL: Tensor, now_BLC: Tensor, shown_BLC: Tensor) -> Tensor:
        """What each token adds to the drift when it is shown as ``now``, ``[B, L]``."""
        moved_BL: Tensor = torch.linalg.vector_norm(now_BLC - shown_BLC, dim=-1)
        return kappa_BL * moved_BL

    def groups(self, outputs: Mapping[str, Tensor], times: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
        """κ and group of every token, ``[B, L]``.

        Raises:
            ValueError: ``pinned`` or ``modalities`` do not fit the model's tokens.
        """
        _, v0, v1 = self._velocities(outputs, times)
        a = (v0 - v1) / (times[0] - times[1])
        speed_BL, bend_BL = (torch.linalg.vector_norm(value, dim=-1) for value in (v0, a))
        free_L = self._free(speed_BL)
        energy_BL = speed_BL.square()
        kappa_BL = bend_BL / (energy_BL + EPSILON + self.relative_epsilon * energy_BL[:, free_L].mean())
        group_BL = torch.full_like(kappa_BL, PINNED, dtype=torch.int8)
        counts = list(self.modalities) or [kappa_BL.shape[1]]
        parts = torch.split(kappa_BL, counts, 1), torch.split(group_BL, counts, 1), torch.split(free_L, counts)
        for own_BL, own_group_BL, own_L in zip(*parts, strict=True):
            values = own_BL[:, own_L]
            if values.numel():
                low, high = _quantiles(values, (self.stable, self.chaotic))
                own_group_BL[:, own_L] = (LINEAR + (values >= high).byte() - (values < low).byte()).to(torch.int8)
        return kappa_BL, group_BL

    def _free(self, like_BL: Tensor) -> Tensor:
        """Which tokens are not pinned, ``[L]``."""
        tokens = like_BL.shape[1]
        if self.modalities and sum(self.modalities) != tokens:
            raise ValueError(f"modalities={self.modalities} are {sum(self.modalities)} tokens, the model has {tokens}")
        free_L = torch.ones(tokens, dtype=torch.bool, device=like_BL.device)
        if isinstance(self.pinned, int):
            free_L[: self.pinned] = False
        elif max(self.pinned, default=0) >= tokens:
            raise ValueError(f"pinned names token {max(self.pinned)}, the model has {tokens}")
        else:
            free_L[list(self.pinned)] = False
        return free_L

    def _at(self, held: Entry, index: float) -> Tensor:
        """The tokens that are predicted for a step, ``[B, L, C]`` in float32."""
        s0, s1, s2 = (held.numbers[name] for name in ("s0", "s1", "s2"))
        y0, v0, v1 = self._velocities(held.tensors, (s0, s1, s2))
        k = index - s0
        x = min(k / self.n_max, 1.0)
        alpha = 3 * x**2 - 2 * x**3
        group = held.tensors["group"][..., None]
        damped = y0 + k * ((1 - alpha) * v0 + alpha * v1)
        return torch.where(group == LINEAR, y0 + k * v0, torch.where(group == CHAOTIC, damped, y0))

    def _velocities(
        self, outputs: Mapping[str, Tensor], times: tuple[float, float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens of y0, v0 and v1, float32."""
        y0, y1, y2 = (self.layout.split(outputs[name]).float() for name in ("y0", "y1", "y2"))
        return y0, (y0 - y1) / (times[0] - times[1]), (y1 - y2) / (times[1] - times[2])


def _quantiles(values: Tensor, shares: tuple[float, float]) -> list[Tensor]:
    """As `torch.quantile`, but a quantile that falls on a value is that very value, and there is no limit of size."""
    ordered = values.flatten().sort().values
    quantiles = []
    for share in shares:
        rank = share * (len(ordered) - 1)
        low = math.floor(rank)
        high = min(low + 1, len(ordered) - 1)
        quantiles.append(ordered[low] + (rank - low) * (ordered[high] - ordered[low]))
    return quantiles


def _earlier(call: Call, y: Tensor) -> Entry | None:
    """What a history can go on from; a pass that runs again begins a new one."""
    held = before(call)
    if held is None or held.tensors["y0"].shape != y.shape or call.step.index <= held.numbers["s0"]:
        return None
    return held
