"""Batch sizes and length of a run."""

from megatron.config.field import Section, key
from megatron.config.types import Integers
from megatron.registry import OBJECTIVES


class TrainingSection(Section):
    """Batch sizes, length, evaluation and stopping.

    train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x data parallel size. Any one of
    the three follows from the others.
    """

    train_batch_size: int | None = key(None, "Samples in one step, over all ranks.", unit="samples")
    train_micro_batch_size_per_gpu: int | None = key(None, "Samples in one forward pass of a rank.", unit="samples")
    gradient_accumulation_steps: int | None = key(
        None, "Forward passes of a rank in one step; derived unless given.", unit="micro batches"
    )
    batch_size: int | None = key(
        None, "The micro batch size; follows from train_micro_batch_size_per_gpu.", unit="samples"
    )
    rampup_batch_size: Integers | None = key(
        None, "Growth of the batch: [first size, increment, samples over which it grows].", unit="samples"
    )
    train_iters: int | None = key(None, "Steps of the run.", unit="steps")
    train_epochs: int | None = key(None, "Passes over the data, instead of train_iters.", unit="epochs")
    train_samples: int | None = key(None, "Samples of the run, instead of train_iters.", unit="samples")
    train_impl: str = key(
        "normal", "Training objective.", choices=OBJECTIVES, planned=("dpo", "rm", "kto", "reinforce")
    )
    eval_interval: int = key(
        1000, "Steps between evaluations; with a task and train_epochs an epoch has one at its end.", unit="steps"
    )
    eval_iters: int = key(100, "Batches in one evaluation.", unit="batches")
    do_train: bool | None = key(None, "Whether there is anything to train; follows from the data.")
    do_valid: bool | None = key(None, "Whether there is anything to validate; follows from the data.")
    do_test: bool | None = key(None, "Whether there is anything to test; follows from the data.")
    seed: int = key(1234, "Seed of initial weights, data order and dropout.")
    deterministic: bool = key(False, "Use only operations that give the same bits on every run.")
    exit_interval: int | None = key(None, "Stop when the iteration is a multiple of this.", unit="steps")
    exit_duration: float | None = key(None, "Save and stop after this long.", unit="minutes")
    skip_outlier_steps: float | None = key(
        None,
        "Leave out updates from losses that exceed the mean of the steps before by this many standard deviations, "
        "such as 6; None leaves none out.",
    )
    outlier_window: int = key(
        128, "Steps before whose losses are compared; the first half of them is never left out.", unit="steps"
    )
    on_nan: str = key(
        "stop",
        "Action on a non-finite loss or gradient; its step is never applied.",
        choices=("stop", "skip"),
    )
    char_level_ppl: bool = key(False, "Report perplexity per character too.")
