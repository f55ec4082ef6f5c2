"""Rays of cameras, and the rig on one canvas."""

from __future__ import annotations

import numpy as np

from holdover_world.scene.cameras import RIG, camera_rays, stitch
from tests.holdover_world.small import CAMERAS


def test_a_ray_goes_through_the_centre_of_its_square() -> None:
    """The centre of 32 by 32 pixels lies between the four middle ones; of a picture of 16 by 16, on its corner."""
    wide, _, rear = CAMERAS
    pixels = camera_rays(wide)
    np.testing.assert_allclose(camera_rays(wide, every=32)[0, 0], pixels[15:17, 15:17].mean((0, 1)))
    pixels = camera_rays(rear)
    corner = pixels[-1, -1] + (pixels[-1, -1] - pixels[-2, -2]) / 2
    np.testing.assert_allclose(camera_rays(rear, every=32), corner[None, None])


def test_the_rig_is_stitched_in_place() -> None:
    frames = {c.name: np.full((2, c.height, c.width, 3), i + 1) for i, c in enumerate(RIG)}
    canvas = stitch(frames)
    assert canvas.shape == (2, 160, 256, 3)
    names = [c.name for c in RIG]
    assert canvas[0, 0, 0, 0] == names.index("front_wide") + 1
    assert canvas[0, 64, 0, 0] == names.index("left_rear") + 1
    assert canvas[0, 159, 128, 0] == names.index("rear") + 1
    assert canvas[0, 159, 0, 0] == 0
    assert (canvas > 0).sum() == 2 * 3 * sum(c.width * c.height for c in RIG)
    below = stitch({"periscope": frames["rear"], **frames})
    np.testing.assert_array_equal(below[:, :160], canvas)
    np.testing.assert_array_equal(below[:, 160:, 72:184], frames["rear"])  # a camera outside the rig has its own row
