"""Maximal update parametrisation, arXiv:2203.03466."""

from megatron.config.key import Section, key


class MupSection(Section):
    """Hyperparameters that carry over from narrow to wide models."""

    use_mup: bool = key(False, "Scale initial weights and learning rates by width.")
    coord_check: bool = key(False, "Plot activations against width and stop.")
    save_base_shapes: bool = key(False, "Write the shapes of the base model and stop.")
    base_shapes_file: str | None = key(None, "Shapes of the base model.")
    mup_init_scale: float = key(1.0, "Multiplies the initial weights.")
    mup_attn_temp: float = key(1.0, "Multiplies the attention scores.")
    mup_output_temp: float = key(1.0, "Multiplies the logits.")
    mup_embedding_mult: float = key(1.0, "Multiplies the embedding's output.")
    mup_rp_embedding_mult: float = key(1.0, "Multiplies the relative position embedding.")
    mup_width_scale: int = key(2, "Width of the delta model over the base model.", unit="ratio")
