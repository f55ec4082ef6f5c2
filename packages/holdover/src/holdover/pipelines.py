"""One line for a pipeline that people already run: `holdover.enable(pipeline, policy)`.

    import holdover

    enabled = holdover.enable(pipeline, holdover.policy("step_hold"))
    video = pipeline.inference(noise, prompts)

The pipeline runs unmodified. Known are pipelines and transformers of diffusers (`holdover.diffusers.enable`), the
pipelines of the Self-Forcing family (Self-Forcing, Causal-Forcing, LongLive), and those of FlashDreams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import holdover.diffusers as of_diffusers
from holdover.method import Policy
from holdover.models.flashdreams import diffusion_of
from holdover.models.generations import Generations
from holdover.models.rollout import Rollout, model_of


def enable(
    target: Any, policy: Policy | Sequence[Policy], **options: Any
) -> of_diffusers.Enabled | Rollout | Generations:
    """Attach a cache to the models of a pipeline, and say at each of its passes where that stands.

    Args:
        target: a pipeline, a transformer of diffusers, or a diffusion model of FlashDreams.
        policy: a caching method, such as ``holdover.policy("step_hold")``, or a list of them, as for `holdover.attach`.
        options: of `holdover.attach`.

    Returns:
        What was enabled: its ``cache`` tells what was decided, its ``disable()`` undoes it, and in its
        ``stream("name")`` the pipeline works on a video of that name. In FlashDreams every rollout cache is a video,
        and ``stream(rollout)`` is its name.

    Raises:
        ValueError: the pipeline is not known, is enabled already, or nothing of its model can be reused.
    """
    if diffusion_of(target) is not None:
        return Generations(target, policy, **options)
    if model_of(target) is not None:
        return Rollout(target, policy, **options)
    return of_diffusers.enable(target, policy, **options)
