"""The recipes: each size has every stage, and stages fit together."""

from __future__ import annotations

import torch

from holdover_world.codec.autoencoder import Autoencoder
from holdover_world.config import CONFIGS
from holdover_world.training.recipes import AUTOENCODERS, RECIPES


def test_every_size_has_the_same_stages() -> None:
    assert {tuple(stages) for stages in RECIPES.values()} == {("teacher", "long", "student", "roads", "agree")}
    assert {tuple(stages) for stages in AUTOENCODERS.values()} == {("colour", "depth", "decoder")}
    assert RECIPES.keys() == AUTOENCODERS.keys() <= CONFIGS.keys()


def test_autoencoders_fit_their_world_models() -> None:
    for size, stages in AUTOENCODERS.items():
        with torch.device("meta"):
            colour, depth = (Autoencoder(**stages[modality].config).config for modality in ("colour", "depth"))
        assert colour.latent_channels == CONFIGS[size].latent_channels
        assert depth.latent_channels == CONFIGS[size].depth_channels
        assert stages["decoder"].config["decoder_blocks"] > colour.decoder_blocks


def test_students_take_four_steps_and_teachers_any() -> None:
    for stages in RECIPES.values():
        assert {name: recipe.levels for name, recipe in stages.items()} == {
            "teacher": 0,
            "long": 0,
            "student": 4,
            "roads": 4,
            "agree": 4,
        }
