"""DeepSpeed's settings: ZeRO, logging of the engine, and blocks that are passed through.

The `zero_*` keys below `zero_optimization` follow from it; they are outputs, which public configurations may carry.
"""

from megatron.config.field import Section, key
from megatron.config.types import Integers, Table


class DeepspeedSection(Section):
    """DeepSpeed's own settings."""

    deepspeed: bool = key(True, "Train through DeepSpeed; there is no other way.")
    zero_optimization: Table | None = key(
        None, "ZeRO: {stage: 0 | 1 | 2 | 3, ...}; 0 when left out. In 16 bits 0 is run as 1. arXiv:1910.02054."
    )
    zero_stage: int | str | Integers | None = key(None, "ZeRO stage; follows from zero_optimization.")
    zero_reduce_scatter: bool | None = key(None, "Follows from zero_optimization.")
    zero_contiguous_gradients: bool | None = key(None, "Follows from zero_optimization.")
    zero_reduce_bucket_size: int | None = key(None, "Follows from zero_optimization.", unit="elements")
    zero_allgather_bucket_size: int | None = key(None, "Follows from zero_optimization.", unit="elements")
    prescale_gradients: bool = key(False, "Divide gradients by the world size before reducing them.")
    gradient_predivide_factor: float = key(1.0, "Divide by this before, and the rest after, reducing.")
    sparse_gradients: bool = key(False, "Sparse reduction of embedding gradients; removed in DeepSpeed 0.19.")
    communication_data_type: bool | None = key(None, "Format in which gradients are reduced; left to DeepSpeed.")
    steps_per_print: int = key(10, "How often DeepSpeed prints its own line.", unit="steps")
    wall_clock_breakdown: bool = key(False, "Time forward, backward and step of each iteration.")
    dump_state: bool = key(False, "Have DeepSpeed print its state once started.")
    flops_profiler: Table | None = key(None, "DeepSpeed's FLOPs profiler: {enabled, profile_step, ...}.")
    comms_logger: Table | None = key(None, "DeepSpeed's log of collectives: {enabled, ...}.")
    autotuning: Table | None = key(None, "DeepSpeed's autotuner: {enabled, ...}.")
    activation_checkpointing: Table | None = key(None, "DeepSpeed's activation checkpointing block.")
    sparse_attention: Table | None = key(None, "DeepSpeed's sparse attention; removed in DeepSpeed 0.19.")
    data_efficiency: Table | None = key(
        None, "DeepSpeed's own data sampling, which does not work here; curriculum_learning does."
    )
    curriculum_learning: Table | None = key(
        None, "Sequences that grow: {enabled, min_difficulty, max_difficulty, schedule_type, schedule_config}."
    )
    curriculum_seqlen: int = key(0, "Sequence length reached by the curriculum.", unit="tokens")
    tensorboard: Table | None = key(None, "DeepSpeed's own TensorBoard monitor; tensorboard_dir is ours.")
    wandb: Table | None = key(None, "DeepSpeed's own Weights & Biases monitor; use_wandb is ours.")
    csv_monitor: Table | None = key(None, "DeepSpeed's CSV monitor; metrics.jsonl is ours.")
    elasticity: Table | None = key(None, "Elastic world sizes; removed in DeepSpeed 0.19.")
    compression_training: Table | None = key(None, "Compressed training; removed in DeepSpeed 0.19.")
    checkpoint: Table | None = key(None, "DeepSpeed's checkpoint block: {tag_validation, parallel_write, ...}.")
    deepspeed_extra_args: Table | None = key(None, "Further DeepSpeed settings, at the top level of its configuration.")
