"""Low-rank updates of experts in a folder of `peft`.

Releases of transformers from 5 on hold one matrix of all experts of a block in one parameter, which `target_parameters`
of peft names. Its A [experts rank, in] has the rows of one expert after those of another, its B [out, rank experts] the
columns of all experts side by side for each column of one. Where both parameters of a block are targeted, the one that
the block names first has `base_layer` in the names of its A and B. Releases before 5 have a linear layer for each
matrix of each expert (GPT-OSS excepted); these are read too. Source of layouts and names: peft 0.21,
tuners/lora/layer.py and tuners/tuners_utils.py; transformers 5.23.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron.adapter_config import EXPERTS_IN, EXPERTS_OUT, LowRank
from megatron.checkpoint.huggingface.family import ModelFamily, TensorMapping
from megatron.checkpoint.huggingface.peft_settings import CONFIG, PeftSettings
from megatron.checkpoint.huggingface.safetensors_format import Promise
from megatron.checkpoint.load.stored_model import StoredModel
from megatron.errors import ConfigError, RunError
from megatron.param_table import EXPERT_STACKS, ModelDims

_OLD, _NEW = ".block_sparse_moe.", ".mlp."
"""What files of a Mixtral, and its modules before release 5, call the experts' module, and what it is from then on."""


@dataclass(frozen=True)
class FusedMatrix:
    """A parameter of transformers that holds one matrix of each expert of a block."""

    target: str
    """Its name among the targets of `lora`."""
    count: int
    """Experts of a block."""
    begin: str
    """What our names of the block's experts begin with."""
    module: str
    """The module of the experts in the model."""
    down: str
    """Our name of A."""
    ups: tuple[str, ...]
    """Our names of B, in the order of its rows."""
    name: str
    """Of the parameter in the module."""
    inputs: int
    """Of a matrix of one expert."""
    outputs: int
    """Of each of our matrices of one expert."""
    in_turn: bool = False
    """Whether rows of our matrices stand in turn in theirs."""

    @property
    def path(self) -> str:
        """Its name in the model."""
        return f"{self.module}.{self.name}"

    @property
    def stored_turned(self) -> bool:
        """Whether ours are [in, out] for each expert."""
        return self.target == EXPERTS_OUT

    def key(self, *, both: bool) -> str:
        """Returns what names of its A and B begin with. both: whether the other parameter has an update too.

        The update of the parameter that the block names last is then around that of the first.
        """
        return f"{self.module}.base_layer" if both and not self.stored_turned else self.module


def fused_matrices(family: ModelFamily, dims: ModelDims) -> list[FusedMatrix]:
    """Returns the parameters that experts of a model are in transformers, block after block."""
    rows = {row.ours: row.theirs[0] for row in family.table(dims)}
    found = []
    for ours, theirs in rows.items():
        begin = ours.removesuffix("w1")
        if not ours.endswith(f"{EXPERT_STACKS}w1"):
            continue
        gated, fused = f"{begin}w3" in rows, ".experts.0." not in theirs
        position = theirs.rpartition(".")[0] if fused else f"{theirs.partition('.experts.0.')[0]}.experts"
        module = family.module_name(position).replace(_OLD, _NEW)
        ups = ("lora_B1", "lora_B3") if gated else ("lora_B1",)
        name, of_block = "gate_up_proj" if gated else "up_proj", (dims.mixture.experts, begin, module)
        sizes = (dims.hidden_size, dims.expert_width)
        found.append(FusedMatrix(EXPERTS_IN, *of_block, "lora_A1", ups, name, *sizes, in_turn=fused))
        found.append(FusedMatrix(EXPERTS_OUT, *of_block, "lora_A2", ("lora_B2",), "down_proj", *sizes[::-1]))
    return found


def target_parameters(found: Sequence[FusedMatrix], asked: LowRank) -> list[str]:
    """Returns what adapter_config.json says of them: names in a block, which all blocks share."""
    chosen = [one for one in found if one.target in asked.targets]
    return sorted({".".join(one.path.split(".")[-3:]) for one in chosen})


