"""A dense checkpoint as a model with experts that computes the same (arXiv:2212.05055).

Every expert begins as the plain MLP of its block, and the weights of a token's experts sum to 1, so the sum over
experts is what the plain MLP gave, whichever the router chooses. The router is drawn anew; shared experts begin with an
output of 0. Training then moves the experts apart.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.format import files, layout
from megatron.checkpoint.load.stored_model import StoredModel, choose, describe, open_model
from megatron.checkpoint.offline.reshard import describe_tokenizer, refuse_uneven
from megatron.checkpoint.offline.write_resharded import write_weights
from megatron.checkpoint.save.commit import make_room, publish
from megatron.config import serialize
from megatron.config.schema.moe import MoeSection
from megatron.config.validation import experts as rules
from megatron.distributed.param_init import parameter_seed
from megatron.errors import ConfigError, ConfigIssue, RunError
from megatron.param_table import EXPERT_STACKS, ModelDims, TensorShape, tensors

RULES = (
    rules.tokens_choose_among_experts,
    rules.router_numbers_make_sense,
    rules.blocks_with_experts_exist,
    rules.expert_widths_divide,
    rules.groups_hold_experts,
    rules.scores_belong_to_topk,
)
USUAL = {"moe_router_type": "topk", "moe_normalize_top_k": True}
"""Keys of the result unless they are given."""
_SHARED = "mlp.shared_experts."


@dataclass(frozen=True)
class UpcycledModel(StoredModel):
    """The model with experts."""

    source: StoredModel
    """The dense one."""
    std: float
    """Standard deviation of what is drawn."""
    seed: int
    """Seed of what is drawn."""

    def full_tensor(self, shape: TensorShape, *, precise: bool = False) -> Tensor:
        """The global tensor: as stored, a copy of the MLP for each expert, or drawn."""
        known = self._stored(shape.layer, shape.name)
        if known is not None:
            return self.source.full_tensor(known, precise=precise)
        if shape.kind == "buffer":
            return torch.zeros(shape.shape)
        if shape.name.startswith(EXPERT_STACKS):
            return self._experts(shape, precise)
        dtype = self.source.full_tensor(self.source.table[0]).dtype
        if shape.name in (f"{_SHARED}linear2.weight", f"{_SHARED}gate.weight"):
            return torch.zeros(shape.shape, dtype=dtype)
        generator = torch.Generator().manual_seed(parameter_seed(self.seed, shape.layer, shape.name))
        return (self.std * torch.randn(shape.shape, generator=generator)).to(dtype)

    def _experts(self, shape: TensorShape, precise: bool) -> Tensor:
        """The same rows for every expert. w1, b1 feed the activation; w3, b3 are the plain half of a gated one."""
        part = shape.name.removeprefix(EXPERT_STACKS)
        second, kind = part.endswith("2"), "weight" if part.startswith("w") else "bias"
        known = self._stored(shape.layer, f"mlp.linear{2 if second else 1}.{kind}")
        assert known is not None, "the rules let only blocks with an MLP get experts"
        tensor = self.source.full_tensor(known, precise=precise)
        if second:
            tensor = tensor.t() if kind == "weight" else tensor
        elif len(known.sections) > 1:
            plain, gate = tensor.chunk(2)
            tensor = plain if part.endswith("3") else gate
        return tensor.repeat(self.moe.moe_num_experts, *(1,) * (tensor.dim() - 1))

    def _stored(self, layer: int, name: str) -> TensorShape | None:
        return next((one for one in self.source.table if (one.layer, one.name) == (layer, name)), None)


def upcycled(stored: StoredModel, config: Any, seed: int) -> UpcycledModel:
    """The model of a configuration with experts, from the weights of a dense one.

    Raises ConfigError for a model that would compute something else.

    Args:
        stored: The dense model.
        config: Its configuration, with the keys of the experts.
        seed: Of the routers.
    """
    found = chain.from_iterable(rule(config) for rule in RULES)
    ConfigError.raise_any([*found, *_changes(stored, config.moe)])
    table = tuple(tensors(ModelDims.of(config.model, config.moe, config.mixers), stored.rows))
    facts = {**vars(stored), "moe": config.moe, "table": table}
    return UpcycledModel(**facts, source=stored, std=config.initialization.init_method_std, seed=seed)


def _changes(stored: StoredModel, moe: MoeSection) -> Iterator[ConfigIssue]:
    """What would make the result compute something else than the dense model."""
    if stored.moe.moe_num_experts > 1:
        yield ConfigIssue("the checkpoint has experts already", "moe_num_experts", stored.moe.moe_num_experts)
    if moe.moe_num_experts <= 1:
        yield ConfigIssue("a model with experts has at least 2", "moe_num_experts", moe.moe_num_experts)
    if stored.model.lora:
        yield ConfigIssue("the checkpoint has adapters", "lora", hint="merge them first: tools/merge_lora.py")
    if not moe.moe_normalize_top_k and moe.moe_router_pre_softmax:
        what = "the weights of a token's experts would not sum to 1, so the result would be another model"
        yield ConfigIssue(what, "moe_normalize_top_k", value=False, hint="leave it out")
    if moe.moe_router_topk_scaling_factor != 1.0:
        value = moe.moe_router_topk_scaling_factor
        yield ConfigIssue("the output of every MLP would be multiplied", "moe_router_topk_scaling_factor", value)
    if moe.moe_ffn_hidden_size not in (None, stored.model.mlp_width):
        what = f"experts begin as the plain MLP, whose inner width is {stored.model.mlp_width}"
        yield ConfigIssue(what, "moe_ffn_hidden_size", moe.moe_ffn_hidden_size, hint="leave it out")
    if stored.model.use_bias_in_mlp and not moe.moe_use_bias_in_experts:
        what = "the MLPs have biases, which would be lost"
        yield ConfigIssue(what, "moe_use_bias_in_experts", value=False, hint="set it to true")
    if moe.moe_use_bias_in_experts and not stored.model.use_bias_in_mlp:
        yield ConfigIssue("the MLPs have no biases", "moe_use_bias_in_experts", value=True, hint="leave it out")


def upcycle(
    load: Path,
    save: Path,
    keys: Mapping[str, Any],
    *,
    model_size: int,
    pipe_size: int,
    iteration: int | None = None,
    config_files: Sequence[Path] = (),
    seed: int = 1234,
) -> Path:
    """Writes <save>/global_step<N> of the same iteration with experts and points `latest` at it; returns its folder.

    It has weights and their configuration, and no optimizer state. Raises ConfigError where the result would compute
    something else, or the sizes do not fit the model.

    Args:
        load: Folder with the checkpoints of the dense run.
        save: Folder to write to.
        keys: Keys of experts of the result.
        model_size: Tensor-parallel degree of the result.
        pipe_size: Pipeline-parallel degree of the result.
        iteration: Checkpoint to read; the latest unless given.
        config_files: Configuration files, for a checkpoint without its own.
        seed: Of the routers.
    """
    unknown = sorted(keys.keys() - MoeSection.model_fields.keys())
    ConfigError.raise_any(ConfigIssue("this is no key of experts", key) for key in unknown)
    directory = choose(load, iteration)
    stored = open_model(directory, config_files=config_files)
    config = describe(directory, config_files).replace(**{**USUAL, **keys}, config_files=None)
    made = upcycled(stored, config, seed)
    refuse_uneven(made.table, model_size)
    number = layout.iteration_of(directory) or 0
    final, partial = layout.step_directory(save, number), layout.partial_directory(save, number)
    if final.exists():
        raise RunError.of("the checkpoint is there already", location=str(final), hint="give another --save-dir")
    make_room(partial)
    try:
        facts = describe_tokenizer(made, number, model_size)
        sizes = {"model_size": model_size, "pipe_size": pipe_size}
        summed = made.model.gpt_j_residual
        written = write_weights(partial, made.table, made.full_tensor, summed=summed, facts=facts, **sizes)
        written.append(files.write_text(partial / layout.RESOLVED, serialize.to_json(config.without_secrets())))
        publish(partial, final, written)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final
