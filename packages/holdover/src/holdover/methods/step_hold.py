"""Step hold, our own: the clean prediction of one pass stands in for later passes of the same chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from holdover.method import Call, Guard, Policy, Predictor, Trigger, Verdict
from holdover.methods.parts.guards import AnyOf, KVProtection, LastStep, Protection, at_least, at_least_zero, one_of
from holdover.methods.parts.predictors import before
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.parts.triggers import Open
from holdover.slot import Prediction


def step_hold(
    *,
    hold: Sequence[int] | Literal["auto"] = (1, 2),
    tolerance: float = 0.06,
    refresh: int = 16,
    last: bool = True,
    prediction: Prediction | None = None,
    protection: Protection = "pass",
) -> Policy:
    """Hold the model's clean prediction over some denoising passes of a chunk; the model is not called there.

    What is held is the clean prediction x̂. The sampler is given what the model would return if it predicted x̂ again
    from the noisy latents of this pass, so noise that the sampler drew meanwhile is accounted for. Nothing is held from
    one chunk to the next: a new action is in the prediction already.

    Args:
        hold: the pass indices that are held, from 1. ``"auto"`` holds a pass while the relative change ``‖x̂ - x̂'‖/‖x̂‖``
            that it made when it was last computed was below ``tolerance``; x̂' is the chunk's latest computed prediction
            before it. With chunks of one stream in flight together, ``"auto"`` holds nothing.
        tolerance: of ``"auto"``.
        refresh: ``"auto"`` computes every pass of the stream's first chunk, and of each ``refresh``-th after it.
        last: compute the last pass of a chunk, whatever ``hold`` says.
        prediction: what the model returns; None asks its slot (`holdover.Slot`, where the kinds are explained). All but
            ``"clean"`` need the noise level: that of ``step(sigma=...)``, else the slot's tap ``"sigma"``.
        protection: ``"pass"`` computes the clean pass alone, so that a committed chunk may come from held predictions;
            ``"chunk"`` computes every pass of a chunk whose latents are committed.

    Raises:
        ValueError: an option is out of range.
    """
    auto = hold == "auto"
    one_of("protection", protection, ("chunk", "pass"))
    guards: list[Guard] = [KVProtection()] if protection == "chunk" else []
    if last:
        guards.append(LastStep())
    if isinstance(hold, str):
        one_of("hold", hold, ("auto",))
        guards += [EveryChunk(refresh), ThisChunk()]
    else:
        guards.append(NotHeld(tuple(hold)))
    guard, predictor = AnyOf(tuple(guards)), CleanPrediction(prediction)
    return Policy(
        name="step_hold",
        spans=ProbeAndTail(0),
        trigger=SmallChange(guard=guard, predictor=predictor, tolerance=tolerance) if auto else Open(guard=guard),
        predictor=predictor,
        # What passes changed is remembered from chunk to chunk; a schedule needs nothing beyond its chunk.
        lifetime="stream" if auto else "chunk",
        level="model",
    )


@dataclass(frozen=True)
class NotHeld:
    """Computes the passes of a chunk that are not listed."""

    hold: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.hold or not all(type(index) is int and index >= 1 for index in self.hold):
            raise ValueError(f"hold={self.hold!r}: give pass indices, 1 or more, such as (1, 2), or 'auto'")

    def __call__(self, call: Call) -> str | None:
        return None if call.step.index in self.hold else "interval"


@dataclass(frozen=True)
class EveryChunk:
    """Computes the stream's first chunk, and every ``refresh``-th after it."""

    refresh: int

    def __post_init__(self) -> None:
        at_least("refresh", self.refresh, 2)

    def __call__(self, call: Call) -> str | None:
        return "interval" if call.chunk % self.refresh == 0 else None


@dataclass(frozen=True)
class ThisChunk:
    """Computes where nothing of this chunk is held yet."""

    def __call__(self, call: Call) -> str | None:
        return "first" if call.entry is not None and call.entry.chunk != call.chunk else None


