"""What the ego will see if the world stands still: its newest pictures, warped to where it will be.

Actions say where the cameras will be, and depth says where everything is. So most of the next pictures can be looked up
in the newest ones, across cameras, before anything is generated. This is the 3D cache of Ren et al. (GEN3C, arXiv
2503.03751), one latent frame deep, and looked up from the future cameras instead of splatted. Without it a transformer
has to learn from examples how far a lane mark moves at which speed in each part of each camera. The transformer is left
with what moves by itself, what was hidden, and what no camera saw.

With a layout (`holdover_world.scene.layout`) distances are those of the layout, cars are looked up where they were, and
things that are hidden now count as unseen. Pixels that no camera saw get the layout's colours.

Each latent frame is worked out by itself, so it is the same, bit for bit, whichever others are asked for.

Shape suffixes: B batch, F latent frames, K video frames, M pixels of all cameras, N tokens of one latent frame, P
values of one token, T latents of one latent frame, Z latent channels, Q values of a block of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdover_world.codec.autoencoder import Autoencoder
from holdover_world.codec.latents import Codec
from holdover_world.conditioning.drawn import Around, Scenery, draw, faces
from holdover_world.conditioning.lookup import Expected
from holdover_world.conditioning.views import Move, Rig, block_order, look
from holdover_world.config import FRAMES, SCALE, WorldConfig
from holdover_world.scene.depth import FAR, NEAR, from_metres, to_metres
from holdover_world.scene.layout import Site
from holdover_world.scene.poses import seen_from

_STEPS = 2  # iterations that find the depth a camera will see
_GROUND = 0.75  # anything farther than this share of the way to the ground counts as the ground


class LinearPath(nn.Module):
    """The linear path of an autoencoder: from normalised latents to pixels by principal components, and back.

    Its directions are random until `take` copies those of an autoencoder. The pixels of a block are in the order of a
    `Rig`.
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
        """Copy the linear path of an autoencoder."""
        for name, buffer in self.named_buffers():
            buffer.copy_(autoencoder.get_buffer(name))

    def _pixels(self) -> tuple[Tensor, Tensor]:
        """Basis ``[Q, Z]`` and centre ``[Q]``, in the order of a rig."""
        order = block_order().to(self.centre_Q.device)
        basis = self.basis_QZ.float().unflatten(0, (-1, len(order)))[:, order]
        return basis.flatten(0, 1), self.centre_Q.float().view(-1, len(order))[:, order].flatten()

    def newest(self, z_TZ: Tensor) -> Tensor:
        """The last video frame of latents, ``[colours, 64*T]``."""
        basis, centre = self._pixels()
        last = slice(-len(basis) // FRAMES, None)
        components = (z_TZ * self.std_Z.float() + self.mean_Z.float()) * self.deviation_Z.float()
        pixels = components @ basis[last].T + centre[last]
        newest: Tensor = pixels.unflatten(1, (-1, SCALE**2)).movedim(1, 0).flatten(1)
        return newest

    def latents(self, video_CKM: Tensor) -> Tensor:
        """Latents ``[T, Z]`` of one latent frame's video."""
        basis, centre = self._pixels()
        scale = 1 / (self.deviation_Z.float() * self.std_Z.float())
        shift = -(centre @ basis) * scale - self.mean_Z.float() / self.std_Z.float()
        blocks_TQ = video_CKM.unflatten(2, (-1, SCALE**2)).permute(2, 1, 0, 3).flatten(1)
        return torch.addmm(shift, blocks_TQ, basis * scale)


class _Now(NamedTuple):
    """What there is to look up: pictures ``[C, height, width]`` per camera, and what is known of distances.

    With a layout the last channel of a picture says what is there. Without one ``maps`` are `_maps`.
    """

    pictures: list[Tensor]
    around: Around | None
    site: Site | None
    colour_3M: Tensor
    maps: list[Tensor]


class Looked(NamedTuple):
    """What is looked up: colour ``[3, K, M]``, metres ``[K, M]``, 1 where it is seen and 0 elsewhere ``[K, M]``, and
    the layout's own colour ``[3, K, M]``."""

    colour_3KM: Tensor
    depth_KM: Tensor
    seen_KM: Tensor
    drawn_3KM: Tensor | None


class Reprojection(nn.Module):
    """Works out the next latent frames from the newest one, as if the world stood still."""

    def __init__(self, sizes: WorldConfig) -> None:
        super().__init__()
        self.sizes = sizes
        channels = {"colour": (3, sizes.latent_channels), "depth": (1, sizes.depth_channels)}
        self.paths = nn.ModuleDict({m: LinearPath(*channels[m]) for m in sizes.modalities})
        self._sceneries: dict[torch.device, Scenery] = {}

    def take(self, codec: Codec) -> None:
        """Copy the linear paths of a codec's autoencoders."""
        for modality in self.sizes.modalities:
            self._path(modality).take(codec.autoencoders[modality])

    @torch.no_grad()
    def forward(
        self,
        last_BNP: Tensor,
        poses_BK3: Tensor,
        sites: Sequence[Site | None] | None = None,
        frames: Sequence[int] | None = None,
    ) -> Expected:
        """Look the next latent frames up.

        Args:
            last_BNP: the newest latent frame.
            poses_BK3: poses of the ego in the coming video frames, relative to the pose that the newest frame shows.
            sites: the place of each row in its layout; None if no row has one.
            frames: the numbers of the latent frames that show these poses, counted from 0; by default the first ones.

        Returns:
            What is expected, in float32. A token counts as seen where some camera sees it now and the ego will not have
            driven through it. The rest of a token stays as it was, or as the layout has it.
        """
        numbers = range(poses_BK3.shape[1] // FRAMES) if frames is None else frames
        scenery = self._sceneries.get(last_BNP.device)
        if scenery is None:
            rig = Rig.of(self.sizes, last_BNP.device)
            scenery = self._sceneries[last_BNP.device] = Scenery.of(rig)
        rows = []
        for last_NP, poses_K3, site in zip(last_BNP, poses_BK3, sites or (None,) * len(last_BNP), strict=True):
            now = self._now(scenery, last_NP.float(), site)
            parts = zip(numbers, poses_K3.split(FRAMES), strict=True)
            rows.append([self._frame(scenery.rig, now, poses, FRAMES * number) for number, poses in parts])
        found = [[torch.stack(each) for each in zip(*row, strict=True)] for row in rows]
        return Expected(*(torch.stack(each) for each in zip(*found, strict=True)))

    def _now(self, scenery: Scenery, last_NP: Tensor, site: Site | None) -> _Now:
        colour_3M = self._newest(last_NP, "colour")
        if site is None:
            return _Now(scenery.rig.pictures(colour_3M), None, None, colour_3M, self._maps(scenery.rig, last_NP))
        around, what_M = now_at(site, scenery, last_NP.device)
        marked_4M = torch.cat([colour_3M, what_M[None]])
        return _Now(scenery.rig.pictures(marked_4M), around, site, colour_3M, [])

    def _frame(self, rig: Rig, now: _Now, poses_K3: Tensor, passed: int) -> Expected:
        """One latent frame, ``[N, *]`` each."""
        if now.around is None or now.site is None:
            looked = self._still(rig, now, Move.of(poses_K3))
        else:
            after = [passed + k + 1 for k in range(len(poses_K3))]
            looked = look_up_in_layout(now.pictures, now.around, now.site, poses_K3, after)
        depth = [self._depth_tokens(rig, looked.depth_KM)] if "depth" in self.paths else []
        latents_NP = torch.cat([self._colour_tokens(looked.colour_3KM), *depth])
        layout_NP = torch.zeros_like(latents_NP)
        if looked.drawn_3KM is not None:
            layout_NP = torch.cat([self._colour_tokens(looked.drawn_3KM), *depth])
        return Expected(latents_NP, self._share(rig, looked.seen_KM), layout_NP)

    def _still(self, rig: Rig, now: _Now, move: Move) -> Looked:
        """By the generated depth."""
        depth_KM, behind_KM = _depths(rig, now.maps, move)
        points_3KM = move.points(rig.views, rig.pixels, depth_KM)
        values_3KM, met_KM = look(rig.views, rig.pixels, now.pictures, points_3KM)
        found_KM = met_KM & ~behind_KM
        colour_3KM = torch.where(found_KM, values_3KM, now.colour_3M[:, None])
        return Looked(colour_3KM, depth_KM, found_KM.float(), None)

    def _colour_tokens(self, video_3KM: Tensor) -> Tensor:
        """Colour as latents ``[N, P]``."""
        return _as_tokens(self._path("colour").latents(video_3KM), self.sizes.patch)

    def _depth_tokens(self, rig: Rig, depth_KM: Tensor) -> Tensor:
        """Metres as latents ``[N, P]``."""
        video_1KD = from_metres(depth_KM).index_select(1, rig.padded_D)[None]
        return _as_tokens(self._path("depth").latents(video_1KD), self.sizes.depth_patch)

    def _share(self, rig: Rig, seen_KM: Tensor) -> Tensor:
        """The share of each token that is seen, ``[N, 1]``."""
        shares, seen_M = [], seen_KM.mean(0)
        for modality in self.sizes.modalities:
            covered = seen_M if modality == "colour" else seen_M[rig.padded_D]
            pixels = (SCALE * self.sizes.token_latents(modality)) ** 2
            shares.append(covered.view(-1, pixels).mean(1))
        return torch.cat(shares)[:, None]

    def _path(self, modality: str) -> LinearPath:
        path = self.paths[modality]
        assert isinstance(path, LinearPath)
        return path

    def _newest(self, last_NP: Tensor, modality: str) -> Tensor:
        """The last pictures in one modality, ``[colours, pixels]``, in the order of its tokens."""
        planes = [plane.tokens for plane in self.sizes.planes if plane.modality == modality]
        first, last = planes[0], planes[-1]
        latents = self.sizes.token_latents(modality) ** 2
        z_TZ = last_NP[first.start : last.stop].unflatten(1, (-1, latents)).transpose(1, 2).flatten(0, 1)
        return self._path(modality).newest(z_TZ)

    def _maps(self, rig: Rig, last_NP: Tensor) -> list[Tensor]:
        """Per camera, in squares of 8 by 8 pixels: points divided by their distance, one divided by the distance, and
        whether something stands there; ``[5, rows, columns]``.

        All of them may be interpolated: planes stay planes.
        """
        now = [rig.coarse.ground_M[part] for part in rig.coarse.parts]
        if "depth" in self.paths:
            metres_1M = to_metres(self._newest(last_NP, "depth"))[:, rig.unpadded_M]
            nearness = [F.avg_pool2d(1 / picture, SCALE).flatten() for picture in rig.pictures(metres_1M)]
            now = [torch.minimum(1 / near, ground) for near, ground in zip(nearness, now, strict=True)]
        maps = []
        for view, part, depth in zip(rig.views, rig.coarse.parts, now, strict=True):
            over_3M = view.axes_33.T @ rig.coarse.rays_3M[:, part] + view.place_3[:, None] / depth
            stands = (depth < _GROUND * rig.coarse.ground_M[part]).float()
            values_5M = torch.cat([over_3M, 1 / depth[None], stands[None]])
            maps.append(values_5M.unflatten(1, (view.camera.height // SCALE, -1)))
        return maps


def now_at(site: Site, scenery: Scenery, device: torch.device) -> tuple[Around, Tensor]:
    """What stands around a site, and what is in each pixel now ``[M]``. It is worked out once per site."""
    if scenery not in site.kept:
        pose_13 = site.pose_3[None].to(device, torch.float32)
        around = Around.of(site.layout, scenery, pose_13[0, :2])
        site.kept[scenery] = around, faces(around, pose_13, [site.frame])[0]
    kept: tuple[Around, Tensor] = site.kept[scenery]
    return kept


def look_up_in_layout(
    marked: Sequence[Tensor], around: Around, site: Site, poses_K3: Tensor, after: Sequence[int]
) -> Looked:
    """Look the pictures up where the layout says that things are.

    Args:
        marked: per camera its picture, whose last channel says what is there.
        after: for each pose the number of video frames after the newest one.
    """
    rig, frames = around.scenery.rig, [site.frame + each for each in after]
    drawn = draw(around, site.ahead(poses_K3).to(poses_K3), frames)
    points_3KM = Move.of(poses_K3).points(rig.views, rig.pixels, drawn.depth_KM)
    here = site.pose_3.to(poses_K3)
    cars = seen_from(here, site.layout.cars([site.frame, *frames]).to(here))
    _move_cars_back(rig, points_3KM, *drawn.cars, cars)
    values_4KM, met_KM = look(rig.views, rig.pixels, marked, points_3KM, nearest=1)
    seen_KM = ((values_4KM[-1] == drawn.what_KM) & met_KM).float()
    # Weights are 0 or 1, so this chooses; it is faster than a condition.
    colour_3KM = torch.lerp(drawn.colour_3KM, values_4KM[:-1], seen_KM)
    return Looked(colour_3KM, drawn.depth_KM, seen_KM, drawn.colour_3KM)


def _move_cars_back(rig: Rig, points_3KM: Tensor, place_Q: Tensor, car_Q: Tensor, cars_KC3: Tensor) -> None:
    """Move points on cars, with the cars, to where these are now.

    Args:
        place_Q, car_Q: the squares on cars, and the numbers of the cars, as in `Drawn.cars`.
        cars_KC3: poses of the cars in present coordinates; the first are the present ones.
    """
    squares = len(rig.fine_order_S)
    points_3SP = points_3KM.view(3, len(cars_KC3[1:]) * squares, -1)  # per square its pixels
    stops = place_Q.new_tensor([part.stop for part in rig.fine.parts])
    view_Q = torch.bucketize(place_Q % squares, stops, right=True)
    axes_33Q1, place_3Q1 = (
        torch.stack([getattr(each, name) for each in rig.views], -1)[..., view_Q, None]
        for name in ("axes_33", "place_3")
    )
    x, y, z = (axes_33Q1 * points_3SP.index_select(1, place_Q)[:, None]).sum(0) + place_3Q1
    then, now = cars_KC3[1 + place_Q // squares, car_Q].T[..., None], cars_KC3[0, car_Q].T[..., None]
    turn = now[2] - then[2]
    x, y = x - then[0], y - then[1]
    back = torch.stack([x * turn.cos() - y * turn.sin() + now[0], x * turn.sin() + y * turn.cos() + now[1], z])
    points_3SP.index_copy_(1, place_Q, (axes_33Q1 * (back - place_3Q1)).sum(1))


def _as_tokens(z_TZ: Tensor, patch: int) -> Tensor:
    """Latents in the order of tokens as tokens ``[N, P]``."""
    tokens: Tensor = z_TZ.unflatten(0, (-1, patch**2)).transpose(1, 2).flatten(1)
    return tokens


def _depths(rig: Rig, maps: Sequence[Tensor], move: Move) -> tuple[Tensor, Tensor]:
    """Depth that each camera will see, per pixel ``[K, M]``, and the pixels whose point is then behind the camera.

    The ego cannot have driven through a solid thing, so ground or sky is assumed at these points.
    """
    grid, count = rig.coarse, len(move.shift_K3)
    guess = torch.cat([1 / each[3].flatten() for each in maps]).expand(count, -1)
    for _ in range(_STEPS):
        met_5KM, found_KM = look(rig.views, grid, maps, move.points(rig.views, grid, guess))
        parts = zip(rig.views, grid.parts, strict=True)
        depth = torch.cat([move.depth(v, met_5KM[:3, :, p] / met_5KM[3, :, p]) for v, p in parts], 1)
        passed = found_KM & (depth < NEAR) & (met_5KM[4] > 0.5)
        depth = depth.masked_fill(passed, FAR).clamp(NEAR, FAR)
        guess = torch.minimum(torch.where(found_KM, depth, guess), grid.ground_M)
    fine, behind = [], []
    for view, part in zip(rig.views, grid.parts, strict=True):
        rows, columns = view.camera.height, view.camera.width
        near = (1 / guess[:, part]).unflatten(1, (rows // SCALE, -1))[:, None]
        fine.append(1 / F.interpolate(near, size=(rows, columns), mode="bilinear", align_corners=False).flatten(1))
        where = passed[:, part].unflatten(1, (rows // SCALE, -1))
        behind.append(where.repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2).flatten(1))
        fine[-1], behind[-1] = fine[-1][:, view.order_M], behind[-1][:, view.order_M]
    depth, ground = torch.cat(fine, 1), rig.pixels.ground_M
    # Whatever is about as far as the ground is the ground.
    return torch.where(depth > _GROUND * ground, ground, depth), torch.cat(behind, 1)
