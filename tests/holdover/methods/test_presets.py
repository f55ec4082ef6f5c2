"""Presets: options under which a method equals code that its authors released. tests/holdover/released replays them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdover
from holdover.methods.parts.tokens import TokenLayout
from holdover.methods.registry import method, presets
from holdover.report.methods import method_help
from tests.holdover.methods.test_parts import call

#: Without these a method cannot be made.
NEEDED = {"magcache": {"ratios": {"cond": (1.0,), "uncond": (1.0,)}}}

ALL = [(name, preset) for name in holdover.policies() for preset in presets(name)]


@pytest.mark.parametrize(("name", "preset"), ALL)
def test_a_preset_is_options_of_its_method(name: str, preset: str) -> None:
    options, needed = dict(presets(name)[preset]), NEEDED.get(name, {})
    assert options.keys() <= inspect.signature(method(name)).parameters.keys()
    made = holdover.policy(name, preset=preset, **needed)
    assert made == method(name)(**options, **needed) != method(name)(**needed)
    assert f"\n    {preset}: " in method_help(name)


def test_the_presets() -> None:
    assert {name: list(presets(name)) for name in holdover.policies() if presets(name)} == {
        "dicache": ["wan", "hunyuan", "flux"],
        "easycache": ["released", "released-wan"],
        "flowcache": ["released"],
        "magcache": ["released-wan"],
        "taylorseer": ["released-wan", "released-hunyuan", "released-flux"],
        "teacache": [
            "hunyuan",
            *("cogvideox-2b", "cogvideox-5b"),
            *("wan-t2v-1.3b", "wan-t2v-14b", "wan-i2v-480p", "wan-i2v-720p"),
            *("wan-t2v-1.3b-retained", "wan-t2v-14b-retained", "wan-i2v-480p-retained", "wan-i2v-720p-retained"),
        ],
        "worldcache_htc": ["aether", "aether-code", "voyager", "voyager-code"],
        "worldcache_pcd": ["released", "released-code", "released-wan"],
    }


def test_options_take_the_place_of_the_presets() -> None:
    made = holdover.policy("worldcache_pcd", preset="released", threshold=0.02, branches=())
    assert (
        made.trigger
        == holdover.policy(
            "worldcache_pcd",
            threshold=0.02,
            saliency="deviation",
            beta_s=1.0,
            beta_d="code",
        ).trigger
    )


@pytest.mark.parametrize(
    ("name", "preset", "message"),
    [
        ("worldcache_pcd", "relesed", "no preset 'relesed'; did you mean 'released'.*; its presets are: released, "),
        ("worldcache_htc", "wan", "worldcache_htc has no preset 'wan'; its presets are: aether, aether-code, voyager"),
        ("never", "released", "never has no preset 'released'; its presets are: none"),
        ("nver", "released", "there is no policy 'nver'; did you mean 'never'"),
    ],
)
def test_unknown_presets_are_refused(name: str, preset: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        holdover.policy(name, preset=preset)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dicache", {"branches": ("a", "a")}, r"branches=\('a', 'a'\): give different names"),
        ("dicache", {"branches": (1,)}, r"branches=\(1,\): give different names"),
        ("dicache", {"retain": (0.2, -1)}, r"retain=\(0.2, -1\): give a whole number of first steps, or a share"),
        ("dicache", {"gamma": (2.0, 1.0)}, r"gamma=\(2.0, 1.0\) is not a range"),
        ("worldcache_pcd", {"saliency": "edges"}, "saliency='edges' is not one of 'variance', 'deviation'"),
        ("easycache", {"size_of": "first"}, "size_of='first' is not one of 'latest', 'computed'"),
        ("easycache", {"level": "sublayer"}, "level='sublayer' is not one of 'block', 'model'"),
        ("teacache", {"of": "input"}, "of='input' is not one of 'modulated', 'time embedding', 'time projection'"),
        ("taylorseer", {"span": "half"}, "span='half' is not one of 'all', 'block', 'sublayer', 'model'"),
        ("worldcache_htc", {"channels": 0}, "channels=0: give the axis of the channels, such as 1; 0 is the batch"),
        ("worldcache_htc", {"patch": (1, 0)}, r"patch=\(1, 0\): give whole numbers, 1 or more"),
        ("worldcache_htc", {"modality_channels": (16, -1)}, r"modality_channels=\(16, -1\): give whole numbers"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        holdover.policy(name, **options)


# The axes of an output, for WorldCache-HTC.


@pytest.mark.parametrize(
    ("layout", "shape", "tokens"),
    [
        (TokenLayout(), (2, 6, 5), (2, 6, 5)),
        (TokenLayout(), (6, 5), (1, 6, 5)),
        (TokenLayout(channels=1, patch=(1, 2, 2)), (2, 8, 3, 4, 6), (2, 18, 32)),
        (TokenLayout(channels=2), (1, 3, 8, 4, 6), (1, 72, 8)),
        (TokenLayout(channels=-1), (1, 3, 4, 6, 8), (1, 72, 8)),
        (TokenLayout(channels=2, modalities=(3, 3, 5)), (2, 2, 11, 2, 3), (2, 36, 5)),
        (TokenLayout(channels=1, patch=(2, 1), modalities=(1, 3)), (1, 4, 6, 5), (1, 30, 6)),
    ],
)
def test_tokens_are_put_back_where_they_were(
    layout: TokenLayout, shape: tuple[int, ...], tokens: tuple[int, ...]
) -> None:
    y = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    split = layout.split(y)
    assert split.shape == tokens
    assert torch.equal(layout.join(split, y.shape), y)
    torch.testing.assert_close(split.square().sum(), y.square().sum())


def test_a_token_has_the_channels_of_its_place_and_modality() -> None:
    y = torch.arange(2 * 5 * 2 * 2.0).reshape(1, 2, 5, 2, 2)  # frames, channels, rows, columns
    tokens = TokenLayout(channels=2, modalities=(2, 3)).split(y)
    assert torch.equal(tokens[0, 0], torch.tensor([*y[0, 0, :2, 0, 0], 0.0]))
    assert torch.equal(tokens[0, 7], torch.tensor([*y[0, 1, :2, 1, 1], 0.0]))
    assert torch.equal(tokens[0, 8], y[0, 0, 2:, 0, 0])
    assert torch.equal(tokens[0, 15], y[0, 1, 2:, 1, 1])


class Latents(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"the output is \[1, 8, 3, 4, 6\]: which axis holds its channels\? Give channels=1 for \[B, C, F, H, W\]"),
        ({"channels": 5}, r"channels=5 is no axis of the output \[1, 8, 3, 4, 6\]"),
        ({"channels": -5}, r"channels=-5 is no axis of the output \[1, 8, 3, 4, 6\], whose first is the batch"),
        ({"channels": 1, "patch": (2, 2)}, r"patch=\(2, 2\) does not divide the axes \[3, 4, 6\]"),
        ({"channels": 1, "patch": (2, 2, 2)}, r"patch=\(2, 2, 2\) does not divide the axes \[3, 4, 6\]"),
        ({"channels": 1, "modality_channels": (4, 5)}, r"are 9 channels, the output \[1, 8, 3, 4, 6\] has 8"),
    ],
)
def test_an_output_of_unknown_layout_is_refused(options: dict[str, Any], message: str) -> None:
    with (
        holdover.attach(Latents(), holdover.policy("worldcache_htc", **options)) as cache,
        cache.step(chunk=0, num_steps=20),
        pytest.raises(ValueError, match=message),
    ):
        cache._runtimes[0].blocks[0].module(torch.ones(1, 8, 3, 4, 6))


def test_eta_follows_the_share_of_chaotic_tokens() -> None:
    def eta(**options: Any) -> float:
        return holdover.policy("worldcache_htc", **options).trigger.eta  # type: ignore[attr-defined, no-any-return]

    assert eta() == 0.5
    assert eta(chaotic=0.8) == pytest.approx(1.0)
    assert eta(chaotic=0.8, drift_reduction="all") == 0.2
    assert eta(chaotic=0.8, eta=3.0) == 3.0
    assert eta(chaotic=1.0) == float("inf")


def test_the_factor_of_ats_counts_guided_passes_twice() -> None:
    def threshold(index: int, branch: str, **options: Any) -> float:
        trigger = holdover.policy("worldcache_pcd", preset="released", threshold=1.0, cfc=False, **options).trigger
        told = call(index=index, num_steps=35)
        told.step = holdover.Step(chunk=0, index=index, num_steps=35, branch=branch)
        return trigger.judge(told, {"change": 0.0, "motion": 0.0}).scores["threshold"]

    assert threshold(7, "cond") == pytest.approx(1 + 5 * 14 / 70)
    assert threshold(7, "uncond") == pytest.approx(1 + 5 * 15 / 70)
    assert threshold(7, "", branches=()) == pytest.approx(1 + 4 * 7 / 35)
    assert threshold(7, "uncond", beta_d=4.0) == pytest.approx(1 + 4 * 15 / 70)
