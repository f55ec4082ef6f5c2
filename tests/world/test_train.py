from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from holdover.rollout.scenarios import shipped_clips
from holdover.world import train as training
from holdover.world.adversary import Discriminator
from holdover.world.clips import read_clip
from holdover.world.config import WorldConfig
from holdover.world.losses import error, hold_actions, rollout_loss
from holdover.world.recipe import Recipe
from holdover.world.segments import Batch, Segments
from holdover.world.train import read_log, train
from holdover.world.transformer import WorldModel

from .small import latents, small_config, small_model


class Sheet:
    """Stands in for recorded clips: one still picture, and a little noise that depends on where a segment starts."""

    def __init__(self, folder: Path, config: WorldConfig) -> None:
        self.config, self.clips = config, [folder]
        self.model = small_model()

    def read(self, clip: Path, start: int, latent_frames: int) -> Batch:
        still, noise = latents(self.model, 1), latents(self.model, latent_frames, seed=start + 1)
        return Batch((still + 0.1 * noise).clamp(-1, 1), torch.full((1, latent_frames, 2), 0.1))

    def sample(self, rng: np.random.Generator, batch: int, latent_frames: int) -> list[Batch]:
        return [self.read(Path(), int(rng.integers(3)), latent_frames)] * batch

    def batch(self, segments: list[Batch], device: str) -> Batch:
        return Batch(*map(torch.cat, zip(*(vars(segment).values() for segment in segments), strict=True)))


@pytest.fixture
def sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "Segments", Sheet)


RECIPE = Recipe(steps=8, batch=1, own_context_from=0.5, plain_share=0.4, warmup=2)


@pytest.mark.parametrize(
    ("loss", "recipe"), [("sequence_loss", RECIPE), ("rollout_loss", replace(RECIPE, adversary=1.0, rollout=2))]
)
@pytest.mark.usefixtures("sheet")
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, recipe: Recipe
) -> None:
    config = small_config(depth=2)
    whole = train(tmp_path, tmp_path / "whole", recipe, heldout=tmp_path, config=config, save_every=3)
    real = getattr(training, loss)
    calls = 0

    def power_cut(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(training, loss, power_cut)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, tmp_path / "cut", recipe, heldout=tmp_path, config=config, save_every=3)
    monkeypatch.setattr(training, loss, real)
    resumed = train(tmp_path, tmp_path / "cut", recipe, heldout=tmp_path, config=config, save_every=3)
    curves = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(p.parent)] for p in (whole, resumed)
    ]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 8
    assert whole.read_bytes() == resumed.read_bytes()
    with pytest.raises(ValueError, match="another folder"):
        train(tmp_path, tmp_path / "cut", Recipe(steps=9), config=config)


@pytest.mark.usefixtures("sheet")
def test_training_learns(tmp_path: Path) -> None:
    recipe = Recipe(steps=60, batch=1, plain_share=0.2, own_context_from=0.8, warmup=5, ema=0.9)
    path = train(tmp_path, tmp_path / "run", recipe, heldout=tmp_path, config=small_config(depth=2), save_every=20)
    log = list(read_log(path.parent))
    psnr = [line["heldout_psnr_db"][0] for line in log if "heldout_psnr_db" in line]
    blank = 10 * np.log10(4 / float(latents(small_model(), 1).clamp(-1, 1).square().mean()))  # of predicting nothing
    assert psnr[-1] > blank + 3
    assert isinstance(WorldModel.load(path), WorldModel)


