"""Layer normalization without weight and bias, as in OLMo (arXiv:2402.00838). Shapes: h features."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.kernels.norms import layer_norm


class NonParametricLayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon), over the last dimension. It ignores ``bias``."""

    def __init__(self, hidden_size: int, epsilon: float, bias: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.compute = layer_norm

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        return self.compute(x, None, None, self.epsilon)
