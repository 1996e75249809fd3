"""The optimizer. `optimizer: {type, params}` is what a user writes; `optimizer_type` and `lr` follow from it."""

from megatron.config.field import Section, key
from megatron.config.types import Table
from megatron.registry import OPTIMIZERS


class OptimizerSection(Section):
    """Optimizer, weight decay and clipping."""

    optimizer: Table | None = key(None, "The optimizer: {type: Adam, params: {lr: 6.0e-4, betas: [0.9, 0.95]}}.")
    optimizer_type: str = key("adam", "Kind of optimizer; follows from optimizer.", choices=OPTIMIZERS)
    lr: float | None = key(None, "Maximum learning rate; follows from optimizer.")
    weight_decay: float = key(0.1, "Decoupled weight decay; norms and biases have none.")
    gradient_clipping: float = key(1.0, "Maximum global gradient norm; 0 does not clip.")
    clip_grad: float = key(1.0, "The same as gradient_clipping, which takes precedence.")
    ema_decay: float | None = key(
        None,
        "Decay of an exponential moving average of the weights, such as 0.999. Evaluations report its loss too, "
        "checkpoints keep it; None keeps none.",
    )
    use_bnb_optimizer: bool = key(False, "Use the 8-bit optimizers of the bitsandbytes package.")

    @property
    def params(self) -> Table:
        """The optimizer's own settings as the user wrote them."""
        params = (self.optimizer or {}).get("params") or {}
        return dict(params)
