"""A small network that reads the motion of the car from video. It is trained on the simulator's pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from holdover_world.runtime import fast_dtype
from holdover_world.scene.cameras import FPS, Camera
from holdover_world.scene.clips import Clip
from holdover_world.scene.vehicles import MAX_SPEED

#: Frames from the first picture that the network sees to the last.
GAP = 8
#: The pictures that the network sees. They are close enough that a lane's dashes are not confused, and far enough apart
#: to show small motion.
MOMENTS = (0, 2, 4, GAP)
#: The sizes in pixels of the average that softens a picture; 1 leaves it unchanged.
SOFTNESS = (1, 2, 3, 4, 6)
#: The scale of speed (m/s) and yaw rate (rad/s).
SCALE = np.array([MAX_SPEED, 0.5])
#: Every n-th clip is kept for the calibration and not trained on.
_CALIBRATES = 6


class MotionReader(nn.Module):
    """Reads speed and yaw rate from a few pictures of a camera that looks ahead.

    Attributes:
        offset, slope: of the line of the network's readings over the true values, see `calibrate`.
    """

    def __init__(self, camera: str) -> None:
        super().__init__()
        self.camera = camera
        self.offset, self.slope = np.zeros(2), np.ones(2)
        layers: list[nn.Module] = []
        channels = 3 * len(MOMENTS)
        for width in (32, 64, 96, 128):
            layers += [nn.Conv2d(channels, width, 5, 2, 2), nn.GroupNorm(8, width), nn.GELU()]
            channels = width
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d((4, 8)), nn.Flatten())
        self.read = nn.Sequential(nn.Linear(channels * 4 * 8, 128), nn.GELU(), nn.Linear(128, 2))

    def forward(self, pictures: Tensor) -> Tensor:
        """From ``[B, 3 * len(MOMENTS), height, width]`` in [-1, 1] to ``[B, 2]``, in units of `SCALE`."""
        result: Tensor = self.read(self.features(pictures))
        return result

    @torch.inference_mode()
    def motion(self, video: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.float64]:
        """Speed (m/s) and yaw rate (rad/s) over every ``GAP`` frames of a video: ``[T // GAP - 1, 2]``."""
        frames = video[self.camera]
        starts = range(0, len(frames) - GAP, GAP)
        motion: NDArray[np.float64] = self(torch.stack([_pictures(frames, t) for t in starts])).double().numpy() * SCALE
        return (motion - self.offset) / self.slope

    def calibrate(self, clips: Sequence[Clip]) -> None:
        """Correct the readings with clips that were not trained on.

        An unsure network reads towards the mean, so its readings vary less than the truth. This fits the line of the
        readings over the known values, and `motion` inverts it (classical calibration). A quantity that does not vary
        in these clips is not corrected.
        """
        read = np.concatenate([self.motion(clip.frames) for clip in clips])
        true = np.concatenate([true_motion(clip) for clip in clips])
        for n in range(2):
            if np.ptp(true[:, n]) > 0:
                slope, offset = np.polyfit(true[:, n], read[:, n], 1)
                self.offset[n], self.slope[n] = self.offset[n] + self.slope[n] * offset, self.slope[n] * slope


def true_motion(clip: Clip, every: int = GAP) -> NDArray[np.float64]:
    """The true motion of a clip at the places of `MotionReader.motion`: mean speed and yaw rate from its poses.

    Args:
        every: frames from one reading to the next.
    """
    yaw, speed = np.unwrap(clip.poses[:, 2]), clip.motion[:, 0]
    starts = range(0, len(yaw) - GAP, every)
    return np.array([[speed[t + 1 : t + GAP + 1].mean(), (yaw[t + GAP] - yaw[t]) * FPS / GAP] for t in starts])


def train_motion_reader(
    clips: Sequence[Clip],
    camera: str,
    *,
    steps: int,
    batch: int = 32,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> MotionReader:
    """Train on recorded clips. Every sixth clip is left out of training and used to calibrate.

    Pictures are softened, brightened and made noisy, as generated video is. Half of the batches are mirrored together
    with their yaw rates.

    Args:
        clips: the clips to train on and to calibrate with.
        camera: the camera to look at.
        advance: called after every step.

    Raises:
        ValueError: there are fewer than two clips.
    """
    if len(clips) < 2:
        raise ValueError(
            f"{len(clips)} clips to train the reader of motion on; give two or more, because one is for calibration"
        )
    known, clips = clips[::_CALIBRATES], [clip for n, clip in enumerate(clips) if n % _CALIBRATES]
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    reader = MotionReader(camera)
    optimiser = torch.optim.AdamW(reader.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    motions = [true_motion(clip, every=1) for clip in clips]
    for _ in range(steps):
        drawn = [(i := int(rng.integers(len(clips))), int(rng.integers(len(motions[i])))) for _ in range(batch)]
        pictures = _softened(torch.stack([_pictures(clips[i].frames[camera], t) for i, t in drawn]), rng)
        target = torch.from_numpy(np.stack([motions[i][t] for i, t in drawn]) / SCALE).float()
        if rng.random() < 0.5:
            pictures, target = pictures.flip(-1), target * torch.tensor([1.0, -1.0])
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype() == torch.bfloat16):
            read = reader(pictures.contiguous(memory_format=torch.channels_last)).float()
        loss = F.smooth_l1_loss(read, target, beta=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        advance()
    reader.eval().requires_grad_(False)
    reader.calibrate(known)
    return reader


def agreement(read: NDArray[np.float64], true: NDArray[np.float64]) -> dict[str, float | None]:
    """Pearson correlation of two series, and the least-squares slope of the first over the second.

    Both are None if a series is constant.
    """
    covariance = np.cov(true, read)
    if 0 in np.diag(covariance):
        return {"correlation": None, "slope": None}
    return {
        "correlation": float(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])),
        "slope": float(covariance[0, 1] / covariance[0, 0]),
    }


def camera_ahead(cameras: Sequence[Camera]) -> str:
    """The name of the camera that looks ahead, the widest if there are several."""
    return min(cameras, key=lambda camera: (abs(camera.yaw), -camera.fov)).name


def _pictures(frames: NDArray[np.uint8], start: int) -> Tensor:
    joined = np.concatenate([frames[start + moment] for moment in MOMENTS], -1)
    return torch.from_numpy(joined).permute(2, 0, 1).float() / 127.5 - 1


def _softened(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Augmented pictures: each mixed with its blur, in other light and with noise."""

    def drawn(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (len(pictures), 1, 1, 1))).float()

    small = F.avg_pool2d(pictures, int(rng.choice(SOFTNESS)), ceil_mode=True, count_include_pad=False)
    blurred = F.interpolate(small, pictures.shape[-2:], mode="bilinear")
    noise = torch.randn(pictures.shape) * drawn(0, 0.04)
    return torch.lerp(pictures, blurred, drawn(0, 1)) * drawn(0.7, 1.2) + drawn(-0.1, 0.1) + noise
