"""Computes everything: the baseline that a trace and statistics can be had for."""

from __future__ import annotations

from holdover.policies.parts.gates import Open
from holdover.policies.parts.guards import Always
from holdover.policies.parts.spans import EachBlock
from holdover.policies.policy import Policy


def never() -> Policy:
    """A policy that holds nothing and computes every block."""
    return Policy(name="never", spans=EachBlock(), guard=Always("never"), gate=Open())
