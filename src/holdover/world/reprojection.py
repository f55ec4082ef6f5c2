"""What the ego is about to see if the world stands still: its newest pictures, moved as it will have moved.

An action says where the cameras will be, and depth where everything is; so most of the next pictures can be looked up
in the newest ones, across cameras, before anything is generated (the 3D cache of Ren et al., GEN3C, arXiv 2503.03751,
rendered at the cameras to come; here it is one latent frame deep, and looked up from there instead of splatted). A
transformer would have to learn from examples how far a lane mark moves at which speed in every part of every camera.
What moves by itself, what was hidden, and what was out of all cameras is left to it.

Shape suffixes: B batch, F latent frames, K video frames, M points, N tokens of one latent frame, P values of one token,
Z latent channels, Q values of a block of pixels, h, w squares of 8 by 8 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdover.world.autoencoder import FRAMES, SCALE, Autoencoder
from holdover.world.cameras import Camera
from holdover.world.config import Plane, WorldConfig, camera_axes, camera_rays
from holdover.world.depth import FAR, NEAR, from_metres, to_metres
from holdover.world.latents import Codec, from_tokens, padded, to_tokens

_STEPS = 2  # in which the depth that a camera will see is found
_GROUND = 0.75  # what lies farther than this share of the way to the ground is the ground


class LinearPath(nn.Module):
    """An autoencoder's way through principal components alone, from normalised latents to pixels and back.

    Until `take` gives it an autoencoder's, its directions are random ones.
    """

    def __init__(self, colours: int, latent_channels: int) -> None:
        super().__init__()
        values = FRAMES * colours * SCALE**2
        self.basis_QZ: Tensor
        self.centre_Q: Tensor
        self.deviation_Z: Tensor
        self.mean_Z: Tensor
        self.std_Z: Tensor
        self.register_buffer("basis_QZ", nn.init.orthogonal_(torch.empty(values, latent_channels)))
        self.register_buffer("centre_Q", torch.zeros(values))
        self.register_buffer("deviation_Z", torch.ones(latent_channels))
        self.register_buffer("mean_Z", torch.zeros(latent_channels))
        self.register_buffer("std_Z", torch.ones(latent_channels))

    def take(self, autoencoder: Autoencoder) -> None:
        """Use an autoencoder's."""
        for name, buffer in self.named_buffers():
            buffer.copy_(autoencoder.get_buffer(name))

    def newest(self, z_Zhw: Tensor) -> Tensor:
        """The last of the video frames of a latent frame, ``[colours, 8*h, 8*w]``."""
        rows = slice(-len(self.basis_QZ) // FRAMES, None)
        components = (z_Zhw.movedim(0, -1) * self.std_Z.float() + self.mean_Z.float()) * self.deviation_Z.float()
        pixels = components @ self.basis_QZ[rows].float().T + self.centre_Q[rows].float()
        return F.pixel_shuffle(pixels.movedim(-1, 0), SCALE)

    def latents(self, video_KCHW: Tensor) -> Tensor:
        """Of video, four frames each: ``[F, Z, h, w]``."""
        blocks = F.pixel_unshuffle(video_KCHW.unflatten(0, (-1, FRAMES)).flatten(1, 2), SCALE).movedim(1, -1)
        components = (blocks - self.centre_Q.float()) @ self.basis_QZ.float() / self.deviation_Z.float()
        return ((components - self.mean_Z.float()) / self.std_Z.float()).movedim(-1, 1)


@dataclass(frozen=True)
class _View:
    """A camera's geometry: its place, its axes (right, down, forward; rows), and per square and per pixel the ray in
    these axes ``[3, M]`` and how far along it the ground is ``[M]``."""

    camera: Camera
    place_3: Tensor
    axes_33: Tensor
    squares: tuple[Tensor, Tensor]
    pixels: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, camera: Camera, device: torch.device) -> _View:
        axes = torch.from_numpy(camera_axes(camera)).float().to(device)
        grids = []
        for size in (SCALE, 1):
            rays_M3 = torch.from_numpy(camera_rays(camera, every=size)).float().to(device).flatten(0, 1)
            down = -rays_M3[:, 2]
            ground = torch.where(down > 1e-3, camera.position[2] / down.clamp(min=1e-3), FAR).clamp(max=FAR)
            grids.append((axes @ rays_M3.T, ground))
        return cls(camera, torch.tensor(camera.position, device=device), axes, *grids)

    def project(self, points_3KM: Tensor) -> tuple[Tensor, Tensor]:
        """Where points, in the axes, are in the picture, from -1 to 1 each way ``[K, M, 2]``, and which are in it."""
        right, down, forward = points_3KM
        slope = math.tan(math.radians(self.camera.fov) / 2)
        scale = 1 / (forward.clamp(min=0.1) * slope)
        at = torch.stack([right * scale, down * scale * (self.camera.width / self.camera.height)], -1)
        return at, (at.abs().amax(-1) <= 1).logical_and_(forward > 0.1)


