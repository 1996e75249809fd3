"""One stage of the model as torch's pipeline runtime drives it.

torch.distributed.pipelining has a stage of its own. This one allocates what it receives when it is due, so that a step
may have other shapes than the last, and frees it after the backward pass; it leaves gradients of weights for later in
the layers (kernels/weight_gradients.py) instead of running each backward function twice; and it lets the optimizer
take the gradients of every backward pass.

s sequence, b micro batch, h hidden, t tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.mesh import Axis
from megatron.distributed.process_group import device
from megatron.kernels.weight_gradients import Deferred, WeightGradients, add_deferred


@dataclass(frozen=True)
class Backward:
    """How the backward passes of a rank reach its optimizer."""

    run: Callable[[Callable[[], None]], None]
    """run(pass): runs a backward pass and lets the optimizer take its gradients."""
    weight_gradients: WeightGradients | None
    """Takes the gradients that are left for later; None if the schedule leaves none."""


class ChunkStage:
    """Passes of one stage. The names of methods and attributes are those that torch's runtime uses."""

    submod = None

    def __init__(
        self, run: Callable[..., Tensor], index: int, count: int, *, pipe: Axis, owner: Callable[[int], int]
    ) -> None:
        """Creates the stage.

        Args:
            run: the layers, called as run(carry, **beside).
            index: number of the stage in the model.
            count: stages of the model.
            pipe: ranks of the pipeline.
            owner: returns the pipeline rank that holds a stage.
        """
        self.stage_index, self.num_stages = index, count
        self.group, self.group_rank, self.group_size = pipe.group, pipe.rank, pipe.size
        self.stage_index_to_group_rank: dict[int, int] = {}
        self.has_backward = False
        self._run, self._pipe, self._owner = run, pipe, owner
        self._backward: Backward | None = None
        self._like: Tensor = torch.empty(0)
        self.clear_runtime_states()

    def begin(self, like: Tensor, backward: Backward | None) -> None:
        """Starts a step. like: a tensor of the shape and type of the stage's input; no memory is needed."""
        self._like, self._backward = like, backward
        self.has_backward = backward is not None
        self.clear_runtime_states()

    @property
    def is_first(self) -> bool:
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        return self.stage_index == self.num_stages - 1

    @property
    def _sends(self) -> bool:
        """Whether outputs are for another rank."""
        return not self.is_last and self._owner(self.stage_index + 1) != self.group_rank

    def clear_runtime_states(self) -> None:
        """Frees what is left of the last step."""
        self._inputs: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        self._output_grads: dict[int, Tensor] = {}
        self._input_grads: dict[int, Tensor | None] = {}
        self._deferred: dict[int, Deferred] = {}

    def forward_one_chunk(
        self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any] | None, save_forward_output: bool = True
    ) -> Tensor:
        """Runs the forward pass of a micro batch.

        Args:
            number: the micro batch in the step.
            args: the tokens [b, s], on the first stage.
            kwargs: tensors beside the carry.
            save_forward_output: not used; the output is saved for the backward pass only.
        """
        if self.is_first:
            carry = args[0]
        else:
            carry = self._inputs[number].requires_grad_(self.has_backward)
            carry = carry.view_as(carry)  # partitioned activations are stored in a shape that no leaf may have
        output = self._run(carry, **(kwargs or {}))
        if self.has_backward or self._sends:
            self._outputs[number] = output
        if not self.has_backward:
            self._inputs.pop(number, None)
        return output

    def backward_one_chunk(
        self, number: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Runs the backward pass of a micro batch, in full or without the gradients of weights.

        Args:
            number: the micro batch in the step.
            loss: its loss, on the last stage.
            full_backward: false if `backward_weight_one_chunk` follows.
            last_backward: not used.
        """
        assert self._backward is not None
        output, gradient = self._outputs.pop(number), self._output_grads.pop(number, None)
        start, gradient = (output, gradient) if loss is None else (loss, None)

        def full() -> None:
            torch.autograd.backward(start, gradient)

        def apart() -> None:
            assert self._backward is not None
            assert self._backward.weight_gradients is not None
            with self._backward.weight_gradients.collect() as self._deferred[number]:
                full()

        self._backward.run(full if full_backward else apart)
        if not self.is_first:
            self._input_grads[number] = self._inputs.pop(number).grad

    def backward_weight_one_chunk(self, number: int, last_backward: bool = False) -> None:
        """Computes the gradients of weights that the backward pass of a micro batch left for later.

        number: the micro batch in the step. last_backward: not used.
        """
        assert self._backward is not None
        found = self._deferred.pop(number)
        self._backward.run(lambda: add_deferred(found))

    def get_fwd_send_ops(self, number: int) -> list[dist.P2POp]:
        """Returns the sending of a micro batch's output to the next stage."""
        output = self._outputs[number] if self.has_backward else self._outputs.pop(number)
        return [self._op(dist.isend, output.detach().contiguous(), self.stage_index + 1)]

    def get_fwd_recv_ops(self, number: int) -> list[dist.P2POp]:
        """Returns the receiving of a micro batch's input from the stage before."""
        self._inputs[number] = self._empty()
        return [self._op(dist.irecv, self._inputs[number], self.stage_index - 1)]

    def get_bwd_send_ops(self, number: int) -> list[dist.P2POp]:
        """Returns the sending of a micro batch's gradient to the stage before."""
        return [self._op(dist.isend, self._gradient(number).contiguous(), self.stage_index - 1)]

    def get_bwd_recv_ops(self, number: int) -> list[dist.P2POp]:
        """Returns the receiving of a micro batch's gradient from the next stage."""
        self._output_grads[number] = torch.empty_like(self._outputs[number], memory_format=torch.contiguous_format)
        return [self._op(dist.irecv, self._output_grads[number], self.stage_index + 1)]

    def set_local_fwd_input(self, output: Tensor, number: int) -> None:
        """Takes the output of the stage before, which is on the same rank."""
        self._inputs[number] = output.detach()

    def get_local_bwd_output(self, number: int) -> Tensor:
        """Returns the gradient for the stage before, which is on the same rank."""
        return self._gradient(number)

    def set_local_bwd_input(self, gradient: Tensor, number: int) -> None:
        """Takes the gradient of the next stage, which is on the same rank."""
        self._output_grads[number] = gradient

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Does nothing: DeepSpeed reduces the gradients of all stages after the step."""

    def _gradient(self, number: int) -> Tensor:
        gradient = self._input_grads.pop(number)
        return torch.zeros_like(self._empty()) if gradient is None else gradient

    def _empty(self) -> Tensor:
        return torch.empty_like(self._like, device=device())

    def _op(self, kind: Callable[..., Any], tensor: Tensor, stage: int) -> dist.P2POp:
        return dist.P2POp(kind, tensor, self._pipe.ranks[self._owner(stage)], self.group)
