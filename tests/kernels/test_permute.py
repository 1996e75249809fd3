"""The weighted sum of what experts return, by operators of torch: against a loop in float64, and what it saves."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.permute import PERMUTATION

TOKENS, TOP_K, HIDDEN = 12, 2, 8


def given(dropped: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the assignments that are not dropped, the weights of all, and the index of each row."""
    draws = torch.Generator().manual_seed(3)
    order = torch.randperm(TOKENS * TOP_K, generator=draws)[dropped:]
    rows = torch.randn(len(order), HIDDEN, generator=draws, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(TOKENS, TOP_K, generator=draws, dtype=torch.float64, requires_grad=True)
    return rows, weights, order


def combined(rows: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    return PERMUTATION.combine(rows, weights, order, PERMUTATION.prepare(order, weights.numel()))


def test_it_is_a_loop_over_assignments() -> None:
    for dropped in (0, 5, TOKENS * TOP_K):
        rows, weights, order = given(dropped)
        expected = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
        for row, index in zip(rows, order.tolist(), strict=True):
            expected[index // TOP_K] += weights[index // TOP_K, index % TOP_K].detach() * row.detach()
        torch.testing.assert_close(combined(rows, weights, order), expected)
        assert torch.autograd.gradcheck(lambda a, b, at=order: combined(a, b, at), (rows, weights))


def test_the_rows_are_saved_once() -> None:
    rows, weights, order = given(0)
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = combined(rows, weights, order)
    assert result.requires_grad
    sizes = [part.numel() * part.element_size() for part in (rows, weights, order)]
    assert sum(held.values()) <= sum(sizes)
