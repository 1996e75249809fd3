"""Blocks of attention and of an MLP alone, against one block with both, and their place in the cache."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron.distributed.mesh import Topology
from megatron.engine.fp8 import use_fp8
from megatron.model.kv_cache import KVCache
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.model.sequential_model import SequentialModel
from megatron.param_table import ModelDims, recurrent_state_shapes, tensors
from megatron.serving.cache_size import CacheSize
from tests.model.mixers import sections
from tests.model.sections import VOCABULARY, initialization_section, model_section

HYBRID = ["mlp", "mamba2", "attention", "mlp", "attention", "mamba2"]
NAMES = {"input_layernorm": (0, "input_layernorm"), "attention": (0, "attention")}
NAMES |= {"post_attention_layernorm": (1, "input_layernorm"), "mlp": (1, "mlp")}


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(3))


def build(kinds: list[str], **changes: object) -> tuple[SequentialModel, ModelDims]:
    model = model_section(num_layers=len(kinds), attention_config=tuple(kinds), **changes)
    model.intermediate_size, model.expansion_factor, mixing = None, None, sections("mamba2")[1]
    plan = build_layer_specs(
        ModelSpec(
            model,
            initialization_section(init_method_std=0.2),
            SimpleNamespace(),
            padded_vocab_size=VOCABULARY,
            topology=Topology.single(),
            seed=1,
            dtype=torch.float32,
            device=torch.device("cpu"),
            mixers=mixing,
        )
    )
    return SequentialModel(plan), ModelDims.of(model, None, mixing)


def test_two_blocks_of_one_sublayer_are_one_block_of_two() -> None:
    joint, _ = build(["global", "global"])
    parts, dims = build(["attention", "mlp"] * 2)
    values = {}
    for name, value in joint.state_dict().items():
        _, layer, part, *rest = name.split(".")
        number = int(layer) - 2
        later, other = NAMES.get(part, (0, part)) if 0 <= number < 2 else (0, part)
        number = 2 * number + later if 0 <= number < 2 else number + 2 * (number >= 2)
        values[".".join(("sequential", str(number + 2), other, *rest))] = value
    parts.load_state_dict(values)
    with torch.no_grad():
        torch.testing.assert_close(parts(tokens()), joint(tokens()), rtol=1e-6, atol=1e-6)
    named = {f"sequential.{shape.layer}.{shape.name}": shape.shape for shape in tensors(dims, VOCABULARY)}
    assert named == {name: tuple(value.shape) for name, value in parts.named_parameters()}


@pytest.mark.parametrize(("kind", "seen"), [("mlp", False), ("attention", True)])
def test_an_mlp_sees_its_token_alone(kind: str, seen: bool) -> None:
    model, _ = build([kind, kind], pos_emb="none")
    other = tokens()
    other[:, 3] = (other[:, 3] + 1) % VOCABULARY
    with torch.no_grad():
        assert torch.equal(model(other)[4:], model(tokens())[4:]) is not seen


def test_the_cache_has_keys_of_blocks_with_attention_alone() -> None:
    model, dims = build(HYBRID)
    attending = [block for block, kind in enumerate(HYBRID) if kind == "attention"]
    shapes = {block: recurrent_state_shapes(dims, block, model_size=1, max_length=24) for block in range(len(HYBRID))}
    cache = KVCache(
        2, 2, 4, 24, 16, attending=attending, states={block: each for block, each in shapes.items() if each}
    )
    assert cache.memory.nbytes == 2 * CacheSize(dims, 2, 24, 4).row_bytes == 2 * (2 * 24 * 2 * 4 * 16 * 4)
    with torch.no_grad():
        parts = [model(part, cache) for part in tokens().split([7, *[1] * 13], dim=1)]
        torch.testing.assert_close(torch.cat(parts), model(tokens()), rtol=1e-5, atol=1e-5)


def test_their_products_can_be_in_fp8() -> None:
    """The projections of attention, and both layers of MLPs; the mixers keep theirs."""
    model, _ = build(HYBRID)
    before = {name: module.kernel for name, module in model.named_modules() if hasattr(module, "kernel")}
    use_fp8({"recipe": "tensorwise"}, model, torch.device("cpu"))
    products = {name: module.kernel for name, module in model.named_modules() if name in before}
    changed = {name.removeprefix("sequential.") for name, kernel in products.items() if kernel is not before[name]}
    blocks = {block + 2: kind for block, kind in enumerate(HYBRID)}
    expected = {f"{layer}.mlp.linear{number}" for layer, kind in blocks.items() if kind == "mlp" for number in (1, 2)}
    names = ("query_key_value", "dense")
    expected |= {f"{layer}.attention.{name}" for layer, kind in blocks.items() if kind == "attention" for name in names}
    assert changed == expected
