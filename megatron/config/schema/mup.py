"""Maximal update parametrisation, arXiv:2203.03466."""

from megatron.config.field import Section, key
from megatron.config.types import Table


class MupSection(Section):
    """Hyperparameter transfer from narrow to wide models, see docs/mup.md."""

    use_mup: bool = key(
        False, "Scale initial weights, learning rates, attention and the output layer by the width over a base model's."
    )
    coord_check: bool = key(
        False, "Train a few widths for a few steps, with muP and without, draw the sizes of activations and stop."
    )
    save_base_shapes: bool = key(
        False, "Write the shapes of this model, as a base for wider ones, into base_shapes_file and stop."
    )
    base_shapes_file: str | None = key(None, "JSON file with the shapes of the base model; save_base_shapes writes it.")
    mup_base_widths: Table | None = key(None, "The widths of the base model; follows from base_shapes_file.")
    mup_init_scale: float = key(1.0, "Multiplies the initial weights, besides what muP does.")
    mup_attn_temp: float = key(1.0, "Divides what the softmax of attention sees, positions that are added included.")
    mup_output_temp: float = key(1.0, "Divides the logits.")
    mup_embedding_mult: float = key(1.0, "Multiplies the embedding's output, words and positions.")
    mup_rp_embedding_mult: float = key(1.0, "Multiplies learned relative positions (pos_emb: rpe).")
    mup_width_scale: int = key(
        2, "How much wider each model of coord_check is than the one before; the first is the base.", unit="ratio"
    )
