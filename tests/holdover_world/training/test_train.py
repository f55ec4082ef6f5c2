"""Training the world model: what a step minimises, by hand; segments of recordings; runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from holdover_world.codec.autoencoder import DECODING, Autoencoder
from holdover_world.codec.checkpoints import read_network
from holdover_world.codec.latents import Codec
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.clips import open_dataset, read_clip
from holdover_world.scene.depth import from_metres
from holdover_world.training import segments as segmenting
from holdover_world.training import train as training
from holdover_world.training.losses import LEAST_SIGMA, error, hold_actions, sequence_loss
from holdover_world.training.recipe import Recipe
from holdover_world.training.segments import Batch, Segments, clips_of_length, codec_digest
from holdover_world.training.train import train
from holdover_world.training.train_autoencoder import AutoencoderSchedule, normalise, train_autoencoder
from holdover_world.training.trainer import read_log
from tests.holdover_world.small import (
    CAMERAS,
    latents,
    small_codec,
    small_config,
    small_layout,
    small_model,
    write_clip,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"
RECIPE = Recipe(steps=6, batch=2, own_context_from=0.5, plain_share=0.4, warmup=2)


def test_frames_not_yet_commanded_hold_the_newest_action() -> None:
    actions = torch.arange(4.0).view(1, 4, 1)
    assert [hold_actions(actions, k).flatten().tolist() for k in range(4)] == [
        [0, 0, 0, 0],
        [0, 1, 1, 1],
        [0, 1, 2, 2],
        [0, 1, 2, 3],
    ]


def test_the_error_is_one_of_velocities() -> None:
    """A velocity is (noisy - clean) / sigma, so an error of 0.2 at sigma 0.5 is one of 0.4."""
    recipe, target = Recipe(l1=0.5), torch.randn(2, 1, 3, 4)
    off = torch.tensor([0.2, -0.2])[:, None, None, None]
    value = error(target + off, target, torch.tensor([0.5, 0.8]), recipe)
    assert value.item() == pytest.approx((0.4**2 + 0.25**2) / 2 + 0.5 * (0.4 + 0.25) / 2, rel=1e-4)
    value = error(target + off, target, torch.zeros(2), replace(recipe, l1=0.0))
    assert value.item() == pytest.approx((0.2 / LEAST_SIGMA) ** 2, rel=1e-4)


class Spy:
    """A "model" whose prediction is a parameter; keeps the passes it is asked for."""

    def __init__(self) -> None:
        self.guess = torch.full((1,), 0.3, requires_grad=True)
        self.passes: list[dict[str, Any]] = []

    def __call__(self, x: Tensor, *, write: bool = False, **given: Any) -> Tensor:
        self.passes.append({"x": x, "write": write, "graded": torch.is_grad_enabled(), **given})
        return self.guess.expand_as(x).clone()

    def take(self, *, write: bool, graded: bool) -> list[dict[str, Any]]:
        return [each for each in self.passes if each["write"] == write and each["graded"] == graded]


def spied(recipe: Recipe, frames: int, *, plain: bool = False, own: bool = False) -> tuple[Spy, Batch, Tensor]:
    model, spy = small_model(), Spy()
    batch = Batch(latents(model, frames, batch=3), torch.rand(3, frames, 2))
    loss = sequence_loss(spy, model, batch, np.random.default_rng(1), recipe, plain=plain, own=own)
    return spy, batch, loss


@pytest.mark.parametrize(("plain", "chunk", "targets"), [(False, 2, 3), (True, 1, 6)])
def test_every_chunk_past_the_context_is_a_target(plain: bool, chunk: int, targets: int) -> None:
    spy, batch, loss = spied(Recipe(context_noise=0.0, unconditional_share=0.0), 10, plain=plain)
    chunks = batch.latents.split(chunk, 1)
    noisy = spy.take(write=False, graded=True)
    assert len(noisy) == targets
    errors, actions = [], batch.actions.split(chunk, 1)[-targets:]
    for each, clean, commanded in zip(noisy, chunks[-targets:], actions, strict=True):
        sigma = each["sigma"]
        assert sigma.shape == (3,)
        assert len(set(sigma.tolist())) == 3  # every row has a level of its own
        noise = (each["x"] - (1 - sigma[:, None, None, None]) * clean) / sigma[:, None, None, None]
        assert noise.std().item() == pytest.approx(1, abs=0.1)
        assert abs(noise.mean().item()) < 0.15
        assert any(torch.equal(each["action_BFA"], hold_actions(commanded, k)) for k in range(chunk))
        errors.append(error(spy.guess.expand_as(clean), clean, sigma, Recipe()))
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    # Clean passes write all but the last; the first ones are not learned from.
    written = [each for each in spy.passes if each["write"]]
    assert all(torch.equal(each["x"], clean) for each, clean in zip(written, chunks[:-1], strict=True))
    assert all(each["sigma"] == 0 for each in written)
    assert [each["graded"] for each in written] == [False] * (4 // chunk) + [True] * (targets - 1)


def test_a_few_step_model_is_trained_at_the_samplers_levels() -> None:
    recipe = Recipe(levels=3, unconditional_share=1.0)
    spy, _, _ = spied(recipe, 24)
    levels = [set(each["sigma"].tolist()) for each in spy.take(write=False, graded=True)]
    assert all(len(level) == 1 for level in levels)
    assert {round(*level, 6) for level in levels} == {1.0, round(10 / 11, 6), round(5 / 7, 6)}
    assert all(each["action_BFA"] is None for each in spy.take(write=False, graded=True))
    assert not any(each["action_BFA"] is None for each in spy.passes if each["write"])


def test_contexts_may_be_the_models_own() -> None:
    spy, batch, loss = spied(Recipe(context_noise=0.0, unconditional_share=0.0), 10, own=True)
    written = [each["x"] for each in spy.passes if each["write"]]
    recorded = batch.latents.split(2, 1)
    assert all(torch.equal(a, b) for a, b in zip(written[:2], recorded[:2], strict=True))
    assert all((each == 0.3).all() for each in written[2:])  # what it said
    assert len(written) == 4
    assert len(spy.take(write=False, graded=False)) >= 2 * 4  # two windows, sampled in four steps each
    targets = zip(spy.take(write=False, graded=True), recorded[2:], strict=True)
    errors = [error(spy.guess.expand_as(clean), clean, each["sigma"], Recipe()) for each, clean in targets]
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_contexts_are_noised_a_little() -> None:
    spy, batch, _ = spied(Recipe(context_noise=0.5), 10)
    written = [each["x"] for each in spy.passes if each["write"]]
    shares = [(x - clean).std().item() for x, clean in zip(written, batch.latents.split(2, 1)[:-1], strict=True)]
    assert 0 < min(shares) < max(shares) < 0.55


def test_segments_are_what_was_recorded(tmp_path: Path) -> None:
    """Latents of the decoded video, actions as commanded; a rest of less than a latent frame is left out."""
    paths = [write_clip(tmp_path, seed, 42) for seed in (0, 1)]
    codec = small_codec(small_config())
    segments = Segments(paths, codec)
    batch = segments.batch([(0, 3), (1, 0)], 5, "cpu")
    assert batch.latents.dtype == torch.float32
    for row, (path, start) in enumerate(zip(paths, (12, 0), strict=True)):
        clip = read_clip(path, depth=True, start=start, frames=20)
        expected = codec.encode(clip.frames, clip.depth)[0]
        torch.testing.assert_close(batch.latents[row], expected, atol=0.02, rtol=0.02)  # kept in bfloat16
        np.testing.assert_allclose(batch.actions[row].numpy(), clip.actions[::4], atol=1e-6)
    drawn = [each for n in range(60) for each in segments.sample(np.random.default_rng(n), 2, 8)]
    assert set(drawn) == {(clip, first) for clip in range(2) for first in range(3)}


def test_clips_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, codec = write_clip(tmp_path, 0, 8), small_codec(small_config())
    encoded, encode = [], segmenting._encode
    monkeypatch.setattr(segmenting, "_encode", lambda *given: encoded.append(given[0]) or encode(*given))
    first = Segments([path], codec).clips[0].latents
    assert torch.equal(Segments([path], codec).clips[0].latents, first)
    assert encoded == [path]
    Segments([path], small_codec(small_config(), seed=1))  # by other autoencoders
    assert encoded == [path] * 2
    write_clip(tmp_path, 0, 16)  # recorded anew
    assert Segments([path], codec).clips[0].latents.shape[1] == 4
    assert encoded == [path] * 3
    assert not list(tmp_path.rglob("*.partial"))


def test_two_processes_may_encode_the_same_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, codec = write_clip(tmp_path, 0, 8), small_codec(small_config())
    save_file = segmenting.save_file

    def overtaken(tensors: Any, file: Path) -> None:
        save_file(tensors, file)
        monkeypatch.undo()
        monkeypatch.setattr(segmenting.os, "getpid", lambda: -1)
        Segments([path], codec)

    monkeypatch.setattr(segmenting, "save_file", overtaken)
    assert Segments([path], codec).clips[0].latents.shape[1] == 2
    assert not list(tmp_path.rglob("*.partial"))


def test_autoencoders_are_told_apart_as_they_are_saved(tmp_path: Path) -> None:
    codec = small_codec(small_config())
    codec.save(tmp_path)
    assert codec_digest(Codec.load(tmp_path, codec.sizes)) == codec_digest(codec)
    alone = small_config(depth_channels=0)
    assert codec_digest(Codec(alone, codec.autoencoders)) == codec_digest(Codec.load(tmp_path, alone))
    assert codec_digest(small_codec(codec.sizes, seed=1)) != codec_digest(codec)


def test_clips_that_are_missing_or_lack_depth_are_named(tmp_path: Path) -> None:
    codec = small_codec(small_config())
    open_dataset(tmp_path, CAMERAS)
    with pytest.raises(ValueError, match="holds no clips; record some with `holdover world record"):
        clips_of_length(tmp_path, 1)
    path = write_clip(tmp_path, 0, 8, depth=False)
    with pytest.raises(FileNotFoundError, match=r"front_wide\.depth\.mkv is missing"):
        Segments([path], codec)
    assert Segments([path], small_codec(small_config(depth_channels=0))).clips[0].latents.shape == (1, 2, 13, 16)


@pytest.mark.parametrize(
    ("changes", "student", "needed"),
    [
        ({"own_context_from": 0.5}, False, 4 + 4 * 2),  # the context, and windows
        ({"own_context_from": 0.9}, False, 4 + 2 * 2),  # of true contexts only
        ({"levels": 2, "windows": 3}, True, 4 + 3 * 2),
    ],
)
def test_clips_that_are_too_short_are_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], student: bool, needed: int
) -> None:
    model, recipe, given = small_model(layers=2), Recipe(steps=6, batch=1, **changes), {}
    monkeypatch.setattr(training, "fit", lambda *_, **rest: given.update(rest))
    model.save(tmp_path / "teacher")
    rest: dict[str, Any] = {"codec": model.codec, "teacher": tmp_path / "teacher" if student else None}
    long, short = write_clip(tmp_path / "long", 0, 4 * needed), write_clip(tmp_path / "short", 7, 4 * needed - 1)
    held, cut = write_clip(tmp_path / "held", 0, 72), write_clip(tmp_path / "cut", 5, 71)
    with pytest.raises(ValueError, match=f"urban-000007 has {4 * needed - 1} frames, {4 * needed} are needed: record"):
        train(short.parent, tmp_path / "out", recipe, **rest)
    with pytest.raises(ValueError, match="urban-000005 has 71 frames, 72 are needed: record"):
        train(long.parent, tmp_path / "out", recipe, heldout=cut.parent, **rest)
    assert not list(tmp_path.rglob(".latents"))
    train(long.parent, tmp_path / "out", recipe, heldout=held.parent, **rest)
    drawn = [given["plan"](step, np.random.default_rng(n)) for step in range(6) for n in range(20)]
    assert max(plan.frames for plan in drawn) == needed
    assert len(given["validate"](model)["heldout"]) == 2


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips"), 0, 80).parent


def test_a_killed_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = small_codec(small_config(layers=2))
    whole = train(clips, tmp_path / "whole", RECIPE, codec=codec, heldout=clips, save_every=2)
    real, calls = training.sequence_loss, 0

    def power_cut(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(training, "sequence_loss", power_cut)
    with pytest.raises(KeyboardInterrupt):
        train(clips, tmp_path / "cut", RECIPE, codec=codec, heldout=clips, save_every=2)
    resumed = train(clips, tmp_path / "cut", RECIPE, codec=codec, heldout=clips, save_every=2)
    curves = [[{k: v for k, v in line.items() if k != "seconds"} for line in read_log(p)] for p in (whole, resumed)]
    assert curves[0] == curves[1]
    assert [line["own"] for line in curves[0]] == [False] * 3 + [True] * 3
    assert {line["plain"] for line in curves[0]} == {True, False}
    assert (whole / WEIGHTS).read_bytes() == (resumed / WEIGHTS).read_bytes()
    for changes, named in (
        ({"recipe": replace(RECIPE, l1=2.0)}, "l1=0.5, not 2.0: use the same, or another folder"),
        ({"codec": small_codec(small_config())}, "layers=2, not 4:"),
        ({"codec": small_codec(small_config(layers=2), seed=1)}, "autoencoders and cameras="),
        ({"start_from": whole}, "start=None, not "),
    ):
        with pytest.raises(ValueError, match=f"cut was trained with {named}"):
            train(clips, tmp_path / "cut", **{"recipe": RECIPE, "codec": codec, **changes})


def test_training_learns(tmp_path: Path) -> None:
    clips = write_clip(tmp_path / "clips", 0, 80, drives=False).parent  # stripes do not move as the world would
    recipe = Recipe(steps=40, batch=2, plain_share=0.2, own_context_from=0.9, warmup=5, ema=0.8)
    codec, recording = small_codec(small_config(layers=2)), read_clip(clips / "urban-000000", depth=True)
    assert recording.depth is not None
    depth = {name: from_metres(torch.from_numpy(metres))[..., None].numpy() for name, metres in recording.depth.items()}
    for modality, pictures in (("colour", recording.frames), ("depth", depth)):
        autoencoder = codec.autoencoders[modality]
        videos = (torch.from_numpy(video).float().movedim(-1, 1)[None] for video in pictures.values())
        blocks = torch.cat([autoencoder.blocks(v / 127.5 - 1 if modality == "colour" else v) for v in videos])
        autoencoder.take_principal_components(blocks)
        normalise(autoencoder, [pictures])
    folder = train(clips, tmp_path / "model", recipe, codec=codec, heldout=clips, save_every=5)
    curve = [line["heldout"][0] for line in read_log(folder) if "heldout" in line]
    assert len(curve) == 8
    assert curve[-1] < 0.7 * curve[0]
    model = WorldModel.load(folder)
    assert model.sizes == codec.sizes
    assert set(model.codec.autoencoders) == {"colour", "depth"}


def test_training_goes_on_from_a_checkpoint(tmp_path: Path, clips: Path) -> None:
    """A step of no size leaves a checkpoint's weights, or a teacher's, as they were; a real one moves them."""
    model, start = small_model(layers=2), tmp_path / "start"
    model.save(start)
    still = Recipe(steps=1, batch=1, muon_rate=0, adam_rate=0)
    begun = (start / WEIGHTS).read_bytes()
    folder = train(clips, tmp_path / "still", still, codec=model.codec, start_from=start)
    assert (folder / WEIGHTS).read_bytes() == begun
    few = replace(still, levels=2, teacher_steps=1)
    folder = train(clips, tmp_path / "student", few, codec=model.codec, teacher=start)
    assert (folder / WEIGHTS).read_bytes() == begun
    folder = train(clips, tmp_path / "moved", Recipe(steps=1, batch=1), codec=model.codec, start_from=start)
    moved = (folder / WEIGHTS).read_bytes()
    assert moved != begun
    folder = train(clips, tmp_path / "other student", few, codec=model.codec, teacher=start, start_from=folder)
    assert (folder / WEIGHTS).read_bytes() == moved
    with pytest.raises(ValueError, match=r"start has WorldConfig.*, not WorldConfig"):
        train(clips, tmp_path / "other", still, codec=small_codec(small_config()), start_from=start)
    with pytest.raises(ValueError, match="start was trained with other autoencoders; use those in its own folder"):
        train(clips, tmp_path / "other", still, codec=small_codec(model.sizes, seed=1), start_from=start)
    with pytest.raises(ValueError, match="levels=0: a student has few"):
        train(clips, tmp_path / "other", still, codec=model.codec, teacher=start)
    with pytest.raises(ValueError, match="levels=0: a student has few"):
        train(clips, tmp_path / "other", replace(still, recorded=True), codec=model.codec)
    with pytest.raises(
        ValueError, match=r"steady=0\.5: a rollout that goes straight on was not recorded; give a teacher"
    ):
        train(clips, tmp_path / "other", replace(still, steady=0.5), codec=model.codec, start_from=start)


def test_segments_stand_where_they_were_recorded(tmp_path: Path) -> None:
    """In their clip's layout, if it has one; a batch may do without."""
    clips, model = [write_clip(tmp_path / "clips", seed, 48) for seed in range(2)], small_model()
    small_layout().save(clips[1])
    batch = Segments(clips, model.codec).batch([(0, 1), (1, 3)], 5, "cpu")
    assert batch.starts == (4, 12)
    history = model.new_history()
    history.commit(batch.latents[:, :2], None)
    batch.without_layout().stand(history, 2)
    assert history.sites == ()
    batch.stand(history, 2)
    assert history.sites[0] is None
    site = history.sites[1]
    assert site is not None
    assert site.frame == 12 + 2 * 4 - 1
    assert site.pose_3.tolist() == [19, 0, 0]  # `write_clip` goes a metre a frame
    (clips[1] / "layout.npz").unlink()
    assert Segments(clips, model.codec).batch([(1, 3)], 5, "cpu").tracks == ()


