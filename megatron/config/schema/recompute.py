"""Recomputation of activations in the backward pass."""

from megatron.config.field import Section, key


class RecomputeSection(Section):
    """Activation checkpointing."""

    checkpoint_activations: bool = key(False, "Save only the input of each group of blocks and recompute the rest.")
    checkpoint_num_layers: int = key(1, "Blocks in one recomputed group.", unit="blocks")
    recompute_granularity: str | None = key(
        None, "full recomputes blocks, selective only the attention core.", choices=("full", "selective")
    )
    recompute_method: str | None = key(
        None,
        "uniform recomputes every group, block only the first checkpoint_num_layers.",
        choices=("uniform", "block"),
    )
    partition_activations: bool = key(False, "Shard saved activations over the tensor parallel ranks.")
    checkpoint_in_cpu: bool = key(False, "Store saved activations in host memory.")
    contiguous_checkpointing: bool = key(False, "Copy saved activations into one buffer.")
    synchronize_each_layer: bool = key(False, "Wait for the device after each recomputed group.")
    profile_backward: bool = key(False, "Time the backward pass of each recomputed group.")
    deepspeed_activation_checkpointing: bool = key(True, "Use DeepSpeed's activation checkpointing.")
