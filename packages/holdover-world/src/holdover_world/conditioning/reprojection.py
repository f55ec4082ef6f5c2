"""What the ego will see if the world stands still: its newest pictures, warped to where it will be.

Actions say where the cameras will be, and depth says where everything is. So most of the next pictures can be looked up
in the newest ones, across cameras, before anything is generated. This is the 3D cache of Ren et al. (GEN3C, arXiv
2503.03751), one latent frame deep, and looked up from the future cameras instead of splatted. Without it a transformer
has to learn from examples how far a lane mark moves at which speed in each part of each camera. The transformer is left
with what moves by itself, what was hidden, and what no camera saw.

With a layout (`holdover_world.scene.layout`) distances are those of the layout, cars are looked up where they were, and
things that are hidden now count as unseen. Pixels that no camera saw get the layout's colours.

Shape suffixes: B batch, F latent frames, K video frames, M points, N tokens of one latent frame, P values of one token,
Z latent channels, Q values of a block of pixels, h, w squares of 8 by 8 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdover_world.codec.autoencoder import Autoencoder
from holdover_world.codec.latents import Codec, from_tokens, padded, to_tokens
from holdover_world.conditioning.drawn import Around, Drawn, draw
from holdover_world.conditioning.lookup import Expected
from holdover_world.conditioning.views import Move, View, look
from holdover_world.config import FRAMES, SCALE, Plane, WorldConfig
from holdover_world.scene.depth import FAR, NEAR, from_metres, to_metres
from holdover_world.scene.layout import Site
from holdover_world.scene.poses import seen_from

_STEPS = 2  # iterations that find the depth a camera will see
_GROUND = 0.75  # anything farther than this share of the way to the ground counts as the ground


class LinearPath(nn.Module):
    """The linear path of an autoencoder: from normalised latents to pixels by principal components, and back.

    Its directions are random until `take` copies those of an autoencoder.
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

    def newest(self, z_Zhw: Tensor) -> Tensor:
        """The last video frame of a latent frame, ``[colours, 8*h, 8*w]``."""
        rows = slice(-len(self.basis_QZ) // FRAMES, None)
        components = (z_Zhw.movedim(0, -1) * self.std_Z.float() + self.mean_Z.float()) * self.deviation_Z.float()
        pixels = components @ self.basis_QZ[rows].float().T + self.centre_Q[rows].float()
        return F.pixel_shuffle(pixels.movedim(-1, 0), SCALE)

    def latents(self, video_KCHW: Tensor) -> Tensor:
        """Latents ``[F, Z, h, w]`` of video, four frames each."""
        blocks = F.pixel_unshuffle(video_KCHW.unflatten(0, (-1, FRAMES)).flatten(1, 2), SCALE).movedim(1, -1)
        components = (blocks - self.centre_Q.float()) @ self.basis_QZ.float() / self.deviation_Z.float()
        return ((components - self.mean_Z.float()) / self.std_Z.float()).movedim(-1, 1)


class Reprojection(nn.Module):
    """Works out the next latent frames from the newest one, as if the world stood still."""

    def __init__(self, sizes: WorldConfig) -> None:
        super().__init__()
        self.sizes = sizes
        channels = {"colour": (3, sizes.latent_channels), "depth": (1, sizes.depth_channels)}
        self.paths = nn.ModuleDict({m: LinearPath(*channels[m]) for m in sizes.modalities})
        self._views: dict[torch.device, tuple[View, ...]] = {}

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
        after = [FRAMES * number + k + 1 for number in numbers for k in range(FRAMES)]
        rows = [
            self._row(last.float(), poses, site, after)
            for last, poses, site in zip(last_BNP, poses_BK3, sites or (None,) * len(last_BNP), strict=True)
        ]
        latents, seen, layouts = zip(*rows, strict=True)
        return Expected(torch.stack(latents), torch.stack(seen), torch.stack(layouts))

    def _row(
        self, last_NP: Tensor, poses_K3: Tensor, site: Site | None, after: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        views = self._views.get(last_NP.device)
        if views is None:
            ordered = [camera for group in self.sizes.groups for camera in group]
            views = self._views[last_NP.device] = tuple(View.of(camera, last_NP.device) for camera in ordered)
        pictures = [self._picture(last_NP, plane) for plane in self._planes("colour")]
        move = Move.of(poses_K3)
        if site is None:
            colours, depths, seen = self._still(last_NP, pictures, views, move)
            latents = self._tokens({"colour": colours, "depth": depths})
            return latents, self._share(seen), torch.zeros_like(latents)
        colours, depths, seen, drawn = look_up_in_layout(pictures, views, move, site, poses_K3, after)
        latents = self._tokens({"colour": colours, "depth": depths})
        layout = self._tokens({"colour": drawn, "depth": depths})
        return latents, self._share(seen), layout

    def _still(
        self, last_NP: Tensor, pictures: Sequence[Tensor], views: Sequence[View], move: Move
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per camera colour ``[3, K, M]``, metres ``[K, M]`` and what is seen ``[K, M]``, by the generated depth."""
        depths, passed = self._depths(last_NP, views, move)
        points = [move.points(view, view.pixels[0], depth) for view, depth in zip(views, depths, strict=True)]
        colours, seen = [], []
        looked = look(views, pictures, points)
        for picture, behind_KM, (values_CKM, met_KM) in zip(pictures, passed, looked, strict=True):
            found_KM = met_KM & ~behind_KM
            colours.append(torch.where(found_KM, values_CKM, picture.flatten(1)[:, None]))
            seen.append(found_KM)
        return colours, depths, seen

    def _tokens(self, shown: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """Colour ``[3, K, M]`` and metres ``[K, M]`` per camera as latents ``[F, N, P]``."""
        parts = []
        for modality in self.sizes.modalities:
            for plane, values in zip(self._planes(modality), shown[modality], strict=True):
                video = values if modality == "colour" else from_metres(values)[None]
                z = self._path(modality).latents(self._video(video, plane))
                parts.append(to_tokens(z[None], plane, self.sizes)[0])
        return torch.cat(parts, 1)

    def _share(self, seen: Sequence[Tensor]) -> Tensor:
        """The share of each token that is seen, ``[F, N, 1]``."""
        shares = []
        for modality in self.sizes.modalities:
            for plane, found_KM in zip(self._planes(modality), seen, strict=True):
                video = self._video(found_KM.float()[None], plane)
                share = F.avg_pool2d(video, SCALE * self.sizes.token_latents(modality))
                shares.append(share.unflatten(0, (-1, FRAMES)).mean(1).flatten(1)[..., None])
        return torch.cat(shares, 1)

    def _path(self, modality: str) -> LinearPath:
        path = self.paths[modality]
        assert isinstance(path, LinearPath)
        return path

    def _planes(self, modality: str) -> list[Plane]:
        return [plane for plane in self.sizes.planes if plane.modality == modality]

    def _picture(self, last_NP: Tensor, plane: Plane) -> Tensor:
        """The last picture of a plane, ``[colours, height, width]``."""
        z = from_tokens(last_NP[None, None], plane, self.sizes)[0, 0]
        return self._path(plane.modality).newest(z)[:, : plane.camera.height, : plane.camera.width]

    def _video(self, values_CKM: Tensor, plane: Plane) -> Tensor:
        """Values of pixels as pictures that whole tokens cover, ``[K, C, height, width]``."""
        return padded(values_CKM.movedim(1, 0).unflatten(-1, (plane.camera.height, -1)), plane, self.sizes)

    def _depths(self, last_NP: Tensor, views: Sequence[View], move: Move) -> tuple[list[Tensor], list[Tensor]]:
        """Depth that each camera will see, per pixel ``[K, M]``, and the pixels whose point is then behind the camera.

        The ego cannot have driven through a solid thing, so ground or sky is assumed at these points.
        """
        now = [view.squares[1] for view in views]
        if "depth" in self.paths:
            metres = [to_metres(self._picture(last_NP, plane)) for plane in self._planes("depth")]
            nearness = [F.avg_pool2d(1 / m, SCALE).flatten() for m in metres]
            now = [torch.minimum(1 / near, ground) for near, ground in zip(nearness, now, strict=True)]
        # Points divided by their distance, and the inverse distance, may be interpolated: planes stay planes.
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


def look_up_in_layout(
    pictures: Sequence[Tensor], views: Sequence[View], move: Move, site: Site, poses_K3: Tensor, after: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Per camera colour ``[3, K, M]``, metres ``[K, M]``, what is seen ``[K, M]``, and the layout's own colour."""
    frames = [site.frame, *(site.frame + each for each in after)]
    poses = torch.cat([site.pose_3[None], site.ahead(poses_K3)]).to(poses_K3)
    around = Around.of(site.layout, poses, frames)
    drawn = [draw(site.layout, view, around) for view in views]
    cars = seen_from(poses[0], site.layout.cars(frames).to(poses))
    marked, points = [], []
    for picture, view, each in zip(pictures, views, drawn, strict=True):
        marked.append(torch.cat([picture, each.what_KM[0].view(1, *picture.shape[1:]).float()]))
        still_3KM = move.points(view, view.pixels[0], each.depth_KM[1:])
        points.append(_where_cars_were(view, still_3KM, each, cars))
    colours, seen = [], []
    for each, (values_CKM, met_KM) in zip(drawn, look(views, marked, points, nearest=1), strict=True):
        seen.append(met_KM & (values_CKM[-1] == each.what_KM[1:]))
        colours.append(torch.where(seen[-1], values_CKM[:-1], each.colour_3KM[:, 1:]))
    return colours, [each.depth_KM[1:] for each in drawn], seen, [each.colour_3KM[:, 1:] for each in drawn]


def _where_cars_were(view: View, points_3KM: Tensor, drawn: Drawn, cars_KC3: Tensor) -> Tensor:
    """Points on cars, moved back with the cars to where these are now.

    Args:
        cars_KC3: poses of the cars in present coordinates; the first are the present ones.
    """
    on_3KM = points_3KM.clone()
    k, m = (drawn.car_KM[1:] >= 0).nonzero(as_tuple=True)
    car = drawn.car_KM[1:][k, m]
    x, y, z = view.axes_33.T @ on_3KM[:, k, m] + view.place_3[:, None]
    then, now = cars_KC3[1:][k, car].T, cars_KC3[0, car].T
    turn = now[2] - then[2]
    x, y = x - then[0], y - then[1]
    back = torch.stack([x * turn.cos() - y * turn.sin() + now[0], x * turn.sin() + y * turn.cos() + now[1], z])
    on_3KM[:, k, m] = view.axes_33 @ (back - view.place_3[:, None])
    return on_3KM


def _fine(view: View, depth_KM: Tensor) -> Tensor:
    """Depth of squares as depth of pixels. Whatever is about as far as the ground is the ground."""
    rows, columns = view.camera.height, view.camera.width
    near = (1 / depth_KM).unflatten(1, (rows // SCALE, -1))[:, None]
    depth = 1 / F.interpolate(near, size=(rows, columns), mode="bilinear", align_corners=False).flatten(1)
    return torch.where(depth > _GROUND * view.pixels[1], view.pixels[1], depth)


def _repeated(view: View, where_KM: Tensor) -> Tensor:
    """Values of squares as values of their pixels."""
    rows = where_KM.unflatten(1, (view.camera.height // SCALE, -1))
    return torch.repeat_interleave(rows.repeat_interleave(SCALE, 1), SCALE, 2).flatten(1)
