"""Depth for a network against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from holdover_world.scene.depth import FAR, NEAR, from_metres, to_metres


def test_depth_is_relative() -> None:
    middle = float(np.sqrt(NEAR * FAR))
    metres = torch.tensor([0.1, NEAR, middle, FAR, 1e6])
    np.testing.assert_allclose(from_metres(metres), [-1, -1, 0, 1, 1], atol=1e-6)
    # The same factor is the same step everywhere.
    steps = from_metres(torch.tensor([1.0, 2.0, 100.0, 200.0])).diff()
    assert steps[0].item() == pytest.approx(steps[2].item(), abs=1e-6)
    metres = torch.from_numpy(np.geomspace(NEAR, FAR, 50))
    np.testing.assert_allclose(to_metres(from_metres(metres)), metres, rtol=1e-4)
    np.testing.assert_allclose(to_metres(torch.tensor([-3.0, 3.0])), [NEAR, FAR], rtol=1e-5)
