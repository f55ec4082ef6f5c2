"""A loop's place in its cycle: what goes into its next chunk, and what becomes of what comes out.

Shape suffixes: B batch, F latent frames, N tokens of one latent frame, P values of one token, A dimensions of the
action, S denoising passes of a chunk, T actions of a plan, K poses of one latent frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from holdover_world.loop.config import HoldWindow, LoopConfig
from holdover_world.loop.protocol import Conditioned, Drafts, History, LoopCache, LoopModel, Moving
from holdover_world.loop.state import LoopState, Window
from holdover_world.model.sampler import noise_levels

M = TypeVar("M", bound=LoopModel)


@dataclass(frozen=True, kw_only=True)
class ChunkInputs:
    """The inputs of one chunk of one loop.

    Attributes:
        position: which chunk of its cycle it is.
        actions_BFA: what each latent frame of the window is told.
        noise_SBFNP: the noise of the cycle.
        known_BFNP: the latent frames that the chunk starts from.
        commits: whether it is announced as committed.
        held: whether the window in hand serves, so that it runs no pass.
    """

    position: int
    actions_BFA: Tensor
    noise_SBFNP: Tensor
    known_BFNP: Tensor
    commits: bool
    held: bool


class Cycle(Generic[M]):
    """A loop without the passes of its model: these are `holdover_world.loop.batch`'s.

    Attributes:
        model, config, cache, stream: as given.
        history: what the model remembers of the video.
        last: the newest committed latent frame, ``[B, N, P]``.
        chunk: the number of the next chunk.
        emitted, actions: the pieces ``[B, 1, N, P]`` and actions ``[B, A]`` of the cycle so far.
        committed: the latents and actions that the KV update will write.
    """

    history: History
    last: Tensor
    chunk: int
    emitted: list[Tensor]
    actions: list[Tensor]
    committed: tuple[Tensor, Tensor] | None

    def __init__(
        self, model: M, config: LoopConfig, cache: LoopCache | None, stream: str, device: torch.device
    ) -> None:
        self.model, self.config, self.cache, self.stream = model, config, cache, stream
        self.sigmas = noise_levels(config.steps, config.shift)
        self._noise_source = torch.Generator(device)

    @property
    def window_frames(self) -> int:
        """Latent frames denoised together."""
        return 1 if self.config.cadence == "plain" else self.model.sizes.window

    @property
    def rows(self) -> int:
        """B, the number of videos that the loop advances together."""
        return len(self.last)

    @property
    def before(self) -> Tensor:
        """The latent frame before the next piece, ``[B, N, P]`` (see `Piece`)."""
        return self.emitted[-1][:, -1] if self.emitted else self.last

    @property
    def complete(self) -> bool:
        """Whether all pieces of the cycle are emitted, and its KV update is due."""
        return len(self.emitted) == self.window_frames

    @property
    def state(self) -> LoopState:
        """Where the loop stands. Assign it to this loop or another to go back there, any number of times."""
        return LoopState(
            history=self.history.fork(),
            last=self.last,
            chunk=self.chunk,
            noise_source=self._noise_source.get_state(),
            noise=self._noise,
            emitted=tuple(self.emitted),
            actions=tuple(self.actions),
            committed=self.committed,
            window=self._window if self._same_conditions() else None,
        )

    @state.setter
    def state(self, state: LoopState) -> None:
        self.remember(state.history.fork())
        self.last, self.chunk = state.last, state.chunk
        self._noise_source.set_state(state.noise_source)
        self._noise: Tensor | None = state.noise
        self.emitted, self.actions, self.committed = list(state.emitted), list(state.actions), state.committed
        self._keep(state.window)

    def remember(self, history: History) -> None:
        """Take a history.

        Raises:
            ValueError: the loop compares poses, and this history knows none.
        """
        hold = self.config.hold_window
        if hold is not None and hold.metres is not None and not isinstance(history, Moving):
            raise ValueError(f"a {type(history).__name__} knows no poses; give HoldWindow(action=...)")
        self.history = history

    def begin_cycle(self) -> None:
        self.emitted, self.actions = [], []
        self._noise = None
        self._keep(None)

    def tell(self, action: Tensor, plan: Tensor | None = None) -> Tensor:
        """What each latent frame of the window is told, ``[B, F, A]``: what was commanded, then the plan.

        Raises:
            ValueError: the plan does not fit.
        """
        action_BA = action.to(self.last.device, torch.float32).expand(self.rows, -1)
        ahead_BFA = _ahead(plan, action_BA, self.window_frames - len(self.actions) - 1)
        return torch.cat([torch.stack([*self.actions, action_BA], 1), ahead_BFA], 1)

    def begin(self, actions_BFA: Tensor) -> ChunkInputs:
        """Begin the next chunk with what `tell` gave. Returns its inputs."""
        last_BNP, position = self.last, len(self.emitted)
        if self._noise is None or self.config.fresh_noise:
            draws = 1 if self.config.sampler == "euler" else self.config.steps
            draw = draws, len(last_BNP), self.window_frames, *last_BNP.shape[1:]
            self._noise = torch.randn(draw, generator=self._noise_source, device=last_BNP.device)
        first_protected = self.config.protected == "first"
        commits = position == (0 if first_protected else self.window_frames - 1)
        if self.committed is not None and self.config.commit == "last_full" and first_protected:
            known = self.committed[0][:, :position]
        else:
            known = torch.cat([self._noise[0, :, :0], *self.emitted], 1)
        self.actions.append(actions_BFA[:, position].clone())
        return ChunkInputs(
            position=position,
            actions_BFA=actions_BFA,
            noise_SBFNP=self._noise,
            known_BFNP=known,
            commits=commits,
            held=self._holds(actions_BFA, position, commits),
        )

    def finish(self, inputs: ChunkInputs, made: Tensor | None) -> tuple[Tensor, Tensor, bool]:
        """Emit the next piece, and choose what will be committed.

        Args:
            inputs: of this chunk.
            made: the window that its passes made; None where the window in hand is held.

        Returns:
            The piece, the latent frame before it, and whether its window is exact.
        """
        window = self._hold() if made is None else self._made(made, inputs)
        position, before = inputs.position, self.before
        piece = window.latents[:, position : position + 1].clone()
        self.emitted.append(piece)
        if made is not None and (position == 0 or (self.config.commit == "last_full" and window.exact)):
            self.committed = made, inputs.actions_BFA
        if self.complete and self.config.commit == "emitted":
            self.committed = torch.cat(self.emitted, 1), torch.stack(self.actions, 1)
        return piece, before, window.exact

    def _made(self, latents: Tensor, inputs: ChunkInputs) -> Window:
        """Take a new window in hand."""
        exact = self.cache is None or self.cache.exact(self.stream)
        drafts = self.cache.drafts(self.stream) if isinstance(self.cache, Drafts) else ()
        window = Window(latents=latents, told=inputs.actions_BFA, exact=exact, drafts=tuple(drafts))
        self._keep(window)
        return window

    def _hold(self) -> Window:
        """The window in hand, once more."""
        assert self._window is not None
        if self.cache is not None:
            branches = ("",) if self.config.guidance == 1 else ("", "uncond")
            self.cache.hold(chunk=self.chunk, num_steps=self.config.steps, stream=self.stream, branches=branches)
        return self._window

    def _keep(self, window: Window | None) -> None:
        self._window = window if self.config.hold_window is not None else None
        self._drawn_under = self._conditions()

    def _holds(self, actions_BFA: Tensor, position: int, commits: bool) -> bool:
        """Whether the next frame of the window in hand is right."""
        hold, window = self.config.hold_window, self._window
        if hold is None or window is None or position in window.drafts or (commits and not window.exact):
            return False
        if not self._same_conditions():
            return False
        now, then = actions_BFA[:, : position + 1], window.told[:, : position + 1]
        if hold.metres is not None and hold.degrees is not None and isinstance(self.history, Moving):
            poses = (self.history.poses(actions)[:, position] for actions in (now, then))
            return _same_poses(*poses, metres=hold.metres, degrees=hold.degrees)
        return _same_actions(hold, now, then)

    def _conditions(self) -> tuple[object, ...]:
        return self.history.conditions if isinstance(self.history, Conditioned) else ()

    def _same_conditions(self) -> bool:
        now, then = self._conditions(), self._drawn_under
        return len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True))


def _ahead(plan: Tensor | None, action_BA: Tensor, count: int) -> Tensor:
    """What the next frames are told, ``[B, count, A]``: the plan and its last row held, else the newest action held."""
    rows, dims = action_BA.shape
    if plan is None:
        return action_BA[:, None].expand(-1, count, -1)
    if plan.ndim not in (2, 3) or plan.shape[-1] != dims or (plan.ndim == 3 and plan.shape[1] != rows):
        raise ValueError(
            f"plan {tuple(plan.shape)} does not fit; give [T, {dims}] or [T, {rows}, {dims}], a normalised action for "
            f"each frame that is not yet commanded"
        )
    plan_TBA = (plan if plan.ndim == 3 else plan[:, None]).to(action_BA).expand(-1, rows, -1)
    if not plan_TBA.isfinite().all():
        raise ValueError(f"plan={plan.tolist()} is not finite; give normalised actions, or leave the plan out")
    whole = torch.cat([action_BA[None], plan_TBA])  # the newest action is all that is known if the plan is empty
    return whole[[min(n, len(plan)) for n in range(1, count + 1)]].transpose(0, 1)


def _same_actions(hold: HoldWindow, now_BFA: Tensor, then_BFA: Tensor) -> bool:
    dims = now_BFA.shape[-1]
    limits = hold.action if isinstance(hold.action, tuple) else (hold.action,) * dims
    if len(limits) != dims:
        raise ValueError(f"HoldWindow(action=...) has {len(limits)} dimensions, the action {dims}; give one for each")
    return bool(((now_BFA - then_BFA).abs() <= now_BFA.new_tensor(limits)).all())


def _same_poses(now_BK3: Tensor, then_BK3: Tensor, *, metres: float, degrees: float) -> bool:
    off = now_BK3 - then_BK3
    turned = (off[..., 2] + math.pi) % (2 * math.pi) - math.pi
    near = (off[..., :2].norm(dim=-1) <= metres) & (turned.abs().rad2deg() <= degrees)
    return bool(near.all())
