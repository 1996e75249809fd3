"""Logging and measurement."""

from pathlib import Path
from typing import Any

from megatron.config.field import Section, key
from megatron.config.types import Strings, Table
from megatron.registry import SINKS


class ObserveSection(Section):
    """Logging, metrics sinks and profiling."""

    log_interval: int = key(100, "Steps between log lines and metrics records.", unit="steps")
    log_dir: str | None = key(None, "The run directory; <save>/logs or runs/<name>-<date> when left out.")
    sinks: Strings | None = key(
        None, "Metrics sinks by name, beside those that have a key of their own.", choices=SINKS
    )
    tensorboard_dir: str | None = key(None, "Folder of TensorBoard event files.")
    use_wandb: bool | None = key(None, "Log to Weights & Biases; when left out, only if a key for it is found.")
    wandb_group: str | None = key(None, "Weights & Biases group.")
    wandb_run_name: str | None = key(None, "Weights & Biases run name.")
    wandb_team: str | None = key(None, "Weights & Biases team.")
    wandb_project: str = key("neox", "Weights & Biases project.")
    wandb_host: str = key("https://api.wandb.ai", "Weights & Biases server.")
    wandb_init_all_ranks: bool = key(False, "Every rank logs to Weights & Biases.")
    use_comet: bool | None = key(None, "Log to Comet.")
    comet_workspace: str | None = key(None, "Comet workspace.")
    comet_project: str | None = key(None, "Comet project.")
    comet_experiment_name: str | None = key(None, "Comet experiment name.")
    comet_tags: Strings | None = key(None, "Comet tags.")
    comet_others: Table | None = key(None, "Further metadata for Comet.")
    comet_experiment: Any = key(None, "Not for users: the public project kept its Comet handle here.")
    git_hash: str | None = key(None, "Revision of the code; found at launch.")
    peak_theoretical_tflops: float | None = key(
        None, "Peak of one accelerator, for model FLOPs utilisation.", unit="TFLOP/s"
    )
    fingerprint_interval: int | None = key(
        None, "Steps between fingerprints of every layer, for tools/compare_runs.py; none when left out.", unit="steps"
    )
    log_grad_norm: bool = key(False, "Log the gradient norm of each parameter.")
    log_grad_pct_zeros: bool = key(False, "Log the share of zeros in each gradient.")
    log_param_norm: bool = key(False, "Log the norm of each parameter.")
    log_norms_by: str = key(
        "parameter",
        "Whether those norms and shares are of each parameter or of each layer.",
        choices=("parameter", "layer"),
    )
    loss_spike_factor: float | None = key(
        None, "Warn when the loss exceeds this multiple of its running mean, with its samples; off when left out."
    )
    log_optimizer_states: bool = key(False, "Log norms of the optimizer's state.")
    log_gradient_noise_scale: bool = key(False, "Estimate the gradient noise scale, arXiv:1812.06162.")
    gradient_noise_scale_n_batches: int = key(5, "Batches in one estimate.", unit="batches")
    gradient_noise_scale_cpu_offload: bool = key(False, "Keep the estimate's gradients in host memory.")
    memory_profiling: bool = key(False, "Record a snapshot of the accelerator's memory.")
    memory_profiling_path: str | None = key(None, "Folder of that snapshot.")
    profile: bool = key(False, "Trace some steps with the torch profiler.")
    profile_step_start: int = key(10, "First traced step.", unit="steps")
    profile_step_stop: int = key(12, "Tracing stops before this step.", unit="steps")

    @property
    def folder(self) -> Path | None:
        """The run directory as a path; None where nothing is written."""
        return None if self.log_dir is None else Path(self.log_dir)
