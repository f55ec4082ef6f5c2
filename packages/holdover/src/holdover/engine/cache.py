"""An attached model's cache, as its user sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from threading import get_ident
from types import TracebackType
from typing import Any, Protocol, overload

import torch
from torch import nn

from holdover.decision import Stats
from holdover.engine.blocks import Block
from holdover.engine.context import StepContext, check_rows
from holdover.engine.gradients import in_backward
from holdover.engine.hooks import Hook
from holdover.engine.layout import LayoutHook
from holdover.engine.passes import Pass
from holdover.engine.runtime import Runtime
from holdover.engine.snapshot import Snapshot, put_back, take
from holdover.engine.streams import Stream
from holdover.engine.trace import Tally, Trace
from holdover.engine.written import WrittenLatents
from holdover.slot import ViewGroup
from holdover.step import ActionLike, FrameActions, Role, Step


class Removable(Protocol):
    """Something that attaching has put into the model."""

    def remove(self) -> None: ...


class Cache:
    """What `attach` returns: says where each pass stands, and tells what was decided. For use by one thread."""

    def __init__(self, model: nn.Module, runtimes: Sequence[Runtime]) -> None:
        self._runtimes = runtimes  # outermost policy first
        self._policies = tuple(repr(runtime.policy) for runtime in runtimes)
        self._passes: list[Pass] = []  # of the open step, one per policy
        self._steps: Sequence[Step] = ()  # of the open step, one per row
        self._thread: int | None = None  # the one that opened it
        self._bytes_at_detach: dict[str, int] | None = None
        self._hooks: list[Removable] = [
            Hook(block, runtime.shortcuts, partial(self._dispatch, n))
            for n, runtime in enumerate(runtimes)
            for block in runtime.blocks
        ]
        self._written = WrittenLatents(model, runtimes)

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()

    def __repr__(self) -> str:
        blocks = sum(len(runtime.blocks) for runtime in self._runtimes)
        state = "detached" if self._bytes_at_detach is not None else f"{blocks} blocks"
        return f"<Cache of {', '.join(self._policies)}, {state}>"

    def detach(self) -> None:
        """Restore the model exactly and free what is held; stats and trace stay. Detaching again does nothing."""
        if self._bytes_at_detach is not None:
            return
        for hook in self._hooks:
            hook.remove()
        self._written.remove()
        self._bytes_at_detach = self._bytes()
        for runtime in self._runtimes:
            runtime.streams.clear()

    @overload
    def step(self, *, rows: Sequence[Step]) -> StepContext: ...
    @overload
    def step(
        self,
        *,
        chunk: int,
        index: int = 0,
        num_steps: int = 1,
        first: int = 0,
        sigma: Any = None,
        action: ActionLike = None,
        frame_actions: FrameActions = None,
        shown: int | None = None,
        condition: Any = None,
        commits: bool = True,
        role: Role = "denoise",
        stream: str = "default",
        branch: str = "",
    ) -> StepContext: ...
    def step(self, *, rows: Sequence[Step] | None = None, **fields: Any) -> StepContext:
        """Say where the next forward pass stands: ``with cache.step(chunk=n, index=i, ...): model(...)``.

        Takes the fields of `Step`, or one `Step` per row of the batch: then every row has a state of its own, and a
        span is computed for the rows that need it; where its slots do not say how to take rows, for all if any does.

        Raises:
            ValueError: a field is out of range or contradicts what was said about its chunk.
        """
        self._require_attached()
        if rows is None:
            return self._context([Step(**fields)], batched=False)
        check_rows(rows, fields)
        return self._context(list(rows), batched=True)

    def _context(self, steps: Sequence[Step], *, batched: bool) -> StepContext:
        def begin() -> None:
            self._require_attached()
            self._require_no_pass("a step")
            self._thread = None if torch.compiler.is_compiling() else get_ident()
            self._steps = steps
            self._written.begin(steps)
            self._passes = [Pass(runtime, steps, batched) for runtime in self._runtimes]

        def end() -> Sequence[Pass]:
            passes, self._passes, self._steps = self._passes, [], ()
            self._written.end()
            return passes

        return StepContext(begin, end)

    @property
    def trace(self) -> Trace:
        """The latest decisions since `attach`, as many as `attach` was told to keep."""
        return self._runtimes[0].trace

    @property
    def nbytes(self) -> int:
        """Bytes of held tensors, all streams together."""
        return sum(self._bytes().values())

    def stats(self, stream: str | None = None) -> Stats:
        """Decisions counted since `attach`, of one stream or of all; resets do not clear them.

        Of several policies these are the innermost one's blocks. A pass that an outer policy served counts as all of
        them reused, with that policy's name as the reason.
        """
        tallies = self._runtimes[-1].tallies
        total = Tally()
        for name in tallies if stream is None else [stream]:
            total.add(tallies.get(name, Tally()))
        held = self._bytes() if self._bytes_at_detach is None else self._bytes_at_detach
        return total.stats(sum(held.values()) if stream is None else held.get(stream, 0))

    def exact(self, stream: str = "default", branch: str = "") -> bool:
        """Whether every block call of the stream's latest chunk was computed so far; False before the first."""
        return all(runtime.streams.get(stream, Stream()).exact(branch) for runtime in self._runtimes)

    def drafts(self, stream: str = "default") -> tuple[int, ...]:
        """The latent frames that the stream's latest chunk did not compute where it computed others (`frontier`)."""
        return tuple(sorted(set().union(*(r.streams[stream].drafts for r in self._runtimes if stream in r.streams))))

    @property
    def by_frame(self) -> bool:
        """Whether a policy may compute some latent frames of a pass and leave the others (`frontier`)."""
        return any(runtime.policy.trigger.by_frame for runtime in self._runtimes)

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that ran since they were reset."""
        return tuple(self._runtimes[0].streams)

    @property
    def open_steps(self) -> Sequence[Step]:
        """The open step, one per row of the batch; empty between passes."""
        return self._steps

    @property
    def in_step(self) -> bool:
        """Whether a step is open."""
        return bool(self._passes)

    def ask_view_groups(self, model: nn.Module, view_groups: Callable[..., Sequence[ViewGroup]]) -> None:
        """Ask at every pass of the model, until `detach`, for the layout of its tokens."""
        if reading := [runtime for runtime in self._runtimes if runtime.reads_layout]:
            self._hooks.append(LayoutHook(model, view_groups, reading))

    def remove_with(self, hook: Removable) -> None:
        """Take a hook of an adapter out at `detach`."""
        self._hooks.append(hook)

    def reset(self, stream: str | None = None) -> None:
        """Forget a stream, or all of them: its next chunk is its first."""
        self._require_no_pass("reset")
        self._written.forget(stream)
        for runtime in self._runtimes:
            for name in list(runtime.streams) if stream is None else [stream]:
                runtime.streams.pop(name, None)
            runtime.fold_tallies()

    def restart(self, stream: str) -> None:
        """Another video begins in a stream: it starts anew, and only counts on how long nothing could be reused."""
        self._require_no_pass("restart")
        self._written.forget(stream)
        for runtime in self._runtimes:
            if stream in runtime.streams:
                runtime.streams[stream] = runtime.streams[stream].restarted()

    def hold(self, *, chunk: int, num_steps: int = 1, stream: str = "default", branches: Sequence[str] = ("",)) -> None:
        """Note a chunk that shows the next frame of the window in hand, and runs none of its passes.

        Raises:
            ValueError: the stream holds nothing, or the chunk ran passes or was held already.
        """
        self._require_no_pass("hold")
        self._require_stream(stream)
        for runtime in self._runtimes:
            runtime.hold(chunk, num_steps, stream, branches)

    def give_up(self, chunk: int, stream: str = "default") -> None:
        """Free what a chunk holds for itself: it ends before its last pass, or another model runs the rest."""
        self._require_no_pass("give_up")
        for runtime in self._runtimes:
            if stream in runtime.streams:
                runtime.streams[stream].give_up(chunk)

    def fork(self, src: str, dst: str) -> None:
        """Let a new stream go on from where another stands; neither touches the other from then on.

        They share memory until they diverge; `nbytes` counts it for each.

        Raises:
            ValueError: ``src`` holds nothing, or ``dst`` exists.
        """
        self._require_no_pass("fork")
        self._require_stream(src)
        if any(dst in runtime.streams for runtime in self._runtimes):
            raise ValueError(f"stream {dst!r} exists; reset it first, or fork into a new name")
        for runtime in self._runtimes:
            runtime.streams[dst] = runtime.streams[src].fork()
        self._written.fork(src, dst)

    def snapshot(self, stream: str = "default") -> Snapshot:
        """A copy of a stream's state, to `restore` here or, once saved, elsewhere.

        Raises:
            ValueError: the stream holds nothing.
        """
        self._require_no_pass("snapshot")
        self._require_stream(stream)
        return take(self._runtimes, stream)

    def restore(self, stream: str, snapshot: Snapshot) -> None:
        """Put a stream where a snapshot was taken. In another model every slot is computed once before it is reused.

        Raises:
            ValueError: the snapshot was taken under another policy.
        """
        self._require_attached()
        self._require_no_pass("restore")
        put_back(self._runtimes, stream, snapshot)

    def _bytes(self) -> dict[str, int]:
        """Per stream, bytes of the entries' tensors."""
        found: Counter[str] = Counter()
        for runtime in self._runtimes:
            found.update({name: stream.nbytes for name, stream in runtime.streams.items()})
        return dict(found)

    def _dispatch(self, n: int, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._passes:
            if in_backward():
                return block.compute(*args, **kwargs)  # gradient checkpointing runs it again
            raise ValueError(
                f"block {block.name!r} ran outside any step; wrap the model's call: "
                f"`with cache.step(chunk=n, index=i, num_steps=len(sigmas)): model(...)`, or detach() the cache"
            )
        if self._thread != get_ident():
            self._require_this_thread()
        return self._passes[n].run(block, args, kwargs)

    def _require_stream(self, name: str) -> None:
        self._require_attached()
        known = self._runtimes[0].streams
        if name not in known:
            raise ValueError(f"no stream {name!r}; streams since reset: {', '.join(map(repr, known)) or 'none'}")

    def _require_attached(self) -> None:
        if self._bytes_at_detach is not None:
            raise ValueError("the cache is detached; attach(model, policy) again")

    def _require_this_thread(self) -> None:
        if self._thread not in (None, get_ident()):
            raise ValueError(
                "two threads use one attached model; give each a model and a cache of its own, or let them take turns"
            )

    def _require_no_pass(self, what: str) -> None:
        if self._passes:
            self._require_this_thread()
            raise ValueError(f"{what} within a step; do it between passes")
