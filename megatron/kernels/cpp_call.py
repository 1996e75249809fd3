"""Arguments of the compiled kernels."""

from __future__ import annotations

import ctypes

from torch import Tensor


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    """Returns where the memory of a tensor begins; null for none."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())
