"""The validation pass: the mean loss of batches that are not trained on, in the middle and at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.process_group import any_rank
from megatron.training.loop_context import LoopContext, TrainSchedule
from megatron.training.run_state import RunState


def evaluate(schedule: TrainSchedule, context: LoopContext, state: RunState) -> bool:
    """Reports the mean loss of `eval_iters` global batches, which follow those of the evaluation before.

    Each data set that has a loss of its own follows, and with a moving average of the weights the same of that. A stop
    request is checked between batches and ends the evaluation; then the result is False, on all ranks.
    """
    context.hooks.before_evaluate(state)
    with context.saved_weights():
        if not _losses(schedule, context, state, "validation"):
            return False
        if context.average is not None:
            with context.average():
                if not _losses(schedule, context, state, "validation_ema"):
                    return False
        return context.hooks.after_evaluate(state)


def _losses(schedule: TrainSchedule, context: LoopContext, state: RunState, split: str) -> bool:
    """Reports the loss of each set of validation data as a metric of `split`; False after a stop request."""
    assert context.valid is not None, "there is validation data wherever an evaluation is due"
    number = max(state.iteration - 1, 0) // schedule.eval_interval if schedule.eval_interval else 0
    first_sample = number * schedule.eval_iters * schedule.samples
    own = [(f"{split}/{name}", source) for name, source in context.valid_sets.items()]
    for name, source in [(split, context.valid), *own]:
        batches = context.hooks.batches(source, "validation", first_sample)
        losses = evaluation_metrics(schedule, context, batches, source.full_pass)
        if losses is None:
            return False
        if losses:
            context.reporter.evaluation(state.iteration, name, losses)
    return True


def evaluation_metrics(
    schedule: TrainSchedule, context: LoopContext, batches: Iterator[MicroBatch], count: int | None = None
) -> dict[str, float] | None:
    """Returns the loss of one evaluation over these batches and metrics derived from it; None after a stop request.

    Nothing, with a message, where no token of the batches has a label.

    Args:
        schedule: numbers of the run.
        context: objects of the run.
        batches: micro batches.
        count: how many of them; those of eval_iters global batches unless given.
    """
    counted = batches if context.characters is None else context.characters.counted(batches)
    sums = _sums(schedule, context, counted, schedule.eval_iters * schedule.micro_batches if count is None else count)
    if sums is None:
        context.reporter.message("the evaluation is given up: a stop was asked for")
        return None
    loss, tokens = sums
    if not tokens:
        message = "an evaluation without a label in its batches has no loss: raise eval_iters or seq_length"
        context.reporter.message(message)
        return {}
    mean = loss / tokens
    parts = context.engine.take_loss_parts()
    if context.characters is None:
        return {"lm_loss": mean, **parts}
    return {"lm_loss": mean, "lm_loss_char_lvl_ppl": context.characters.perplexity(mean)}


def _sums(
    schedule: TrainSchedule, context: LoopContext, batches: Iterator[MicroBatch], left: int
) -> tuple[float, float] | None:
    """The loss of all tokens that count [nats], and their number; None after a stop request on any rank.

    The request is checked every few micro batches.

    Args:
        schedule: numbers of the run.
        context: objects of the run.
        batches: micro batches.
        left: how many of them.
    """
    share = schedule.micro_batches * -(-context.engine.min_eval_batches // schedule.micro_batches)
    loss = tokens = 0.0
    while left > 0:
        if any_rank(context.stop_requested()):
            return None
        count = min(share, left)
        losses_of, tokens_of = context.engine.eval_sums(batches, count)
        loss, tokens, left = loss + losses_of, tokens + tokens_of, left - count
    return loss, tokens
