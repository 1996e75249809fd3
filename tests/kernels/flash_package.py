"""Stands for the flash-attn packages: their functions and arithmetic, written out sequence by sequence in float64.

Signatures, layouts and the bottom-right alignment are those of the public packages: flash_attn 2 (`dropout_p`,
`alibi_slopes`), flash_attn_interface 3 (no dropout, a tuple in older releases), flash_attn.cute 4 (None for no window,
always a tuple). Every call is recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Window = tuple[int | None, int | None]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: Window = (-1, -1),
    slopes: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """One sequence: q [s, n, d], k and v [keys, m, d] -> [s, n, d].

    Query i is at i + keys - s. It sees the keys from window[0] before to window[1] behind it, -1 or None for all, none
    behind it if causal. A score is scaled, capped by softcap * tanh(score / softcap), and falls by slope * distance. A
    query that sees no key gets 0.
    """
    (queries, heads, size), keys = q.shape, k.shape[0]
    group = heads // k.shape[1]
    out = []
    for head in range(heads):
        scores = q[:, head] @ k[:, head // group].t() * size**-0.5
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(queries)[:, None] + keys - queries
        key = torch.arange(keys)[None]
        if slopes is not None:
            scores = scores - slopes[head].to(scores.dtype) * (at - key).abs()
        left, right = (None if side in (None, -1) else side for side in window)
        right = 0 if causal else right
        seen = torch.ones(queries, keys, dtype=torch.bool)
        seen = seen if left is None else seen & (key >= at - left)
        seen = seen if right is None else seen & (key <= at + right)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out.append(weights.masked_fill(~seen, 0.0) @ v[:, head // group])
    return torch.stack(out, dim=1)


@dataclass
class FlashPackage:
    """The functions of one version, and what they were called with."""

    version: int
    """2, 3 or 4."""
    core: Callable[..., Tensor] = attend
    """Computes one sequence."""
    reads_offsets: bool = True
    """Whether sequences are cut at their offsets; without, joined rows go to the core as one, as for fake tensors."""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Name of each function called, with its arguments by name."""

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Checks the options of this version and returns those of `attend`; ValueError for one that it lacks."""
        known = {"softmax_scale", "causal", "window_size", "softcap", "deterministic"}
        known |= {2: {"dropout_p", "alibi_slopes", "return_attn_probs"}}.get(self.version, set())
        if set(options) - known:
            raise TypeError(f"unexpected keyword arguments {set(options) - known}")
        if options.get("dropout_p", 0.0) > 0:
            raise ValueError("the stand-in has no dropout")
        window = options.get("window_size", (None, None) if self.version == 4 else (-1, -1))
        assert self.version != 4 or -1 not in window
        return {
            "causal": options.get("causal", False),
            "window": window,
            "slopes": options.get("alibi_slopes"),
            "softcap": options.get("softcap", 0.0),
        }

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """[b, s, n, d], [b, keys, m, d] -> [b, s, n, d]."""
        self.calls.append(("flash_attn_func", {"q": q, **options}))
        chosen = self._options(options)
        rows = [self.core(*row, **chosen) for row in zip(q, k, v, strict=True)]
        return self._result(torch.stack(rows))

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        **options: Any,
    ) -> Any:
        """[p, n, d], [p, m, d] -> [p, n, d]; sequences lie between the offsets, int32 [sequences + 1]."""
        lengths = {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q, "cu_seqlens_k": cu_seqlens_k}
        self.calls.append(("flash_attn_varlen_func", {"q": q, **lengths, **options}))
        chosen = self._options(options)
        if not self.reads_offsets:
            return self._result(self.core(q, k, v, **chosen))
        for offsets, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
            assert offsets.dtype == torch.int32 and offsets.is_contiguous() and offsets.device == q.device
            assert isinstance(longest, int) and int(offsets.diff().max()) <= longest
        queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
        return self._result(torch.cat([self.core(*part, **chosen) for part in parts]))

    def _result(self, out: Tensor) -> Any:
        return out if self.version == 2 else (out, torch.zeros(1))

    def modules(self) -> dict[str, ModuleType]:
        """The modules of the package, to be put into sys.modules."""
        names = {2: ["flash_attn"], 3: ["flash_attn_interface"], 4: ["flash_attn", "flash_attn.cute"]}[self.version]
        made = {name: ModuleType(name) for name in names}
        for name, module in made.items():
            module.__spec__ = ModuleSpec(name, None, origin=__file__)
        last = made[names[-1]]
        last.flash_attn_func = self.flash_attn_func  # type: ignore[attr-defined]
        last.flash_attn_varlen_func = self.flash_attn_varlen_func  # type: ignore[attr-defined]
        return made

    def install(self) -> None:
        """Puts the modules into sys.modules for good."""
        sys.modules.update(self.modules())
