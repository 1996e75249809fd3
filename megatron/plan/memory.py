"""Memory of one rank by component: parameters, gradients, optimizer, activations. All in bytes.

The optimizer has some fp32 numbers per parameter (Adam two), and an fp32 copy of the parameters wherever DeepSpeed has
one. The memory of each ZeRO stage is that of DeepSpeed 0.19 (bf16_optimizer.py, zero/stage_1_and_2.py, zero/stage3.py);
gradients are counted at their peak, after the backward pass of the last micro batch.

Activations are the tensors that autograd saves for one micro batch, times the micro batches in flight on a pipeline
stage, and the logits. Temporary buffers of single operations and fragmentation come on top, so leave some memory free.

s sequence, b micro batch, h hidden, t tensor parallel degree.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from megatron.adapter_config import EXPERTS_IN, EXPERTS_OUT, IN_PROJ, SHARED_IN, SHARED_OUT
from megatron.output_blocks import rows_of_a_block
from megatron.param_table import LatentDims, ModelDims
from megatron.plan.activation_layout import ActivationLayout
from megatron.plan.adapters import adapter_activations
from megatron.plan.gated_delta import delta_bytes
from megatron.plan.latents import core_bytes, latent_bytes
from megatron.plan.mixers import mixer_activations
from megatron.registry import (
    ATTENTION,
    ATTENTION_ALONE,
    FULL_ATTENTION,
    GATED_DELTA_NET,
    MIXER_BLOCKS,
    MLP_ALONE,
    NORMS,
    ONE_PLUS,
    POSITIONS,
    WITH_OUT_PROJ,
)

FP32 = 4

SAVED_PROBABILITIES = 256 << 20
"""Attention in blocks on a CPU saves up to this many bytes of probabilities per call, and recomputes more."""
COMPILED_HEAD = 16
"""Heads of a multiple of this many features have a compiled kernel on a CPU, which saves no probabilities."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    parameters: int
    """Parameters."""
    gradients: int
    """Gradients at their peak."""
    optimizer: int
    """Optimizer state and fp32 copies."""
    activations: int
    """Saved activations and logits."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations

    def json(self) -> dict[str, int]:
        """Returns the components and their sum."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class StateLayout:
    """Settings that decide the memory of parameters, gradients and optimizer."""

    width: int
    """Bytes of a parameter."""
    zero_stage: int
    """ZeRO stage."""
    ranks: int
    """Data parallel size."""
    bucket: int
    """Maximum elements of a reduction bucket."""
    buffers: int = 0
    """Buckets that are allocated eagerly; 0 for reduction in place."""
    summed: int = FP32
    """Bytes of an accumulated gradient."""
    gathered: int = 1_000_000_000
    """Maximum elements that ZeRO 3 gathers at a time."""
    expert_parallel_size: int = 1
    """Ranks that share the experts."""
    state_per_param: float = 2
    """fp32 values of optimizer state per parameter."""
    secondary: int = 0
    """Ranks that share a second copy of all weights at ZeRO 3; 0 without one."""


