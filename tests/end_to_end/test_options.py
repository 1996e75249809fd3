"""Every position scheme, norm, activation and kind of attention on several ranks, and for transformers.

One process is the reference: tensor parallelism with sequence parallelism, a pipeline with accumulation (ZeRO 0 and 1),
and context parallelism under ZeRO 3 give its losses and gradient norms; a pipeline goes on from what tensor parallelism
saved; what a family of transformers can express gives its logits there, and the rest is refused by the name of a key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron.checkpoint.huggingface.export_model import export
from megatron.checkpoint.huggingface.families import FAMILIES as THEIRS
from megatron.checkpoint.load.stored_model import open_model
from megatron.checkpoint.save.saver import Counters, Saver
from megatron.config import Resources, resolve
from megatron.distributed.init import init_distributed
from megatron.engine.builder import build_inference_engine, build_training_engine
from megatron.errors import ConfigError
from tests.end_to_end.engines import (
    BASE,
    CONTEXT,
    LENGTH,
    PIPELINE,
    SAVED,
    TENSOR,
    VOCABULARY,
    Curves,
    agree,
    train,
)
from tests.multi_rank import run_distributed
from tests.options import FAMILIES, Keys


def settings_of(family: str, name: str) -> Keys:
    """The keys of a member, as two ranks can cut it."""
    keys = {**BASE, **FAMILIES[family][name]}
    if keys.get("num_kv_heads") == 1:  # two ranks cannot share one key head
        keys["num_kv_heads"] = 2
    return keys


def run(world_size: int, family: str, layout: Keys, folder: Path | None = None, *, resumed: bool = False) -> Curves:
    """The curves of every member of a family."""
    cases = {name: settings_of(family, name) for name in FAMILIES[family]}
    position = "" if folder is None else str(folder)
    found: list[Curves] = run_distributed(train, world_size, cases, layout, position, resumed, timeout=400)
    return found[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_and_pipeline_ranks_are_one_process(family: str, tmp_path: Path) -> None:
    expected = run(1, family, {})
    assert all(curve[-1][0] < curve[0][0] for curve in expected.values())
    agree(run(2, family, TENSOR, tmp_path), expected)
    later = {name: curve[SAVED:] for name, curve in expected.items()}
    agree(run(2, family, PIPELINE, tmp_path, resumed=True), later)


@pytest.mark.long
@pytest.mark.parametrize(
    "layout", [CONTEXT, {**PIPELINE, "zero_optimization": {"stage": 1}}], ids=["cp2zero3", "pp2zero1"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_layouts_are_one_process(family: str, layout: Keys) -> None:
    agree(run(2, family, layout), run(1, family, {}))


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
MPT: Keys = {
    "pos_emb": "alibi",
    "use_bias_in_norms": False,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
}
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
    ("positions", "alibi"): ("mpt", MPT),
    ("norms", "layernorm without bias"): ("mpt", MPT),
    ("activations", "mish"): ("neox", {**NEOX, "num_kv_heads": 4, "kv_channels": 16}),
    ("attention", "global"): ("neox", NEOX),
    ("attention", "flash"): ("neox", NEOX),
    ("attention", "sliding window"): ("mistral", LLAMA),
}
"""(family, member) -> the family of transformers that has it, and what else such a model needs."""


def saved_logits(rank: int, world_size: int, cases: dict[str, Keys], folder: str) -> dict[str, Tensor]:
    """Saves the initial weights of each case and returns their logits for one text."""
    topology = init_distributed(pipe_parallel_size=0, model_parallel_size=1, seed=1, backend="gloo")
    found = {}
    for name, keys in cases.items():
        config = resolve([], {**keys, "save": str(Path(folder) / name)}, Resources(1)).config
        engine = build_training_engine(config, topology, padded_vocab_size=VOCABULARY)
        Saver(config, engine, padded_vocab_size=VOCABULARY).save(Counters(0, 0))
        loading = config.replace(load=config.checkpoint.save)
        found[name] = build_inference_engine(loading, topology, VOCABULARY).logits(text()).clone()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Checkpoints of every exported member, and the logits of each."""
    folder = tmp_path_factory.mktemp("saved")
    cases = {name: {**settings_of(family, name), **further} for (family, name), (_, further) in EXPORTED.items()}
    return folder, run_distributed(saved_logits, 1, cases, str(folder), timeout=300)[0]


@pytest.mark.parametrize(("family", "name"), EXPORTED, ids=str)
def test_transformers_says_the_same(
    family: str, name: str, saved: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, expected = saved
    export(open_model(folder / name), tmp_path / "theirs", family_name=EXPORTED[family, name][0])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(text()).logits, expected[name], rtol=1e-4, atol=1e-5)


REFUSED = {
    "sinusoidal": "pos_emb",
    "rotary, dynamic": "rope_scaling",
    "rpe": "pos_emb",
    "none": "pos_emb",
    "scalenorm": "norm",
    "non_parametric_layernorm": "norm",
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
        reported = [str(ConfigError(*each.misfits(model))) for each in THEIRS.values()]
        assert all(reported)
        assert any(REFUSED[name] in errors for errors in reported)
