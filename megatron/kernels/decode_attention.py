"""Decode attention on the CPU: one new position a row over a key/value cache.

torch's kernel reads a bfloat16 cache six times slower than an fp32 one, needs a mask if rows differ in length, and a
dozen small operations around it. The compiled loop (csrc/decode.cpp) rotates the query and the key, stores key and
value, and reads the cache at memory bandwidth, each row to its own end.

Shapes: b rows, n query heads, m key/value heads (n = g * m), k positions of the cache, d head dim.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron.kernels.cpp_build import library
from megatron.kernels.rotary import plain_rotary

Table = tuple[Tensor, Tensor]
"""Cosines and sines of the angles of positions, fp32 [at least k, r/2]; r features of a head are rotated."""
DecodeKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Table | None], Tensor]
"""(q [b, n, d], k and v [b, m, d], keys and values [b, m, k, d], ends [b], table) -> [b, n, d].

k and v are stored in keys and values at position ends - 1; ends, int64 on the CPU: length of each row afterwards.
"""

_DTYPES = (torch.float32, torch.bfloat16)


def choose_decode_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> DecodeKernel | None:
    """Returns the compiled loop if it can be used, else None."""
    return native_decode_attention if native_attention_unavailable(device, dtype, head_dim) is None else None


def native_attention_unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Returns the reason why the compiled loop cannot be used, or None. May compile it."""
    if device.type != "cpu":
        return f"The compiled attention is for the CPU, and the model is on {device.type}."
    if dtype not in _DTYPES:
        return f"The compiled attention knows fp32 and bfloat16, not {dtype}."
    if head_dim % 16:
        return f"The compiled attention takes heads of a multiple of 16 features, not {head_dim}."
    found = library()
    return found if isinstance(found, str) else None


def plain_decode_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, ends: Tensor, table: Table | None = None
) -> Tensor:
    """Reference implementation in float64 of DecodeKernel.

    Args:
        q: Query of each row's new token [b, n, d].
        k: Its key [b, m, d].
        v: Its value [b, m, d].
        keys: Cached keys [b, m, k, d]; the new key is stored at ends - 1.
        values: Cached values, likewise.
        ends: Length of each row with the new token [b].
        table: Cosines and sines of rotary positions; None without them.
    """
    row, newest = torch.arange(len(ends)), ends - 1
    if table is not None:
        cos, sin = (angles[newest][:, None] for angles in table)  # [b, 1, r/2]
        q, k = plain_rotary(q, cos, sin), plain_rotary(k, cos, sin)
    keys[row, :, newest], values[row, :, newest] = k, v
    group = q.shape[1] // k.shape[1]
    found = []
    for queries, some_keys, some_values, end in zip(q, keys, values, ends.tolist(), strict=True):
        seen, weighed = (x[:, :end].double().repeat_interleave(group, dim=0) for x in (some_keys, some_values))
        scores = torch.einsum("nd,nkd->nk", queries.double(), seen) / math.sqrt(q.shape[-1])
        found.append(torch.einsum("nk,nkd->nd", scores.softmax(-1), weighed).to(q.dtype))
    return torch.stack(found)


def native_decode_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, ends: Tensor, table: Table | None = None
) -> Tensor:
    """The compiled loop of DecodeKernel. All tensors have one type; the features of a head are contiguous.

    Args:
        q: Query of each row's new token [b, n, d].
        k: Its key [b, m, d].
        v: Its value [b, m, d].
        keys: Cached keys [b, m, k, d]; the new key is stored at ends - 1.
        values: Cached values, likewise.
        ends: Length of each row with the new token [b].
        table: Cosines and sines of rotary positions; None without them.
    """
    loaded = library()
    assert isinstance(loaded, ctypes.CDLL), "native_attention_unavailable said that it can be used"
    assert q.dtype == k.dtype == keys.dtype and keys.stride() == values.stride()
    assert q.stride(2) == k.stride(2) == v.stride(2) == keys.stride(3) == 1
    batch, heads, size = q.shape
    shared = k.shape[1]
    out = torch.empty(batch, heads, size, dtype=q.dtype)
    cos, sin = table or (None, None)
    half = 0 if cos is None else cos.shape[1]
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *keys.stride()[:3])
    loaded.neox_decode(
        *(None if x is None else ctypes.c_void_p(x.data_ptr()) for x in (q, k, v, keys, values, cos, sin, ends, out)),
        (ctypes.c_int64 * 5)(batch, shared, heads // shared, size, half),
        (ctypes.c_int64 * 9)(*strides),
        ctypes.c_float(1.0 / math.sqrt(size)),
        ctypes.c_int(q.dtype == torch.bfloat16),
        ctypes.c_int(torch.get_num_threads()),
    )
    return out
