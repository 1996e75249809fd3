"""The learning rate schedule."""

from megatron.config.field import Section, key
from megatron.config.types import Table
from megatron.registry import SCHEDULES


class ScheduleSection(Section):
    """Warmup, then decay over a horizon."""

    lr_decay_style: str = key("linear", "Shape of the decay after warmup.", choices=SCHEDULES)
    lr_decay_iters: int | None = key(
        None, "Horizon of the decay; train_iters x lr_decay_fraction when left out.", unit="steps"
    )
    lr_decay_fraction: float | None = key(
        None, "Horizon as a part of train_iters, where lr_decay_iters is not given.", unit="fraction"
    )
    lr_decay_samples: int | None = key(
        None, "Horizon counted in samples, with train_samples, which it is unless given.", unit="samples"
    )
    min_lr: float = key(0.0, "The decay never goes below this learning rate.")
    warmup: float = key(0.01, "Part of the horizon in which the learning rate rises linearly to lr.", unit="fraction")
    warmup_iters: int | None = key(None, "Length of the warmup in steps, in place of warmup.", unit="steps")
    wsd_decay_fraction: float = key(
        0.1,
        "With lr_decay_style wsd or power, the last part of the horizon, in which the learning rate decays.",
        unit="fraction",
    )
    wsd_decay_style: str = key("linear", "Shape of that decay.", choices=("linear", "cosine", "sqrt"))
    infinite_constant_lr: float | None = key(
        None, "With lr_decay_style infinite_cosine or infinite_inv_sqrt, the learning rate after cooling down."
    )
    infinite_cooldown_fraction: float = key(
        0.2, "Part of the horizon after warmup in which the learning rate falls to it.", unit="fraction"
    )
    infinite_anneal_fraction: float = key(
        0.1, "Last part of the horizon, in which it falls exponentially to min_lr.", unit="fraction"
    )
    power_amplitude: float = key(
        4.0,
        "With lr_decay_style power, the rate is at most this x train_batch_size x tokens ** power_exponent.",
    )
    power_exponent: float = key(-0.51, "Exponent of the tokens trained.")
    override_lr_scheduler: bool = key(False, "On resuming, take the schedule from this configuration.")
    use_checkpoint_lr_scheduler: bool = key(False, "On resuming, take the schedule from the checkpoint.")
    scheduler: Table | None = key(None, "A DeepSpeed scheduler block; the schedule here is used instead.")

    def warmup_length(self, horizon: int) -> int:
        """Returns the length of the warmup, in the unit of the horizon [steps or samples]."""
        return int(self.warmup * horizon) if self.warmup_iters is None else self.warmup_iters
