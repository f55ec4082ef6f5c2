"""The machine and the software that a figure was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


def environment(model: nn.Module | None = None, checkpoint: Path | None = None) -> dict[str, Any]:
    """What the figures were measured on, and with: a model, read from a checkpoint."""
    return {
        "holdover": version("holdover"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        **({"dtype": str(next(model.parameters()).dtype).removeprefix("torch.")} if model else {}),
        **({"model": checkpoint.name} if checkpoint else {}),
    }


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
