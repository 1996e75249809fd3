"""A small model with random weights, the engine that generation and evaluation see, and its twin in transformers."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.config import Config, resolve
from megatron.distributed.mesh import Topology
from megatron.model.kv_cache import KVCache
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.model.sequential_model import SequentialModel

SEQUENCE = 48
HEADS, HIDDEN, LAYERS = 4, 32, 3


def small_config(**flags: object) -> Config:
    """Rotary positions on half of each head, parallel residual: the shape of the Pythia models."""
    return resolve(
        [],
        {
            "num_layers": LAYERS,
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "seq_length": SEQUENCE,
            "max_position_embeddings": SEQUENCE,
            "pos_emb": "rotary",
            "rotary_pct": 0.5,
            "gpt_j_residual": True,
            "no_weight_tying": True,
            "norm": "layernorm",
            "tokenizer_type": "CharLevelTokenizer",
            "train_batch_size": 1,
            "train_micro_batch_size_per_gpu": 1,
            "train_iters": 1,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            **flags,
        },
    ).config


class SmallEngine:
    """The two methods of an engine, over one module in this process. Counts its forward passes."""

    def __init__(self, config: Config, vocabulary: int = 512, *, scale: float = 4.0) -> None:
        plan = build_layer_specs(
            ModelSpec(
                config.model,
                config.initialization,
                config.kernels,
                padded_vocab_size=vocabulary,
                topology=Topology.single(),
                seed=11,
                dtype=torch.float32,
            )
        )
        self.module = SequentialModel(plan).eval()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(5)
            for name, parameter in self.module.named_parameters():
                parameter.mul_(scale)  # larger weights than training starts with, so that no two tokens are near a tie
                if name.endswith("bias"):
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        self.config = config
        self.calls = 0

    @torch.no_grad()
    def logits(self, tokens: Tensor, cache: KVCache | None = None, at: Tensor | None = None) -> Tensor:
        self.calls += 1
        logits = self.module(tokens, cache).transpose(0, 1).float()
        return logits if at is None else logits.flatten(0, 1)[at]

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        model = self.config.model
        heads = model.num_attention_heads
        return KVCache(model.num_layers, batch, model.num_kv_heads, max_length, model.hidden_size // heads)


def transformers_twin(engine: SmallEngine, vocabulary: int = 512) -> torch.nn.Module:
    """Transformers' own GPT-NeoX model with the same weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    twin = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocabulary,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=4 * HIDDEN,
            hidden_act="gelu",
            rotary_pct=0.5,
            max_position_embeddings=SEQUENCE,
            use_parallel_residual=True,
            tie_word_embeddings=False,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        )
    )
    twin.load_state_dict({_twin_name(name): value for name, value in engine.module.state_dict().items()}, strict=True)
    return twin.eval()


def _twin_name(name: str) -> str:
    _, layer, rest = name.split(".", 2)
    number = int(layer)
    if number == 0:
        return "gpt_neox.embed_in.weight"
    if number == LAYERS + 3:
        return "gpt_neox.final_layer_" + rest
    if number == LAYERS + 4:
        return "lm_head.weight"
    rest = rest.replace("mlp.linear1", "mlp.dense_h_to_4h").replace("mlp.linear2", "mlp.dense_4h_to_h")
    return f"gpt_neox.layers.{number - 2}.{rest}"