def expert_promises(
    stored: StoredModel, found: Sequence[FusedMatrix], asked: LowRank, dtype: torch.dtype
) -> Iterator[Promise]:
    """The tensors of all updates of experts.

    Args:
        stored: The checkpoint.
        found: What `fused_matrices` returns.
        asked: The updates.
        dtype: Of the tensors.
    """
    both = {EXPERTS_IN, EXPERTS_OUT} <= set(asked.targets)
    for one in found:
        if one.target not in asked.targets:
            continue
        joint, outputs = one.count * asked.rank, len(one.ups) * one.outputs
        name = f"base_model.model.{one.key(both=both)}"
        yield Promise(f"{name}.lora_A.weight", (joint, one.inputs), dtype, partial(_down, stored, one, dtype))
        yield Promise(f"{name}.lora_B.weight", (outputs, joint), dtype, partial(_up, stored, one, dtype))


def _stack(stored: StoredModel, one: FusedMatrix, name: str, dtype: torch.dtype) -> Tensor:
    """Returns a stack of ours, [e, out, in]."""
    shape = next(each for each in stored.table if each.key == one.begin + name)
    values = stored.full_tensor(shape, precise=dtype == torch.float32).unflatten(0, (one.count, -1))
    return values.transpose(1, 2) if one.stored_turned else values


def _down(stored: StoredModel, one: FusedMatrix, dtype: torch.dtype) -> Tensor:
    return _stack(stored, one, one.down, dtype).flatten(0, 1)


def _up(stored: StoredModel, one: FusedMatrix, dtype: torch.dtype) -> Tensor:
    ups = [_stack(stored, one, name, dtype) for name in one.ups]  # [e, out, r]
    joint = torch.stack(ups, 2).flatten(1, 2) if one.in_turn else torch.cat(ups, 1)
    return joint.permute(1, 2, 0).flatten(1).contiguous()


@dataclass(frozen=True)
class ExpertUpdate:
    """The update of one matrix of one expert, or of the two halves of a gated one."""

    down: Tensor
    """A [r, in]."""
    ups: tuple[Tensor, ...]
    """B [out, r] of each of our matrices, times the update's factor."""


Updates = Mapping[FusedMatrix, Mapping[int, ExpertUpdate]]
"""Matrix of all experts -> number of the expert -> its update; nothing for matrices without one."""


def take_updates(
    found: Sequence[FusedMatrix],
    rows: Mapping[str, TensorMapping],
    named: dict[str, Tensor],
    settings: PeftSettings,
    family: ModelFamily,
) -> Updates:
    """Takes the updates of experts out of `named`.

    RunError for one of a shape that no update has, ConfigError for dropout or norms of rows beside them.

    Args:
        found: What `fused_matrices` returns.
        rows: Our name without an ending -> the row of the family's table.
        named: Tensors by their names in files.
        settings: Of the adapter.
        family: Of the model.
    """
    nested = {one.module for one in found if not one.stored_turned and _first(one, True, family) in named}
    alone = Counter(one.module for one in found if settings.targets_parameter(one.path))
    updates: dict[FusedMatrix, Mapping[int, ExpertUpdate]] = {}
    for one in found:
        names = ("w2",) if one.stored_turned else ("w1", "w3")[: len(one.ups)]
        parts = [rows[f"{one.begin}{name}"] for name in names]
        both = one.module in nested
        meant = both or (settings.targets_parameter(one.path) and alone[one.module] == 1)
        if meant and _first(one, both, family) in named:
            updates[one] = _fused_updates(one, both, named, settings, family)
        elif len(parts[0].theirs) > 1:
            updates[one] = _single_updates(one, parts, named, settings, family)
    updates = {one: experts for one, experts in updates.items() if experts}
    if updates:
        _refuse_unlike_peft(settings)
    return updates


def _refuse_unlike_peft(settings: PeftSettings) -> None:
    for key, value, given in (
        ("lora_dropout", settings.dropout, settings.dropout > 0),
        ("use_dora", True, settings.magnitudes),
    ):
        if given:
            raise ConfigError.of(
                "updates of experts are taken over without it alone: peft has none for experts in one parameter",
                key=key,
                value=value,
                location=CONFIG,
                hint="write lora_dropout: 0.0 to go on without" if key == "lora_dropout" else "merge them with peft",
            )


def _first(one: FusedMatrix, both: bool, family: ModelFamily) -> str:
    return family.file_name(f"{one.key(both=both)}.lora_A.weight")


