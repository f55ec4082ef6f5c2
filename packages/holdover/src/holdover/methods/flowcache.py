"""FlowCache (arXiv 2602.10825): of the chunks in flight, each at a noise level of its own, each is judged by itself."""

from __future__ import annotations

from holdover.method import Policy
from holdover.methods.parts.guards import First, Protection, for_steps
from holdover.methods.parts.predictors import Residual
from holdover.methods.parts.signals import RelativeChange
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.parts.triggers import Accumulate


def flowcache(*, threshold: float = 0.01, retain: First = 0, protection: Protection = "pass") -> Policy:
    """Reuse a chunk's residual of all blocks while what enters them has changed little since it was computed.

    For loops in which a chunk begins before the one before it is done, so that chunks at staggered noise levels take
    turns: every pass says which chunk it is of. From step to step of a chunk the relative change (L1) of the embedded
    input is summed; the blocks are computed once the sum reaches the threshold, which resets it.

    Left open and chosen here: the chunk's own last step is not forced, as it is not in the released code; the paper's
    compression of the KV cache is no part of this. The preset has the released code's decisions; that code repeats the
    sampler's last change of the latents, which lies outside of the model, in place of the blocks' residual.

    Args:
        threshold: ε, of the sum.
        retain: first steps of a chunk that are computed: how many, a share of the steps, or a share and a number more.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    return Policy(
        name="flowcache",
        spans=ProbeAndTail(0),
        trigger=Accumulate(
            guard=for_steps(retain=retain, last=False, protection=protection),
            signal=RelativeChange("input", follows=True),
            metric="change",
            threshold=threshold,
        ),
        predictor=Residual(),
        lifetime="chunk",
    )


#: The released code's settings.
PRESETS = {"released": {"threshold": 0.01, "retain": 5}}
