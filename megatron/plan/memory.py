"""Memory of one rank by component: parameters, gradients, optimizer, activations. All in bytes.

The optimizer keeps some fp32 numbers a parameter (Adam two), and there is an fp32 copy of the parameters wherever
DeepSpeed keeps one. What each
ZeRO stage keeps follows from DeepSpeed 0.19 (bf16_optimizer.py, zero/stage_1_and_2.py, zero/stage3.py); gradients are
counted at their peak, when the last micro batch has been backpropagated.

Activations are what autograd keeps of one micro batch, times the micro batches that a pipeline stage has under way,
and the logits. Temporary buffers of single operations and the allocator's fragments come on top, so leave some memory
free.

s sequence, b micro batch, h hidden, t tensor parallel degree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron.param_table import ModelDims
from megatron.plan.mixers import kept_by_mixer
from megatron.registry import NORMS, POSITIONS, WITHOUT_ATTENTION

FP32 = 4

KEPT_WEIGHTS = 256 << 20
"""The processor's attention keeps up to this many bytes of probabilities a call, and recomputes more."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations

    def json(self) -> dict[str, int]:
        """The components and their sum."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class StateLayout:
    """What decides the memory of parameters, gradients and optimizer.

    width: bytes of a parameter. ranks: data parallel size. bucket: most elements of a reduction bucket. buffers: such
    buckets that are made outright, 0 where gradients are reduced where they stand. summed: bytes of an accumulated
    gradient. gathered: elements that ZeRO 3 may hold together. expert_parallel_size: ranks that share the experts.
    moments: fp32 numbers that the optimizer keeps of each parameter.
    """

    width: int
    zero_stage: int
    ranks: int
    bucket: int
    buffers: int = 0
    summed: int = FP32
    gathered: int = 1_000_000_000
    expert_parallel_size: int = 1
    state_per_param: float = 2


def state_memory(count: int, layout: StateLayout, experts: int = 0, trained: int | None = None) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and optimizer on this rank.

    count: parameters that every data parallel rank holds. experts: those of the experts of all ranks that share them.
    trained: how many of `count` are, where all others and the experts are frozen; all of them unless given.
    """
    width, stage = layout.width, layout.zero_stage
    local = experts // layout.expert_parallel_size
    share = -(-count // layout.ranks) + -(-local // max(1, layout.ranks // layout.expert_parallel_size))
    count += local
    parameters = width * (share + min(count, layout.gathered)) if stage == 3 else width * count
    if trained is not None:
        count, share = trained, -(-trained // layout.ranks)
    state_per_param = layout.state_per_param * FP32
    if stage == 0:
        return parameters, width * count, int(state_per_param * count) + (FP32 * count if width < FP32 else 0)
    return parameters, _zero_gradients(count, share, layout), int((state_per_param + FP32) * share)


def _zero_gradients(count: int, share: int, layout: StateLayout) -> int:
    """Bytes of gradients at their peak: at the end of a backward pass, or in the optimizer's step, which takes a flat
    fp32 copy of this rank's share.
    """
    width, whole, flat, sums = layout.width, layout.width * count, FP32 * share, layout.summed * share
    if layout.zero_stage == 1 and width < layout.summed:
        return whole + layout.summed * count  # every gradient is summed in fp32
    staged = layout.buffers * min(count, layout.bucket) * width  # no larger than what fills them
    if layout.zero_stage == 1:
        return max(whole, sums + flat) + staged
    under_way = 0 if layout.buffers else width * min(count, layout.bucket)
    if layout.zero_stage == 2 and width < layout.summed:
        return flat + max(staged, under_way)  # the sums become the copy, one parameter group after another
    return sums + max(flat, under_way) + staged


@dataclass(frozen=True)
class ActivationLayout:
    """What decides the memory of activations.

    width: bytes of an activation. recompute: blocks in a recomputed group, 0 for none; with `first_only` that many
    blocks at the start of a stage are recomputed one by one, and the others are kept. selective: the attention core is
    recomputed. kept_share: part of a group's input that stays on the device [fraction]. dropout: masks are kept. cpu:
    the kernels of the processor keep other tensors than those of an accelerator. shares: of earlier positions, what the
    attention of each block sees [fraction]; all unless given. fused_scan: of Mamba.
    """

    seq_length: int
    micro_batch: int
    model_parallel_size: int
    width: int
    recompute: int
    hidden_dropout: bool
    attention_dropout: bool
    cpu: bool
    first_only: bool = False
    selective: bool = False
    kept_share: float = 1.0
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    shares: tuple[float, ...] = ()
    fused_scan: bool = False

    @property
    def tokens(self) -> int:
        """Of this rank's part of the sequences."""
        return self.seq_length * self.micro_batch // self.context_parallel_size

    @property
    def residual_tokens(self) -> int:
        """Of this rank's part between tensor-parallel regions."""
        return self.tokens // self.model_parallel_size if self.sequence_parallel else self.tokens


def block_activations(dims: ModelDims, layout: ActivationLayout, block: int = 0) -> int:
    """Bytes that autograd keeps of one block and one micro batch. block: its number."""
    if dims.kind(block) in WITHOUT_ATTENTION:
        return _mixer(dims, layout, dims.kind(block))
    norms = 1 if dims.shared_norm else 2
    inputs = 1 if dims.gpt_j_residual else 2  # norms of a parallel residual read the same tensor
    between = _between(dims, block) * dims.hidden_size  # outputs of the norms, inputs of the linear layers
    kept = layout.residual_tokens * between * layout.width + _updates(dims, layout, block)
    kept += (
        _experts(dims, layout) if dims.has_experts(block) else layout.tokens * _mlp_width(dims, layout) * layout.width
    )
    share = layout.shares[block] if layout.shares else 1.0
    kept += _norm_inputs(dims, layout, norms, inputs) + _attention(dims, layout, share)
    if layout.hidden_dropout:
        kept += 2 * layout.residual_tokens * dims.hidden_size  # one byte of mask an element
    return kept


def _between(dims: ModelDims, block: int) -> int:
    """How many outputs of norms are kept for the gradients of what reads them."""
    attention = dims.saves_input("query_key_value")
    mlp = dims.saves_input("dense_h_to_4h") and not (dims.frozen and dims.has_experts(block))
    return int(attention or mlp) if dims.shared_norm else int(attention) + int(mlp)


def _updates(dims: ModelDims, layout: ActivationLayout, block: int) -> int:
    """Bytes that low-rank updates keep: their narrow products, and the masks of dropout with the inputs it made."""
    asked = dims.low_rank
    if asked is None:
        return 0
    widths = {"query_key_value": dims.hidden_size, "dense": dims.query_size // layout.model_parallel_size}
    if not dims.has_experts(block):
        widths |= {"dense_h_to_4h": dims.hidden_size, "dense_4h_to_h": dims.mlp_width // layout.model_parallel_size}
    inputs = [width for name, width in widths.items() if name in asked.targets]
    kept = len(inputs) * asked.rank * layout.width
    if asked.dropout > 0:
        kept += sum(inputs) * (layout.width if layout.cpu else 1)
        both = dims.shared_norm and {"query_key_value", "dense_h_to_4h"} <= set(asked.targets)
        kept += dims.hidden_size * layout.width if both else 0  # one output of a norm, dropped from twice
    return layout.tokens * kept


def _mixer(dims: ModelDims, layout: ActivationLayout, kind: str) -> int:
    """Bytes of a block without attention. RWKV's norms are counted with it."""
    kept = kept_by_mixer(
        dims,
        kind,
        tokens=layout.tokens,
        seq_length=layout.seq_length,
        micro_batch=layout.micro_batch,
        cut=layout.model_parallel_size,
        width=layout.width,
        fused=layout.fused_scan,
    )
    if kind != "rwkv":
        kept += layout.residual_tokens * dims.hidden_size * layout.width + _norm_inputs(dims, layout, norms=1, inputs=1)
    if layout.hidden_dropout:
        kept += (2 if kind == "rwkv" else 1) * layout.residual_tokens * dims.hidden_size
    return kept


def _mlp_width(dims: ModelDims, layout: ActivationLayout) -> int:
    """Features that an MLP keeps of a token, besides its input."""
    inner = dims.mlp_width // layout.model_parallel_size
    return ((4 if dims.gated else 2) - (not dims.saves_input("dense_4h_to_h"))) * inner


def _experts(dims: ModelDims, layout: ActivationLayout) -> int:
    """Bytes that a mixture keeps, where every expert is visited equally often and no token is dropped.

    For each visit the row that goes in, what the MLP keeps and the row that comes out; for each token the router's
    input in fp32 and some numbers for each expert: logits, probabilities and their logarithms.
    """
    visits = layout.tokens * dims.mixture.top_k
    features = (1 if dims.frozen else 2) * dims.hidden_size + _mlp_width(dims, layout)
    router = 0 if layout.width == FP32 or dims.frozen else dims.hidden_size * FP32
    return visits * features * layout.width + layout.tokens * (router + 4 * dims.mixture.experts * FP32)


def _norm_inputs(dims: ModelDims, layout: ActivationLayout, norms: int, inputs: int) -> int:
    """Bytes that the norms keep besides their outputs."""
    values = layout.residual_tokens * dims.hidden_size
    statistics = norms * layout.residual_tokens * 2 * FP32
    if NORMS.entry(dims.norm).fp32_on_cpu and layout.cpu:  # composed of plain operations in fp32
        return (inputs if dims.frozen else inputs + norms) * values * FP32 + statistics
    return inputs * values * layout.width + statistics


def _head_norms(dims: ModelDims, layout: ActivationLayout) -> int:
    """Bytes that the norms of queries and keys keep: their inputs, which the projection's output holds as well."""
    if not dims.qk_norm:
        return 0
    cut = layout.model_parallel_size
    values = layout.tokens * (dims.query_size + dims.kv_size) // cut
    heads = layout.tokens * (dims.num_attention_heads + dims.num_kv_heads) // cut
    wide = FP32 * 2 if NORMS.entry(dims.norm).fp32_on_cpu and layout.cpu else layout.width
    return values * wide + heads * 2 * FP32


def _attention(dims: ModelDims, layout: ActivationLayout, share: float) -> int:
    """Bytes that the attention core and the projection after it keep, and the norms before it."""
    projected = 0 if dims.saves_input("dense") else dims.query_size // layout.model_parallel_size
    return _core(dims, layout, share) + _head_norms(dims, layout) - layout.tokens * projected * layout.width


def _core(dims: ModelDims, layout: ActivationLayout, share: float) -> int:
    cut, width, tokens = layout.model_parallel_size, layout.width, layout.tokens
    query, kv = dims.query_size // cut, dims.kv_size // cut
    heads = dims.num_attention_heads // (cut * layout.context_parallel_size)
    squares = layout.micro_batch * heads * layout.seq_length**2
    rotary = "attention" in POSITIONS.entry(dims.pos_emb).enters
    if layout.selective:
        return tokens * (2 * query + 2 * kv + (0 if rotary and layout.cpu else query + 2 * kv)) * width
    if layout.attention_dropout:  # scores, probabilities and masks are made one by one
        return tokens * (4 * query + 4 * kv) * width + squares * (3 * FP32 if layout.cpu else 2 * width + 1)
    if layout.cpu:
        kept = tokens * (2 * query + 2 * kv + (0 if rotary else 2 * kv)) * width
        weights = int(squares * width // 2 * share) + tokens * 64 * dims.num_attention_heads // cut * width
        return kept + (weights if weights <= KEPT_WEIGHTS else 0)
    features = query + 2 * kv + (query + kv if rotary else 0) + 2 * query
    return tokens * (features * width + FP32 * dims.num_attention_heads // cut)


def head_activations(dims: ModelDims, layout: ActivationLayout, padded_vocab_size: int) -> int:
    """Bytes of the final norm and of the logits, whose place their gradient takes."""
    logits = layout.tokens * padded_vocab_size // layout.model_parallel_size * layout.width
    output = 0 if dims.frozen else layout.residual_tokens * dims.hidden_size * layout.width
    return output + _norm_inputs(dims, layout, norms=1, inputs=1) + logits


def stage_activations(
    dims: ModelDims,
    layout: ActivationLayout,
    *,
    blocks: Sequence[int],
    under_way: int,
    padded_vocab_size: int | None,
    pipelined: bool = False,
) -> int:
    """Bytes of a stage, at the end of a forward pass or when a group of blocks is repeated.

    blocks: their numbers. under_way: micro batches between their forward and backward pass. padded_vocab_size: None
    where the stage has no output layer. pipelined: what goes to another stage and comes from there is held as well.
    """
    sizes = [block_activations(dims, layout, block) for block in blocks]
    whole = layout.tokens * dims.hidden_size * layout.width
    boundary = int(whole * layout.kept_share)
    group = min(layout.recompute, len(sizes))
    head = 0 if padded_vocab_size is None else head_activations(dims, layout, padded_vocab_size)
    if layout.first_only:
        kept = group * boundary + sum(sizes[group:])
        repeated = group * boundary + max(sizes[:group], default=0)  # by then the others have been backpropagated
    elif group:
        kept = -(-len(sizes) // group) * boundary
        repeated = kept + max(sum(sizes[first : first + group]) for first in range(0, len(sizes), group))
    else:
        kept = repeated = sum(sizes)
    sent = (under_way + 1) * whole if pipelined else 0
    return (under_way - 1) * kept + max(kept + head, repeated) + sent
