"""Initialisation of weights."""

from megatron.config.field import Section, key
from megatron.registry import INITS


class InitializationSection(Section):
    """Initial weights."""

    init_method: str = key("normal", "Initialisation of every matrix but the output projections.", choices=INITS)
    output_layer_init_method: str = key(
        "scaled_normal", "Initialisation of the projections that add to the residual.", choices=INITS
    )
    init_method_std: float = key(0.02, "Standard deviation of the normal initialisations.")
    use_cpu_initialization: bool = key(False, "Draw the initial weights on the CPU.")
