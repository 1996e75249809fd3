"""How many samples a run takes of each split."""

from __future__ import annotations

from megatron.config.derive.ramp import Ramp
from megatron.config.known import known
from megatron.config.sections.training import TrainingSection


def samples_wanted(training: TrainingSection, iterations: int, *, same_valid: bool = False) -> dict[str, int]:
    """Samples of train, valid and test that all ranks together take in a run of so many iterations.

    There is an evaluation every eval_interval iterations and one at the end, each on samples of its own, or with
    same_valid all on the same ones.
    """
    batch = known(training.train_batch_size)
    per_evaluation = training.eval_iters * batch
    several = bool(training.eval_interval) and not same_valid
    evaluations = iterations // training.eval_interval + 1 if several else 1
    train = Ramp.of(batch, training.rampup_batch_size).consumed(iterations)
    return {"train": train, "valid": evaluations * per_evaluation, "test": per_evaluation}
