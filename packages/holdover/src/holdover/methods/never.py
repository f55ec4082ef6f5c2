"""Computes everything: the baseline that a trace and statistics can be had for."""

from __future__ import annotations

from holdover.methods.parts.gates import Open
from holdover.methods.parts.guards import Always
from holdover.methods.parts.spans import EachBlock
from holdover.methods.policy import Policy


def never() -> Policy:
    """A policy that holds nothing and computes every block."""
    return Policy(name="never", spans=EachBlock(), guard=Always("never"), gate=Open())