@pytest.mark.usefixtures("sheet")
def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """A step of no size leaves a checkpoint's weights, and its sizes, as they were; a real one moves them."""
    model = small_model(depth=2)
    model.save(tmp_path / "start.safetensors")
    still = Recipe(steps=1, batch=1, muon_rate=0, adam_rate=0)
    path = train(tmp_path, tmp_path / "still", still, start_from=tmp_path / "start.safetensors")
    assert path.read_bytes() == (tmp_path / "start.safetensors").read_bytes()
    path = train(tmp_path, tmp_path / "moved", Recipe(steps=1, batch=1), start_from=path)
    assert WorldModel.load(path).config == model.sizes
    assert path.read_bytes() != (tmp_path / "start.safetensors").read_bytes()
    with pytest.raises(ValueError, match="brings its own sizes"):
        train(tmp_path, tmp_path / "two", still, start_from=path, config=model.sizes)


def test_the_gradient_of_a_rollout_without_an_adversary_is_the_regressions() -> None:
    """Of a "model" whose prediction is a parameter: the mean of its errors against the last windows."""
    model = small_model()
    config, recipe = model.sizes, Recipe(adversary=1.0)
    x = latents(model, config.context + 3 * config.window)
    batch = Batch(x, torch.zeros(1, x.shape[1], config.action_dims))
    guess = latents(model, config.window, seed=7).requires_grad_(True)
    graded = []

    def predict(noisy: torch.Tensor, *, sigma: float, write: bool = False, **_: object) -> torch.Tensor:
        if torch.is_grad_enabled() and not write:
            graded.append(sigma)
        return guess

    judge = Discriminator(config)
    surrogate, value, generated = rollout_loss(
        predict, model, batch, np.random.default_rng(3), recipe, judge, plain=False, weight=0.0
    )
    targets = x[:, config.context :].split(config.window, 1)[-recipe.graded :]
    assert len(graded) == len(targets) == 2
    expected = torch.stack([error(guess, t, s, recipe) for t, s in zip(targets, graded, strict=True)]).mean()
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(surrogate, guess)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, guess))
    assert torch.equal(generated, guess.detach().repeat(1, 3, 1, 1))


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
def test_segments_are_what_was_recorded(keep_bytes: int) -> None:
    """Of a shipped clip: pixels by hand from the decoded video, actions as commanded."""
    config = WorldConfig()
    segments = Segments(shipped_clips(), config, keep_bytes=keep_bytes)
    clip = read_clip(segments.clips[0])
    for start in (8, 40):
        parts = [segments.read(segments.clips[0], start, 2) for _ in range(2)]
        batch = segments.batch(parts, "cpu")
        assert batch.latents.shape == (2, 2, config.tokens, config.patch_values)
        corner = torch.from_numpy(clip.frames["front_wide"][start, :8, :8]).float() / 127.5 - 1
        torch.testing.assert_close(batch.latents[1, 0, 0, : 8 * 8 * 3], corner.flatten())
        torch.testing.assert_close(batch.actions[0, :, 0].numpy(), clip.actions[start : start + 8 : 4, 0])


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    recipe = Recipe(steps=100, warmup=10, decay=0.5)
    assert recipe.rate(0) == pytest.approx(0.1)
    assert recipe.rate(9) == recipe.rate(50) == 1
    assert recipe.rate(75) == pytest.approx(0.5)
    assert recipe.rate(99) == pytest.approx(0.02)


def test_frames_not_yet_commanded_hold_the_newest_action() -> None:
    actions = torch.arange(4.0).view(1, 4, 1)
    assert [hold_actions(actions, k).flatten().tolist() for k in range(4)] == [
        [0, 0, 0, 0],
        [0, 1, 1, 1],
        [0, 1, 2, 2],
        [0, 1, 2, 3],
    ]


def test_an_empty_folder_and_a_wrong_share_are_named(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"format": 1, "fps": 12, "cameras": []}))
    with pytest.raises(ValueError, match="holds no clips"):
        train(tmp_path, tmp_path / "run", Recipe(steps=1))
    with pytest.raises(ValueError, match=r"decay=1\.5"):
        Recipe(decay=1.5)
    with pytest.raises(ValueError, match="rollout=0"):
        Recipe(rollout=0)
    with pytest.raises(ValueError, match="adversary=-1"):
        Recipe(adversary=-1)
