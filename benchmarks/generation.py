"""Greedy decoding beside transformers.generate and, where it is installed, litgpt: the same weights, in one process.

    python benchmarks/generation.py [--precision fp32 bfloat16] [--batch 1 8] [--rounds 3]

12 layers x 768, vocabulary 50,304, prompts of 64 tokens and 128 new ones, or others: `--prompt 512 --new 1` times the
prompt. Each round runs all contenders one after the other, so that a machine whose speed drifts slows all; the figure
is the best of the rounds. On a machine that others use as well, `--processor-time` with one thread counts the time that
this process had.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from megatron.config import Config, resolve
from megatron.distributed.mesh import Topology
from megatron.engine.inference_engine import InferenceEngine, build_stage, pack
from megatron.inference.sampling import Sampler, Sampling
from megatron.inference.token_loop import Limits, RunningSequence, decode
from megatron.model.kv_cache import KVCache, cache_dtype
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec

LAYERS, HIDDEN, HEADS, VOCABULARY, PROMPT, NEW = 12, 768, 12, 50304, 64, 128
DTYPES = {"fp32": torch.float32, "bfloat16": torch.bfloat16}
Generate = Callable[[Tensor, int], list[list[int]]]
"""Prompts [b, s] and a number of tokens -> so many new tokens of each."""


def _config() -> Config:
    return resolve(
        [],
        {
            "num_layers": LAYERS,
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "seq_length": 2048,
            "max_position_embeddings": 2048,
            "pos_emb": "rotary",
            "rotary_pct": 0.25,
            "gpt_j_residual": True,
            "no_weight_tying": True,
            "norm": "layernorm",
            "tokenizer_type": "CharLevelTokenizer",
            "train_batch_size": 1,
            "train_micro_batch_size_per_gpu": 1,
            "train_iters": 1,
        },
    ).config


def twin(dtype: torch.dtype) -> torch.nn.Module:
    """Transformers' GPT-NeoX with random weights of Pythia-160M's shape, larger than usual so that ties are rare."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(1)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=4 * HIDDEN,
            rotary_pct=0.25,
            max_position_embeddings=2048,
            use_parallel_residual=True,
            initializer_range=0.06,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        )
    )
    return model.to(dtype).eval()


def our_engine(model: torch.nn.Module, dtype: torch.dtype) -> InferenceEngine:
    """This project's engine with the twin's weights."""
    config, topology = _config(), Topology.single()
    plan = build_layer_specs(
        ModelSpec(
            config.model,
            config.initialization,
            config.kernels,
            padded_vocab_size=VOCABULARY,
            topology=topology,
            seed=1,
            dtype=dtype,
            device=torch.device("cpu"),
        )
    )
    stage = build_stage(plan, topology)
    weights = model.state_dict()
    with torch.no_grad():
        for key, parameter in stage.parameters.items():
            parameter.copy_(weights[_twin_name(key)])
    pack(stage)
    size = HIDDEN // HEADS
    cache_type = cache_dtype(dtype, torch.device("cpu"), size)
    return InferenceEngine(
        stage,
        topology,
        lambda batch, length: KVCache(LAYERS, batch, HEADS, length, size, dtype=cache_type),
        HIDDEN,
        VOCABULARY,
        dtype,
    )


def ours(model: torch.nn.Module, dtype: torch.dtype) -> Generate:
    """This project's token loop on the twin's weights."""
    engine = our_engine(model, dtype)

    def generate(prompts: Tensor, new: int) -> list[list[int]]:
        limits = Limits(frozenset(), new, prompts.shape[1] + new)
        sampler = Sampler(Sampling(), vocab_size=VOCABULARY, seed=0)
        texts = [RunningSequence(prompt, limits, sampler) for prompt in prompts.tolist()]
        for _ in decode(engine, texts, rows=len(texts)):
            pass
        return [text.tokens[prompts.shape[1] :] for text in texts]

    return generate


def _twin_name(key: str) -> str:
    layer, rest = key.split(".", 1)
    number = int(layer)
    if number == 0:
        return "gpt_neox.embed_in.weight"
    if number == LAYERS + 3:
        return "gpt_neox.final_layer_" + rest
    if number == LAYERS + 4:
        return "lm_head.weight" if "lm_head" not in rest else rest
    rest = rest.replace("mlp.linear1", "mlp.dense_h_to_4h").replace("mlp.linear2", "mlp.dense_4h_to_h")
    return f"gpt_neox.layers.{number - 2}.{rest}"


def transformers_generate(model: Any) -> Generate:
    """transformers.generate with its cache, greedy."""

    def generate(prompts: Tensor, new: int) -> list[list[int]]:
        with torch.inference_mode():
            made = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
        return made[:, prompts.shape[1] :].tolist()

    return generate


def litgpt_generate(dtype: torch.dtype) -> Generate | None:
    """Litgpt's own loop over its pythia-160m; None where litgpt is not installed. One text at a time is what it does,
    so a batch goes through its model as one tensor here.
    """
    try:
        from litgpt import GPT
        from litgpt import Config as LitConfig
    except ImportError:
        return None
    config = LitConfig.from_name("pythia-160m", padded_vocab_size=VOCABULARY)
    model = GPT(config).to(dtype).eval()

    def generate(prompts: Tensor, new: int) -> list[list[int]]:
        with torch.inference_mode():
            length = prompts.shape[1]
            model.max_seq_length = length + new
            model.set_kv_cache(batch_size=len(prompts), dtype=dtype)
            at, fresh, made = torch.arange(length), prompts, []
            for _ in range(new):
                fresh = model(fresh, at)[:, -1:].argmax(-1)
                made.append(fresh)
                at = at[-1:] + 1
            return torch.cat(made, 1).tolist()

    return generate


def main() -> None:
    """Prints a line for each precision and batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="texts side by side")
    parser.add_argument("--processor-time", action="store_true", help="count processor time, not time on the wall")
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=NEW, help="new tokens of a text; 1 times the prompt alone")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    print(f"{LAYERS} layers x {HIDDEN}, vocabulary {VOCABULARY}, {torch.get_num_threads()} threads", flush=True)
    for name in asked.precision:
        model = twin(DTYPES[name])
        contenders = {"ours": ours(model, DTYPES[name]), "transformers": transformers_generate(model)}
        if (litgpt := litgpt_generate(DTYPES[name])) is not None:
            contenders["litgpt"] = litgpt
        for batch in asked.batch:
            clock = time.process_time if asked.processor_time else time.perf_counter
            prompts = torch.randint(0, VOCABULARY, (batch, asked.prompt), generator=torch.Generator().manual_seed(7))
            _compare(name, prompts, contenders, asked.new, asked.rounds, clock)


def _compare(
    name: str, prompts: Tensor, contenders: dict[str, Generate], new: int, rounds: int, clock: Callable[[], float]
) -> None:
    best, batch = dict.fromkeys(contenders, float("inf")), len(prompts)
    for _ in range(rounds):
        made = {}
        for contender, generate in contenders.items():
            started = clock()
            made[contender] = generate(prompts, new)
            best[contender] = min(best[contender], clock() - started)
    same = sum(a == b for a, b in zip(made["ours"], made["transformers"], strict=True))
    rates = ", ".join(f"{contender} {batch * new / spent:.1f}" for contender, spent in best.items())
    fastest = min(spent for contender, spent in best.items() if contender != "ours")
    print(
        f"{name:8s} batch {batch}: {fastest / best['ours']:.2f}x the better, "
        f"{best['transformers'] / best['ours']:.2f}x transformers ({rates} tokens/s; {same} of {batch} texts equal)",
        flush=True,
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
