"""Forward, loss and backward of models whose every tensor is on a fake GPU; prints a JSON object of the outcomes.

    python -m tests.fake_gpu.models

A name maps to null, or to the error. Triton's launches are counted and not made. Two planted bugs must be errors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from tests.fake_gpu import fake_cuda  # isort: skip  (before torch)

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron.distributed.mesh import Topology
from megatron.distributed.rng_tracker import TensorParallelRNG
from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets
from megatron.kernels import attention, flash_attention
from megatron.kernels.documents import DocumentOffsets, attach_offsets
from megatron.kernels.fp8 import fp8_linear
from megatron.kernels.triton import runtime
from megatron.model.block import TransformerBlock
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.model.moe.losses import RouterLossTracker
from megatron.model.recompute import Recompute
from megatron.model.sequential_model import SequentialModel
from megatron.registry.fp8 import FP8_RECIPES
from tests.kernels.flash_package import FlashPackage
from tests.model import mixers, mixtures, sections

VOCABULARY, BATCH, LENGTH = 96, 2, 32
NEOX = {"pos_emb": "rotary", "rotary_pct": 0.25, "gpt_j_residual": True}
LLAMA = {**sections.LLAMA, "pos_emb": "rotary", "num_kv_heads": 2}


def build(
    keys: dict[str, Any],
    *,
    reset: bool = False,
    recompute: bool = False,
    options: dict[str, bool] | None = None,
    **more: Any,
) -> SequentialModel:
    """A model for the GPU, built on the CPU. options: keys of the kernels section."""
    spec = ModelSpec(
        keys.pop("section", None) or sections.model_section(**keys),
        sections.initialization_section(),
        SimpleNamespace(kernels="auto", **(options or {})),
        padded_vocab_size=VOCABULARY,
        topology=Topology.single(),
        seed=1,
        dtype=torch.bfloat16,
        device=fake_cuda.DEVICE,
        random=TensorParallelRNG(1, 0, fake_cuda.DEVICE),
        reset_attention=reset,
        reset_positions=reset and keys.get("pos_emb") != "alibi",
        recompute_attention=partial(checkpoint, use_reentrant=False) if recompute else None,
        **more,
    )
    return SequentialModel(build_layer_specs(spec))


def step(
    model: SequentialModel, *, reset: bool = False, losses: RouterLossTracker | None = None, length: int = LENGTH
) -> None:
    """One training step up to the gradients. AssertionError where a result is not on the GPU.

    reset: two documents in the first sequence, where they lie is read before the copy to the GPU.
    """
    offsets = DocumentOffsets.of(torch.tensor([[0] * 5 + [5] * (LENGTH - 5), [0] * LENGTH]))
    with fake_cuda.FakeGPU():
        fake_cuda.onto_gpu(model)
        device = fake_cuda.DEVICE
        tokens = torch.zeros(BATCH, length, dtype=torch.long, device=device)
        starts = torch.zeros_like(tokens) if reset else None
        if starts is not None:
            attach_offsets(starts, offsets.to(device))
        weights = torch.ones(length, BATCH, device=device) / tokens.numel()
        model.train()
        loss = model(tokens, None, starts, TokenTargets(tokens.t(), weights, VOCABULARY - 6))
        assert loss.device == device
        loss.backward()
        assert all(one.grad is not None and one.grad.device == device for one in model.parameters())
        if losses is not None:
            losses.take(Topology.single(), device)


def experts() -> None:
    """A mixture with both router losses and no capacity."""
    moe = mixtures.moe_section(moe_aux_loss_coeff=0.1, moe_z_loss_coeff=0.1)
    losses = RouterLossTracker(0.1, 0.1)
    losses.scale = 1.0
    step(build(dict(LLAMA), moe=moe, router_losses=losses), losses=losses)


def mamba(kind: str = "mamba") -> None:
    """Blocks of kind mamba or mamba2."""
    section, mixing = mixers.sections(kind)
    step(build({"section": section}, mixers=mixing))


def recomputed() -> None:
    """Blocks that are computed again in the backward pass, with dropout."""
    model = build({**NEOX, "hidden_dropout": 0.1})
    random = TensorParallelRNG(1, 0, fake_cuda.DEVICE)
    model.recompute = Recompute(partial(checkpoint, use_reentrant=False), random)
    step(model)


def fp8(recipe: str) -> None:
    """Products in FP8, whose rules about types, strides and the layout of scales torch checks for fake tensors too."""
    model = build({**LLAMA, "hidden_size": 256, "kv_channels": 64, "num_kv_heads": 4, "mlp_width": 384})
    for each in model.modules():
        if isinstance(each, TransformerBlock):
            for layer in each.linear_layers():
                layer.kernel = fp8_linear(FP8_RECIPES[recipe])
    step(model, length=64)


def documents() -> None:
    """Documents through torch's kernel of joined rows, which starts no flexible attention and no mask."""
    model = build(dict(LLAMA), reset=True)
    assert model.sequential[2].attention.attend is flash_attention.varlen_attention
    step(model, reset=True)


def documents_by_package() -> None:
    """Documents, a window and ALiBi through flash-attn's function for joined rows."""
    package = FlashPackage(2, core=fake_cuda.one_kernel_attention, reads_offsets=False)
    package.install()
    try:
        keys = {"pos_emb": "alibi", "sliding_window_width": 8, "attention_config": ("flash", "global")}
        model = build(keys, reset=True)
        assert model.sequential[2].attention.attend is flash_attention.flash_2_attention
        step(model, reset=True)
    finally:
        del sys.modules["flash_attn"]
    assert [name for name, _ in package.calls] == 2 * ["flash_attn_varlen_func"]
    for _, given in package.calls:
        assert given["window_size"] == (7, 0)
        assert given["max_seqlen_q"] == LENGTH
        assert given["alibi_slopes"].device == given["cu_seqlens_q"].device == fake_cuda.DEVICE
        assert (given["cu_seqlens_q"].dtype, given["cu_seqlens_q"].shape) == (torch.int32, (4,))


