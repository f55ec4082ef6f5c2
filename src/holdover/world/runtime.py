"""Process settings that make PyTorch fast on a CPU."""

from __future__ import annotations

import ctypes
import sys

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
