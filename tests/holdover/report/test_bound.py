"""The bound against Amdahl's law by hand."""

from __future__ import annotations

import pytest

from holdover.report.bound import amdahl_bound


@pytest.mark.parametrize(
    ("share", "skip", "bound"), [(1, 0.5, 2.0), (0.8, 0.75, 2.5), (0.9, 0, 1.0), (0, 0.7, 1.0), (0.87, 0.714, 2.6398)]
)
def test_amdahl(share: float, skip: float, bound: float) -> None:
    assert amdahl_bound(share, skip) == pytest.approx(bound, rel=1e-4)


def test_amdahl_refuses_what_is_no_share() -> None:
    for share, skip in ((1.2, 0.5), (0.5, -0.1), (1.0, 1.0)):
        with pytest.raises(ValueError, match=r"share|leaves no time"):
            amdahl_bound(share, skip)
