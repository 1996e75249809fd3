"""All rules across sections. Each is a function of the whole Config that yields the errors it finds.

All rules are applied and every violation is reported at once. A rule speaks of what can never work; what is only
not built yet is in `megatron.config.validation.unsupported`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress

from megatron.config.config import Config
from megatron.config.validation import (
    adapters,
    architecture,
    attention,
    data,
    deepspeed,
    experts,
    layout,
    mixers,
    mup,
    optimizer,
    positions,
    schedule,
    training,
    transformer_engine,
)
from megatron.config.validation.unknown_values import UnresolvedValue, partial
from megatron.errors import ConfigIssue

Rule = Callable[[Config], Iterator[ConfigIssue]]

RULES: tuple[Rule, ...] = (
    training.deepspeed_is_on,
    layout.layout_divides_world,
    layout.stages_hold_layers,
    layout.vocabulary_divides_ranks,
    architecture.heads_divide_hidden,
    layout.heads_divide_ranks,
    layout.mlp_width_divides_ranks,
    architecture.positions_cover_sequence,
    architecture.skipped_positions_are_learned,
    architecture.rotary_turns_pairs,
    architecture.norms_have_what_they_are_made_with,
    positions.sines_come_in_pairs,
    positions.buckets_hold_distances,
    positions.scaling_is_known,
    attention.sparse_options_are_known,
    attention.window_holds_a_token,
    attention.blocks_have_their_own_weights,
    attention.shared_positions_are_reduced_once,
    training.fractions_are_fractions,
    schedule.warmup_is_a_part,
    schedule.warmup_ends_before_the_horizon,
    deepspeed.extra_arguments_only_add,
    deepspeed.offload_is_possible,
    training.counts_are_positive,
    training.ends_are_tokens,
    training.ports_are_ports,
    training.hosts_are_counted,
    training.one_launcher_is_named,
    layout.pipeline_limits_zero,
    layout.context_needs_no_pipeline,
    optimizer.whole_tensors_need_no_zero,
    optimizer.momenta_are_exchanged_once,
    optimizer.pieces_need_full_precision,
    optimizer.spread_experts_are_pieces,
    optimizer.host_memory_holds_parameters,
    optimizer.eight_bits_are_built,
    optimizer.nesterov_needs_momentum,
    layout.sequence_parallel_needs_tensor_parallel,
    training.fp16_loss_needs_fp16,
    mixers.mixers_limit_layouts,
    mixers.mixer_widths_divide,
    mup.mup_is_on_where_it_is_meant,
    mup.mup_has_a_base,
    mup.mup_factors_are_positive,
    mup.mup_knows_the_model,
    mup.mup_knows_the_optimizer,
    experts.experts_limit_zero,
    experts.tokens_choose_among_experts,
    experts.router_numbers_make_sense,
    schedule.learning_rates_are_ordered,
    training.saving_is_scheduled,
    training.loading_is_possible,
    training.buckets_are_addresses,
    schedule.run_has_a_length,
    schedule.horizon_counts_what_the_run_counts,
    schedule.batch_grows_in_whole_steps,
    schedule.curriculum_is_one_of_ours,
    training.recomputation_is_one_thing,
    training.snapshots_need_a_gpu,
    training.noise_needs_several_batches,
    data.data_has_one_source,
    data.lists_are_as_long_as_their_paths,
    data.split_is_readable,
    data.passes_need_no_weights,
    data.distances_start_again_with_attention,
    adapters.one_thing_is_trained,
    adapters.widths_are_those_of_the_model,
    adapters.updates_have_matrices,
    adapters.prompts_leave_room,
    transformer_engine.norm_and_mlp_are_one_layer,
    transformer_engine.fp8_has_layers,
)


def violations(config: Config, unknown: Collection[str] = ()) -> list[ConfigIssue]:
    """Every error that any rule finds. unknown: keys whose values nobody can judge by."""
    seen = partial(config, unknown)
    found: list[ConfigIssue] = []
    for rule in RULES:
        with suppress(UnresolvedValue):
            for issue in rule(seen):
                found.append(issue)  # noqa: PERF402 (what a rule found before it met an unknown value stands)
    return found