def test_a_torch_that_cannot_train_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ImportError, match=r"torch.optim.Muon: pip install 'torch>=2.9'"):
        train(tmp_path / "none", tmp_path, RECIPE, codec=small_codec(small_config()))
    with pytest.raises(ImportError, match=r"torch.optim.Muon: pip install 'torch>=2.9'"):
        train_autoencoder(tmp_path / "none", tmp_path, AutoencoderSchedule())


def test_a_decoder_can_be_trained_alone(tmp_path: Path) -> None:
    """Latents stay what they were, to the bit; pictures do not, and get nearer to what was recorded."""
    clips = [write_clip(tmp_path / "clips", seed, 48) for seed in range(2)]
    sizes = {"widths": (8, 16), "latent_channels": 4, "encoder_blocks": 1, "decoder_blocks": 1}
    first = train_autoencoder(clips[0].parent, tmp_path / "first", AutoencoderSchedule(steps=2, batch=1), config=sizes)
    schedule = AutoencoderSchedule(steps=12, batch=2, warmup=1, ema=0.5)
    further = train_autoencoder(clips[0].parent, tmp_path / "further", schedule, start_from=first)
    before, after = (read_network(Autoencoder, folder, torch.float32) for folder in (first, further))
    moved = {n for n, value in before.state_dict().items() if not torch.equal(after.state_dict()[n], value)}
    assert moved
    assert all(name.startswith(DECODING) for name in moved)
    video = torch.from_numpy(read_clip(clips[1]).frames["front_wide"]).permute(0, 3, 1, 2)[None].float() / 127.5 - 1
    z = before.encode(video)
    assert torch.equal(after.encode(video), z)
    errors = [(model.decode(z) - video).square().mean().item() for model in (before, after)]
    assert errors[1] < 0.95 * errors[0]
    with pytest.raises(ValueError, match="is for a new autoencoder"):
        train_autoencoder(clips[0].parent, tmp_path / "no", schedule, start_from=first, config=sizes)
    deeper = {"decoder_blocks": 2}
    train_autoencoder(clips[0].parent, tmp_path / "deeper", schedule, start_from=first, config=deeper)
    deep = read_network(Autoencoder, tmp_path / "deeper", torch.float32)
    assert torch.equal(deep.encode(video), z)
    assert len(deep.decoder) == len(before.decoder) + 2
    assert (deep.decode(z) - video).square().mean() < 0.95 * errors[0]
    depth = small_codec(small_config())
    one, other = replace_colour(depth, before), replace_colour(depth, after)
    assert codec_digest(one) == codec_digest(other) != codec_digest(depth)


def replace_colour(codec: Codec, colour: Autoencoder) -> Codec:
    return Codec(codec.sizes, {**codec.autoencoders, "colour": colour})


@pytest.mark.parametrize(
    "changes",
    [
        {"without_layout": 1.5},
        {"plain_share": 1.5},
        {"unconditional_share": -0.1},
        {"teacher_steps": 0},
        {"windows": 0},
        {"teacher_guidance": 0.5},
        {"learned": -1},
        {"agreement": -1.0},
        {"steady": 1.5},
    ],
)
def test_impossible_recipes_are_refused(changes: dict[str, Any]) -> None:
    [(name, value)] = changes.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Recipe(**changes)
