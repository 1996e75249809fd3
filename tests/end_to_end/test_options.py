"""Every position scheme, norm, activation and kind of attention on several ranks, and for transformers.

One process is the reference: tensor parallelism with sequence parallelism, a pipeline with accumulation, and context
parallelism under ZeRO 3 give its losses and gradient norms, a pipeline goes on from what tensor parallelism saved, and
what a family of transformers can express gives its logits there; the rest is refused by the name of a key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron.checkpoint.huggingface.export import export
from megatron.checkpoint.huggingface.families import FAMILIES as THEIRS
from megatron.checkpoint.load import find_checkpoint
from megatron.checkpoint.save import Counters, Saver
from megatron.checkpoint.stored import open_model
from megatron.config import Config, Resources, resolve
from megatron.data.batch import MicroBatch
from megatron.engine.build import build_inference_engine, build_training_engine
from megatron.errors import ConfigError
from megatron.parallel.bootstrap import bootstrap
from megatron.parallel.topology import Topology
from megatron.shapes import ModelDims, tensors
from tests.distributed import run_distributed
from tests.options import FAMILIES, LAYERS, Keys

VOCABULARY, LENGTH, STEPS, SAVED = 64, 24, 4, 2
BASE: Keys = {
    "num_layers": LAYERS,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": LENGTH,
    "max_position_embeddings": LENGTH,
    "pos_emb": "rotary",
    "vocab_size": VOCABULARY,
    "make_vocab_size_divisible_by": 1,
    "init_method_std": 0.1,
    "train_batch_size": 4,
    "train_iters": STEPS,
    "gradient_clipping": 0.5,
    "optimizer": {"type": "Adam", "params": {"lr": 1.0e-3, "eps": 1.0e-6}},
    "precision": "fp32",
    "checkpoint_factor": 1,
    "distributed_backend": "gloo",
}
TENSOR: Keys = {"model_parallel_size": 2, "sequence_parallel": True}
PIPELINE: Keys = {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2}
CONTEXT: Keys = {"context_parallel_size": 2, "zero_optimization": {"stage": 3}}
Curves = dict[str, list[tuple[float, float]]]


def settings_of(family: str, name: str, **changes: object) -> Keys:
    keys = {**BASE, **FAMILIES[family][name]}
    if keys.get("num_kv_heads") == 1:  # two ranks cannot share one key head
        keys["num_kv_heads"] = 2
    return {**keys, **changes}


def batches(config: Config, topology: Topology) -> list[MicroBatch]:
    """This rank's micro batches of the one global batch."""
    tokens = torch.randint(0, VOCABULARY, (4, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    mine = tokens.chunk(topology.data.size)[topology.data.rank]
    parts = mine.chunk(config.training.gradient_accumulation_steps or 1)
    return [MicroBatch(part[:, :-1], part[:, 1:].contiguous(), torch.ones(part[:, 1:].shape)) for part in parts]


def train(rank: int, world_size: int, family: str, layout: Keys, folder: str, resumed: bool) -> Curves:
    """Loss and gradient norm of each step of each member. Saves after SAVED steps, or goes on from what is saved."""
    topology = None
    curves: Curves = {}
    for name in FAMILIES[family]:
        place = str(Path(folder) / name)
        keys = settings_of(family, name, **layout, save=place, **({"load": place} if resumed else {}))
        config = resolve([], keys, Resources(world_size)).config
        axes = config.parallelism
        topology = topology or bootstrap(
            pipe_parallel_size=axes.pipe_parallel_size,
            model_parallel_size=axes.model_parallel_size,
            context_parallel_size=axes.context_parallel_size,
            sequence_parallel=axes.sequence_parallel,
            seed=1,
            backend="gloo",
        )
        checkpoint = find_checkpoint(config, tensors(ModelDims.of(config.model), VOCABULARY)) if resumed else None
        engine = build_training_engine(config, topology, padded_vocab_size=VOCABULARY, checkpoint=checkpoint)
        if checkpoint is not None:
            state = checkpoint.optimizer()
            assert state is not None
            engine.load_optimizer(state)
        curves[name] = []
        for step in range(SAVED if resumed else 0, STEPS):
            result = engine.train_step(iter(batches(config, topology)), 1e-3)
            curves[name].append((float(result.loss), float(result.grad_norm)))
            if layout == TENSOR and step + 1 == SAVED:
                Saver(config, engine, padded_vocab_size=VOCABULARY).save(Counters(SAVED, SAVED * 4))
    return curves


def agree(found: Curves, expected: Curves) -> None:
    """1e-5 for the loss; 1e-4 for the norm, which sums squares in another order."""
    for name, curve in expected.items():
        losses, norms = ([pair[at] for pair in curve] for at in (0, 1))
        assert [pair[0] for pair in found[name]] == pytest.approx(losses, rel=1e-5), name
        assert [pair[1] for pair in found[name]] == pytest.approx(norms, rel=1e-4), name
        assert losses[-1] < losses[0], name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_is_one_process(family: str, tmp_path: Path) -> None:
    def run(world_size: int, layout: Keys, *, resumed: bool = False) -> Curves:
        found: list[Curves] = run_distributed(train, world_size, family, layout, str(tmp_path), resumed, timeout=300)
        return found[0]

    expected = run(1, {})
    agree(run(2, TENSOR), expected)
    later = {name: curve[SAVED:] for name, curve in expected.items()}
    agree(run(2, PIPELINE, resumed=True), later)
    agree(run(2, CONTEXT), expected)
    if family in ("positions", "attention"):
        agree(run(2, {**PIPELINE, "zero_optimization": {"stage": 1}}), expected)


def text() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(4))


LLAMA: Keys = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
    "rotary_pct": 1.0,
    "no_weight_tying": True,
}
NEOX: Keys = {"no_weight_tying": True}
EXPORTED: dict[tuple[str, str], tuple[str, Keys]] = {
    ("positions", "learned"): ("gpt2", {"activation": "gelu_tanh"}),
    ("positions", "learned, offset"): ("opt", {"activation": "relu"}),
    ("positions", "rotary"): ("neox", NEOX),
    ("positions", "rotary, linear"): ("llama", LLAMA),
    ("positions", "rotary, yarn"): ("llama", LLAMA),
    ("positions", "rotary, llama3"): ("llama", LLAMA),
    ("norms", "layernorm"): ("neox", NEOX),
    ("norms", "rmsnorm"): ("llama", LLAMA),
    ("norms", "rmsnorm, queries and keys"): ("qwen3", LLAMA),
    ("activations", "gelu"): ("neox", NEOX),
    ("activations", "swiglu"): ("llama", {**LLAMA, "gpt_j_residual": False, "gpt_j_tied": False}),
    ("activations", "geglu"): ("llama", {**LLAMA, "activation": "geglu", "gpt_j_residual": False, "gpt_j_tied": False}),
    ("attention", "global"): ("neox", NEOX),
    ("attention", "flash"): ("neox", NEOX),
    ("attention", "sliding window"): ("mistral", LLAMA),
}
"""(family, member) -> the family of transformers that has it, and what else such a model needs."""


