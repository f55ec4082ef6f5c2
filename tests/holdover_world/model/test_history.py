"""What the world model remembers of a video: one history, its forks, its rows, its file, and several as a batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from holdover_world.conditioning.lookup import Expected
from holdover_world.conditioning.motion import drive
from holdover_world.config import FRAMES
from holdover_world.model.history import WorldHistory
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.layout import Track
from tests.holdover_world.small import latents, small_layout, small_model

ACTION = torch.tensor([[[0.4, 0.3], [0.1, -0.2]], [[0.2, 0.0], [0.2, 0.1]]])


def track() -> Track:
    poses = torch.arange(60).view(20, 3).double() / 10
    return Track(small_layout(), poses, torch.tensor([[8.0, 0.02]]).repeat(20, 1))


def written(model: WorldModel, windows: int, *, rows: int = 1, history: WorldHistory | None = None) -> WorldHistory:
    history = history or model.new_history()
    for n in range(windows):
        x = latents(model, 2, seed=n, batch=rows)
        model(x, sigma=0.0, action_BFA=ACTION[:rows], history=history, write=True)
    return history


def from_file(model: WorldModel, history: WorldHistory) -> WorldHistory:
    again = model.new_history()
    again.load_state_dict(load(save({name: t.contiguous() for name, t in history.state_dict().items()})))
    return again


def predicted(model: WorldModel, history: WorldHistory) -> Tensor:
    rows = 1 if history.last is None else len(history.last)
    x = latents(model, 2, seed=9, batch=rows)
    return model(x, sigma=0.5, action_BFA=ACTION[:rows].flip(1), history=history)


def test_a_pass_that_fails_changes_nothing() -> None:
    model = small_model()
    history = written(model, 3)
    twin, before = history.fork(), predicted(model, history)
    handle = model.blocks[-1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("lost power")))
    with pytest.raises(RuntimeError, match="lost power"):
        written(model, 1, history=history)
    handle.remove()
    assert torch.equal(predicted(model, history), before)
    written(model, 1, history=history)
    assert not torch.equal(predicted(model, history), before)
    assert torch.equal(predicted(model, twin), before)


@pytest.mark.parametrize("located", [False, True])
def test_it_is_forked_written_and_read_whole(located: bool) -> None:
    """Also when other actions were carried out than the frames show."""
    model = small_model()
    history = written(model, 1)
    if located:
        history.follow(track())
    shown = latents(model, 2, seed=1)
    model(shown, sigma=0.0, action_BFA=ACTION[:1], done_BFA=ACTION[1:], history=history, write=True)
    expected = predicted(model, history)
    again = from_file(model, history)
    assert again.nbytes == history.nbytes > history.kv.nbytes
    for twin in (again, history.fork(), history.take([0])):
        assert torch.equal(predicted(model, twin), expected)
    other = written(model, 1)
    if located:
        other.follow(track())
    model(shown, sigma=0.0, action_BFA=ACTION[:1], history=other, write=True)
    assert not torch.equal(predicted(model, other), expected)


def test_rows_are_taken() -> None:
    model = small_model()
    both = written(model, 2, rows=2)
    both.stand([track(), None], [7, 0])
    x, action = latents(model, 2, seed=9, batch=2), ACTION.flip(1)
    expected = model(x, sigma=0.5, action_BFA=action, history=both)
    for row in range(2):
        alone = model(x[[row]], sigma=0.5, action_BFA=action[[row]], history=both.take([row]))
        torch.testing.assert_close(alone, expected[[row]], atol=1e-5, rtol=1e-5)


def test_it_moves_through_its_layout_row_by_row() -> None:
    model, recording = small_model(), track()
    history = written(model, 1, rows=2)
    assert history.sites == ()
    history.stand([recording, None], [7, 0])
    place = history.sites[0]
    assert place is not None
    assert history.sites[1] is None
    assert (place.frame, place.pose_3.tolist()) == (7, recording.poses_T3[7].tolist())
    before = history.ego.motion_B2
    written(model, 1, rows=2, history=history)
    x, y, yaw = drive(before, ACTION)[0][0, -1].double()
    cos, sin = place.pose_3[2].cos(), place.pose_3[2].sin()
    moved = history.sites[0]
    assert moved is not None
    assert moved.frame == 7 + 2 * FRAMES
    expected = torch.stack([x * cos - y * sin, x * sin + y * cos, yaw])
    torch.testing.assert_close(moved.pose_3 - place.pose_3, expected)
    for twin in (history.fork(), from_file(model, history), history.take([0, 1])):
        assert twin.sites[1] is None
        assert twin.sites[0] is not None
        assert torch.equal(twin.sites[0].pose_3, moved.pose_3)
    history.stand([recording, recording], [7, 9])
    assert torch.equal(history.ego.motion_B2, recording.motion_T2[[7, 9]])


def test_it_follows_a_recording_from_its_beginning() -> None:
    model, recording = small_model(), track()
    history = written(model, 2, rows=2)
    history.follow(recording)
    assert [site and site.frame for site in history.sites] == [4 * FRAMES - 1] * 2
    assert torch.equal(history.ego.motion_B2, recording.motion_T2[[15, 15]])


def test_what_is_expected_is_forgotten_with_every_new_frame() -> None:
    model, asked = small_model(), list[int]()

    def expect(last: Tensor, poses: Tensor, sites: object, frames: Sequence[int]) -> Expected:
        asked.append(poses.shape[1])
        return model.reprojection(last, poses, None, frames)

    history = written(model, 1)
    later = torch.cat([ACTION[:1, :1], ACTION[1:, 1:]], 1)
    for action in (ACTION[:1], ACTION[:1], later):
        history.expect(action, expect)
    assert asked == [2 * FRAMES, FRAMES]  # all frames, none, and those from the new action on
    found, fresh = history.expect(later, expect), history.fork()
    fresh.stand([None], [0])  # which forgets as well
    for each, again in zip(found, fresh.expect(later, expect), strict=True):
        torch.testing.assert_close(each, again)
    written(model, 1, history=history)
    history.expect(later, expect)
    assert asked[2:] == [2 * FRAMES, 2 * FRAMES]


def test_a_batch_expects_what_each_of_its_videos_expects() -> None:
    model = small_model()
    located, elsewhere = written(model, 1), written(model, 2)
    written(model, 1, history=located)
    located.follow(track())
    batch = model.stack([located, elsewhere])
    found = batch.expect(ACTION, model.reprojection)
    for row, history in enumerate((located, elsewhere)):
        own = history.fork().expect(ACTION[[row]], model.reprojection)
        for each, expected in zip(found, own, strict=True):
            torch.testing.assert_close(each[[row]], expected)
    assert not found.layout_BFNP[1].any()
    assert torch.equal(batch.last, torch.cat([located.last, elsewhere.last]))  # type: ignore[list-item]


def test_what_is_expected_is_embedded_once_for_the_passes_of_a_chunk() -> None:
    model, calls = small_model(), list[int]()
    model.last_embed[0].register_forward_hook(lambda *_: calls.append(1))
    history, x = written(model, 2), latents(model, 2)
    action, other = ACTION[:1].clone(), ACTION[1:].clone()
    calls.clear()
    with torch.no_grad():
        outputs = [model(x, sigma=0.5, action_BFA=each, history=history) for each in (action, action, other, action)]
        assert len(calls) == 3
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[3])
        assert torch.equal(outputs[2], model(x, sigma=0.5, action_BFA=other, history=history.fork()))
        assert len(calls) == 4  # a fork may be another model's
    model(x, sigma=0.5, action_BFA=action, history=history)
    model(x, sigma=0.5, action_BFA=action, history=history)
    assert len(calls) == 6  # while gradients are recorded, nothing is kept


def test_latent_frames_that_are_worked_out_alone_equal_those_of_the_window() -> None:
    """Bit for bit. The rows of a batch may show different ones."""
    model = small_model()
    histories = [written(model, 1, history=written(model, 1)) for _ in range(2)]
    histories[0].follow(track())
    whole = model.stack([history.fork() for history in histories]).expect(ACTION, model.reprojection)
    batch = model.stack(histories)
    batch.expect(-ACTION, model.reprojection)
    found = batch.expect(ACTION, model.reprojection, [1, 0])
    for each, expected in zip(found, whole, strict=True):
        assert torch.equal(each[[0, 1], [1, 0]], expected[[0, 1], [1, 0]])
    assert not torch.equal(found.latents_BFNP, whole.latents_BFNP)
