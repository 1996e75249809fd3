"""Random numbers for dropout under tensor parallelism.

A tensor that is equal on all tensor-parallel ranks (the residual stream) needs the same dropout mask on all of them: it
uses torch's default generator, which every rank of a tensor-parallel group seeds alike. A sharded tensor (attention
heads) needs different masks: they are drawn inside ``TensorParallelRNG.fork``, from a separate state that each rank
seeds differently (Megatron-LM, arXiv:1909.08053, appendix B.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron.distributed.param_init import parameter_seed


class TensorParallelRNG:
    """Random state for draws on tensors that are sharded over tensor-parallel ranks.

    Args:
        seed: seed of the run.
        rank: a number that differs between ranks that must draw differently, such as the global rank.
        device: device of the draws.
    """

    def __init__(self, seed: int, rank: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.state = torch.Generator(self.device).manual_seed(parameter_seed(seed, rank, "sharded")).get_state()

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Makes torch's default generator continue this state inside the block, and restores it afterwards."""
        outer = self._default_state()
        self._set_default(self.state)
        try:
            yield
        finally:
            self.state = self._default_state()
            self._set_default(outer)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the state, for checkpoints and for recomputed activations."""
        return {"sharded": self.state.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continues from a saved state."""
        self.state = state["sharded"].clone()

    def _default_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def _set_default(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)