def _fused_updates(
    one: FusedMatrix, both: bool, named: dict[str, Tensor], settings: PeftSettings, family: ModelFamily
) -> dict[int, ExpertUpdate]:
    """The updates of the matrices of all experts of a block."""
    key = _first(one, both, family)
    down, up = named.pop(key), named.pop(key.replace(".lora_A.", ".lora_B."), None)
    joint, outputs = len(down), len(one.ups) * one.outputs
    if up is None or joint % one.count or down.shape[1] != one.inputs or up.shape != (outputs, joint):
        shapes = f"{tuple(down.shape)} and {None if up is None else tuple(up.shape)}"
        needed = f"[{one.count} r, {one.inputs}] and [{outputs}, {one.count} r]"
        raise RunError.of(f"A and B of {one.path} have shapes {shapes}, which are no {needed} of any rank r")
    factor = settings.factor(one.path, joint // one.count)
    downs = down.float().unflatten(0, (one.count, -1))  # [e, r, in]
    joined = up.float().unflatten(1, (-1, one.count)).permute(2, 0, 1) * factor  # [e, out, r]
    parts = len(one.ups)
    ups = [joined[:, part::parts] for part in range(parts)] if one.in_turn else joined.chunk(parts, 1)
    return {number: ExpertUpdate(downs[number], tuple(each[number] for each in ups)) for number in range(one.count)}


def _single_updates(
    one: FusedMatrix,
    parts: Sequence[TensorMapping],
    named: dict[str, Tensor],
    settings: PeftSettings,
    family: ModelFamily,
) -> dict[int, ExpertUpdate]:
    """The updates of experts whose matrices are linear layers of their own; halves that share A keep its rank."""
    found = {}
    for number, names in enumerate(zip(*(part.theirs for part in parts), strict=True)):
        pairs: list[tuple[Tensor, Tensor] | None] = []
        for name in names:
            module = name.removesuffix(".weight")
            down, up = (named.pop(f"{module}.{part}.weight", None) for part in ("lora_A", "lora_B"))
            if down is None or up is None:
                pairs.append(None)
                continue
            if (len(up), down.shape[1]) != (one.outputs, one.inputs):
                what = f"the update of {module} is A {list(down.shape)} and B {list(up.shape)}"
                raise RunError.of(f"{what}, and the matrix of the model is {[one.outputs, one.inputs]}")
            pairs.append((down.float(), up.float() * settings.factor(family.module_name(module), len(down))))
            if settings.magnitudes:
                _refuse_unlike_peft(settings)
        there = [pair for pair in pairs if pair is not None]
        if not there:
            continue
        shared = all(pair[0].equal(there[0][0]) for pair in there)
        downs = [there[0][0]] if shared else [pair[0] for pair in there]
        rank, ups, at = sum(map(len, downs)), [], 0
        for pair in pairs:
            up = there[0][1].new_zeros(len(there[0][1]), rank)
            if pair is not None:
                up[:, at : at + pair[1].shape[1]] = pair[1]
                at += 0 if shared else pair[1].shape[1]
            ups.append(up)
        found[number] = ExpertUpdate(torch.cat(downs), tuple(ups))
    return found


def expert_factors(found: Sequence[FusedMatrix], updates: Updates, asked: LowRank) -> Iterator[tuple[str, Tensor]]:
    """A and B of experts under our names. Experts without an update have a random A and a B of zeros, as at the start.

    Args:
        found: What `fused_matrices` returns.
        updates: Of the adapter.
        asked: What `lora` says of it.
    """
    for one in found:
        if one.target not in asked.targets:
            continue
        down = torch.stack([random_down(f"{one.begin}{n}", asked.rank, one.inputs) for n in range(one.count)])
        ups = [torch.zeros(one.count, one.outputs, asked.rank) for _ in one.ups]
        for number, update in updates.get(one, {}).items():
            width = len(update.down)
            down[number, :width] = update.down
            for values, part in zip(ups, update.ups, strict=True):
                values[number, :, :width] = part / asked.scale
        for name, values in zip((one.down, *one.ups), (down, *ups), strict=True):
            turned = values.transpose(1, 2) if one.stored_turned else values
            yield f"{one.begin}{name}", turned.flatten(0, 1).contiguous()


def random_down(module: str, rank: int, inputs: int) -> Tensor:
    """Returns first values of A [rank, in], the same in every import.

    Args:
        module: Name of the matrix.
        rank: Rows of A.
        inputs: Columns of A.
    """
    seed = sum(module.encode())
    bound = 1 / math.sqrt(inputs)
    return torch.empty(rank, inputs).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
