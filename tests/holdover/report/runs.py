"""A run's folder with a test pattern: the number of each frame is burnt into both halves of every picture."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdover.decision import Decision
from holdover.report.run_dir import ChunkRecord, Rollout
from holdover.report.run_write import write_rollout

FPS, FRAMES, PER_CHUNK = 12, 96, 4
BITS, BIT, TOP = 7, 8, 24  # bits of a number; in pixels the side of each bit's square, and where the squares begin
SIZES = {"front": (128, 64), "rear": (96, 48)}
#: The brightness of each rollout's ground, to tell them apart.
GROUND = {"full": 60, "xcache": 100, "other": 140}


def pattern(number: int, ground: int, width: int, height: int) -> NDArray[np.uint8]:
    """A picture whose halves each show a number as black and white squares, on a ground of its rollout's."""
    picture = np.full((height, width, 3), ground, np.uint8)
    for half in (0, width // 2):
        for bit in range(BITS):
            left = half + 4 + bit * BIT
            if left + BIT <= half + width // 2:
                picture[TOP : TOP + 2 * BIT, left : left + BIT] = 255 * (number >> bit & 1)
    return picture


def video(name: str) -> dict[str, NDArray[np.uint8]]:
    return {
        camera: np.stack([pattern(t, GROUND[name], *size) for t in range(FRAMES)]) for camera, size in SIZES.items()
    }


def decisions(seed: int, *, steps: int = 4, blocks: int = 6) -> list[Decision]:
    """Every kind of decision, with scores where a gate was asked; a KV update after each fourth chunk."""
    source, made = random.Random(seed), []

    def note(chunk: int, index: int, block: int, role: Any, reason: str, **scores: float) -> None:
        computed, sigma = reason != "reuse", 1 - index / steps
        made.append(
            Decision("default", "", chunk, index, f"blocks.{block}", block, role, computed, reason, scores, sigma)
        )

    for chunk in range(FRAMES // PER_CHUNK):
        for index in range(steps):
            for block in range(blocks):
                if chunk == 0 or chunk % 4 == 0:
                    note(chunk, index, block, "denoise", "warm-up" if chunk == 0 else "kv cycle")
                elif block == 0:
                    note(chunk, index, block, "denoise", "anchor")
                else:
                    cosine = source.uniform(0.9, 1)
                    reason = "cosine" if cosine < 0.95 else "reuse"
                    note(chunk, index, block, "denoise", reason, cosine=cosine, threshold=0.95, deviation=0.5)
        if chunk % 4 == 3:
            for block in range(blocks):
                note(chunk, 0, block, "kv_update", "kv update")
    return made


def write_run(folder: Path) -> Path:
    """Two scenarios: "first" with full compute and two policies, "second" with one."""
    full = video("full")
    for scenario, names in (("first", ("full", "xcache", "other")), ("second", ("full", "xcache"))):
        for number, name in enumerate(names):
            cached = name != "full"
            chunks = [
                ChunkRecord(
                    chunk=g,
                    frames=PER_CHUNK,
                    seconds=0.3 if cached else 0.5,
                    dit_seconds=0.2 if cached else 0.4,
                    bytes_held=min(g, 1) * 2**20 if cached else None,
                    action=(0.5, g / 100),
                )
                for g in range(FRAMES // PER_CHUNK)
            ]
            write_rollout(
                folder,
                Rollout(
                    scenario=scenario,
                    name=name,
                    fps=FPS,
                    policy=f"{name}()" if cached else None,
                    reference="full" if cached else None,
                    block_share=0.8 if cached else None,
                    figures=figures(name),
                    command="python run.py",
                    seed=3,
                    environment={"python": "3", "processor": "a processor"},
                    recorded=float(number + 10 * (scenario == "second")),
                ),
                full if name == "full" else video(name),
                chunks=chunks,
                decisions=decisions(number) if cached else (),
                reference=full if cached else None,
            )
    return folder


def figures(name: str) -> dict[str, Any]:
    views = {"psnr_db": 30.5, "ssim": 0.9, "lpips": None}
    return {
        "name": name,
        "policy": None if name == "full" else f"{name}()",
        "skip": 0.5,
        "speedup": 2.0,
        "speedup_bound": 2.5,
        "dit_ms_per_chunk": 200.0,
        "end_to_end_ms_per_chunk": 300.0,
        "bytes_held": 2**20,
        "stitched": views,
        "cameras": dict.fromkeys(SIZES, views),
        "reaction": {"brake": 0.1, "steer": 0.9},
        "reasons": {"reuse": 10, "cosine": 5},
    }