def documents_without_offsets() -> None:
    """Starts whose offsets were not read before the copy: the host waits for them."""
    model = build(dict(LLAMA), reset=True)
    with fake_cuda.FakeGPU():
        fake_cuda.onto_gpu(model)
        tokens = torch.zeros(BATCH, LENGTH, dtype=torch.long, device=fake_cuda.DEVICE)
        model(tokens, None, torch.zeros_like(tokens))


class Planted(torch.nn.Module):
    """A last layer with a bug before it."""

    def __init__(self, inner: torch.nn.Module, bug: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.bug = inner, bug

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(self.bug(hidden), *args, **kwargs)


def planted(bug: Callable[[Tensor], Tensor]) -> None:
    """A model with a bug before its output layer."""
    model = build(dict(LLAMA))
    model.sequential[-1] = Planted(model.sequential[-1], bug)
    step(model)


def launches_of_a_block(
    block: torch.nn.Module, run: Callable[[Tensor], Tensor], shape: tuple[int, ...], launched: list[str]
) -> int:
    """Kernels that the forward and backward pass of one block start, in the second step; those of Triton included."""
    torch.nn.functional.scaled_dot_product_attention = fake_cuda.one_kernel_attention
    with fake_cuda.FakeGPU():
        fake_cuda.onto_gpu(block)
        hidden = torch.zeros(shape, dtype=torch.bfloat16, device=fake_cuda.DEVICE, requires_grad=True)
        upstream = torch.ones_like(hidden)
        run(hidden).backward(upstream)
        block.zero_grad()
        launched.clear()
        with fake_cuda.Launches() as launches:
            run(hidden).backward(upstream)
    return launches.count + len(launched)


def our_launches(launched: list[str]) -> int:
    """Those of a Llama block of ours, those of Triton included."""
    block = build(dict(LLAMA)).sequential[2].train()
    return launches_of_a_block(block, block, (LENGTH, BATCH, sections.model_section().hidden_size), launched)


def their_launches(attention_kernel: str) -> int:
    """Those of transformers' block of the same shape."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    section = sections.model_section(**LLAMA)
    config = LlamaConfig(
        hidden_size=section.hidden_size,
        num_attention_heads=section.num_attention_heads,
        num_key_value_heads=section.num_kv_heads,
        intermediate_size=section.mlp_width,
        attn_implementation=attention_kernel,
    )
    block = LlamaDecoderLayer(config, 0).to(torch.bfloat16).train()
    rotary = LlamaRotaryEmbedding(config)

    def run(hidden: Tensor) -> Tensor:
        if not table:  # it is the same for all blocks
            table.extend(part.to(torch.bfloat16).to(fake_cuda.DEVICE) for part in angles)
        output = block(hidden, position_embeddings=tuple(table), attention_mask=None)
        return output if isinstance(output, Tensor) else output[0]

    angles = rotary(torch.zeros(1, LENGTH, section.hidden_size), torch.arange(LENGTH).unsqueeze(0))
    table: list[Tensor] = []
    return launches_of_a_block(block, run, (BATCH, LENGTH, section.hidden_size), [])


CASES: dict[str, Callable[[], None]] = {
    "quickstart": lambda: step(build({**NEOX, "hidden_dropout": 0.1, "attention_dropout": 0.1})),
    "llama": lambda: step(build(dict(LLAMA))),
    "tied": lambda: step(build({**LLAMA, "no_weight_tying": False})),
    "experts": experts,
    "mamba": mamba,
    "mamba2": partial(mamba, "mamba2"),
    "alibi": lambda: step(build({"pos_emb": "alibi"})),
    "documents": documents,
    "documents by flash-attn": documents_by_package,
    "windows": lambda: step(build({**LLAMA, "sliding_window_width": 8})),
    "sparse": lambda: step(build({**LLAMA, "attention_config": ("local", "bigbird")})),
    "softmax": lambda: step(build(dict(NEOX), options={"scaled_upper_triang_masked_softmax_fusion": True})),
    "recomputed attention": lambda: step(build({**NEOX, "attention_dropout": 0.1}, recompute=True)),
    "recomputed blocks": recomputed,
    **{f"fp8 {recipe}": partial(fp8, recipe) for recipe in FP8_RECIPES},
    "planted: the host reads a value": lambda: planted(lambda hidden: hidden * float(hidden.sum().item())),
    "planted: offsets are read from the GPU": documents_without_offsets,
    "planted: a tensor on the CPU": lambda: planted(lambda hidden: hidden + torch.ones(hidden.shape[-1])),
}


def without_compiler(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, view: Any) -> Tensor:
    """Stands for flexible attention, whose compiler asks for a real device."""
    return attention.plain_attention(q, k, v, 0.0, starts, view)


def outcome(case: Callable[[], None]) -> str | None:
    """None, or the error of a case."""
    try:
        case()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def main() -> None:
    """Runs all cases."""
    fake_cuda.pretend()
    attention.flex_attention = without_compiler
    launched: list[str] = []
    runtime.launch = lambda kernel, *_, **__: launched.append(kernel.__name__)  # type: ignore[assignment]
    found: dict[str, Any] = {name: outcome(case) for name, case in CASES.items()}
    kernels = sorted(set(launched))
    counts = {"ours": our_launches(launched), **{kind: their_launches(kind) for kind in ("eager", "sdpa")}}
    print(json.dumps({"outcomes": found, "launched": kernels, "launches of a block": counts}))


if __name__ == "__main__":
    sys.exit(main())
