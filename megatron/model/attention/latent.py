"""Multi-head latent attention (arXiv:2405.04434, section 2.1): keys and values of all heads from one latent a token.

A token's latent [r] is normed and projected up to the keys and values of every head. Rotary positions cannot go through
that projection, so each query head has further features that are rotated, and the token has one rotated key for all
heads. Queries may have a latent of their own. A head's scores are (q_nope k_nope + q_rope k_rope) * scale.

The cache has the latent and the rotated key of each token, r + p numbers, and no heads. New tokens behind it attend to
latents (equations 10 to 12 of section 2.1.2): the projection up is absorbed into the query and into the output,
(q_nope W_k) latent = q_nope (W_k latent).

Tensor-parallel ranks have heads of the projections up; the projections down and their norms are on every rank, on its
shard of the sequence where there is sequence parallelism.

Kernels take heads of one width, so the narrower of (queries and keys) and values is filled with zeros, which changes no
result.

Shapes: s sequence on this rank, b micro batch, h hidden, n heads, t tensor-parallel degree, r rank of the latent, e
features without positions and p rotated features of a head, v features of a value head, d the larger of e + p and v.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.distributed.param_init import ParamFactory, zeros
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.distributed.tensor_parallel.sequence_parallel import Regather, gather_or_copy_to_tp
from megatron.kernels.attention import masked_attention
from megatron.kernels.attention_patterns import AttentionMask
from megatron.model.attention.self_attention import SelfAttention, visible_mask
from megatron.model.block_spec import BlockSpec
from megatron.model.kv_cache import KVCache


class DownProjection(nn.Module):
    """y = x Wᵀ + bias, with the full W on every rank; gradients are those of its shard of the sequence, then summed."""

    def __init__(self, inputs: int, outputs: int, source: ParamFactory, spec: BlockSpec) -> None:
        """Creates the parameters ``weight`` [out, in] and ``bias`` [out].

        Args:
            inputs: width of the input.
            outputs: width of the output.
            source: creates the parameters.
            spec: has the initial values, and whether there is a bias.
        """
        super().__init__()
        self.weight = source.replicated("weight", (outputs, inputs), spec.init_fn)
        self.bias = source.replicated("bias", (outputs,), zeros) if spec.dims.has_qkv_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(x, self.weight, self.bias)


class LatentSelfAttention(SelfAttention):
    """Causal attention of block ``number`` (from 0) over latents.

    Raises ValueError if the heads do not divide by the tensor-parallel degree.
    """

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__(number, spec, source)
        dims, latent = spec.dims, spec.dims.latent
        assert latent is not None
        if dims.num_attention_heads % source.axis.size:
            raise ValueError(f"{dims.num_attention_heads} heads do not divide by {source.axis.size} ranks")
        self.latent = latent
        self.axis = source.axis
        self.query_width = latent.query_head

        def up(name: str, inputs: int, width: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                inputs,
                dims.num_attention_heads * width,
                source.of(name),
                init_fn=spec.init_fn,
                bias=False,
                kernel=spec.kernels.linear,
            )

        if latent.query_rank:
            self.q_down_proj = DownProjection(dims.hidden_size, latent.query_rank, source.of("q_down_proj"), spec)
            self.q_layernorm = spec.norm_of_shard(latent.query_rank)
            self.q_up_proj = up("q_up_proj", latent.query_rank, latent.query_head)
        else:
            self.q_proj = up("q_proj", dims.hidden_size, latent.query_head)
        self.kv_down_proj = DownProjection(dims.hidden_size, latent.cached, source.of("kv_down_proj"), spec)
        self.kv_layernorm = spec.norm_of_shard(latent.rank)
        self.kv_up_proj = up("kv_up_proj", latent.rank, latent.plain + latent.value)
        self.kv_up_proj.keeps_weight = True
        self.dense = RowParallelLinear(
            dims.num_attention_heads * latent.value,
            dims.hidden_size,
            source.of("dense"),
            init_fn=spec.output_init_fn,
            bias=dims.attention_bias,
            kernel=spec.kernels.linear,
            lora=spec.lora_specs.get("dense"),
        )

    def linear_layers(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """Returns the layers with a sharded weight."""
        queries = self.q_up_proj if self.latent.query_rank else self.q_proj
        return [queries, self.kv_up_proj, self.dense]

    def inner(
        self,
        x: Tensor,
        cache: KVCache | None,
        document_starts: Tensor | None = None,
        regather: Regather | None = None,
    ) -> Tensor:
        """[s, b, h] -> the input of ``dense`` [s, b, n/t * v].

        Args:
            x: input of the block's attention.
            cache: latents and rotated keys of earlier positions, or None.
            document_starts: position at which each token's document starts [b, s], or None.
            regather: of the region that the caller ends.
        """
        sizes = self.latent
        if sizes.query_rank:
            q = self.q_up_proj(self.q_layernorm(self.q_down_proj(x)), regather)
        else:
            q = self.q_proj(x, regather)
        q = q.unflatten(-1, (self.heads, self.query_width)).permute(1, 2, 0, 3)  # [b, n/t, s, e + p]
        q_nope, q_rope = q.split([sizes.plain, sizes.rotary], dim=-1)
        latent, k_rope = self.kv_down_proj(x).split([sizes.rank, sizes.rotary], dim=-1)
        latent = self.kv_layernorm(latent)  # [s, b, r], with sequence parallelism [s/t, b, r]
        k_rope = gather_or_copy_to_tp(k_rope, self.axis).permute(1, 0, 2).unsqueeze(1)  # [b, 1, s, p]
        if self.positions is not None:
            where = self.positions_of(q, document_starts) if cache is None else _after(cache, q.shape[2])
            q_rope, k_rope = self.positions.pair(q_rope, k_rope, *where)
        if cache is None:
            heads = self._heads(q_nope, q_rope, latent, k_rope, regather)
            core = self.core(*heads, document_starts)[..., : sizes.value]
        else:
            core = self._attend_cached(q_nope, q_rope, latent, k_rope, cache)
        return core.permute(2, 0, 1, 3).flatten(2)  # [s, b, n/t * v]

    def _heads(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, regather: Regather | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values of this rank's heads, all [b, n/t, s, d].

        Args:
            q_nope: queries without positions [b, n/t, s, e].
            q_rope: rotated queries [b, n/t, s, p].
            latent: [s, b, r], with sequence parallelism [s/t, b, r].
            k_rope: rotated keys [b, 1, s, p].
            regather: of the region that the caller ends.
        """
        sizes = self.latent
        pairs = self.kv_up_proj(latent, regather).unflatten(-1, (self.heads, sizes.plain + sizes.value))
        k_nope, v = pairs.permute(1, 2, 0, 3).split([sizes.plain, sizes.value], dim=-1)  # [b, n/t, s, e], [.., v]
        q = _joined(q_nope, q_rope, sizes.core) * self._factor(sizes.core)
        k = _joined(k_nope, k_rope.expand(-1, self.heads, -1, -1), sizes.core)
        return q, k, _filled(v, sizes.core)

    def _attend_cached(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, cache: KVCache) -> Tensor:
        """Attends from new positions to the cache: shapes as in ``_heads`` -> [b, n/t, s, v].

        Args:
            q_nope: queries without positions.
            q_rope: rotated queries.
            latent: latents of the new positions.
            k_rope: rotated keys of the new positions.
            cache: latents and rotated keys of earlier positions.
        """
        sizes, length = self.latent, q_nope.shape[2]
        slots, is_first = cache.slots(length), cache.length == 0
        view = self.view(slots.end, q_nope.device)
        stored = cache.update_latents(self.number, _joined(latent.transpose(0, 1), k_rope.squeeze(1), sizes.cached))
        if is_first:  # no earlier tokens, so that heads of their own cost less than latents
            q, k, v = self._heads(q_nope, q_rope, latent, k_rope, None)
            return self.attend(q, k, v, 0.0, None, view)[..., : sizes.value]
        weights = self.kv_up_proj.weight.view(self.heads, sizes.plain + sizes.value, sizes.rank)
        to_keys, to_values = weights.split([sizes.plain, sizes.value], dim=1)  # [n/t, e, r], [n/t, v, r]
        q = _joined(q_nope @ to_keys, q_rope, sizes.cached) * self._factor(sizes.cached)  # [b, n/t, s, r + p]
        q = q.flatten(1, 2).unsqueeze(1).to(stored.dtype)  # [b, 1, n/t s, r + p]
        k, v = stored.unsqueeze(1), stored[..., : sizes.rank].unsqueeze(1)  # [b, 1, end, r + p]
        shown = slots.mask
        if view is not None or (shown is None and length > 1):
            shown = visible_mask(view or AttentionMask(), slots, length, q.device)
        if shown is None:
            core = F.scaled_dot_product_attention(q, k, v)
        else:  # of every head
            shown = shown.expand(-1, self.heads, -1, -1).flatten(1, 2).unsqueeze(1)
            core = masked_attention(q, k, v, shown, view)
        core = core.view(-1, self.heads, length, sizes.rank).to(q_nope.dtype)
        return core @ to_values.transpose(1, 2)  # [b, n/t, s, v]

    def _factor(self, width: int) -> float:
        """Returns the factor of queries, whose scores the kernels divide by the root of that width."""
        return self.query_factor * math.sqrt(width / self.query_width)


def _after(cache: KVCache, length: int) -> tuple[int, Tensor | None]:
    """Returns the first position of that many new ones, and the positions [b, s] of rows of different lengths."""
    return cache.length, cache.slots(length).positions


def _joined(first: Tensor, second: Tensor, width: int) -> Tensor:
    """Returns both side by side, filled with zeros up to the width."""
    return _filled(torch.cat((first, second), dim=-1), width)


def _filled(x: Tensor, width: int) -> Tensor:
    """Returns x with zeros behind its last features, up to the width."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