def state_memory(
    count: int, layout: StateLayout, experts: int = 0, trained: tuple[int, int] | None = None
) -> tuple[int, int, int]:
    """Returns the bytes of parameters, gradients and optimizer on a rank.

    Args:
        count: parameters of every data parallel rank.
        layout: the settings.
        experts: parameters of all experts of an expert parallel group.
        trained: the trainable ones among both, if all others are frozen.
    """
    width, stage = layout.width, layout.zero_stage
    count, share = _held(count, experts, layout)
    parameters = width * (share + min(count, layout.gathered)) if stage == 3 else width * count
    parameters += width * -(-count // layout.secondary) if stage == 3 and layout.secondary > 1 else 0
    if trained is not None:
        count, share = _held(*trained, layout)
    state_per_param = layout.state_per_param * FP32
    if stage == 0:
        return parameters, width * count, int(state_per_param * count) + (FP32 * count if width < FP32 else 0)
    return parameters, _zero_gradients(count, share, layout), int((state_per_param + FP32) * share)


def _held(count: int, experts: int, layout: StateLayout) -> tuple[int, int]:
    """Returns the parameters of a rank, and those of its partition by ZeRO. Arguments as of `state_memory`."""
    local = experts // layout.expert_parallel_size
    copies = max(1, layout.ranks // layout.expert_parallel_size)
    return count + local, -(-count // layout.ranks) + -(-local // copies)


def _zero_gradients(count: int, share: int, layout: StateLayout) -> int:
    """Returns the peak bytes of gradients: at the end of a backward pass, or in the optimizer's step, which makes a
    flat fp32 copy of this rank's shard.
    """
    width, full, flat, sums = layout.width, layout.width * count, FP32 * share, layout.summed * share
    if layout.zero_stage == 1 and width < layout.summed:
        return full + layout.summed * count  # every gradient is summed in fp32
    staged = layout.buffers * min(count, layout.bucket) * width  # no larger than what fills them
    if layout.zero_stage == 1:
        return max(full, sums + flat) + staged
    under_way = 0 if layout.buffers else width * min(count, layout.bucket)
    if layout.zero_stage == 2 and width < layout.summed:
        return flat + max(staged, under_way)  # the sums become the copy, one parameter group at a time
    return sums + max(flat, under_way) + staged


def block_activations(dims: ModelDims, layout: ActivationLayout, block: int = 0) -> int:
    """Returns the bytes that autograd saves for one block and one micro batch. block: its number."""
    kind = dims.kind(block)
    if kind in MIXER_BLOCKS:
        return _mixer(dims, layout, block)
    if kind in (ATTENTION_ALONE, MLP_ALONE):
        return _sublayer(dims, layout, block)
    norms = 1 if dims.shared_norm else 2
    norms *= 2 if dims.norms_before and dims.norms_after else 1
    inputs = 1 if dims.gpt_j_residual else norms  # norms of a parallel residual read the same tensor
    between = _between(dims, block) * dims.hidden_size  # outputs of the norms, inputs of the linear layers
    saved = layout.residual_tokens * between * layout.width + adapter_activations(dims, layout, block)
    saved += _mlp(dims, layout, block) + _norm_inputs(dims, layout, norms, inputs) + _attention(dims, layout, block)
    if layout.hidden_dropout:
        saved += 2 * layout.residual_tokens * dims.hidden_size  # one byte of mask per element
    return saved


def _sublayer(dims: ModelDims, layout: ActivationLayout, block: int) -> int:
    """Returns the saved bytes of a block of attention or an MLP alone: of it, of one norm and of its output."""
    attends = dims.kind(block) == ATTENTION_ALONE
    saved = _attention(dims, layout, block) if attends else _mlp(dims, layout, block)
    read = dims.saves_input("query_key_value" if attends else "dense_h_to_4h") and not (
        dims.frozen and dims.has_experts(block)
    )
    values = layout.residual_tokens * dims.hidden_size
    saved += values * layout.width * int(read) + _norm_inputs(dims, layout, norms=1, inputs=1)
    return saved + adapter_activations(dims, layout, block) + (values if layout.hidden_dropout else 0)


def _mlp(dims: ModelDims, layout: ActivationLayout, block: int) -> int:
    """Returns the saved bytes of a block's MLP or experts, without their input."""
    if dims.has_experts(block):
        return _experts(dims, layout)
    return layout.tokens * _mlp_width(dims, layout, dims.mlp_width, "dense_4h_to_h") * layout.width


def _between(dims: ModelDims, block: int) -> int:
    """Returns how many outputs of norms are saved for the weight gradients of the next layers."""
    attention = dims.saves_input("query_key_value") or (dims.output_gate and dims.saves_input("output_gate"))
    if dims.kind(block) == GATED_DELTA_NET:
        attention = dims.saves_input(IN_PROJ)
    mlp = dims.saves_input("dense_h_to_4h")
    if dims.frozen and dims.has_experts(block):
        mlp = dims.mixture.shared_width > 0 and dims.saves_input(SHARED_IN)
    return int(attention or mlp) if dims.shared_norm else int(attention) + int(mlp)


def _mixer(dims: ModelDims, layout: ActivationLayout, block: int) -> int:
    """Returns the saved bytes of a block without attention; RWKV's norms are included."""
    kind = dims.kind(block)
    saved = adapter_activations(dims, layout, block) + mixer_activations(
        dims,
        kind,
        tokens=layout.tokens,
        seq_length=layout.seq_length,
        micro_batch=layout.micro_batch,
        tp=layout.model_parallel_size,
        width=layout.width,
        fused=layout.fused_scan,
    )
    if kind != "rwkv":
        read = kind not in WITH_OUT_PROJ or dims.saves_input(IN_PROJ)
        saved += layout.residual_tokens * dims.hidden_size * layout.width * int(read)
        saved += _norm_inputs(dims, layout, norms=1, inputs=1)
    if layout.hidden_dropout:
        saved += (2 if kind == "rwkv" else 1) * layout.residual_tokens * dims.hidden_size
    return saved


def _mlp_width(dims: ModelDims, layout: ActivationLayout, width: int, outer: str) -> int:
    """Returns the features that an MLP of an inner width saves per token, without its input.

    Args:
        dims: of the model.
        layout: of the activations.
        width: inner width of the MLP.
        outer: what `lora` calls its second matrix; "" where no update is for it.
    """
    inner = width // layout.model_parallel_size
    gated = 3 if layout.cpu else 4  # the compiled kernel saves only its input, of twice the width
    gated += 2 if layout.bounded_gates else 0  # which then is a copy of the halves
    return ((gated if dims.gated else 2) - (not dims.saves_input(outer))) * inner


def _experts(dims: ModelDims, layout: ActivationLayout) -> int:
    """Returns the saved bytes of the experts, for balanced routing without dropped tokens.

    Per token and expert: the input row, the features of the MLP and the output row. Per token: the router's input in
    fp32, and per expert logits, probabilities and their logarithms. Shared experts save the features of their MLP, and
    with a gate their output.
    """
    mixture = dims.mixture
    visits = layout.tokens * mixture.top_k
    adapter = dims.low_rank if dims.low_rank is not None and dims.low_rank.of_experts else None
    features = (2 if dims.saves_input(EXPERTS_IN) else 1) * dims.hidden_size
    features += _mlp_width(dims, layout, dims.expert_width, EXPERTS_OUT)
    features += 0 if adapter is None else adapter.rank * len({EXPERTS_IN, EXPERTS_OUT} & set(adapter.targets))
    router = 0 if layout.width == FP32 or dims.frozen else dims.hidden_size * FP32
    shared = _mlp_width(dims, layout, mixture.shared_width, SHARED_OUT) + dims.hidden_size * mixture.shared_gate
    saved = visits * features * layout.width + layout.tokens * (router + 4 * mixture.experts * FP32)
    return saved + (layout.tokens * shared * layout.width if mixture.shared_width else 0)


def _norm_inputs(dims: ModelDims, layout: ActivationLayout, norms: int, inputs: int) -> int:
    """Returns the saved bytes of the norms, without their outputs."""
    values = layout.residual_tokens * dims.hidden_size
    statistics = norms * layout.residual_tokens * 2 * FP32
    width = FP32 if NORMS.entry(dims.norm).traits >= ONE_PLUS else layout.width  # these read an fp32 copy
    return inputs * values * width + statistics


def _key_width(dims: ModelDims, tensor_ranks: int) -> int:
    """Returns the features of the key heads that a rank attends to, at least one whole head."""
    return max(dims.head_dim, dims.kv_size // tensor_ranks)


def _head_norms(dims: ModelDims, layout: ActivationLayout) -> int:
    """Returns the saved bytes of the norms of queries and keys: their inputs."""
    if not dims.qk_norm:
        return 0
    tp = layout.model_parallel_size
    values = layout.tokens * (dims.query_size // tp + _key_width(dims, tp))
    if dims.qk_norm_across:  # the inputs and the normalised values, in fp32
        return 2 * values * FP32
    heads = layout.tokens * (dims.num_attention_heads // tp + _key_width(dims, tp) // dims.head_dim)
    return values * layout.width + heads * 2 * FP32


def _attention(dims: ModelDims, layout: ActivationLayout, block: int) -> int:
    """Returns the saved bytes of the attention core, its projection, and the norms of queries and keys."""
    if dims.kind(block) == GATED_DELTA_NET:
        return layout.tokens * delta_bytes(dims.mixers.delta, layout.model_parallel_size, layout.width)
    projected = 0 if dims.saves_input("dense") else dims.value_size // layout.model_parallel_size
    core = _core(dims, layout, block) if dims.latent is None else _latent_core(dims, dims.latent, layout, block)
    gate = 2 * dims.query_size // layout.model_parallel_size if dims.output_gate else 0  # its sigmoid, the product
    mixes = dims.value_residual and block > 0 and not dims.frozen  # it saves the values of both blocks
    mixed = 2 * _key_width(dims, layout.model_parallel_size) if mixes else 0
    return core + _head_norms(dims, layout) + layout.tokens * (gate + mixed - projected) * layout.width


def _latent_core(dims: ModelDims, latent: LatentDims, layout: ActivationLayout, block: int) -> int:
    """Returns the saved bytes of the core of latent attention, and of the latents and their norms."""
    around = layout.residual_tokens * latent_bytes(latent, layout.width)
    scores = layout.bounded_scores or layout.attention_dropout or dims.kind(block) in layout.kinds_with_scores
    if scores and not layout.selective:
        return around + _core(replace(dims, head_dim=latent.core), layout, block)
    rows = layout.tokens * dims.num_attention_heads // layout.model_parallel_size
    return around + rows * core_bytes(latent, layout.width, selective=layout.selective)


def _core(dims: ModelDims, layout: ActivationLayout, block: int) -> int:
    share = layout.shares[block] if layout.shares else 1.0
    tp, width, tokens = layout.model_parallel_size, layout.width, layout.tokens
    query, kv = dims.query_size // tp, _key_width(dims, tp)
    heads = dims.num_attention_heads // (tp * layout.context_parallel_size)
    squares = layout.micro_batch * heads * layout.seq_length**2
    rotary = "attention" in POSITIONS.entry(dims.pos_emb).enters
    if layout.selective:
        return tokens * (2 * query + 2 * kv + (0 if rotary and layout.cpu else query + 2 * kv)) * width
    if layout.bounded_scores:  # tanh of the scores and probabilities in fp32, keys and values of every query head
        return tokens * 5 * query * width + squares * (2 * FP32 + (0 if width == FP32 else width))
    copies = 4 * query + 4 * kv if dims.latent is None else 5 * query
    if layout.attention_dropout:  # scores, probabilities and masks are separate tensors
        return tokens * copies * width + squares * (3 * FP32 if layout.cpu else 2 * width + 1)
    if dims.kind(block) in layout.kinds_with_scores:
        return tokens * copies * width + squares * width
    compiled = dims.head_dim % COMPILED_HEAD == 0 and ATTENTION.entry(dims.kind(block)).traits >= FULL_ATTENTION
    if layout.ring_size > 1 or layout.sinks or (layout.cpu and compiled):
        features = 2 * query + 2 * kv + (query + kv if rotary else 0)
        return tokens * (features * width + FP32 * dims.num_attention_heads // tp)
    if layout.cpu:
        saved = tokens * (2 * query + 2 * kv + (0 if rotary else 2 * kv)) * width
        weights = int(squares * width // 2 * share) + tokens * 64 * dims.num_attention_heads // tp * width
        return saved + (weights if weights <= SAVED_PROBABILITIES else 0)
    features = query + 2 * kv + (query + kv if rotary else 0) + 2 * query
    return tokens * (features * width + FP32 * dims.num_attention_heads // tp)


def ring_buffers(dims: ModelDims, layout: ActivationLayout) -> int:
    """Returns the bytes of what passes from rank to rank in the backward pass of a block: keys and values on their way
    and coming, in fp32 their gradients at home, on their way and coming, and the gradient of the queries.
    """
    if layout.ring_size == 1:
        return 0
    query, kv = dims.query_size // layout.model_parallel_size, _key_width(dims, layout.model_parallel_size)
    return layout.tokens * (4 * kv * layout.width + (6 * kv + query) * FP32)


def head_activations(dims: ModelDims, layout: ActivationLayout, padded_vocab_size: int) -> int:
    """Returns the bytes of the final norm and of the logits, whose memory their gradient reuses.

    Where the loss is computed in blocks, there are the logits of one block, and the gradients of the hidden states and
    of the matrix.
    """
    vocabulary = padded_vocab_size // layout.model_parallel_size
    norm = _norm_inputs(dims, layout, norms=1, inputs=1)
    output = layout.residual_tokens * dims.hidden_size * layout.width
    if not layout.loss_in_blocks:
        tanh = layout.tokens * vocabulary * FP32 if layout.bounded_logits else 0
        return (output if dims.trains_head else 0) + norm + layout.tokens * vocabulary * layout.width + tanh
    rows = min(layout.tokens, rows_of_a_block(vocabulary, cpu=layout.cpu))
    hidden = layout.tokens * dims.hidden_size * layout.width
    gathered = hidden if layout.residual_tokens < layout.tokens else 0
    width = FP32 if rows < layout.tokens else layout.width
    matrix = vocabulary * dims.hidden_size * width if dims.trains_head else 0
    logits = rows * vocabulary * layout.width * (2 if layout.bounded_logits else 1)  # with the slopes of the bound
    return output + gathered + norm + hidden + matrix + logits
