"""Matrices that single ranks own: who owns which, mean gradients at the owners, and weights back on all ranks."""

from __future__ import annotations

import torch
from torch.nn import Parameter

from megatron.distributed.mesh import Axis, Topology
from megatron.distributed.param_attrs import mark_experts, mark_sharded
from megatron.optim.owned_matrices import OwnedMatrices, assign_owners, by_owner
from tests.multi_rank import run_distributed

SHAPES = {
    "columns": ((6, 4), 0, ()),
    "rows": ((4, 8), 1, ()),
    "replicated": ((3, 5), None, ()),
    "two": ((8, 4), 0, (4, 4)),
}


def topology(data: int, model: int, expert: int = 1) -> Topology:
    axes = {name: Axis(name) for name in ("pipe", "context", "model_parallel")}
    ranks = Axis("dp_cp", data)
    mine = Axis("expert_data", data // expert)
    return Topology(0, data * model, data=ranks, dp_cp=ranks, model=Axis("model", model), expert_data=mine, **axes)


def test_costs_are_balanced_over_all_ranks() -> None:
    """Rows x columns x min(rows, columns): one large matrix weighs as much as eight of half its sides."""
    large = Parameter(torch.zeros(8, 8))
    small = [Parameter(torch.zeros(4, 4)) for _ in range(24)]
    owners = assign_owners([*small, large], topology(2, 2))
    counts: dict[tuple[int, int], int] = {}
    for parameter in small:
        slot = owners[parameter].data, owners[parameter].model
        counts[slot] = counts.get(slot, 0) + 1
    assert (owners[large].data, owners[large].model) not in counts
    assert sorted(counts.values()) == [8, 8, 8]


def test_experts_are_owned_by_ranks_that_hold_them() -> None:
    stacks = [Parameter(torch.zeros(8, 4)) for _ in range(4)]
    for stack in stacks:
        mark_sharded(stack, 0, (4,) * 4)
        mark_experts(stack, Axis("expert", 2))
    dense = [Parameter(torch.zeros(8, 4)) for _ in range(4)]
    owners = assign_owners([*stacks, *dense], topology(4, 1, expert=2))
    assert sorted(owners[one].data for one in stacks) == [0, 0, 1, 1]  # of the two ranks with the same experts
    assert sorted(owners[one].data for one in dense) == [0, 1, 2, 3]


def exchanged(rank: int, world_size: int) -> list[str]:
    """Names of what this rank owned, after every value was compared with the full tensors."""
    mesh = Topology.build(pipe=1, model=2, rank=rank, world_size=world_size)
    generator = torch.Generator().manual_seed(1)
    full = {name: torch.randn(shape, generator=generator).bfloat16() for name, (shape, _, _) in SHAPES.items()}
    slopes = {name: torch.randn(mesh.dp_cp.size, *shape, generator=generator) for name, (shape, _, _) in SHAPES.items()}

    def shard(tensor: torch.Tensor, name: str, model: int) -> torch.Tensor:
        _, dim, sections = SHAPES[name]
        if dim is None:
            return tensor
        parts = tensor.split(list(sections or (tensor.shape[dim],)), dim)
        return torch.cat([part.chunk(2, dim)[model] for part in parts], dim)

    parameters = {name: Parameter(shard(tensor, name, mesh.model.rank).clone()) for name, tensor in full.items()}
    for name, parameter in parameters.items():
        if SHAPES[name][1] is not None:
            mark_sharded(parameter, SHAPES[name][1], SHAPES[name][2])
    owners = assign_owners(list(parameters.values()), mesh)
    listed = by_owner(list(parameters.values()), owners)
    names = {parameter: name for name, parameter in parameters.items()}
    flat = torch.cat([*(one.detach().flatten() for one in listed), torch.zeros(3, dtype=torch.bfloat16)])
    offset = 0
    for one in listed:
        one.data = flat.narrow(0, offset, one.numel()).view(one.shape)
        offset += one.numel()
    slope = [shard(slopes[names[one]][mesh.dp_cp.rank], names[one], mesh.model.rank).flatten() for one in listed]
    matrices = OwnedMatrices(listed, owners, flat, torch.cat([*slope, torch.zeros(3)]), mesh.dp_cp, mesh.model, 2)
    matrices.reduce_gradients()
    owned = []
    for one, assigned in matrices.assigned.items():
        if assigned.full is not None:
            owned.append(names[one])
            assert torch.equal(assigned.full, full[names[one]].float())
            assert torch.allclose(assigned.full.grad, slopes[names[one]].mean(0), atol=1e-6)
            assigned.full.data += 1.0
    matrices.send_weights()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, shard((full[name].float() + 1.0).bfloat16(), name, mesh.model.rank))
    return owned


def test_gradients_reach_the_owner_and_weights_all_ranks() -> None:
    owned = run_distributed(exchanged, 4)
    assert sorted(name for names in owned for name in names) == sorted(SHAPES)
    assert all(owned)
