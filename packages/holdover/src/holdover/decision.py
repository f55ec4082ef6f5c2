"""What was decided, block by block, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from holdover.step import Role

#: Reasons of the engine itself. Policies add their own.
#:   kv update, prefill   the pass has a role that is never served from cache
#:   condition            the condition changed since the span was computed, or within this chunk
#:   first                there is no entry yet
#:   interrupted          the entry was given up in a pass that failed
#:   snapshot             the entry came from another model
#:   shape, dtype, device the hidden state differs from the entry's in that
#:   bytes                the entry does not fit under max_bytes
#:   gradients            gradients are being recorded
#:   nan                  the signal is not finite
#:   audit                an audit of this stream found an error past its limit
#:   batch, group, branch another row of the batch, rank of the group, or guidance branch of the pass needed it
#:   reuse                served from cache
#:   window               no pass ran: the chunk shows the next frame of the window in hand
REUSE = "reuse"
WINDOW = "window"
WARM_UP = "warm-up"
#: Of a guard that looks at the action: it says nothing against the loop.
ACTION = "action"


@dataclass(frozen=True, slots=True)
class Decision:
    """One block of one pass.

    ``scores`` holds what the trigger looked at, such as ``cosine``, ``threshold`` and ``deviation``. It is empty where
    a guard decided. ``recomputed`` in it is the share of tokens computed where a part of a span was. ``audit`` in it is
    the relative error (L2) of a reused span that was computed as well.
    """

    stream: str
    branch: str
    chunk: int
    index: int
    slot: str
    block: int
    role: Role
    computed: bool
    reason: str
    scores: Mapping[str, float]
    sigma: float | None

    @property
    def reused(self) -> bool:
        """Whether it was served from cache, in a pass that ran."""
        return not self.computed and self.reason != WINDOW


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """Relative error (L2) of the reused spans that were computed as well."""

    samples: int
    mean_error: float
    max_error: float
    alarmed: bool


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Decisions, counted.

    Attributes:
        computed: block calls computed, KV updates and prefills included.
        reused: block calls served from cache.
        skip: reused / all block calls of denoising passes after warm-up, anchors and protected chunks included.
        held_chunks: chunks that ran no pass; their blocks are counted nowhere else. See `Cache.hold`.
        bytes_held: bytes of the entries' tensors; after `detach`, those held until then.
        reasons: block calls per reason.
        audit: what the audit found, None where it looked at nothing.
    """

    computed: int
    reused: int
    skip: float
    bytes_held: int
    reasons: Mapping[str, int]
    audit: AuditResult | None
    held_chunks: int = 0

    def __str__(self) -> str:
        lines = [
            f"skipped   {self.skip:6.1%} of the block calls after warm-up",
            f"reused    {self.reused}",
            f"computed  {self.computed}",
            f"held      {self.bytes_held / 2**20:.1f} MiB",
            "reasons   " + ", ".join(f"{reason} {n}" for reason, n in sorted(self.reasons.items(), key=_by_count)),
        ]
        if self.held_chunks:
            lines.append(f"window    {self.held_chunks} chunks without a pass")
        if self.audit:
            lines.append(
                f"audit     {self.audit.samples} samples, relative error mean {self.audit.mean_error:.2e}, "
                f"max {self.audit.max_error:.2e}{', past the limit' if self.audit.alarmed else ''}"
            )
        return "\n".join(lines)


def _by_count(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]
