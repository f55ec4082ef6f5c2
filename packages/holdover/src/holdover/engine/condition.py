"""Conditions, kept by value: a caller may overwrite a tensor in place, and that is a change too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def freeze(condition: Any) -> Any:
    """A copy of a condition that later changes to its tensors do not reach.

    Raises:
        ValueError: a part of it is neither tensors nor hashable.
    """
    if isinstance(condition, Tensor):
        return condition.detach().clone()
    if isinstance(condition, np.ndarray):
        return torch.tensor(condition)
    if isinstance(condition, Mapping):
        return {key: freeze(value) for key, value in condition.items()}
    if isinstance(condition, list | tuple):
        return tuple(freeze(value) for value in condition)
    if isinstance(condition, Hashable):
        return condition
    raise ValueError(f"condition holds a {type(condition).__name__}; pass tensors, mappings of them or hashable values")


def same(frozen: Any, condition: Any) -> bool:
    """Whether a condition is the one that was frozen. NaN is like nothing, itself included."""
    if isinstance(condition, np.ndarray):
        condition = torch.from_numpy(condition)
    if isinstance(frozen, Tensor) or isinstance(condition, Tensor):
        return (
            isinstance(frozen, Tensor)
            and isinstance(condition, Tensor)
            and frozen.shape == condition.shape
            and frozen.dtype == condition.dtype
            and frozen.device == condition.device
            and torch.equal(frozen, condition)
        )
    if isinstance(condition, Mapping):
        return (
            isinstance(frozen, dict)
            and frozen.keys() == condition.keys()
            and all(same(frozen[key], value) for key, value in condition.items())
        )
    if isinstance(condition, list | tuple):
        return (
            isinstance(frozen, tuple)
            and len(frozen) == len(condition)
            and all(same(a, b) for a, b in zip(frozen, condition, strict=True))
        )
    return bool(type(frozen) is type(condition) and frozen == condition)


def digest(frozen: Any) -> str | None:
    """A name for a frozen condition that another process understands; None where its values have no plain form."""
    try:
        text = json.dumps(_plain(frozen), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError):
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        data = value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return ["tensor", str(value.dtype), list(value.shape), str(value.device), hashlib.sha256(data).hexdigest()]
    if isinstance(value, dict):
        return ["mapping", sorted(([_plain(k), _plain(v)] for k, v in value.items()), key=json.dumps)]
    if isinstance(value, tuple):
        return ["sequence", [_plain(item) for item in value]]
    if value is None or type(value) in (bool, int, float, str):
        return [type(value).__name__, value]
    raise TypeError(f"{type(value).__name__} has no plain form")
