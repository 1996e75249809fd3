"""Output layer and loss in blocks against float64, and that no tensor of all logits exists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.distributed.mesh import Axis
from megatron.distributed.tensor_parallel import linear_cross_entropy as in_blocks
from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets, linear_cross_entropy
from megatron.distributed.tensor_parallel.sequence_parallel import gather_or_copy_to_tp
from megatron.kernels.linear import LinearKernel, onednn_linear, plain_linear, widened_linear
from megatron.model.loss_function import LossFunction
from megatron.objectives.language_model import LanguageModel
from tests.multi_rank import run_distributed

SEQUENCE, BATCH, HIDDEN, ROWS, VOCABULARY = 24, 2, 16, 640, 601
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2}


def case(dtype: torch.dtype, z_loss: float = 0.0) -> tuple[Tensor, Tensor, TokenTargets]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, VOCABULARY, (SEQUENCE, BATCH), generator=generator)
    weights = torch.rand(SEQUENCE, BATCH, generator=generator)
    weights[::3] = 0.0  # tokens without a loss
    return hidden, weight, TokenTargets(labels, weights, VOCABULARY, z_loss)


def expected(
    hidden: Tensor, weight: Tensor, targets: TokenTargets, factor: float = 1.0, bound: float | None = None
) -> tuple[Tensor, ...]:
    """The loss and its gradients in float64, from all logits at once."""
    hidden, weight = (each.detach().double().requires_grad_() for each in (hidden, weight))
    logits = (hidden @ weight.t())[..., : targets.vocabulary]
    logits = logits if bound is None else bound * torch.tanh(logits / bound)
    log_sums = logits.logsumexp(-1)
    losses = log_sums - logits.gather(-1, targets.labels.unsqueeze(-1)).squeeze(-1)
    total = (targets.weights.double() * (losses + targets.z_loss * log_sums**2)).sum()
    return total.detach(), *torch.autograd.grad(factor * total, (hidden, weight))


def difference(found: Tensor, right: Tensor) -> float:
    return float((found.detach().double() - right).abs().max() / right.abs().max())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 7 rows and parts of the matrix's gradient of some 60."""
    monkeypatch.setattr(in_blocks, "rows_of_a_block", lambda *_, **__: 7)
    monkeypatch.setattr(in_blocks, "_PART_ELEMENTS", 60 * HIDDEN)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("z_loss", "bound"), [(0.0, None), (0.01, None), (0.0, 3.0)])
@pytest.mark.parametrize(
    ("dtype", "kernel"),
    [
        (torch.float64, plain_linear),
        (torch.float32, plain_linear),
        (torch.float32, onednn_linear),
        (torch.bfloat16, plain_linear),
        (torch.bfloat16, widened_linear),
    ],
)
def test_loss_and_gradients_are_those_of_float64(
    dtype: torch.dtype, kernel: LinearKernel, z_loss: float, bound: float | None
) -> None:
    hidden, weight, targets = case(dtype, z_loss)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, Axis("model"), kernel, bound=bound)
    (0.3 * loss).backward()
    right = expected(hidden, weight, targets, 0.3, bound)
    assert hidden.grad is not None
    assert weight.grad is not None
    for found, value in zip((loss, hidden.grad, weight.grad), right, strict=True):
        assert difference(found, value) < TOLERANCE[dtype]
    assert weight.grad.dtype == dtype
    with torch.no_grad():
        again = linear_cross_entropy(hidden, weight, targets, Axis("model"), kernel, bound=bound)
        assert torch.allclose(again, loss)


@pytest.mark.usefixtures("small_blocks")
def test_frozen_tensors_get_no_gradient_and_the_others_theirs() -> None:
    hidden, weight, targets = case(torch.float64)
    _, for_hidden, for_weight = expected(hidden, weight, targets)
    learned = hidden.clone().requires_grad_()
    linear_cross_entropy(learned, weight, targets, Axis("model"), plain_linear).backward()
    assert learned.grad is not None
    assert difference(learned.grad, for_hidden) < 1e-12
    matrix = weight.clone().requires_grad_()
    linear_cross_entropy(hidden, matrix, targets, Axis("model"), plain_linear).backward()
    assert matrix.grad is not None
    assert difference(matrix.grad, for_weight) < 1e-12


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, targets = case(torch.float32)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets, Axis("model"), plain_linear)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        loss.backward()


class Largest(TorchDispatchMode):
    """Notes the largest number of elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *found])
        return result


def on_rank(rank: int, world_size: int, sequence_parallel: bool) -> dict[str, Any]:
    """The loss of one rank's shard of the matrix, gradients in float64, and the largest tensor that was made."""
    in_blocks.rows_of_a_block = lambda *_, **__: 7
    group = torch.distributed.group.WORLD
    axis = Axis("model", world_size, rank, tuple(range(world_size)), group=group, sequence_parallel=sequence_parallel)
    hidden, weight, targets = case(torch.float64, 0.01)
    shard = weight.chunk(world_size)[rank].clone().requires_grad_()
    given = (hidden.chunk(world_size)[rank] if sequence_parallel else hidden).clone().requires_grad_()
    largest = Largest()
    with largest:
        loss = linear_cross_entropy(gather_or_copy_to_tp(given, axis), shard, targets, axis, plain_linear)
        loss.backward()
    assert given.grad is not None
    assert shard.grad is not None
    return {"loss": loss.item(), "hidden": given.grad, "weight": shard.grad, "elements": largest.elements}


@pytest.mark.parametrize(("world_size", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_shards_of_the_matrix_give_the_same_and_no_tensor_holds_all_logits(
    world_size: int, *, sequence_parallel: bool
) -> None:
    ranks = run_distributed(on_rank, world_size, sequence_parallel)
    loss, for_hidden, for_weight = expected(*case(torch.float64, 0.01))
    for found in ranks:
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-12)
        assert found["elements"] < SEQUENCE * BATCH * ROWS // world_size
    gradients = [found["hidden"] for found in ranks]
    joined = torch.cat(gradients) if sequence_parallel else gradients[0]
    assert difference(joined, for_hidden) < 1e-12
    assert difference(torch.cat([found["weight"] for found in ranks]), for_weight) < 1e-12


def test_an_objective_that_changes_only_the_loss_is_computed_from_logits() -> None:
    class Halved(LanguageModel):
        def loss(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().loss(*args, **kwargs) / 2

    class Plain:
        def loss(self, *args: Any, **kwargs: Any) -> Tensor:
            return torch.zeros(())

    axis = Axis("model")
    assert LossFunction(LanguageModel(), axis, None).in_blocks
    assert not LossFunction(LanguageModel(), axis, None, fused=False).in_blocks
    assert not LossFunction(Halved(), axis, None).in_blocks
    assert not LossFunction(Plain(), axis, None).in_blocks
