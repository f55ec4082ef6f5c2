"""FBCache, the first-block cache of ParaAttention (github.com/chengzeyi/ParaAttention): block 0 tells for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from holdover.method import Call, Policy, Trigger, Verdict
from holdover.methods.parts.guards import Protection, at_least_zero, for_steps
from holdover.methods.parts.predictors import Residual
from holdover.methods.parts.signals import RelativeChange
from holdover.methods.parts.spans import ProbeAndTail


def fbcache(*, threshold: float = 0.05, protection: Protection = "pass") -> Policy:
    """Reuse the residual of the blocks after the first while the first one's residual has changed little.

    The first block is always computed. Its residual is compared, by relative change (L1), with that of the step at
    which the other blocks were last computed.

    Args:
        threshold: of the relative change.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    return Policy(
        name="fbcache",
        spans=ProbeAndTail(1),
        trigger=Below(
            guard=for_steps(retain=0, last=False, protection=protection),
            signal=RelativeChange("probe residual"),
            metric="change",
            threshold=threshold,
        ),
        predictor=Residual(),
        lifetime="chunk",
        reads_pass_input=True,
    )


@dataclass(frozen=True, kw_only=True)
class Below(Trigger):
    """Reuses while a metric stays below a threshold."""

    metric: str
    threshold: float

    def __post_init__(self) -> None:
        at_least_zero("threshold", self.threshold)

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        reason = None if metrics[self.metric] < self.threshold else self.metric
        return Verdict(reason, {**metrics, "threshold": self.threshold})
