"""Saving and loading."""

from megatron.config.field import Section, key
from megatron.config.types import Integers, Table


class CheckpointSection(Section):
    """Saving and loading of checkpoints."""

    save: str | None = key(None, "Folder to save checkpoints in.")
    save_overwrite: bool = key(
        False,
        "Start anew in a `save` folder that holds another run's checkpoints: they move to <save>/replaced-<time>; "
        "without it that is refused.",
    )
    load: str | None = key(None, "Folder to load a checkpoint from.")
    load_fallback: str = key(
        "error",
        "Behaviour when `load` has no intact checkpoint: error refuses to start, previous loads the newest intact one "
        "where a newer one is damaged, fresh starts from initial weights where there is none.",
        choices=("error", "previous", "fresh"),
    )
    pretrained_checkpoint: str | None = key(
        None,
        "Save folder of a trained encoder, whose weights without its heads a classifier, or the encoders of queries "
        "and passages, start from where `load` has nothing to resume.",
    )
    iteration: int | None = key(None, "Checkpoint to load; the latest when left out.", unit="steps")
    finetune: bool = key(False, "Load the weights only and count iterations from 0.")
    checkpoint_factor: int | float | None = key(
        None, "With scale linear: save every so many steps; with log: at the powers of this.", unit="steps"
    )
    checkpoint_scale: str = key("linear", "Spacing of checkpoints.", choices=("linear", "log"))
    checkpoint_async: bool = key(False, "Train while a checkpoint is written; only its copy to host memory blocks.")
    extra_save_iters: Integers | None = key(None, "Further iterations to save at.", unit="steps")
    save_hf_every: int | None = key(
        None,
        "Also write a folder of transformers for checkpoints whose iteration is a multiple of this, in the background, "
        "into <save>/huggingface; none when left out.",
        unit="steps",
    )
    hf_architecture: str | None = key(
        None,
        "Family in transformers that save_hf_every and tools/convert_to_hf.py write, where it can express the model: "
        "that of an imported one. The first that can when left out.",
    )
    keep_last_n_checkpoints: int | None = key(None, "Older checkpoints are removed.", unit="checkpoints")
    no_save_optim: bool = key(False, "Save no optimizer state.")
    no_save_rng: bool = key(False, "Save no random number state.")
    no_load_optim: bool = key(False, "Start with a fresh optimizer state.")
    override_data_order: bool = key(
        False,
        "Resume although data sets, weights, seed, sequence length, packing or passes are others than the "
        "checkpoint's, so that the samples that follow are in another order; refused otherwise.",
    )
    no_load_rng: bool = key(False, "Start with fresh random number state.")
    checkpoint_validation_with_forward_pass: bool = key(
        False, "Save logits with the checkpoint and compare them after loading."
    )
    s3_path: str | None = key(
        None, "Also copy checkpoints to this s3://bucket/folder; one that `load` lacks is fetched from there."
    )
    s3_chunk_size: int = key(104857600, "Size of one request of a copy to or from S3.", unit="bytes")
    config_files: Table | None = key(None, "Text of the configuration files by name; kept with the checkpoint.")