@dataclass(frozen=True)
class _Move:
    """From the ego's coordinates at each of K poses to those of now: rotations ``[K, 3, 3]`` and shifts ``[K, 3]``."""

    turn_K33: Tensor
    shift_K3: Tensor

    @classmethod
    def of(cls, poses_K3: Tensor) -> _Move:
        x, y, yaw = poses_K3.unbind(-1)
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        turn = [yaw.cos(), -yaw.sin(), zero, yaw.sin(), yaw.cos(), zero, zero, zero, one]
        return cls(torch.stack(turn, -1).unflatten(-1, (3, 3)), torch.stack([x, y, zero], -1))

    def places(self, view: _View) -> Tensor:
        """Where a camera will be, ``[K, 3]``."""
        return self.turn_K33 @ view.place_3 + self.shift_K3

    def points(self, view: _View, rays_3M: Tensor, depth_KM: Tensor) -> Tensor:
        """What a camera will see along rays at these distances, in its axes of now ``[3, K, M]``."""
        turn_K33 = view.axes_33 @ self.turn_K33 @ view.axes_33.T
        shift_3K = view.axes_33 @ (self.places(view) - view.place_3).T
        directions_3KM = (turn_K33.movedim(1, 0).flatten(0, 1) @ rays_3M).unflatten(0, (3, -1))
        return torch.addcmul(shift_3K[..., None], directions_3KM, depth_KM)

    def depth(self, view: _View, points_3KM: Tensor) -> Tensor:
        """How far away points in the ego's coordinates of now will be along a camera's axis, ``[K, M]``."""
        forward_K3 = self.turn_K33 @ view.axes_33[2]
        beside_3KM = points_3KM - self.places(view).T[..., None]
        return (forward_K3.T[..., None] * beside_3KM).sum(0)


