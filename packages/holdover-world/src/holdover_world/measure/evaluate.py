"""Evaluation of a world model against the simulator: fidelity, drift, response to actions, agreement of cameras."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.progress import Progress

from holdover.report.environment import environment
from holdover.report.fidelity import psnr
from holdover.report.tables import markdown
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import LoopConfig
from holdover_world.measure.cards import about, write_card
from holdover_world.measure.fidelity import FAR, compare, depth_errors
from holdover_world.measure.motion import agreement, camera_ahead, train_motion_reader, true_motion
from holdover_world.measure.plots import plot_pictures
from holdover_world.measure.stlpips import StLpips
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.cameras import FPS, Camera, camera_rays
from holdover_world.scene.clips import Clip, list_clips, read_clip, read_track

#: Seconds from the start at which a drive is compared with the simulator, over the last `EVERY` frames before each.
HORIZONS = (0.5, 1.0, 2.0, 4.0)
#: The spans, in seconds, over which the Fréchet distance is computed.
SPANS = ((0, 2), (2, 5), (5, 10), (10, 16), (16, 22))
#: Slow comparisons use every n-th frame.
EVERY = 4
#: Training steps of the network that reads motion, by default.
READER_STEPS = 1600
#: Two cameras are compared if the second sees at least this share of the first one's pixels.
OVERLAP = 0.1

Video = Mapping[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class Drive:
    """The video that a model generated under a clip's actions, and the video of the simulator."""

    scenario: str
    made: Video
    depth: Mapping[str, NDArray[np.float32]] | None
    clip: Clip  # begins with the first generated frame


