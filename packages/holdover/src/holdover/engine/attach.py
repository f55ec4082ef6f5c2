"""Attaching a policy to a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, overload

import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from holdover.engine.contract import Audit, Policy
from holdover.engine.hooks import MARK, Hook
from holdover.engine.passes import Pass
from holdover.engine.rows import Runtime
from holdover.engine.slots import Block, Slot, ViewGroup, find_blocks, find_view_groups
from holdover.engine.snapshot import Snapshot, decode, encode, model_digest
from holdover.engine.state import Stream
from holdover.engine.step import ActionLike, Role, Step
from holdover.engine.trace import Stats, Tally, Trace


def attach(
    model: nn.Module,
    policy: Policy,
    *,
    slots: Sequence[Slot | nn.Module | str] | None = None,
    view_groups: Sequence[ViewGroup] | Callable[..., Sequence[ViewGroup]] | None = None,
    audit: float | Audit = 0.0,
    max_bytes: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Cache:
    """`holdover.attach`, where its arguments are explained, for a model that declares its slots or is told them.

    Raises:
        ValueError: an argument is out of range, the model's blocks cannot be found, or a cache is attached already.
    """
    attached = [name or type(model).__name__ for name, module in model.named_modules() if MARK in module.__dict__]
    if attached:
        raise ValueError(f"a cache is attached to {attached[0]!r} already; call its detach() first")
    if max_bytes is not None and max_bytes < 0:
        raise ValueError(f"max_bytes={max_bytes} is negative; give bytes per stream, or None for no cap")
    audit = audit if isinstance(audit, Audit) else Audit(audit)
    blocks = find_blocks(model, slots, policy.level)
    writing = [block.name for block in blocks if block.slot.writes_kv]
    if audit.rate > 0 and writing:
        raise ValueError(
            f"audit={audit.rate} would run block {writing[0]!r} twice, and it writes keys and values in place; "
            f"pass audit=0"
        )
    runtime = Runtime(
        policy=policy,
        blocks=blocks,
        view_groups=() if callable(view_groups) else find_view_groups(model, view_groups),
        audit=audit,
        max_bytes=max_bytes,
        process_group=process_group,
    )
    cache = Cache(runtime)
    if callable(view_groups) and policy.signal is not None and policy.signal.reads_layout:
        cache.ask_view_groups(model, view_groups)
    return cache


class Cache:
    """What `attach` returns: says where each pass stands, and answers what was held over. For use by one thread."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._pass: Pass | None = None
        self._bytes_at_detach: dict[str, int] | None = None
        self._hooks = [Hook(block, runtime.settled, self._dispatch) for block in runtime.blocks]
        self._asked: RemovableHandle | None = None

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "detached" if self._bytes_at_detach is not None else f"{len(self._hooks)} blocks"
        return f"<Cache of {self._runtime.policy!r}, {state}>"

    def detach(self) -> None:
        """Restore the model exactly and free what is held; stats and trace stay. Detaching again does nothing."""
        if self._bytes_at_detach is not None:
            return
        for hook in self._hooks:
            hook.remove()
        if self._asked is not None:
            self._asked.remove()
        self._bytes_at_detach = {name: stream.nbytes for name, stream in self._runtime.streams.items()}
        self._runtime.streams.clear()

    @overload
    def step(self, *, rows: Sequence[Step]) -> StepContext: ...
    @overload
    def step(
        self,
        *,
        chunk: int,
        index: int = 0,
        num_steps: int = 1,
        sigma: Any = None,
        action: ActionLike = None,
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
            return StepContext(self, [Step(**fields)], batched=False)
        if fields:
            raise ValueError(f"rows came together with {', '.join(fields)}; put these into each row's Step")
        if not rows:
            raise ValueError("rows is empty; pass one Step per row of the batch")
        if len({step.role for step in rows}) > 1:
            raise ValueError("rows differ in role; a pass either denoises or writes the KV cache")
        names = [(step.stream, step.branch) for step in rows]
        if len(set(names)) < len(names):
            raise ValueError(
                f"rows name {max(names, key=names.count)} twice; a stream and branch has one row in a batch"
            )
        return StepContext(self, list(rows), batched=True)

    @property
    def trace(self) -> Trace:
        """Every decision since `attach`."""
        return self._runtime.trace

    @property
    def nbytes(self) -> int:
        """Bytes of held tensors, all streams together."""
        return sum(stream.nbytes for stream in self._runtime.streams.values())

    def stats(self, stream: str | None = None) -> Stats:
        """Decisions counted since `attach`, of one stream or of all; resets do not clear them."""
        tallies = self._runtime.tallies
        total = Tally()
        for name in tallies if stream is None else [stream]:
            total.add(tallies.get(name, Tally()))
        held = self._bytes_at_detach
        if held is None:
            held = {name: state.nbytes for name, state in self._runtime.streams.items()}
        return total.stats(sum(held.values()) if stream is None else held.get(stream, 0))

    def exact(self, stream: str = "default", branch: str = "") -> bool:
        """Whether every block call of the stream's latest chunk was computed so far; False before the first."""
        state = self._runtime.streams.get(stream)
        chunk = state.chunks.get(state.latest) if state and state.latest is not None else None
        run = chunk.runs.get(branch) if chunk else None
        return run is not None and run.exact

    @property
    def in_step(self) -> bool:
        """Whether a step is open."""
        return self._pass is not None

    def ask_view_groups(self, model: nn.Module, view_groups: Callable[..., Sequence[ViewGroup]]) -> None:
        """Ask at every pass of the model, until `detach`, for the layout of its tokens."""

        def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._runtime.lay_out(tuple(view_groups(module, *args, **kwargs)))

        self._asked = model.register_forward_pre_hook(ask, with_kwargs=True)

    def reset(self, stream: str | None = None) -> None:
        """Forget a stream, or all of them: its next chunk is its first."""
        self._require_no_pass("reset")
        if stream is None:
            self._runtime.streams.clear()
        else:
            self._runtime.streams.pop(stream, None)

    def give_up(self, chunk: int, stream: str = "default") -> None:
        """Free what a chunk holds for itself: it ends before its last pass, or another model runs the rest."""
        self._require_no_pass("give_up")
        if stream in self._runtime.streams:
            self._runtime.streams[stream].give_up(chunk)

    def fork(self, src: str, dst: str) -> None:
        """Let a new stream go on from where another stands; neither touches the other from then on.

        They share memory until they diverge; `nbytes` counts it for each.

        Raises:
            ValueError: ``src`` holds nothing, or ``dst`` exists.
        """
        self._require_no_pass("fork")
        source = self._stream(src)
        if dst in self._runtime.streams:
            raise ValueError(f"stream {dst!r} exists; reset it first, or fork into a new name")
        self._runtime.streams[dst] = source.fork()

    def snapshot(self, stream: str = "default") -> Snapshot:
        """A copy of a stream's state, to `restore` here or, once saved, elsewhere.

        Raises:
            ValueError: the stream holds nothing.
        """
        self._require_no_pass("snapshot")
        plain, tensors = encode(self._stream(stream))
        model = model_digest(self._runtime.blocks)
        return Snapshot(policy=repr(self._runtime.policy), model=model, stream=plain, tensors=tensors)

    def restore(self, stream: str, snapshot: Snapshot) -> None:
        """Put a stream where a snapshot was taken. In another model every slot is computed once before it is reused.

        Raises:
            ValueError: the snapshot was taken under another policy.
        """
        self._require_attached()
        self._require_no_pass("restore")
        if snapshot.policy != repr(self._runtime.policy):
            raise ValueError(
                f"the snapshot was taken under {snapshot.policy}, attached is {self._runtime.policy!r}; attach "
                f"with the snapshot's policy"
            )
        state = decode(snapshot, self._runtime.blocks)
        if snapshot.model != model_digest(self._runtime.blocks):
            state.held = {key: held.voided("snapshot") for key, held in state.held.items()}
            state.nbytes = 0
        self._runtime.streams[stream] = state

    def _dispatch(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._pass is None:
            raise ValueError(
                f"block {block.name!r} ran outside any step; wrap the model's call: "
                f"`with cache.step(chunk=n, index=i, num_steps=len(sigmas)): model(...)`, or detach() the cache"
            )
        return self._pass.run(block, args, kwargs)

    def _stream(self, name: str) -> Stream:
        self._require_attached()
        state = self._runtime.streams.get(name)
        if state is None:
            known = ", ".join(map(repr, self._runtime.streams)) or "none"
            raise ValueError(f"no stream {name!r}; streams that ran since reset: {known}")
        return state

    def _require_attached(self) -> None:
        if self._bytes_at_detach is not None:
            raise ValueError("the cache is detached; attach(model, policy) again")

    def _require_no_pass(self, what: str) -> None:
        if self._pass is not None:
            raise ValueError(f"{what} within a step; do it between passes")


class StepContext:
    """The span of time in which the model runs one pass; what `Cache.step` returns."""

    def __init__(self, cache: Cache, steps: Sequence[Step], *, batched: bool) -> None:
        self._cache, self._steps, self._batched = cache, steps, batched

    def __enter__(self) -> None:
        cache = self._cache
        cache._require_attached()
        cache._require_no_pass("a step")
        cache._pass = Pass(cache._runtime, self._steps, self._batched)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        done, self._cache._pass = self._cache._pass, None
        assert done is not None
        done.close()
        if kind is None:
            done.commit()
        else:
            done.roll_back()