@pytest.mark.parametrize(("family", "name"), EXPORTED, ids=str)
def test_transformers_says_the_same(family: str, name: str, tmp_path: Path) -> None:
    model, further = EXPORTED[family, name]
    config = resolve([], settings_of(family, name, **further, save=str(tmp_path / "ours")), Resources(1)).config
    (expected,) = run_distributed(saved_logits, 1, config)
    export(open_model(tmp_path / "ours"), tmp_path / "theirs", family_name=model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(text()).logits, expected, rtol=1e-4, atol=1e-5)


def saved_logits(rank: int, world_size: int, config: Config) -> Tensor:
    """Saves the initial weights and returns their logits for one text."""
    topology = bootstrap(pipe_parallel_size=0, model_parallel_size=1, seed=1, backend="gloo")
    engine = build_training_engine(config, topology, padded_vocab_size=VOCABULARY)
    Saver(config, engine, padded_vocab_size=VOCABULARY).save(Counters(0, 0))
    loading = config.replace(load=config.checkpoint.save)
    return build_inference_engine(loading, topology, VOCABULARY).logits(text()).clone()


REFUSED = {
    "sinusoidal": "pos_emb",
    "rotary, dynamic": "rope_scaling",
    "rpe": "pos_emb",
    "alibi": "pos_emb",
    "none": "pos_emb",
    "scalenorm": "norm",
    "non_parametric_layernorm": "norm",
    "layernorm without bias": "use_bias_in_norms",
    "layernorm, queries and keys": "use_qk_layernorm",
    "softsign": "activation",
    "glu": "activation",
    "local": "attention_config",
    "sparse_fixed": "attention_config",
    "sparse_variable": "attention_config",
    "bigbird": "attention_config",
    "bslongformer": "attention_config",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_lacks_is_refused_by_name(name: str) -> None:
    family = next(family for family, cases in FAMILIES.items() if name in cases)
    for further in (NEOX, LLAMA, {"pos_emb": "learned"}):
        keys: dict[str, Any] = {**further, **settings_of(family, name), **FAMILIES[family][name]}
        model = resolve([], keys, Resources(1)).config.model
        told = [str(ConfigError(*each.misfits(model))) for each in THEIRS.values()]
        assert all(told)
        assert any(REFUSED[name] in faults for faults in told)
