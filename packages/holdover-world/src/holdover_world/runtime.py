"""Settings that make PyTorch fast on this machine: how memory is kept, and which dtype to compute in."""

from __future__ import annotations

import ctypes
import platform
import sys

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_memory() -> bool:
    """Let the C library keep freed memory instead of returning it to the system after every large tensor.

    A transformer pass allocates the same few megabytes again and again. With the defaults of glibc they are mapped anew
    each time, which took a third of a measured pass. Call this once, before the first large allocation.

    Returns:
        Whether the C library took the settings; False if it is not glibc.
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
    """The dtype in which a network runs fastest there: bfloat16, or float32 on a CPU that cannot multiply in bfloat16.

    On x86 that takes instructions of its own. With AVX-512 alone a product in bfloat16 took twice as long as in float32
    when measured, and a hundred times as long without AVX-512, where PyTorch computes it number by number.
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    try:
        if platform.machine().lower() in ("x86_64", "amd64"):
            supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        else:
            supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # the test that PyTorch itself makes
    except (AttributeError, RuntimeError):  # an older PyTorch, or one built without oneDNN
        supported = False
    return torch.bfloat16 if supported else torch.float32
