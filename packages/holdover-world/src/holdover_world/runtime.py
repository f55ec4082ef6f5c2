"""What makes PyTorch fast on the machine at hand: how memory is kept, and in what numbers to compute."""

from __future__ import annotations

import ctypes
import sys

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_memory() -> bool:
    """Let the C library keep freed memory instead of returning it to the system after every large tensor.

    A transformer pass allocates the same few megabytes again and again; with glibc's defaults each of them is mapped
    and faulted in anew, which took a third of a pass where it was measured. Call once, before the first large
    allocation. Returns whether the C library took the settings (False elsewhere than on glibc).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    largest = 2**31 - 1
    settings = ((_M_MMAP_THRESHOLD, 2**30), (_M_TRIM_THRESHOLD, largest), (_M_TOP_PAD, 2**28))
    return all(mallopt(name, value) == 1 for name, value in settings)


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """What a network is best computed in there: bfloat16, but float32 on a CPU that cannot multiply in bfloat16.

    On x86 that takes AVX-512; without it PyTorch goes through a product number by number, which took a hundred times as
    long as in float32 where it was measured.
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    try:
        supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # what PyTorch itself asks before it hands one over
    except (AttributeError, RuntimeError):  # built without oneDNN
        supported = False
    return torch.bfloat16 if supported else torch.float32
