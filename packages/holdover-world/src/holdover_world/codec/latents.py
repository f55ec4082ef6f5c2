"""Video to tokens and back: the pictures of a rig through the autoencoders, and their latents as tokens.

Shape suffixes: B batch, F latent frames, T video frames, N tokens of one latent frame, P values of one token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from holdover_world.codec.autoencoder import Autoencoder
from holdover_world.codec.checkpoints import read_network, write_network
from holdover_world.config import FRAMES, SCALE, Plane, WorldConfig
from holdover_world.runtime import fast_dtype
from holdover_world.scene.depth import from_metres, to_metres

Colour = Mapping[str, NDArray[np.uint8]]
Depth = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Codec:
    """The autoencoders of one world model, one per modality of ``sizes``, and the layout of their latents as tokens."""

    sizes: WorldConfig
    autoencoders: Mapping[str, Autoencoder]

    def __post_init__(self) -> None:
        channels = {"colour": self.sizes.latent_channels, "depth": self.sizes.depth_channels}
        for modality in self.sizes.modalities:
            if modality not in self.autoencoders:
                raise ValueError(f"no autoencoder of {modality} was given: give one, or sizes without {modality}")
            own = len(self.autoencoders[modality].deviation_Z)
            if own != channels[modality]:
                raise ValueError(
                    f"the autoencoder of {modality} has {own} latent channels, the model takes {channels[modality]}: "
                    "give another autoencoder, or sizes with as many channels"
                )

    def __deepcopy__(self, _: dict[int, object]) -> Codec:
        """Itself. Nothing changes it, so copies of a model share it."""
        return self

    @classmethod
    def load(cls, folder: Path, sizes: WorldConfig, *, dtype: torch.dtype | None = None) -> Codec:
        """Read the autoencoders of a model: those in its folder, or those of its teacher, one folder up.

        Args:
            dtype: of the weights; by default the one the CPU is fast in (`fast_dtype`).

        Raises:
            ValueError: an autoencoder is missing, of another version or size, or its training was interrupted.
        """
        autoencoders = {}
        for modality in sizes.modalities:
            own = folder / modality
            if not own.is_dir() and (folder.parent / "config.json").is_file():
                own = folder.parent / modality
            if not own.is_dir():
                raise ValueError(f"no autoencoder of {modality} in {folder}: give another folder, or train one")
            autoencoders[modality] = read_network(Autoencoder, own, dtype or fast_dtype())
            if autoencoders[modality].std_Z.isnan().any():
                raise ValueError(f"training of {own} was interrupted; run it again to finish it")
        return cls(sizes, autoencoders)

    def save(self, folder: Path) -> None:
        for modality, autoencoder in self.autoencoders.items():
            write_network(autoencoder, folder / modality)

    @torch.inference_mode()
    def encode(self, frames: Colour, depth: Depth | None = None, *, at_once: int = 1) -> Tensor:
        """Turn video into latents.

        Args:
            frames: per camera ``uint8 [T, height, width, 3]``, T a multiple of 4.
            depth: per camera ``float32 [T, height, width]`` in metres, for a model with depth.
            at_once: latent frames encoded together (see `Autoencoder.encode`).

        Returns:
            ``float32 [1, F, N, P]``, on the autoencoders' device.
        """
        if self.sizes.depth_channels and depth is None:
            raise ValueError("this world model has depth; give the depth of the frames as well")
        parts = []
        for plane in self.sizes.planes:
            name = plane.camera.name
            source = frames if plane.modality == "colour" else depth
            if source is None or name not in source:
                raise ValueError(f"camera {name!r} has no {plane.modality}; give it beside {sorted(source or ())}")
            video = torch.from_numpy(np.ascontiguousarray(source[name]))
            size, own = (video.shape[2], video.shape[1]), (plane.camera.width, plane.camera.height)
            if size != own:
                raise ValueError(
                    f"{plane.modality} of {name} is {size[0]}x{size[1]}, the model's {own[0]}x{own[1]}; "
                    "give clips of the cameras that it was trained on"
                )
            if len(video) % FRAMES:
                raise ValueError(f"{len(video)} frames of {name} are not a multiple of {FRAMES}")
            if plane.modality == "colour":
                x = video.permute(0, 3, 1, 2).float() / 127.5 - 1
            else:
                x = from_metres(video)[:, None]
            autoencoder = self.autoencoders[plane.modality]
            z = autoencoder.encode(padded(x, plane, self.sizes)[None].to(autoencoder.device), at_once=at_once)
            parts.append(to_tokens(z, plane, self.sizes))
        return torch.cat(parts, 2)

    def decode(self, latents_BFNP: Tensor, before_BNP: Tensor | None = None) -> dict[str, NDArray[np.uint8]]:
        """The colour of latents: per camera ``uint8 [B, T, height, width, 3]``.

        Args:
            before_BNP: the latent frame that was shown before them; None at the beginning of a video.
        """
        return {
            name: ((x.movedim(2, -1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
            for name, x in self.pictures("colour", latents_BFNP, before_BNP).items()
        }

    def decode_depth(self, latents_BFNP: Tensor, before_BNP: Tensor | None = None) -> dict[str, NDArray[np.float32]]:
        """The depth of latents in metres: per camera ``float32 [B, T, height, width]``."""
        return {
            name: to_metres(x[:, :, 0].cpu()).numpy()
            for name, x in self.pictures("depth", latents_BFNP, before_BNP).items()
        }

    @torch.inference_mode()
    def pictures(self, modality: str, latents_BFNP: Tensor, before_BNP: Tensor | None = None) -> dict[str, Tensor]:
        """The pictures of one modality: per camera ``float32 [B, T, colours, height, width]``, nominally in [-1, 1]."""
        if modality not in self.autoencoders:
            raise ValueError(f"this world model has no {modality}, only {', '.join(self.autoencoders)}")
        autoencoder = self.autoencoders[modality]
        found = {}
        for group in self.sizes.groups:
            planes = [plane for plane in self.sizes.planes if plane.camera in group and plane.modality == modality]
            z = torch.cat([from_tokens(latents_BFNP, plane, self.sizes) for plane in planes])
            before = None
            if before_BNP is not None:
                before = torch.cat([from_tokens(before_BNP[:, None], plane, self.sizes)[:, 0] for plane in planes])
            videos = autoencoder.decode(z, before).float().chunk(len(planes))
            for plane, video in zip(planes, videos, strict=True):
                found[plane.camera.name] = video[..., : plane.camera.height, : plane.camera.width]
        return {
            plane.camera.name: found[plane.camera.name] for plane in self.sizes.planes if plane.modality == modality
        }


def padded(x_TCHW: Tensor, plane: Plane, sizes: WorldConfig) -> Tensor:
    """Pictures enlarged at the right and lower edges, so that whole tokens cover them."""
    size = SCALE * sizes.token_latents(plane.modality)
    right, below = plane.columns * size - plane.camera.width, plane.rows * size - plane.camera.height
    return F.pad(x_TCHW, (0, right, 0, below), mode="replicate") if right or below else x_TCHW


def to_tokens(z_BFZhw: Tensor, plane: Plane, sizes: WorldConfig) -> Tensor:
    """The latents of a plane as its tokens ``[B, F, n, P]``."""
    p = sizes.token_latents(plane.modality)
    x = z_BFZhw.unflatten(-1, (plane.columns, p)).unflatten(3, (plane.rows, p))
    tokens: Tensor = x.permute(0, 1, 3, 5, 2, 4, 6).flatten(2, 3).flatten(3)
    return tokens


def from_tokens(x_BFNP: Tensor, plane: Plane, sizes: WorldConfig) -> Tensor:
    """The latents of a plane from the tokens of all planes: the reverse of `to_tokens`."""
    p = sizes.token_latents(plane.modality)
    x = x_BFNP[:, :, plane.tokens].unflatten(-1, (-1, p, p)).unflatten(2, (plane.rows, plane.columns))
    latents: Tensor = x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4)
    return latents
