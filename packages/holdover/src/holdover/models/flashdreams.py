"""What is known of FlashDreams: its networks, chunk-causal Wan and Cosmos; its schedulers; its rollout caches.

All are found by name: FlashDreams is not imported.

Noisy passes write keys and values in place, at the position of the current chunk, which does not move until the chunk
is finalized. The clean pass is always computed, and overwrites what they wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from holdover.method import Policy
from holdover.models.adapter import Adapter
from holdover.models.diffusers import told
from holdover.slot import Slot, ViewGroup

#: The attributes of schedulers that hold, pass by pass, their noise levels and the timesteps that they name.
SIGMAS, TIMESTEPS = ("denoising_sigmas", "sigmas"), ("denoising_step_list", "timesteps")

#: The whole model, as its scheduler sees it: it returns ``ε - x̂`` of latents ``(1-σ)·x̂ + σ·ε``, guidance included.
WHOLE = Slot("", kind="model", method="predict_flow", hidden="noisy_latent", prediction="flow", writes_kv=True)


def modulated(block: Any, x: Tensor, e: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``e`` is ``[B, 6, C]``, or ``[B, L, 6, C]`` where tokens differ in noise."""
    shift, scale = (block.modulation + e).unbind(-2)[:2]
    if e.dim() == x.dim():
        shift, scale = shift.unsqueeze(-2), scale.unsqueeze(-2)
    output: Tensor = block.norm1(x) * (1 + scale) + shift
    return output


def modulated_cosmos(
    block: Any, x: Tensor, emb: Tensor, *args: Any, adaln_lora: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """``emb`` is ``[B, 1, C]``, or ``[B, L, C]`` where tokens differ in noise."""
    values = block.adaln_modulation_self_attn(emb)
    shift, scale, _ = (values if adaln_lora is None else values + adaln_lora).chunk(3, dim=-1)
    output: Tensor = block.layer_norm_self_attn(x) * (1 + scale) + shift
    return output


def _network(model: str, family: str, **more: Any) -> Adapter:
    """A network whose blocks take ``x``, tokens ``[B, L, C]``, and their own part of its KV cache."""
    return Adapter(
        model=model,
        family=family,
        blocks=("blocks",),
        hidden="x",
        latents="x",
        prediction="flow",
        writes_kv=True,
        autoregressive=True,
        condition=(),
        **more,
    )


FLASHDREAMS = (
    _network(
        "WanDiTNetwork", "FlashDreams, Wan 2.1 and 2.2", taps={"modulated": modulated, "time projection": told("e")}
    ),
    _network("CosmosDiTNetwork", "FlashDreams, Cosmos Predict 2", taps={"modulated": modulated_cosmos}),
)


def diffusion_of(target: Any) -> Any:
    """FlashDreams' diffusion model, which a target is or holds; None for any other object."""
    for found in (target, getattr(target, "diffusion_model", None)):
        for cls in type(found).__mro__:
            if cls.__name__ == "DiffusionModel" and cls.__module__.partition(".")[0] == "flashdreams":
                return found
    return None


class Schedule:
    """The noise levels of a scheduler, by pass.

    Raises:
        ValueError: how many passes make a chunk is not known.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler, self._values = scheduler, list[float]()
        self._known: tuple[Tensor | None, Tensor | None] = None, None
        self._checked: set[int] = set()
        self.num_steps: int = getattr(scheduler.config, "num_inference_steps", 0)
        if not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError(
                f"{type(scheduler).__name__}.config has no num_inference_steps, so how many passes make a chunk is not "
                f"known; attach to the network, and say where each pass stands"
            )

    def sigma(self, index: int, timestep: Tensor) -> float | None:
        """σ of a pass; None where the scheduler does not say it.

        Raises:
            ValueError: the scheduler runs another pass than its schedule names.
        """
        sigmas, timesteps = (self._first(names) for names in (SIGMAS, TIMESTEPS))
        if sigmas is not self._known[0] or timesteps is not self._known[1]:  # a scheduler that moved to a device
            self._known, self._checked = (sigmas, timesteps), set()
            self._values = [] if sigmas is None else sigmas.tolist()
        if index >= self.num_steps or self._strays(index, timestep, timesteps):
            raise ValueError(
                f"{type(self._scheduler).__name__} runs pass {index} of {self.num_steps} at timestep "
                f"{float(timestep):g}, which is not the one of its schedule, so where the pass stands is not known; "
                f"call disable() of what enable returned"
            )
        return self._values[index] if self._values else None

    def _strays(self, index: int, timestep: Tensor, timesteps: Tensor | None) -> bool:
        """Looked at once per pass of a schedule: the device has to answer."""
        if timesteps is None or index in self._checked:
            return False
        if (timesteps[index].to(timestep) != timestep).any():
            return True
        self._checked.add(index)
        return False

    def _first(self, names: Sequence[str]) -> Tensor | None:
        return next((value for name in names if (value := getattr(self._scheduler, name, None)) is not None), None)


def branch_of(rollout: Any, network_cache: Any) -> str:
    """The guidance branch that a network's KV cache serves; Wan 2.2 has a pair of them for each of its networks."""
    for part in (rollout, *vars(rollout).values()):
        uncond = getattr(part, "network_cache_uncond", None)
        if uncond is not None and (network_cache is uncond or network_cache is part.network_cache):
            return "uncond" if network_cache is uncond else "cond"
    return ""


def plain(value: Any) -> Any:
    """What steers a chunk, as a condition: a structure of tensors becomes a mapping."""
    if isinstance(value, Tensor | str | int | float | None):
        return value
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    fields = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    if fields is None:
        return value
    return {name: plain(item) for name, item in fields.items()}


def grid(owner: Any) -> Callable[..., Sequence[ViewGroup]] | None:
    """How a recipe lays out the tokens of a latent frame; None where it does not say, or ranks share a frame."""
    if not hasattr(owner, "_output_height") or getattr(owner, "_cp_size", 1) > 1:
        return None
    _, height, width = owner.config.network.patch_size

    def view_groups(*args: Any, **kwargs: Any) -> Sequence[ViewGroup]:
        return (ViewGroup("video", 1, owner._output_height // height, owner._output_width // width),)

    return view_groups


def ranks(transformer: nn.Module) -> Any:
    """The ranks that share the tokens of a pass, which decide together."""
    groups = (getattr(module, "_cp_group", None) for module in transformer.modules())
    return next((group for group in groups if group is not None), None)


def refuse_graphs(transformer: nn.Module, policies: Sequence[Policy]) -> None:
    """Raises: ValueError: FlashDreams replays its network as a CUDA graph."""
    if any(getattr(module, "_use_cuda_graph", False) for module in transformer.modules()):
        raise ValueError(
            f"{' and '.join(policy.name for policy in policies)} would decide block by block, and "
            f"{type(transformer).__name__} replays its network as one CUDA graph, in which no block can be left out; "
            f"make it with use_cuda_graph=False, or take a policy of the whole model, such as "
            f"holdover.policy('step_hold')"
        )
