"""The stages of training as data, by size and name. `lab/speedrun.sh` runs them one after the other.

The numbers of `small` come from the stages that the shipped checkpoint went through. `tiny` takes a quarter of its
steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from holdover_world.training.recipe import Recipe
from holdover_world.training.train_autoencoder import AutoencoderSchedule


class AutoencoderRecipe(NamedTuple):
    """How to train an autoencoder, and the arguments of `Autoencoder`."""

    schedule: AutoencoderSchedule
    config: Mapping[str, Any]


_DECODER = AutoencoderSchedule(
    steps=2400, muon_rate=0.005, adam_rate=0.0003, decay=0.95, ema=0.98, warmup=60, squared=12.0, seed=5
)
_SMALL_AUTOENCODERS = {
    "colour": AutoencoderRecipe(AutoencoderSchedule(), {}),
    "depth": AutoencoderRecipe(AutoencoderSchedule(steps=800), {"latent_channels": 12, "widths": (64, 128)}),
    # The decoder of colour alone, deeper.
    "decoder": AutoencoderRecipe(_DECODER, {"decoder_blocks": 6}),
}
_STUDENT = Recipe(batch=1, levels=4, windows=8, warmup=10, ema=0.97)
_SMALL = {
    # Flow matching on recorded contexts; the last fifth of the steps on contexts of its own.
    "teacher": Recipe(),
    # Longer rollouts on contexts of its own.
    "long": Recipe(
        steps=100, batch=1, windows=12, own_context_from=0, muon_rate=0.006, adam_rate=0.00035, warmup=8, decay=0.7,
        ema=0.96, seed=6,
    ),
    # The teacher, distilled into four steps.
    "student": replace(
        _STUDENT, steps=150, muon_rate=0.005, adam_rate=0.0003, decay=0.8, seed=1, teacher_steps=6, teacher_guidance=1.5
    ),
    # The student learns from recordings, in their layouts.
    "roads": replace(
        _STUDENT, steps=760, windows=3, recorded=True, muon_rate=0.006, adam_rate=0.0005, decay=0.6, seed=31
    ),
    # Chunks of a cycle learn to agree, and steady driving is added. The student is its own teacher.
    "agree": replace(
        _STUDENT, steps=160, windows=10, recorded=True, learned=2, agreement=8.0, steady=0.3, teacher_steps=1,
        muon_rate=0.003, adam_rate=0.00025, warmup=5, decay=0.85, ema=0.95, seed=23,
    ),
}  # fmt: skip

#: By size and stage.
AUTOENCODERS: Mapping[str, Mapping[str, AutoencoderRecipe]] = {
    "small": _SMALL_AUTOENCODERS,
    "tiny": {
        "colour": AutoencoderRecipe(AutoencoderSchedule(steps=375), {"widths": (32, 64), "decoder_blocks": 2}),
        "depth": AutoencoderRecipe(
            AutoencoderSchedule(steps=200), {"latent_channels": 12, "widths": (16, 32), "decoder_blocks": 2}
        ),
        "decoder": AutoencoderRecipe(replace(_DECODER, steps=600), {"decoder_blocks": 3}),
    },
}
#: By size and stage.
RECIPES: Mapping[str, Mapping[str, Recipe]] = {
    "small": _SMALL,
    "tiny": {name: replace(recipe, steps=recipe.steps // 4) for name, recipe in _SMALL.items()},
}
