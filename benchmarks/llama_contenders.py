"""Training steps of one Llama on a GPU: ours, transformers', a plain torch loop and torchtitan's model.

All have the same shapes (rmsnorm, swiglu, rotary over the whole head, no biases, untied head), AdamW (fused), clipping
at 1.0, bfloat16 products and fp32 master weights. Ours goes through DeepSpeed; the others share one loop, in which
bfloat16 gradients are added to fp32 ones. torchtitan's model has fp32 weights under autocast.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contenders import RATE, Shape, Step, batches, plain_loop
from megatron.config import Config, Resources, resolve
from megatron.distributed.init import init_distributed
from megatron.distributed.process_group import device
from megatron.engine.builder import build_training_engine

BASE = 10000.0  # of rotary positions
EPSILON = 1e-5


def mlp_width(shape: Shape) -> int:
    """Inner width: 8/3 of the hidden size, rounded up to a multiple of 256 (of 16 for small models)."""
    multiple = 256 if shape.hidden >= 256 else 16
    return -(-8 * shape.hidden // (3 * multiple)) * multiple


def our_config(shape: Shape, *, compiled: bool = False, fp8: str | None = None) -> Config:
    """The configuration of ours. Raises ConfigError where it cannot run.

    Args:
        shape: Sizes.
        compiled: True to compile blocks.
        fp8: Recipe of products in FP8, or None.
    """
    settings: dict[str, Any] = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "intermediate_size": 3 * mlp_width(shape),
        "seq_length": shape.sequence,
        "max_position_embeddings": shape.sequence,
        "pos_emb": "rotary",
        "norm": "rmsnorm",
        "rms_norm_epsilon": EPSILON,
        "activation": "swiglu",
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
        "no_weight_tying": True,
        "precision": "bfloat16",
        "compile": compiled,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "Adam", "params": {"lr": RATE, "betas": [0.9, 0.95]}},
        "train_micro_batch_size_per_gpu": shape.micro_batch,
        "train_iters": 1000,
        "tokenizer_type": "CharLevelTokenizer",
        "data_path": "none",
        **({} if fp8 is None else {"fp8": {"recipe": fp8}}),
    }
    return resolve([], settings, Resources(1)).config


def ours(shape: Shape, *, compiled: bool = False, fp8: str | None = None) -> Step:
    """A step of our engine through DeepSpeed."""
    config = our_config(shape, compiled=compiled, fp8=fp8)
    topology = init_distributed(pipe_parallel_size=0, model_parallel_size=1, seed=1)
    engine = build_training_engine(config, topology, padded_vocab_size=shape.vocabulary)
    source = batches(shape)
    return lambda: float(engine.train_step(source, RATE).loss)


def transformers_llama(shape: Shape, *, compiled: bool = False) -> Step:
    """A step of transformers' LlamaForCausalLM (sdpa)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    architecture = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=mlp_width(shape),
        max_position_embeddings=shape.sequence,
        rms_norm_eps=EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": BASE},
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(architecture).to(device(), torch.bfloat16).train()
    forward = torch.compile(model) if compiled else model
    return plain_loop(model, lambda tokens: forward(tokens).logits, shape)


class PlainBlock(nn.Module):
    """Attention and MLP of a Llama, of torch's modules alone."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, width = shape.heads, mlp_width(shape)
        self.norms = nn.ModuleList(nn.RMSNorm(shape.hidden, EPSILON) for _ in range(2))
        self.qkv = nn.Linear(shape.hidden, 3 * shape.hidden, bias=False)
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.up = nn.Linear(shape.hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]. cos, sin: [s, d]."""
        batch, length, hidden = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * cos + _half_turned(qkv[0]) * sin, qkv[1] * cos + _half_turned(qkv[1]) * sin, qkv[2]
        core = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(core.transpose(1, 2).reshape(batch, length, hidden))
        plain, gate = self.up(self.norms[1](x)).chunk(2, dim=-1)
        y: Tensor = x + self.down(F.silu(gate) * plain)
        return y


class PlainLlama(nn.Module):
    """A Llama of torch's modules alone."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(PlainBlock(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, EPSILON)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        size = shape.hidden // shape.heads
        angles = torch.outer(torch.arange(shape.sequence), BASE ** -(torch.arange(0, size, 2) / size)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, s] -> logits [b, s, v]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def plain_torch(shape: Shape, *, compiled: bool = True) -> Step:
    """A step of a Llama of torch's modules, by default through torch.compile."""
    model = PlainLlama(shape).to(device(), torch.bfloat16).train()
    return plain_loop(model, torch.compile(model) if compiled else model, shape)


def torchtitan(shape: Shape) -> Step:
    """A step of torchtitan's Llama 3 with its blocks through torch.compile, under autocast, flexible attention."""
    model = titan_model(shape).to(device()).train()
    positions = torch.arange(shape.sequence, device=device()).expand(shape.micro_batch, -1)
    masks = model.get_attention_masks(positions)
    for block in model.layers.values():
        block.compile(fullgraph=True)

    def forward(tokens: Tensor) -> Tensor:
        with torch.autocast(device().type, torch.bfloat16):
            logits: Tensor = model(tokens, positions, masks)
        return logits

    return plain_loop(model, forward, shape)


def titan_model(shape: Shape) -> Any:
    """Torchtitan's Llama 3 of these sizes, with new weights, on the CPU."""
    from torchtitan.models import common
    from torchtitan.models.common.config_utils import get_attention_config, make_ffn_config, make_gqa_config
    from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock

    init: dict[str, Callable[..., Any]] = {"weight": lambda weight: nn.init.normal_(weight, std=0.02)}
    norm = common.RMSNorm.Config(normalized_shape=shape.hidden, eps=EPSILON, param_init={"weight": nn.init.ones_})
    rope = common.ComplexRoPE.Config(dim=shape.hidden // shape.heads, max_seq_len=shape.sequence, theta=BASE)
    block = Llama3TransformerBlock.Config(
        attention_norm=norm,
        ffn_norm=norm,
        attention=make_gqa_config(
            dim=shape.hidden,
            n_heads=shape.heads,
            wqkv_param_init=init,
            wo_param_init=init,
            inner_attention=get_attention_config("flex"),
            fuse_qkv=True,
            rope=rope,
        ),
        feed_forward=make_ffn_config(
            dim=shape.hidden, hidden_dim=mlp_width(shape), w1_param_init=init, w2w3_param_init=init
        ),
    )
    config = Llama3Model.Config(
        dim=shape.hidden,
        vocab_size=shape.vocabulary,
        tok_embeddings=common.Embedding.Config(
            num_embeddings=shape.vocabulary, embedding_dim=shape.hidden, param_init=init
        ),
        norm=norm,
        lm_head=common.Linear.Config(in_features=shape.hidden, out_features=shape.vocabulary, param_init=init),
        layers=[block] * shape.layers,
    )
    model = config.build()
    model.init_states()
    return model
