"""Networks on disk: folders of configuration and weights as diffusers writes them, in bfloat16.

A file is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

Network = TypeVar("Network", bound=ModelMixin)

#: The file of a network's weights, as diffusers names it.
WEIGHTS = "diffusion_pytorch_model.safetensors"
#: The file of a network that is kept as its difference from another network; half the size of its weights.
DIFFERENCE = "difference.safetensors"


def write_network(network: ModelMixin, folder: Path) -> None:
    """Write ``config.json`` and ``diffusion_pytorch_model.safetensors``; other files in the folder stay."""
    # Names with an underscore are diffusers' own, among them the path that the network was read from.
    twin = type(network).from_config({k: v for k, v in network.config.items() if not k.startswith("_")})
    twin.load_state_dict(network.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".partial"
    shutil.rmtree(temporary, ignore_errors=True)
    torch.nn.Module.to(twin, dtype=torch.bfloat16).save_pretrained(temporary)  # ModelMixin.to warns without need
    for file in temporary.iterdir():
        file.chmod(0o644)  # safetensors lets only the owner read them
        file.replace(folder / file.name)
    temporary.rmdir()


def write_difference(network: ModelMixin, base: ModelMixin, folder: Path) -> None:
    """Write the difference of a network from another of the same sizes: eight bits a value, one scale a row."""
    tensors = {}
    for (name, own), other in zip(network.state_dict().items(), base.state_dict().values(), strict=True):
        added = own.float() - other.float()
        scale = (added.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        tensors[name] = (added / scale).round().to(torch.int8)
        tensors[f"{name}.scale"] = scale
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".partial-{DIFFERENCE}"
    save_file(tensors, temporary)
    temporary.chmod(0o644)
    temporary.replace(folder / DIFFERENCE)


def add_difference(network: ModelMixin, folder: Path) -> None:
    """Add what `write_difference` wrote; the sum is exact within half a scale and rounded to bfloat16.

    The rounding makes the sum the same in every dtype, and the same as that of the network kept whole.

    Raises:
        ValueError: the folder holds no difference, or that of another kind of network.
    """
    try:
        tensors = load_file(folder / DIFFERENCE)
        for name, value in network.state_dict().items():
            value.copy_((value.float() + tensors.pop(name) * tensors.pop(f"{name}.scale")).bfloat16())
        if tensors:
            raise KeyError(*tensors)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        kind = type(network).__name__
        raise ValueError(f"{folder} does not hold the difference of a {kind} from this one") from error


def weights_digest(folder: Path) -> str:
    """A digest of the weights in a folder."""
    name = DIFFERENCE if (folder / DIFFERENCE).is_file() else WEIGHTS
    with (folder / name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def read_network(kind: type[Network], folder: Path, dtype: torch.dtype) -> Network:
    """Read what `write_network` wrote, in evaluation mode.

    Raises:
        ValueError: the folder holds another kind of network, or none.
    """
    try:
        # Not from_pretrained: it fills in missing weights at random.
        network = kind.from_config(kind.load_config(folder))
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, TypeError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} does not hold a {kind.__name__} of this version; train it again") from error
    torch.nn.Module.to(network, dtype=dtype)
    return network.eval().requires_grad_(False)
