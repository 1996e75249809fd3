"""Activation recomputation in the backward pass (arXiv:1604.06174).

Full recomputation saves only the input of a group of blocks. By the method "uniform" every block belongs to a group of
`layers` blocks; by "block" the first `layers` blocks of a stage are recomputed one by one and the others saved, to use
the available memory. Selective recomputation (arXiv:2205.05198, section 5) repeats only the attention core, which has
most of the memory and little of the arithmetic.

The second computation must draw the same dropout masks. The functions that recompute restore torch's default generator;
the generator for sharded tensors is restored here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, is_grad_enabled

from megatron.distributed.rng_tracker import TensorParallelRNG
from megatron.model.block import Block
from megatron.model.kv_cache import KVCache

Layer = Callable[..., Tensor]
Checkpoint = Callable[..., Tensor]
"""checkpoint(function, input): calls the function, saves only its input, and calls it again in the backward pass."""


@dataclass(frozen=True)
class Recompute:
    """Settings of full recomputation."""

    checkpoint: Checkpoint
    """Function of torch or DeepSpeed."""
    random: TensorParallelRNG
    """Generator whose state is restored in the second forward pass."""
    layers: int = 1
    """[blocks], see the top of the file."""
    method: Literal["uniform", "block"] = "uniform"
    """`uniform` or `block`, see the top of the file."""

    def groups(self, layers: Sequence[Layer]) -> Iterator[tuple[bool, Sequence[Layer]]]:
        """Yields (whether it is recomputed, the layers) of each group."""
        blocks = [index for index, layer in enumerate(layers) if isinstance(layer, Block)]
        first, end = (blocks[0], blocks[-1] + 1) if blocks else (len(layers), len(layers))
        yield False, layers[:first]
        if self.method == "uniform":
            for start in range(first, end, self.layers):
                yield True, layers[start : min(start + self.layers, end)]
        else:
            stop = min(first + self.layers, end)
            for index in range(first, stop):
                yield True, layers[index : index + 1]
            yield False, layers[stop:end]
        yield False, layers[end:]

    def run(
        self,
        layers: Sequence[Layer],
        carry: Tensor,
        document_starts: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Runs the layers in order, saving only their input.

        Args:
            layers: layers in order.
            carry: input of the first layer.
            document_starts: as for run_layers.
            padding: as for run_layers.
        """

        def forward(value: Tensor) -> Tensor:
            for layer in layers:
                value = layer(value, None, document_starts, *_of(layer, padding))
            return value

        if not carry.requires_grad:
            # Nothing before is trained, and DeepSpeed's function requires a gradient of its input. It is no leaf:
            # partitioned activations are stored flat, in a shape that a leaf's gradient would not have.
            carry = carry.detach().requires_grad_().view_as(carry)
        return self.checkpoint(_SameRNGForward(forward, self.random), carry)


class _SameRNGForward:
    """A function whose second call starts from the random state of the first, and then restores the state."""

    def __init__(self, function: Callable[[Tensor], Tensor], random: TensorParallelRNG) -> None:
        self._function = function
        self._random = random
        self._start: Tensor | None = None

    def __call__(self, value: Tensor) -> Tensor:
        if self._start is None:
            self._start = self._random.state.clone()
            return self._function(value)
        now = self._random.state
        self._random.state = self._start
        try:
            return self._function(value)
        finally:
            self._random.state = now


def run_layers(
    layers: Sequence[Layer],
    carry: Tensor,
    cache: KVCache | None,
    recompute: Recompute | None,
    document_starts: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """Runs the layers of a model or a stage, with recomputation if it is set and there is a backward pass.

    Args:
        layers: layers in order.
        carry: input of the first layer.
        cache: cache of earlier tokens, or None.
        recompute: settings of recomputation, or None.
        document_starts: start of the document of each token [b, s], for document masks.
        padding: True for a token that the packing added [b, s], for layers with experts.
    """
    if recompute is None or cache is not None or not is_grad_enabled():
        for layer in layers:
            carry = layer(carry, cache, document_starts, *_of(layer, padding))
        return carry
    for recomputed, group in recompute.groups(layers):
        if recomputed:
            carry = recompute.run(group, carry, document_starts, padding)
        else:
            for layer in group:
                carry = layer(carry, None, document_starts, *_of(layer, padding))
    return carry


def _of(layer: Layer, padding: Tensor | None) -> tuple[Tensor, ...]:
    """The mask of padding as a further argument of a layer that takes it."""
    return (padding,) if padding is not None and getattr(layer, "takes_padding", False) else ()
