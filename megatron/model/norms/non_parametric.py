"""Layer normalization without weight and bias, as in OLMo (arXiv:2402.00838). Shapes: h features."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.kernels.norms import LAYER_NORM


class NonParametricLayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon), over the last dimension. It ignores ``bias``."""

    takes_residual = True

    def __init__(self, hidden_size: int, epsilon: float, bias: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.compute = LAYER_NORM

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., h] -> [..., h]; with a residual the norm of residual + x, and that sum."""
        if residual is not None:
            return self.compute.of_sum(x, residual, None, None, self.epsilon)
        return self.compute(x, None, None, self.epsilon)