class Reprojection(nn.Module):
    """From the newest latent frame to what the next ones would be if the world stood still."""

    def __init__(self, sizes: WorldConfig) -> None:
        super().__init__()
        self.sizes = sizes
        channels = {"colour": (3, sizes.latent_channels), "depth": (1, sizes.depth_channels)}
        self.paths = nn.ModuleDict({m: LinearPath(*channels[m]) for m in sizes.modalities})
        self._views: dict[torch.device, tuple[_View, ...]] = {}

    def take(self, codec: Codec) -> None:
        """Use a codec's autoencoders."""
        for modality in self.sizes.modalities:
            self._path(modality).take(codec.autoencoders[modality])

    @torch.no_grad()
    def forward(self, last_BNP: Tensor, poses_BK3: Tensor) -> tuple[Tensor, Tensor]:
        """Look the next latent frames up.

        Args:
            last_BNP: the newest latent frame.
            poses_BK3: where the ego will be at each video frame to come, from `motion.drive`.

        Returns:
            The latents ``float32 [B, F, N, P]``, and of each token the share that some camera sees now and the ego will
            not have gone through, ``[B, F, N, 1]``; the rest of it is as it was.
        """
        rows = [self._row(last.float(), _Move.of(poses)) for last, poses in zip(last_BNP, poses_BK3, strict=True)]
        latents, seen = zip(*rows, strict=True)
        return torch.stack(latents), torch.stack(seen)

    def _row(self, last_NP: Tensor, move: _Move) -> tuple[Tensor, Tensor]:
        views = self._views.get(last_NP.device)
        if views is None:
            ordered = [camera for group in self.sizes.groups for camera in group]
            views = self._views[last_NP.device] = tuple(_View.of(camera, last_NP.device) for camera in ordered)
        pictures = [self._picture(last_NP, plane) for plane in self._planes("colour")]
        depths, passed = self._depths(last_NP, views, move)
        points = [move.points(view, view.pixels[0], depth) for view, depth in zip(views, depths, strict=True)]
        shown: dict[str, list[Tensor]] = {"colour": [], "depth": [from_metres(depth)[None] for depth in depths]}
        seen = []
        looked = look(views, pictures, points)
        for picture, behind_KM, (values_CKM, met_KM) in zip(pictures, passed, looked, strict=True):
            found_KM = met_KM & ~behind_KM
            shown["colour"].append(torch.where(found_KM, values_CKM, picture.flatten(1)[:, None]))
            seen.append(found_KM.float()[None])
        parts, shares = [], []
        for modality in self.sizes.modalities:
            for plane, video, found in zip(self._planes(modality), shown[modality], seen, strict=True):
                z = self._path(modality).latents(self._video(video, plane))
                parts.append(to_tokens(z[None], plane, self.sizes)[0])
                share = F.avg_pool2d(self._video(found, plane), SCALE * self.sizes.token_latents(modality))
                shares.append(share.unflatten(0, (-1, FRAMES)).mean(1).flatten(1)[..., None])
        return torch.cat(parts, 1), torch.cat(shares, 1)

    def _path(self, modality: str) -> LinearPath:
        path = self.paths[modality]
        assert isinstance(path, LinearPath)
        return path

    def _planes(self, modality: str) -> list[Plane]:
        return [plane for plane in self.sizes.planes if plane.modality == modality]

    def _picture(self, last_NP: Tensor, plane: Plane) -> Tensor:
        """What a plane shows in the end, ``[colours, height, width]``."""
        z = from_tokens(last_NP[None, None], plane, self.sizes)[0, 0]
        return self._path(plane.modality).newest(z)[:, : plane.camera.height, : plane.camera.width]

    def _video(self, values_CKM: Tensor, plane: Plane) -> Tensor:
        """As pictures that whole tokens cover, ``[K, C, height, width]``."""
        return padded(values_CKM.movedim(1, 0).unflatten(-1, (plane.camera.height, -1)), plane, self.sizes)

    def _depths(self, last_NP: Tensor, views: Sequence[_View], move: _Move) -> tuple[list[Tensor], list[Tensor]]:
        """How far away what each camera will see is, per pixel ``[K, M]``, and where that would be behind the camera.

        What the ego will have gone through cannot have stood there: the ground, or the sky, is taken to be there.
        """
        now = [view.squares[1] for view in views]
        if "depth" in self.paths:
            metres = [to_metres(self._picture(last_NP, plane)) for plane in self._planes("depth")]
            nearness = [F.avg_pool2d(1 / m, SCALE).flatten() for m in metres]
            now = [torch.minimum(1 / near, ground) for near, ground in zip(nearness, now, strict=True)]
        # Points over their distances, and one over it, may be interpolated: planes stay planes.
        maps = []
        for view, depth in zip(views, now, strict=True):
            over_3M = view.axes_33.T @ view.squares[0] + view.place_3[:, None] / depth
            stands = (depth < _GROUND * view.squares[1]).float()
            values_5M = torch.cat([over_3M, 1 / depth[None], stands[None]])
            maps.append(values_5M.unflatten(1, (view.camera.height // SCALE, -1)))
        guesses = [depth.expand(len(move.shift_K3), -1) for depth in now]
        passed = [torch.zeros_like(guess, dtype=torch.bool) for guess in guesses]
        for _ in range(_STEPS):
            points = [move.points(view, view.squares[0], guess) for view, guess in zip(views, guesses, strict=True)]
            for n, (met_5KM, found_KM) in enumerate(look(views, maps, points)):
                depth = move.depth(views[n], met_5KM[:3] / met_5KM[3])
                passed[n] = found_KM & (depth < NEAR) & (met_5KM[4] > 0.5)
                depth = depth.masked_fill(passed[n], FAR).clamp(NEAR, FAR)
                guesses[n] = torch.minimum(torch.where(found_KM, depth, guesses[n]), views[n].squares[1])
        fine = [_fine(view, guess) for view, guess in zip(views, guesses, strict=True)]
        return fine, [_repeated(view, where) for view, where in zip(views, passed, strict=True)]


def look(views: Sequence[_View], pictures: Sequence[Tensor], points: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Look points up in pictures: each in its own camera's, or else in the first that it is in.

    Args:
        pictures: per camera ``[C, h, w]``.
        points: per camera, in its axes ``[3, K, M]``.

    Returns:
        Per camera what was found ``[C, K, M]``, and where ``[K, M]``.
    """
    looked, missing, elsewhere = [], [], []
    for picture, view, points_3KM in zip(pictures, views, points, strict=True):
        at, found_KM = view.project(points_3KM)
        looked.append((_sample(picture, at), found_KM))
        missing.append((~found_KM).flatten().nonzero()[:, 0])
        elsewhere.append(view.axes_33.T @ points_3KM.flatten(1)[:, missing[-1]] + view.place_3[:, None])
    ego_3M = torch.cat(elsewhere, 1)
    values_CM = ego_3M.new_zeros(len(pictures[0]), ego_3M.shape[1])
    found_M = torch.zeros_like(values_CM[0], dtype=torch.bool)
    left = torch.arange(len(found_M), device=found_M.device)
    for picture, view in zip(pictures, views, strict=True):
        at, here_KM = view.project((view.axes_33 @ (ego_3M[:, left] - view.place_3[:, None]))[:, None])
        here = here_KM[0].nonzero()[:, 0]
        values_CM[:, left[here]] = _sample(picture, at[:, here])[:, 0]
        found_M[left[here]] = True
        left = left[~here_KM[0]]
    counts = [len(places) for places in missing]
    others = zip(looked, missing, values_CM.split(counts, 1), found_M.split(counts), strict=True)
    for (all_CKM, all_KM), places, values, found in others:
        all_CKM.flatten(1)[:, places], all_KM.flatten()[places] = values, found
    return looked


def _sample(picture_Chw: Tensor, at_KM2: Tensor) -> Tensor:
    return F.grid_sample(picture_Chw[None], at_KM2[None], padding_mode="border", align_corners=False)[0]


def _fine(view: _View, depth_KM: Tensor) -> Tensor:
    """Depth of squares as depth of pixels; what is about as far as the ground is the ground."""
    rows, columns = view.camera.height, view.camera.width
    near = (1 / depth_KM).unflatten(1, (rows // SCALE, -1))[:, None]
    depth = 1 / F.interpolate(near, size=(rows, columns), mode="bilinear", align_corners=False).flatten(1)
    return torch.where(depth > _GROUND * view.pixels[1], view.pixels[1], depth)


def _repeated(view: _View, where_KM: Tensor) -> Tensor:
    """What holds of squares, of their pixels."""
    rows = where_KM.unflatten(1, (view.camera.height // SCALE, -1))
    return torch.repeat_interleave(rows.repeat_interleave(SCALE, 1), SCALE, 2).flatten(1)
