"""Where a pass of a pipeline stands, read from the call that is being made.

A transformer may serve several pipelines, each with a scheduler of its own. So the pipeline is looked for among the
callers of the pass: it is the object whose method runs the transformer.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from holdover.engine import condition as conditions

#: The name under which a pipeline's call is marked among its local variables. The mark goes when the call ends.
MARK = "__holdover_call__"


class Caller(NamedTuple):
    """The pipeline that runs a pass, and what tells one call of it from the next. Both are None outside of one."""

    pipeline: Any = None
    call: object = None


@dataclass
class Chunk:
    """One denoising from noise to a video, or to a chunk of it, by all transformers of a pipeline.

    Attributes:
        number: of the chunk in its stream.
        schedule: the scheduler's tensor of timesteps. `set_timesteps` makes a new one.
        seen: transformer, branch and index of every pass that ended well.
        first: per transformer the index of its first pass.
        branches: per transformer the conditions of its unnamed guidance branches.
        timestep: that of the latest pass whose scheduler had not counted yet.
    """

    number: int
    schedule: Any
    seen: set[tuple[str, str, int]] = field(default_factory=set)
    first: dict[str, int] = field(default_factory=dict)
    branches: dict[str, list[Any]] = field(default_factory=dict)
    timestep: Any = None

    def copy(self) -> Chunk:
        branches = {name: list(known) for name, known in self.branches.items()}
        return replace(self, seen=set(self.seen), first=dict(self.first), branches=branches)

    @property
    def latest(self) -> int:
        """The index of the latest pass."""
        return max((index for _, _, index in self.seen), default=-1)

    def is_over(self, num_steps: int) -> bool:
        """Whether every branch of the step before has run the last step."""
        last = num_steps - 1
        before = max((index for _, _, index in self.seen if index < last), default=None)
        ran, ended = ({branch for _, branch, index in self.seen if index == at} for at in (before, last))
        return bool(ended) and ran <= ended

    def branch(self, transformer: str, condition: Mapping[str, Any]) -> str:
        """The name of an unnamed guidance branch, told by its condition. The first of a chunk is ``""``."""
        known = self.branches.setdefault(transformer, [])
        for number, frozen in enumerate(known):
            if conditions.same(frozen, condition):
                return str(number or "")
        known.append(conditions.freeze(condition))
        return str(len(known) - 1 or "")


def caller() -> Caller:
    """The pipeline whose method is running, where there is one: the nearest object that has a scheduler."""
    found, frame, outermost = None, sys._getframe(1), None
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            if found is None and _is_pipeline(owner):
                found = owner
            if owner is found and found is not None:
                outermost = frame
        frame = frame.f_back  # type: ignore[assignment]
    return Caller() if outermost is None else Caller(found, outermost.f_locals.setdefault(MARK, object()))


def _is_pipeline(owner: Any) -> bool:
    return not isinstance(owner, nn.Module) and hasattr(getattr(owner, "scheduler", None), "timesteps")


def position(scheduler: Any, timestep: Any, chunk: Chunk | None, *, running: bool) -> int | None:
    """The step at which a scheduler stands; None if that cannot be told.

    Args:
        scheduler: the pipeline's.
        timestep: what the transformer is given.
        chunk: the chunk in progress.
        running: the scheduler belongs to the pipeline that runs this pass. Else the timestep must be in its schedule.

    Raises:
        ValueError: frames of this pass stand at several steps.
    """
    schedule = getattr(scheduler, "timesteps", None)
    if schedule is None:
        return None
    counted = getattr(scheduler, "step_index", None)
    if counted is not None and running:
        return int(counted)
    given = torch.as_tensor([] if timestep is None else timestep, device=schedule.device).detach().unique()
    places = (schedule.to(given.dtype)[:, None] == given).nonzero().tolist()
    if len({value for _, value in places}) > 1:
        raise ValueError(
            f"frames of this pass stand at {len(given)} steps of the schedule, and a cache needs one step per pass; "
            f"call the pipeline with synchronous steps (SkyReels-V2: ar_step=0), or disable the cache"
        )
    found = [place for place, _ in places]
    if counted is not None and int(counted) in found:
        return int(counted)
    if found:  # of several that are rounded to the same, the next
        return int(next((place for place in found if chunk is None or place >= chunk.latest), found[0]))
    if not running or (chunk is not None and not _same(chunk.timestep, timestep)):
        return None
    return getattr(scheduler, "begin_index", None) or 0


def _same(known: Any, timestep: Any) -> bool:
    return known is None or conditions.same(known, timestep)
