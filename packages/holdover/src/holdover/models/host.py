"""What a model that people already run says of itself, so that a cache finds its way in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from holdover.slot import Slot, ViewGroup

#: Attributes by which accelerate and diffusers mark a module whose weights they move around its forward.
ACCELERATE, DIFFUSERS, GROUP = "_hf_hook", "_diffusers_hook", "group_offloading"


def any_model(model: nn.Module) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Host:
    """A class of models, found by the name of the class.

    Functions of a block take the block and the arguments of its forward; functions of the model take the model and the
    arguments of its forward.

    Attributes:
        model: the class's name.
        family: what it is called in the documentation.
        blocks: attributes with its lists of blocks, in the order in which they run.
        hidden: the argument of a block with its hidden state.
        returns: where in the tuple that a block returns the hidden state stands.
        beside: what a reused block returns beside it; None: what it returned when last computed.
        taps: tensors of a block that a policy may read, such as ``modulated``.
        rows: the arguments of a block for some rows of the batch.
        writes_kv: blocks write keys and values in place in denoising passes too.
        block_kv_update: of a block, whether this call writes the persistent KV cache, where blocks are told.
        kv_update: of the model, whether this pass writes the persistent KV cache, where the model is told.
        autoregressive: what one chunk makes is history of the next by way of a KV cache.
        grid: of the model, rows and columns of tokens of a latent frame; None: tokens are a plain sequence.
        condition: the model's arguments with what steers the video but the action.
        action: the model's argument with the action, if it has one.
        refused: why its blocks cannot be held over; empty if they can.
        tells: what sets it apart from other classes of the same name.
        tested: on the ``class`` itself, in a ``pipeline`` too, or on a ``contract``: modules of our own that take,
            return and write what its blocks do.
    """

    model: str
    family: str
    blocks: tuple[str, ...] = ("transformer_blocks",)
    hidden: str = "hidden_states"
    returns: int = 0
    beside: Callable[..., tuple[Any, ...]] | None = None
    taps: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict, hash=False)
    rows: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    writes_kv: bool = False
    block_kv_update: Callable[..., bool] | None = None
    kv_update: Callable[..., bool] | None = None
    autoregressive: bool = False
    grid: Callable[..., tuple[int, int]] | None = None
    condition: tuple[str, ...] = ("encoder_hidden_states",)
    action: str | None = None
    refused: str = ""
    tells: Callable[[nn.Module], bool] = any_model
    tested: Literal["class", "pipeline", "contract"] = "class"

    def slots(self, model: nn.Module) -> list[Slot]:
        """The model's blocks.

        Raises:
            ValueError: the model is not built as declared, its blocks cannot be held over or are offloaded already.
        """
        if self.refused:
            raise ValueError(f"blocks of {self.family} cannot be held over: {self.refused}")
        for name, module in model.named_modules():
            if name and _offloaded(module):
                raise ValueError(
                    f"{name!r} of {self.model} is offloaded already: its weights come and go with forwards that a "
                    f"block held over does not run; attach or enable first, then offload"
                )
        found = []
        for name in self.blocks:
            blocks = getattr(model, name, None)
            if not isinstance(blocks, nn.ModuleList):
                raise ValueError(
                    f"{self.model} has no list of blocks {name!r}, unlike the version that is known; name its blocks: "
                    f"attach(model, policy, slots=[...])"
                )
            found += [self._slot(f"{name}.{index}", block) for index, block in enumerate(blocks)]
        return found

    def view_groups(self, model: nn.Module, *args: Any, **kwargs: Any) -> Sequence[ViewGroup]:
        """The layout of its tokens in this pass."""
        assert self.grid is not None
        rows, columns = self.grid(model, *args, **kwargs)
        return (ViewGroup("video", 1, rows, columns),)

    def _slot(self, name: str, block: nn.Module) -> Slot:
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
            taps=self.taps,
            rows=self.rows,
        )


def _offloaded(module: nn.Module) -> bool:
    return hasattr(module, ACCELERATE) or GROUP in getattr(getattr(module, DIFFUSERS, None), "hooks", ())
