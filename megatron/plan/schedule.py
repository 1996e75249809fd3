"""The schedule of a pipeline in the plan: what each rank computes when, and the part of the time that ranks wait."""

from __future__ import annotations

from typing import Any

from megatron.adapter_config import low_rank, soft_prompt
from megatron.config import Config
from megatron.config.derived.pipe_layout import pipe_layout
from megatron.pipe_schedule.drawing import LEGEND, drawn
from megatron.pipe_schedule.layout import ONE_F_ONE_B, PipeLayout
from megatron.pipe_schedule.timing import PassTimes, Timeline, step_bubble


def pass_times(config: Config) -> PassTimes:
    """Returns the times of the passes, each 1 where nothing is known: recomputed blocks have a second forward pass, and
    frozen weights no gradient.
    """
    recompute, model = config.recompute, config.model
    blocks = recompute.checkpoint_activations or recompute.recompute_granularity == "full"
    frozen = low_rank(model.lora) is not None or soft_prompt(model.soft_prompt_tuning) is not None
    return PassTimes(inputs=2.0 if blocks else 1.0, weights=0.0 if frozen else 1.0)


def schedule_figures(config: Config) -> dict[str, Any] | None:
    """Returns the object `pipe_schedule` of `--dry-run --json`; None where no stage waits for another."""
    found = _step(config)
    if found is None:
        return None
    step, bubble, plain = found
    return {
        "schedule": step.layout.schedule,
        "stages_per_rank": step.layout.chunks,
        "bubble": round(bubble, 4),
        "bubble_1f1b": round(plain, 4),
    }


def schedule_lines(config: Config) -> list[str]:
    """Returns the lines of the plan; none where no stage waits for another."""
    found = _step(config)
    if found is None:
        return []
    step, bubble, plain = found
    layout, count = step.layout, config.training.gradient_accumulation_steps
    stages = "1 stage" if layout.chunks == 1 else f"{layout.chunks} stages"
    title = f"{layout.schedule}: {layout.ranks} ranks x {stages}, {count} micro batches, bubble {bubble:.1%}"
    if layout.schedule != ONE_F_ONE_B:
        title += f" (1f1b {plain:.1%})"
    shown = len({work.batch for work, _, _ in step.passes[0]})
    cut = [f"drawn with {shown} micro batches; further ones are like those in the middle"] if shown != count else []
    return [title, *drawn(step), LEGEND, *cut]


def _step(config: Config) -> tuple[Timeline, float, float] | None:
    """Returns a timeline, the bubble, and that of one stage a rank; None without a pipeline, or an unknown batch."""
    layout, count = pipe_layout(config), config.training.gradient_accumulation_steps
    if layout.ranks == 1 or not count:
        return None
    times = pass_times(config)
    plain = PipeLayout(ONE_F_ONE_B, layout.ranks)
    step, bubble = step_bubble(layout, count, times)
    return step, bubble, bubble if layout == plain else step_bubble(plain, count, times)[1]
