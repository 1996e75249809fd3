"""The plan's number of parameters against the modules themselves, built without memory on torch's meta device."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config import Resources, resolve
from megatron.distributed.mesh import Topology
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.param_table import key_in_table
from megatron.plan import make_plan
from megatron.plan.parameter_counts import model_tensors
from megatron.plan.vocabulary import find_vocabulary
from tests.contracts.shipped import FILES, intended, name_of

MODELS = [path for path in FILES if re.search("num.layers", path.read_text(encoding="utf-8"))]


def built(path: Path) -> tuple[int | None, dict[str, Any], dict[str, Any]]:
    """The plan's number, and name -> shape of every tensor: by the modules, and by the table."""
    ranks, files = intended(path)
    reported = re.search(r"(?<![a-z_])vocab_size", path.read_text(encoding="utf-8"))
    found = resolve(files, {} if reported else {"vocab_size": 50_277}, Resources(ranks))
    config = found.config
    padded = find_vocabulary(config.tokenizer, config.parallelism.model_parallel_size).padded
    assert padded
    with torch.device("meta"):
        layers = build_layer_specs(
            ModelSpec(
                config.model,
                config.initialization,
                config.kernels,
                padded_vocab_size=padded,
                topology=Topology.single(),
                seed=1,
                dtype=torch.bfloat16,
                device=torch.device("cpu"),
                moe=config.moe,
                mixers=config.mixers,
            )
        )
        modules = {
            key_in_table(layer.index, name): tuple(parameter.shape)
            for layer in layers
            if layer.tied_to is None or layer.arguments  # heads beside a tied matrix
            for name, parameter in layer.build().named_parameters()
        }
    table = {f"{tensor.layer}.{tensor.name}": tensor.shape for tensor in model_tensors(config, padded)}
    return make_plan(found).parameters, modules, table


@pytest.mark.parametrize("path", MODELS, ids=name_of)
def test_the_plan_counts_what_the_modules_hold(path: Path) -> None:
    planned, modules, table = built(path)
    assert modules == table
    assert planned == sum(torch.Size(shape).numel() for shape in modules.values())
