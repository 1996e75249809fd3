"""What every kind of block and of MLP must do, whatever it is: one run of each member through every layout.

Training on one process, cut over 2 tensor-parallel ranks (with the sequence), in 2 pipeline stages, with recomputation,
under ZeRO 3, and continued from a checkpoint over 2 data-parallel ranks with ZeRO 2, gives the same losses and gradient
norms; the checkpoint writes the same text with and without a cache; exporting it works, or names the key in the way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.huggingface.export_model import export
from megatron.checkpoint.load.stored_model import open_model
from megatron.checkpoint.offline.reshard import reshape
from megatron.config import Resources, resolve
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_inference_engine
from megatron.errors import ConfigError
from megatron.inference.sampling import Sampler, Sampling
from megatron.inference.token_loop import Limits, RunningSequence, decode
from megatron.registry import GATED_DELTA_NET, MLP_ALONE, MLPS, ROUTERS, WITHOUT_ATTENTION
from tests.contracts.shipped import CONFIGS
from tests.end_to_end.runs import BASE, run, run_files, same, series
from tests.layouts import pick

SHORT: dict[str, Any] = {"train_iters": 4, "eval_interval": 4, "eval_iters": 1, "num_kv_heads": 4, "num_layers": 2}
MIXTURE = {"moe_num_experts": 4, "moe_top_k": 2, "use_bias_in_mlp": False}
MAMBA2 = {"mamba_head_dim": 16, "mamba_num_groups": 2, "mamba_state_dim": 24, "mamba_dt_limit": [0.01, None]}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
MEMBERS: dict[str, dict[str, Any]] = {
    "dense": {},
    **{f"moe {router}": {**MIXTURE, "moe_router_type": router} for router in ROUTERS.names},
    **{
        kind: {
            "attention_config": [[[kind], "all"]],
            "activation": "gelu",
            "pos_emb": "none" if kind.startswith("mamba") else "learned",
            "norm": "rmsnorm" if kind.startswith("mamba") else "layernorm",
            "reset_attention_mask": True,
            **(MAMBA2 if kind == "mamba2" else {}),
            **(DELTA if kind == GATED_DELTA_NET else {}),
        }
        for kind in sorted(WITHOUT_ATTENTION - {MLP_ALONE})
    },
    "gated delta net, gated attention, experts": {
        **MIXTURE,
        **DELTA,
        "attention_config": [[["gated_delta_net", "global"], "all"]],
        "moe_router_type": "topk",
        "attention_output_gate": True,
    },
    "moe, parallel residual": {**MIXTURE, "moe_router_type": "topk", "gpt_j_residual": True},
    "moe, mamba2, attention, mlp": {
        **MIXTURE,
        **MAMBA2,
        "num_layers": 4,
        "attention_config": ["mamba2", "mlp", "attention", "mlp"],
        "moe_router_type": "topk",
        "moe_layer_freq": [0, 0, 0, 1],
        "reset_attention_mask": True,
    },
    "mamba and attention": {"attention_config": [[["mamba", "global"], "all"]], "norm": "layernorm"},
}
LAYOUTS = pick("tensor 2, sequence", "pipeline 2", "recomputed", "data 2, ZeRO 3")
EXPORTED = {"dense": "llama", "mamba": "mamba", "mamba2": "mamba2"}


def test_every_member_is_here() -> None:
    reported = " ".join(MEMBERS)
    assert all(name in reported for name in (*MLPS.names, *ROUTERS.names, *WITHOUT_ATTENTION))


@pytest.mark.parametrize("member", MEMBERS)
def test_member(member: str, dataset: str, tmp_path: Path) -> None:
    settings = {**SHORT, **MEMBERS[member], "data_path": dataset}
    save = {"save": str(tmp_path / "save"), "checkpoint_factor": 2}
    single = run(1, tmp_path / "single", **settings, **save)
    for name, (ranks, layout) in LAYOUTS.items():
        if name.startswith("data") and "sinkhorn" in member:
            continue  # it balances the tokens of one rank
        same(run(ranks, tmp_path / name, **settings, **layout), single, name)
    elsewhere = {"load": str(tmp_path / "save"), "iteration": 2, "zero_optimization": {"stage": 2}}
    if "sinkhorn" not in member:
        same(run(2, tmp_path / "elsewhere", **settings, **elsewhere), single, "elsewhere", start=2)
    cached_is_uncached(settings, tmp_path / "save")
    reshaped_is_the_same(tmp_path)
    exported_or_refused(member, settings, tmp_path)


def cached_is_uncached(settings: dict[str, Any], load: Path) -> None:
    """Greedy text of two prompts of different lengths, token by token, and its scores."""
    reported = {**BASE, **settings, "load": str(load), "user_script": "generate.py"}
    config = resolve([], reported, Resources(1)).config.for_inference()
    engine = build_inference_engine(config, Topology.single(), 512)
    found = []
    for cached in (True, False):
        limits = Limits(ends=frozenset(), maximum_tokens=6, seq_length=32)
        texts = [RunningSequence(prompt, limits, sampler()) for prompt in ([1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11])]
        steps = [
            (texts.index(step.text), step.token, step.logits) for step in decode(engine, texts, rows=2, cached=cached)
        ]
        found.append(steps)
    for (row, token, scores), (other_row, other_token, other_scores) in zip(*found, strict=True):
        assert (row, token) == (other_row, other_token)
        torch.testing.assert_close(scores, other_scores, rtol=1e-4, atol=1e-4)


def reshaped_is_the_same(folder: Path) -> None:
    """Cut for 2 tensor-parallel ranks and 2 stages, offline, and put together again."""
    reshape(folder / "save", folder / "reshaped", model_size=2, pipe_size=2)
    before, after = open_model(folder / "save"), open_model(folder / "reshaped")
    assert after.weights.model_size == 2
    assert all(torch.equal(before.full_tensor(shape), after.full_tensor(shape)) for shape in before.table)


def sampler() -> Sampler:
    return Sampler(Sampling(temperature=0.0), vocab_size=512, seed=1)


def exported_or_refused(member: str, settings: dict[str, Any], folder: Path) -> None:
    stored = open_model(folder / "save")
    if member in EXPORTED:
        assert export(stored, folder / "export").family == EXPORTED[member]
        return
    key = "moe_|use_qk_layernorm|gpt_j_residual" if member.startswith("moe") else "attention_config"
    with pytest.raises(ConfigError, match=key):
        export(stored, folder / "export")


MIXTRAL = {**MIXTURE, "moe_router_type": "topk", "moe_normalize_top_k": True, "use_bias_in_attn_linear": False}


def test_mixtral_is_exported(dataset: str, tmp_path: Path) -> None:
    """A mixture that was trained here, in the form that transformers knows."""
    run(
        2,
        tmp_path,
        **SHORT,
        **MIXTRAL,
        data_path=dataset,
        save=str(tmp_path / "save"),
        moe_expert_parallel_size=2,
        checkpoint_factor=4,
    )
    assert export(open_model(tmp_path / "save"), tmp_path / "export").family == "mixtral"


SHIPPED = ("mamba/130M", "rwkv/169M", "moe/125M-8-experts")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_trains_small(name: str, dataset: str, tmp_path: Path) -> None:
    """Its blocks, parts and optimizer at a width of 64, 4 blocks, on two ranks: the loss falls."""
    small = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "vocab_size": None}
    small |= {"max_position_embeddings": 32, "tokenizer_type": "CharLevelTokenizer", "train_iters": 30}
    small |= {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "warmup": 0.1, "lr_decay_iters": 30}
    small |= {"data_path": dataset, "log_interval": 1, "eval_interval": 30, "eval_iters": 1, "num_workers": 0}
    small |= {"checkpoint_factor": None, "peak_theoretical_tflops": 1.0, "split": "90,5,5"}
    if name.startswith("moe"):
        small["moe_expert_parallel_size"] = 2
    losses = series(run_files([CONFIGS / f"{name}.yml"], 2, tmp_path, **small), "train/lm_loss")
    assert losses[-1] < losses[0] - 0.5
