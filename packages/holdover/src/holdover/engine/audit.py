"""Computing a sample of the reused spans as well, to know their error."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from holdover.engine.trace import Tally
from holdover.engine.transaction import Transaction


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Compute a sample of the reused spans as well, without changing the output.

    Attributes:
        rate: share of reused spans, 0 to 1.
        limit: relative error (L2) of a span's output past which the engine warns and computes the stream until reset.
        seed: of the sample.
    """

    rate: float = field(kw_only=False)
    limit: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"audit={self.rate} is not a share; pass a rate from 0 to 1")
        if not self.limit > 0:
            raise ValueError(f"limit={self.limit} of the audit is not positive; pass a relative error such as 0.1")

    def draws(self, row: Transaction) -> bool:
        """Whether a stream's latest reuse is in the sample. Its number tells, so that a restored stream draws alike."""
        if self.rate == 0:
            return False
        return random.Random(f"{self.seed} {row.step.stream} {row.step.branch} {row.reuses}").random() < self.rate

    def heed(self, row: Transaction, tallies: Mapping[str, Tally], policy: str) -> None:
        """Count the errors of a pass that ended well; the first one past the limit raises the stream's alarm."""
        tally = tallies[row.step.stream]
        for error in row.audit_errors:
            tally.count_audit(error)
        if row.stream.alarmed or not any(error > self.limit for error in row.audit_errors):
            return
        row.stream.alarmed = True
        if not any(known.alarmed for known in tallies.values()):
            warnings.warn(
                f"{policy}: a reused span of stream {row.step.stream!r} was off by {max(row.audit_errors):.3g}, past "
                f"the audit's limit of {self.limit:.3g}; the stream is computed until "
                f"cache.reset({row.step.stream!r})",
                stacklevel=4,
            )
        tally.alarmed = True
