"""Random numbers for dropout under tensor parallelism.

Where a tensor is the same on all tensor-parallel ranks (the residual stream), dropout must draw the same mask on all of
them: it uses torch's default generator, which every rank of a tensor-parallel group seeds alike. Where a tensor is cut
over the ranks (attention heads), the masks must differ: those draws run inside ``TensorParallelRNG.fork``, on a state
of its own that each rank seeds differently (Megatron-LM, arXiv:1909.08053, appendix B.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron.distributed.param_init import parameter_seed


class TensorParallelRNG:
    """The random state for draws on tensors that are cut over tensor-parallel ranks.

    seed: of the run. rank: a number that differs between the ranks that must draw differently (tensor, pipeline and
    data coordinates together; the global rank will do). device: where the draws happen.
    """

    def __init__(self, seed: int, rank: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.state = torch.Generator(self.device).manual_seed(parameter_seed(seed, rank, "sharded")).get_state()

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Inside the block torch's default generator continues this state; afterwards it is as it was before."""
        outer = self._default_state()
        self._set_default(self.state)
        try:
            yield
        finally:
            self.state = self._default_state()
            self._set_default(outer)

    def state_dict(self) -> dict[str, Tensor]:
        """The state, for checkpoints and for recomputed activations."""
        return {"sharded": self.state.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved state."""
        self.state = state["sharded"].clone()

    def _default_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def _set_default(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)