def drive_clip(model: WorldModel, path: Path, loop: LoopConfig, *, seed: int, chunks: int) -> Drive:
    """Start with a clip's first two windows and drive its actions, in full compute."""
    sizes, codec = model.sizes, model.codec
    per, start = sizes.frames_per_latent, 2 * sizes.window
    clip = read_clip(path, cameras=[camera.name for camera in sizes.cameras], depth="depth" in sizes.modalities)
    first = start * per
    before = {name: video[:first] for name, video in clip.frames.items()}
    latents = codec.encode(before, clip.depth and {name: video[:first] for name, video in clip.depth.items()})
    whole = min(len(clip.actions) // per, start + chunks)
    actions = torch.from_numpy(clip.actions[: whole * per]).float().unflatten(0, (-1, per)).mean(1).to(latents.device)
    running = ClosedLoop(model, latents, actions[None, :start], config=loop, seed=seed, track=read_track(path))
    pieces = list(running.run(actions[start:]))
    made = _joined([codec.decode(piece.latents, piece.before) for piece in pieces])
    depth = _joined([codec.decode_depth(piece.latents, piece.before) for piece in pieces]) if clip.depth else None
    part = slice(first, whole * per)
    follows = Clip(
        scenario=clip.scenario,
        seed=clip.seed,
        frames={name: video[part] for name, video in clip.frames.items()},
        depth=clip.depth and {name: video[part] for name, video in clip.depth.items()},
        actions=clip.actions[part],
        poses=clip.poses[part],
        motion=clip.motion[part],
    )
    return Drive(clip.scenario, made, depth, follows)


def reconstruct(model: WorldModel, clip: Clip) -> dict[str, NDArray[np.uint8]]:
    """A clip encoded and decoded: the best video that a model can generate."""
    latents = model.codec.encode(clip.frames, clip.depth, at_once=model.sizes.window)
    return {name: video[0] for name, video in model.codec.decode(latents).items()}


def _joined(pieces: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """The pieces of a batch of one row, joined to one video per camera."""
    return {name: np.concatenate([piece[name][0] for piece in pieces]) for name in pieces[0]}


def run_evaluation(
    model: WorldModel,
    out: Path,
    *,
    clips: Path,
    data: Path,
    steps: int = LoopConfig.steps,
    guidance: float = 1.0,
    per_scenario: int = 2,
    chunks: int = 66,
    reader_steps: int = READER_STEPS,
    seed: int = 0,
    progress: Progress,
) -> dict[str, Any]:
    """Evaluate a world model in full compute. Writes a card as Markdown and JSON (`card_name`), and crops of pictures.

    Args:
        clips: held-out recordings, each at least two windows and ``chunks`` chunks long.
        data: other recordings, on which the network that reads motion is trained.
        steps: denoising steps per chunk. With more than four the sampler is Euler's.
        guidance: guidance on the action, see `LoopConfig`.
        per_scenario: the number of clips per scenario.
        chunks: the number of chunks per clip, at most.
        reader_steps: training steps of the network that reads motion.

    Raises:
        ValueError: there are no clips.
    """
    chosen = _choose(clips, per_scenario)
    # In full compute this rule commits what is shown, as in sessions.
    loop = replace(LoopConfig.of_steps(steps), commit="last_full", guidance=guidance)
    task = progress.add_task("evaluating", total=len(chosen) + reader_steps)
    drives = []
    for path in chosen:
        progress.update(task, description=f"evaluating: {path.name}")
        drives.append(drive_clip(model, path, loop, seed=seed, chunks=chunks))
        progress.advance(task)
    progress.update(task, description="evaluating: training the reader of motion")
    ahead = camera_ahead(model.sizes.cameras)
    reader = train_motion_reader(
        [read_clip(path, cameras=[ahead]) for path in list_clips(data)],
        ahead,
        steps=reader_steps,
        seed=seed,
        advance=lambda: progress.advance(task),
    )
    true = np.concatenate([true_motion(r.clip) for r in drives])
    read = {
        "generated": np.concatenate([reader.motion(r.made) for r in drives]),
        "simulator": np.concatenate([reader.motion(r.clip.frames) for r in drives]),
    }
    distance = StLpips()
    decoded = [reconstruct(model, r.clip) for r in drives]
    figures: dict[str, Any] = {
        "steps": steps,
        "guidance": guidance,
        "clips": [path.name for path in chosen],
        "reconstruction_psnr_db": _reconstruction(drives, decoded),
        "horizons": {f"{seconds:g}": _fidelity(drives, seconds, distance) for seconds in HORIZONS},
        "depth": {f"{seconds:g}": _depth(drives, seconds) for seconds in HORIZONS} if drives[0].depth else None,
        "frechet": _drift(drives, distance),
        "action": {
            source: {"speed": agreement(m[:, 0], true[:, 0]), "yaw_rate": agreement(m[:, 1], true[:, 1])}
            for source, m in read.items()
        },
        "cross_view": cross_view(drives, model.sizes.cameras),
        "environment": environment(model),
    }
    name = card_name(steps, guidance)
    plot_pictures(out / f"{name}-crops.png", _crops(drives, decoded, ahead))
    write_card(out, name, card(figures), figures)
    return figures


def _choose(clips: Path, per_scenario: int) -> list[Path]:
    found = list_clips(clips)
    kinds = sorted({path.name.rsplit("-", 1)[0] for path in found})
    chosen = [path for kind in kinds for path in [p for p in found if p.name.startswith(f"{kind}-")][:per_scenario]]
    if not chosen:
        raise ValueError(f"{clips} holds no clips; record some with `holdover world record --out {clips}`")
    return chosen


def _reconstruction(drives: Sequence[Drive], decoded: Sequence[Video]) -> float:
    """PSNR in dB of the decoded clips, over all cameras and clips."""
    errors = [
        np.square(video.astype(np.float32) - r.clip.frames[name]).ravel()
        for r, videos in zip(drives, decoded, strict=True)
        for name, video in videos.items()
    ]
    return psnr(np.concatenate(errors))


def _crops(drives: Sequence[Drive], decoded: Sequence[Video], camera: str) -> dict[str, dict[str, Any]]:
    """For each scenario the middle of a camera's picture after one second: recorded, decoded and generated."""
    rows: dict[str, dict[str, Any]] = {}
    for r, videos in zip(drives, decoded, strict=True):
        frame = min(FPS, len(r.made[camera]), len(videos[camera])) - 1
        height, width = r.made[camera].shape[1:3]
        part = slice(height // 4, height), slice(width // 4, width - width // 4)
        titles = {"recorded": r.clip.frames, "encoded and decoded": videos, "generated": r.made}
        rows.setdefault(r.scenario, {title: video[camera][frame][part] for title, video in titles.items()})
    return rows


def _before(seconds: float) -> slice:
    return slice(round(seconds * FPS) - EVERY, round(seconds * FPS))


def _fidelity(drives: Sequence[Drive], seconds: float, distance: StLpips) -> dict[str, float]:
    frames = _before(seconds)
    parts = [
        compare(
            {n: v[frames] for n, v in r.made.items()},
            {n: v[frames] for n, v in r.clip.frames.items()},
            every=EVERY // 2,
            distance=distance,
        )
        for r in drives
    ]
    return {
        "psnr_db": psnr(np.concatenate([p.errors["stitched"] for p in parts])),
        "ssim": fmean(p.ssim["stitched"] for p in parts),
        "lpips": fmean(p.lpips["stitched"] for p in parts),
    }


def _depth(drives: Sequence[Drive], seconds: float) -> dict[str, float | None]:
    """The errors of depth over all cameras."""
    made, true = (
        np.concatenate([video[_before(seconds)].ravel() for depth in some if depth for video in depth.values()])
        for some in ([r.depth for r in drives], [r.clip.depth for r in drives])
    )
    return depth_errors(made, true)


def _drift(drives: Sequence[Drive], distance: StLpips) -> list[dict[str, Any]]:
    """For each span the Fréchet distance between the generated and the simulator's pictures, and between two halves of
    the simulator's."""
    rows = []
    for begin, end in SPANS:
        part = slice(begin * FPS, end * FPS, EVERY)
        made = _embed([r.made for r in drives], part, distance)
        true = _embed([r.clip.frames for r in drives], part, distance)
        if len(made):
            rows.append(
                {
                    "seconds": [begin, end],
                    "pictures": len(made),
                    "frechet": frechet(made, true),
                    "simulator": frechet(true[::2], true[1::2]),
                }
            )
    return rows


def _embed(videos: Sequence[Video], part: slice, distance: StLpips) -> NDArray[np.float64]:
    found = [distance.embedding(view[part]) for video in videos for view in video.values() if len(view[part])]
    return np.concatenate(found) if found else np.zeros((0, 256))


def frechet(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Fréchet distance of two sets of features ``[N, C]``, taken as Gaussian (FID, Heusel et al., arXiv 1706.08500)."""
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    # The trace of the square root of a product of covariances. Its eigenvalues are real and positive, up to rounding.
    root = np.sqrt(np.linalg.eigvals(a @ b).real.clip(min=0)).sum()
    return float(np.square(first.mean(0) - second.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * root)


def cross_view(drives: Sequence[Drive], cameras: Sequence[Camera]) -> list[dict[str, Any]]:
    """PSNR in dB between neighbouring cameras in the region that both see, for generated and simulated video.

    Pixels are matched by direction, as if everything were far away. Near things do not match, in the simulator either,
    if two cameras stand apart.
    """
    rows = []
    for one, other in combinations(cameras, 2):
        where = matching_pixels(one, other)
        seen = np.isfinite(where[..., 0])
        if seen.mean() < OVERLAP:
            continue
        row: dict[str, Any] = {"cameras": [one.name, other.name], "share": float(seen.mean())}
        for source in ("generated", "simulator"):
            videos = [r.made if source == "generated" else r.clip.frames for r in drives]
            errors = [_mismatch(video[one.name][::EVERY], video[other.name][::EVERY], where, seen) for video in videos]
            row[source] = psnr(np.array(errors))
        rows.append(row)
    return rows


def _mismatch(
    one: NDArray[np.uint8], other: NDArray[np.uint8], where: NDArray[np.float64], seen: NDArray[np.bool_]
) -> float:
    """Mean squared difference of two cameras over the pixels that both see; ``where`` maps ``one`` to ``other``."""
    grid = torch.from_numpy(np.nan_to_num(where)).float().expand(len(other), -1, -1, -1)
    looked = F.grid_sample(torch.from_numpy(other).permute(0, 3, 1, 2).float(), grid, align_corners=False)
    return float(np.square(looked.permute(0, 2, 3, 1).double().numpy() - one)[:, seen].mean())


def card_name(steps: int, guidance: float) -> str:
    """The name of an evaluation's files: ``world``, plus steps and guidance if they are not the default."""
    few, unguided = steps == LoopConfig.steps, guidance == 1
    return "world" + ("" if few else f"-{steps}") + ("" if unguided else f"-guided-{guidance:g}")


def matching_pixels(one: Camera, other: Camera) -> NDArray[np.float64]:
    """For each pixel of ``one``, where ``other`` sees the same direction: ``[H, W, 2]``, NaN if it does not.

    The values are column and row in the coordinates of `torch.nn.functional.grid_sample`: -1 and 1 are the borders.
    """
    x, y, z = np.moveaxis(camera_rays(one), -1, 0)
    yaw, pitch = np.radians(other.yaw), np.radians(other.pitch)
    ahead, left = x * np.cos(yaw) + y * np.sin(yaw), y * np.cos(yaw) - x * np.sin(yaw)
    forward, up = ahead * np.cos(pitch) - z * np.sin(pitch), ahead * np.sin(pitch) + z * np.cos(pitch)
    reach = np.tan(np.radians(other.fov) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        where = np.stack([-left / forward, -up / forward * other.width / other.height], -1) / reach
    # Less than half a pixel from the border, interpolation would mix in pixels from outside.
    inside = (np.abs(where) <= 1 - 1 / np.array([other.width, other.height])).all(-1) & (forward > 0)
    return np.where(inside[..., None], where, np.nan)


def card(figures: dict[str, Any]) -> str:
    """The card of an evaluation, in Markdown."""
    horizons = [
        (f"{seconds} s", f"{row['psnr_db']:.1f}", f"{row['ssim']:.3f}", f"{row['lpips']:.3f}")
        for seconds, row in figures["horizons"].items()
    ]
    depth = [
        (f"{seconds} s", _number(row["abs_rel"], 3), _number(row["within_1.25"], 3))
        for seconds, row in (figures["depth"] or {}).items()
    ]
    drift = [
        (f"{a}–{b} s", str(row["pictures"]), f"{row['frechet']:.2g}", f"{row['simulator']:.2g}")
        for row in figures["frechet"]
        for a, b in [row["seconds"]]
    ]
    action = [
        (quantity, *(_number(figures["action"][s][key][n]) for s in ("generated", "simulator") for n in _AGREEMENT))
        for quantity, key in (("speed", "speed"), ("yaw rate", "yaw_rate"))
    ]
    views = [
        (
            " and ".join(row["cameras"]),
            f"{100 * row['share']:.0f} %",
            f"{row['generated']:.1f}",
            f"{row['simulator']:.1f}",
        )
        for row in figures["cross_view"]
    ]
    return f"""# The world model against the simulator

Full compute, the shown pictures committed, {figures["steps"]} steps per chunk, guidance {figures["guidance"]:g}.
Actions of held-out clips: {", ".join(figures["clips"])}.

Recordings encoded and decoded have a PSNR of {figures["reconstruction_psnr_db"]:.1f} dB over all cameras. The middle of
the camera ahead after one second:

![recorded, encoded and decoded, generated]({card_name(figures["steps"], figures["guidance"])}-crops.png)

Fidelity over time, stitched view:

{markdown(("after", "PSNR, dB", "SSIM", "ST-LPIPS"), horizons)}
Depth nearer than {FAR:g} m, all cameras: mean relative error, and share of pixels within a factor of 1.25 of the truth:

{markdown(("after", "AbsRel", "within 1.25"), depth) if depth else "This model has no depth."}
Drift: Fréchet distance between generated and simulated pictures of the same seconds, and between two halves of the
simulated ones. Features are the mean features of ST-LPIPS's AlexNet, all cameras:

{markdown(("seconds", "pictures", "Fréchet distance", "within the simulator"), drift)}
Response to actions: a network reads speed and yaw rate from the camera ahead. They are compared with the true motion
of the simulator. The network is trained on simulated pictures and calibrated with others:

{markdown(("what", "correlation", "slope", "simulator: correlation", "slope"), action)}
Agreement of neighbouring cameras in the region that both see, PSNR in dB of pixels matched by direction:

{markdown(("cameras", "of the first", "generated", "simulator"), views)}
{about(figures["environment"])}
"""


_AGREEMENT = ("correlation", "slope")


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
