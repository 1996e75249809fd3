#!/usr/bin/env python
"""A training step and cached greedy text of each family of decoders, beside transformers', in turns on one core.

    OMP_NUM_THREADS=1 python benchmarks/families.py [FAMILY ...] [--generate] [--turns 6]

Four layers of 256 features, 4 samples of 512 tokens, a vocabulary of 8,192, fp32: forward, loss, backward and AdamW.
Attention of transformers is by sdpa; families with experts (8 of 64, or 2 of 8) are `eager` in both, or --experts
names another implementation of theirs. With --generate 8 prompts of 64 tokens and 64 new ones. Prints the least
processor time of each [ms], and theirs over ours.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from torch import Tensor

from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.checkpoint.load.loader import find_checkpoint
from megatron.config import Config, Resources, resolve
from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.init import init_distributed
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_inference_engine, build_training_engine
from megatron.errors import RunError
from megatron.inference.sampling import Sampler, Sampling
from megatron.inference.token_loop import Limits, RunningSequence, decode
from megatron.param_table import ModelDims, tensors

VOCABULARY, LENGTH, BATCH, PROMPTS, PROMPT, NEW = 8192, 512, 4, 8, 64, 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 704,
    "max_position_embeddings": 1024,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "moe_intermediate_size": 128, "num_experts_per_tok": 8}
LATENT = {
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
DENSE: dict[str, dict[str, Any]] = {
    "gpt_neox": SIZES,
    **dict.fromkeys(("llama", "mistral", "qwen2", "olmo2", "granite", "smollm3", "apertus"), GROUPED),
    "qwen3": {**GROUPED, "head_dim": 64},
    "gemma2": {**GROUPED, "head_dim": 64, "sliding_window": 128},
    "gemma3_text": {**GROUPED, "head_dim": 64, "sliding_window": 128},
    "olmo3": {**GROUPED, "sliding_window": 128},
    "phi3": GROUPED,
    "cohere2": {**GROUPED, "sliding_window": 128},
    "starcoder2": GROUPED,
    "nemotron": GROUPED,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {**GROUPED, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "num_experts": 64, "shared_expert_intermediate_size": 256},
    "qwen3_moe": {**EXPERTS, "num_experts": 64, "head_dim": 64},
    "olmoe": {**GROUPED, "num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 128},
    "glm4_moe": {**EXPERTS, "n_routed_experts": 64, "head_dim": 64},
    "deepseek_v3": {**EXPERTS, **LATENT, "n_routed_experts": 64, "q_lora_rank": None},
    "gpt_oss": {**GROUPED, "num_local_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 128, "head_dim": 64},
}
Step = Callable[[], None]


def model_of(family: str, folder: Path, experts: str) -> Any:
    """Returns the model of transformers, and writes its folder. experts: their implementation of experts."""
    torch.manual_seed(0)
    settings = {**DENSE, **MIXTURES}[family]
    config = transformers.AutoConfig.for_model(family, **settings)
    kind = "eager" if family in MIXTURES or "softcapping" in str(config.to_dict().keys()) else "sdpa"
    more = {"experts_implementation": experts} if family in MIXTURES else {}
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=kind, **more)
    model.save_pretrained(folder)
    return model


def config_of(folder: Path, **keys: Any) -> Config:
    """Returns the configuration of the folder's model."""
    settings = {**Folder.open(folder).settings(), "load": str(folder), "vocab_size": VOCABULARY, **keys}
    settings |= {"make_vocab_size_divisible_by": 1, "distributed_backend": "gloo", "precision": "fp32"}
    return resolve([], settings, Resources(1)).config


def training(folder: Path, theirs: Any, topology: Topology) -> tuple[Step, Step]:
    """Returns their step and ours, of the same weights and tokens.

    Args:
        folder: of the model.
        theirs: model of transformers.
        topology: of one rank.
    """
    tokens = torch.randint(5, VOCABULARY, (BATCH, LENGTH + 1))
    optimizer = {"type": "Adam", "params": {"lr": 1.0e-4}}
    keys = {"seq_length": LENGTH, "train_batch_size": BATCH, "train_iters": 1, "optimizer": optimizer}
    config = config_of(folder, **keys, finetune=True, gradient_clipping=0.0)
    table = tensors(ModelDims.of(config.model, config.moe, config.mixers), VOCABULARY)
    checkpoint = find_checkpoint(config, table)
    engine = build_training_engine(config, topology, padded_vocab_size=VOCABULARY, checkpoint=checkpoint)
    batch = MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(BATCH, LENGTH))
    update = torch.optim.AdamW(theirs.parameters(), lr=1e-4, fused=True)
    theirs.train()

    def step() -> None:
        engine.train_step(iter([batch]), 1e-4)

    def their_step() -> None:
        logits = theirs(tokens[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        update.step()
        update.zero_grad()

    return their_step, step


def generation(folder: Path, theirs: Any) -> tuple[Step, Step]:
    """Returns their greedy text and ours, which must be equal. folder: of the model. theirs: of transformers."""
    config = config_of(folder, user_script="generate.py", seq_length=1024).for_inference()
    engine = build_inference_engine(config, Topology.single(), VOCABULARY)
    prompts = torch.randint(5, VOCABULARY, (PROMPTS, PROMPT))
    theirs.eval()
    found: dict[str, list[list[int]]] = {}

    def step() -> None:
        limits, sampler = Limits(frozenset(), NEW, PROMPT + NEW), Sampler(Sampling(), vocab_size=VOCABULARY, seed=0)
        texts = [RunningSequence(prompt, limits, sampler) for prompt in prompts.tolist()]
        for _ in decode(engine, texts, rows=PROMPTS):
            pass
        found["ours"] = [text.tokens for text in texts]

    def their_step() -> None:
        with torch.no_grad():
            made: Tensor = theirs.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW, do_sample=False, pad_token_id=0
            )
        found["theirs"] = made.tolist()

    their_step()
    step()
    if found["ours"] != found["theirs"]:
        raise RunError.of("the texts differ", location=str(folder))
    return their_step, step


def least(turns: int, *steps: Step) -> list[float]:
    """Returns the least processor time of each step [ms]; they take turns, and the first one warms up."""
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(turns + 1):
        for step, own in zip(steps, times, strict=True):
            started = time.process_time()
            step()
            own.append(time.process_time() - started if turn else float("inf"))
    return [min(own) * 1e3 for own in times]


def main() -> None:
    """Prints a line for each family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=[*DENSE, *MIXTURES])
    parser.add_argument("--generate", action="store_true", help="greedy text in place of training")
    parser.add_argument("--turns", type=int, default=6, help="measured turns")
    parser.add_argument("--experts", default="eager", help="experts_implementation of transformers")
    args = parser.parse_args()
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    os.environ.update({**alone, **os.environ})
    transformers.logging.set_verbosity_error()
    topology = init_distributed(pipe_parallel_size=0, model_parallel_size=1, seed=1, backend="gloo")
    for family in args.families:
        with tempfile.TemporaryDirectory() as folder:
            theirs = model_of(family, Path(folder), args.experts)
            pair = generation(Path(folder), theirs) if args.generate else training(Path(folder), theirs, topology)
            other, own = least(args.turns, *pair)
        print(f"{family:12} transformers {other:7.0f} ms, ours {own:7.0f} ms: {other / own:.2f}", flush=True)


if __name__ == "__main__":
    main()
