"""How a cache finds its way into a model that people already run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from holdover.slot import Prediction, Slot, ViewGroup

#: Attributes by which accelerate and diffusers mark a module whose weights they move around its forward.
ACCELERATE, DIFFUSERS, GROUP = "_hf_hook", "_diffusers_hook", "group_offloading"

#: The tap of `Adapter.embedding`.
EMBEDDING = "time embedding"


class Place(NamedTuple):
    """Where a pass stands in a KV cache, as its own arguments say.

    Attributes:
        cache: the KV cache; a guidance branch has one of its own.
        start: the place of its first token.
        timestep: the largest of its latent frames; 0 is no noise.
        staggered: frames differ in noise.
    """

    cache: object
    start: int
    timestep: float
    staggered: bool


def any_model(model: nn.Module) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What is known of a class of models. The class is found by its name.

    Functions of a block take the block and the arguments of its forward. Functions of the model take the model and the
    arguments of its forward.

    Attributes:
        model: the name of the class.
        family: the name of the model in the documentation.
        blocks: the attributes that hold its lists of blocks, in the order in which they run.
        hidden: the argument of a block that carries the hidden state.
        returns: the position of the hidden state in the tuple that a block returns.
        beside: a function of a block: what a reused block returns beside the hidden state. None: what it returned when
            last computed.
        taps: functions of a block: tensors that a policy may read, by name, such as ``modulated``.
        embedding: the module whose first output is the embedding of the timestep, for blocks that are not given it.
        rows: a function of row numbers and a block's arguments: the arguments for these rows of the batch.
        writes_kv: blocks write keys and values in place in denoising passes, too.
        block_kv_update: a function of a block: whether this call writes the persistent KV cache. None: blocks are not
            told.
        kv_update: a function of the model: whether this pass writes the persistent KV cache. None: the model is not
            told.
        autoregressive: a chunk attends to earlier chunks through a KV cache.
        grid: a function of the model: the rows and columns of tokens in a latent frame. None: tokens are a plain
            sequence.
        condition: the arguments of the model that steer the video, except for the action. What it generated before, its
            history, is none of them.
        given: a function of the model: what else steers the video, by name, such as an image beside the noise. None:
            nothing.
        action: the argument of the model that carries the action. None: it has none.
        place: a function of the model: where this pass stands in its KV cache, in which noisy passes begin a chunk and
            a clean one ends it. None: the pass does not say.
        latents: the argument of the model that carries the noisy latents.
        prediction: what the model returns of them. None: not known.
        noise: a function of the model: their noise level in this call. None: the model is not told one that is known.
        refused: why nothing can be reused; empty if it can.
        refuses: a function of a model: why nothing can be reused at its settings; empty if it can.
        tells: whether a model of this class name is the one that is meant.
        tested: on the ``class`` itself; also in a ``pipeline``; or on a ``contract``: modules of our own that take,
            return and write the same as its blocks.
    """

    model: str
    family: str
    blocks: tuple[str, ...] = ("transformer_blocks",)
    hidden: str = "hidden_states"
    returns: int = 0
    beside: Callable[..., tuple[Any, ...]] | None = None
    taps: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict, hash=False)
    embedding: str = ""
    rows: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    writes_kv: bool = False
    block_kv_update: Callable[..., bool] | None = None
    kv_update: Callable[..., bool] | None = None
    autoregressive: bool = False
    grid: Callable[..., tuple[int, int]] | None = None
    condition: tuple[str, ...] = ("encoder_hidden_states",)
    given: Callable[..., dict[str, Any]] | None = None
    action: str | None = None
    place: Callable[..., Place | None] | None = None
    latents: int | str = 0
    prediction: Prediction | None = None
    noise: Callable[..., Tensor] | None = None
    refused: str = ""
    refuses: Callable[[nn.Module], str] | None = None
    tells: Callable[[nn.Module], bool] = any_model
    tested: Literal["class", "pipeline", "contract"] = "class"

    def slots(self, model: nn.Module, more_taps: Mapping[str, Callable[..., Tensor]] = {}) -> list[Slot]:
        """The model's blocks; ``more_taps`` are those that belong to this very model.

        Raises:
            ValueError: the model is not built as declared, or its blocks are offloaded already.
        """
        for name, module in model.named_modules():
            if name and _offloaded(module):
                raise ValueError(
                    f"{name!r} of {self.model} is offloaded already: its weights come and go with its forward, which a "
                    f"reused block does not run; attach or enable first, then offload"
                )
        found = []
        for name in self.blocks:
            blocks = getattr(model, name, None)
            if not isinstance(blocks, nn.ModuleList):
                raise ValueError(
                    f"{self.model} has no list of blocks {name!r}, unlike the version that is known; name its blocks: "
                    f"attach(model, policy, slots=[...])"
                )
            found += [self._slot(f"{name}.{index}", block, more_taps) for index, block in enumerate(blocks)]
        return found

    def whole(self) -> Slot:
        """The model as a whole."""
        return Slot(
            "",
            kind="model",
            hidden=self.latents,
            kv_update=self.kv_update,
            writes_kv=self.writes_kv,
            taps={} if self.noise is None else {"sigma": self.noise},
            prediction=self.prediction,
        )

    def require_reusable(self, model: nn.Module) -> None:
        """Raises: ValueError: nothing of this model can be reused."""
        reason = self.refused or (self.refuses(model) if self.refuses is not None else "")
        if reason:
            raise ValueError(f"{self.family} cannot be reused: {reason}; attach holdover.never() to trace it")

    @property
    def tapped(self) -> tuple[str, ...]:
        """The names of all tensors that a policy may read."""
        return (*self.taps, *([EMBEDDING] if self.embedding else []))

    def view_groups(self, model: nn.Module, *args: Any, **kwargs: Any) -> Sequence[ViewGroup]:
        """The layout of the tokens in this pass."""
        assert self.grid is not None
        rows, columns = self.grid(model, *args, **kwargs)
        return (ViewGroup("video", 1, rows, columns),)

    def steering(self, model: nn.Module, told: Mapping[str, Any]) -> dict[str, Any]:
        """All that steers the video in a forward with these arguments, by name."""
        condition = {name: told[name] for name in self.condition if told.get(name) is not None}
        if self.given is not None:
            condition |= self.given(model, **told)
        scale = (told.get("attention_kwargs") or {}).get("scale")  # the strength of a LoRA for this pass
        return condition if scale is None else condition | {"scale": scale}

    def _slot(self, name: str, block: nn.Module, more_taps: Mapping[str, Callable[..., Tensor]]) -> Slot:
        parameters = inspect.signature(block.forward).parameters
        passed_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        if self.hidden not in parameters and not passed_on:
            raise ValueError(
                f"block {name!r} of {self.model} takes no argument {self.hidden!r}, unlike the version that is known; "
                f"name the blocks: attach(model, policy, slots=[holdover.Slot({name!r}, hidden=...), ...])"
            )
        return Slot(
            block,
            hidden=self.hidden,
            returns=self.returns,
            beside=self.beside,
            kv_update=self.block_kv_update,
            writes_kv=self.writes_kv,
            taps={**self.taps, **more_taps},
            rows=self.rows,
        )


def _offloaded(module: nn.Module) -> bool:
    return hasattr(module, ACCELERATE) or GROUP in getattr(getattr(module, DIFFUSERS, None), "hooks", ())