@dataclass(frozen=True)
class CleanPrediction(Predictor):
    """Holds the clean prediction x̂, and gives what the model would return for it. Goes by ``prediction``, or the slot.

    With the noisy latents x and the noise level σ of a pass, and ``α = √(1 - σ²)``:

    - ``clean``: the model returns x̂.
    - ``flow``: ``x = (1-σ)·x̂ + σ·ε``; it returns ``ε - x̂``, which is ``(x - x̂)/σ``.
    - ``noise``: ``x = α·x̂ + σ·ε``; it returns ε, which is ``(x - α·x̂)/σ``.
    - ``v``: ``x = α·x̂ + σ·ε``; it returns ``α·ε - σ·x̂``, which is ``(α·x - x̂)/σ`` (arXiv 2202.00512, appendix D).

    Sums are in float32, or in float64 where the latents are.
    """

    prediction: Prediction | None = None
    adds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.prediction is not None:
            one_of("prediction", self.prediction, get_args(Prediction))

    def remember(self, call: Call, y: Tensor, spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"clean": self.clean(call, y)}

    def predict(self, call: Call) -> Tensor:
        clean, kind = call.known.tensors["clean"], self._kind(call)
        if kind == "clean":
            return clean.clone()  # the model may write into what it is given
        x, sigma = _noisy(call, clean.shape).to(clean.dtype), _noise_level(call, kind)
        alpha = (1 - sigma**2) ** 0.5
        rest = {"flow": x - clean, "noise": x - alpha * clean, "v": alpha * x - clean}[kind]
        if isinstance(sigma, Tensor):
            sigma = sigma.where(sigma > 0, torch.inf)  # latents that are given without noise: nothing is returned
        return rest / sigma

    def clean(self, call: Call, y: Tensor) -> Tensor:
        """x̂ from what the model returned."""
        kind = self._kind(call)
        if kind == "clean":
            return y.detach().clone()
        x = _noisy(call, y.shape)
        dtype, sigma = torch.promote_types(x.dtype, torch.float32), _noise_level(call, kind)
        x, y = x.to(dtype), y.detach().to(dtype)
        if kind == "flow":
            return x - sigma * y
        alpha = (1 - sigma**2) ** 0.5
        if kind == "v":
            return alpha * x - sigma * y
        if not torch.as_tensor(alpha > 0).all():
            raise ValueError("at sigma=1 predicted noise tells nothing of the clean latents; begin denoising below it")
        return (x - sigma * y) / alpha

    def _kind(self, call: Call) -> Prediction:
        kind = self.prediction or call.prediction
        if kind is None:
            kinds = ", ".join(map(repr, get_args(Prediction)))
            raise ValueError(
                f"step_hold does not know what the model returns; say prediction=..., one of {kinds}, or declare it: "
                f"holdover.Slot('', kind='model', prediction=...)"
            )
        return kind


@dataclass(frozen=True, kw_only=True)
class SmallChange(Trigger):
    """Holds a pass whose clean prediction hardly differed from the one before it, when it was last computed.

    Attributes:
        predictor: tells the clean prediction.
        tolerance: of the relative change.
    """

    predictor: CleanPrediction
    tolerance: float

    def __post_init__(self) -> None:
        at_least_zero("tolerance", self.tolerance)

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        change = _numbers(call).get(_change(call))
        if change is None:
            return Verdict("history")
        scores = {"change": change, "threshold": self.tolerance}
        return Verdict(None if change < self.tolerance else "change", scores)

    def learn(self, call: Call, y: Tensor) -> Mapping[str, float]:
        numbers = {**_numbers(call), "steps": float(call.step.num_steps)}
        held = before(call)
        if held is None or held.chunk != call.chunk:
            return numbers
        now, then = self.predictor.clean(call, y).float(), held.tensors["clean"].float()
        norm = torch.linalg.vector_norm
        return {**numbers, _change(call): float(norm(now - then) / norm(now))}


def _change(call: Call) -> str:
    """The name of the number that says what this pass changed."""
    return f"change {call.step.index}"


def _numbers(call: Call) -> Mapping[str, float]:
    """What is known of the passes; another number of passes begins anew."""
    known = call.entry.numbers if call.entry else {}
    return known if known.get("steps") == call.step.num_steps else {}


def _noisy(call: Call, shape: torch.Size) -> Tensor:
    """The noisy latents among what enters the model: all of it, or the first channels."""
    x = call.x.detach()
    differ = [n for n, (given, made) in enumerate(zip(x.shape, shape, strict=False)) if given != made]
    if x.dim() != len(shape) or len(differ) > 1 or any(x.shape[n] < shape[n] for n in differ):
        raise ValueError(
            f"the model is given {list(x.shape)} and returns {list(shape)}, so which part of the input is noisy is not "
            f"known; name the argument with the noisy latents: holdover.Slot('', kind='model', hidden=...)"
        )
    return x.narrow(differ[0], 0, shape[differ[0]]) if differ else x


def _noise_level(call: Call, kind: str) -> float | Tensor:
    """σ of the pass: a number, or a tensor that goes with the latents."""
    if call.step.sigma is None:
        try:
            return call.tap("sigma")
        except ValueError as error:
            raise ValueError(
                f"what the model returns ({kind}) is turned into clean latents by the noise level, which is not known; "
                f"say step(sigma=...), or declare it: {error}"
            ) from error
    sigma = float(call.step.sigma)
    if not 0 < sigma <= 1:
        raise ValueError(f"sigma={sigma} is no noise level of a model that returns {kind}: these lie above 0, up to 1")
    return sigma
