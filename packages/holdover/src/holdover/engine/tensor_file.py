"""A file of tensors with a header in JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a header and tensors, which may share memory, to one safetensors file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        save_file(copies, temporary, metadata={"holdover": json.dumps(header)})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: Path, hint: str, *, format: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file; the message ends with ``hint``.
        ValueError: the file is damaged or something else, or its header's ``format`` is another.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no snapshot at {path}; {hint}")
    wrong = f"{path} is not a snapshot of format {format!r}; {hint}"
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("holdover", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(wrong) from error
    if header.get("format") != format:
        raise ValueError(wrong)
    return header, tensors
