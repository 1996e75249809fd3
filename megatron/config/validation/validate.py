"""Runs all rules. A rule is a function of the Config that yields the errors it finds.

Every violation is reported at once. Rules reject what can never work; features that are not built yet are in
`megatron.config.validation.unsupported`.
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
    encoder,
    encoder_decoder,
    experts,
    fp8,
    latent,
    launch,
    layout,
    mixers,
    model_parts,
    multi_token,
    mup,
    optimizer,
    pipe_schedule,
    positions,
    schedule,
    training,
    transformer_engine,
)
from megatron.config.validation.unknown_values import UnresolvedValue, hide_unknown
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
    architecture.norms_have_their_bias,
    positions.sines_come_in_pairs,
    positions.buckets_hold_distances,
    positions.scaling_is_known,
    model_parts.norms_fit_their_blocks,
    model_parts.norms_across_heads_see_all,
    model_parts.factors_are_numbers,
    model_parts.bounds_are_computed,
    model_parts.sinks_are_computed,
    model_parts.layer_types_are_known,
    latent.latents_have_widths,
    latent.latents_fit_other_parts,
    multi_token.modules_read_further_tokens,
    attention.sparse_options_are_known,
    attention.window_holds_a_token,
    attention.blocks_have_their_own_weights,
    attention.shared_positions_are_reduced_once,
    training.fractions_are_fractions,
    schedule.warmup_is_a_part,
    schedule.warmup_ends_before_the_horizon,
    deepspeed.extra_arguments_only_add,
    deepspeed.offload_is_possible,
    deepspeed.secondary_partitions_divide_ranks,
    training.counts_are_positive,
    training.tokenizer_was_not_moved,
    training.eos_tokens_are_ids,
    launch.ports_are_ports,
    launch.hosts_are_counted,
    launch.one_launcher_is_named,
    layout.pipeline_limits_zero,
    layout.context_divides_sequences,
    layout.ring_is_supported,
    pipe_schedule.chunks_hold_blocks,
    pipe_schedule.schedule_takes_micro_batches,
    pipe_schedule.schedule_fits_other_keys,
    optimizer.full_tensors_need_no_zero,
    optimizer.momenta_are_exchanged_once,
    optimizer.flat_shards_need_full_precision,
    optimizer.full_tensors_need_no_expert_parallel,
    optimizer.options_of_muon_go_together,
    optimizer.one_average_of_the_weights,
    optimizer.iterates_are_averaged_in_memory,
    optimizer.host_memory_holds_parameters,
    optimizer.eight_bits_are_built,
    optimizer.apex_has_what_is_asked,
    optimizer.nesterov_needs_momentum,
    layout.sequence_parallel_needs_tensor_parallel,
    training.fp16_loss_needs_fp16,
    training.left_out_steps_leave_no_gradients,
    training.outliers_are_found_by_their_loss,
    mixers.mixers_limit_layouts,
    mixers.mixer_widths_divide,
    mixers.mamba2_sizes_fit,
    mup.mup_keys_need_use_mup,
    mup.mup_has_a_base,
    mup.mup_factors_are_positive,
    mup.mup_knows_the_model,
    mup.mup_knows_the_optimizer,
    experts.experts_limit_zero,
    experts.tokens_choose_among_experts,
    experts.router_numbers_make_sense,
    experts.blocks_with_experts_exist,
    experts.expert_widths_divide,
    experts.groups_hold_experts,
    experts.scores_belong_to_topk,
    schedule.learning_rates_are_ordered,
    schedule.infinite_schedules_have_their_rates,
    training.saving_is_scheduled,
    training.loading_is_possible,
    training.buckets_are_addresses,
    schedule.run_has_a_length,
    schedule.horizon_has_the_unit_of_the_run,
    schedule.rampup_sizes_divide,
    schedule.curriculum_is_supported,
    training.recomputation_is_one_thing,
    training.snapshots_need_a_gpu,
    training.measurements_make_sense,
    encoder.masks_belong_to_objectives,
    encoder.encoders_do_not_generate,
    encoder.encoders_have_their_parts,
    encoder.masked_samples_can_be_made,
    encoder_decoder.stacks_belong_to_spans,
    encoder_decoder.encoder_decoders_have_their_parts,
    encoder_decoder.encoder_decoders_generate_or_train,
    encoder_decoder.spans_can_be_cut_out,
    data.data_has_one_source,
    data.lists_are_as_long_as_their_paths,
    data.split_is_readable,
    data.passes_need_no_weights,
    data.distances_start_again_with_attention,
    adapters.one_thing_is_trained,
    adapters.widths_are_those_of_the_model,
    adapters.adapters_have_matrices,
    adapters.saved_modules_exist,
    adapters.prompts_leave_room,
    transformer_engine.norm_and_mlp_are_one_layer,
    transformer_engine.fp8_has_layers,
    fp8.fp8_recipe_is_usable,
)


def find_violations(config: Config, unknown: Collection[str] = ()) -> list[ConfigIssue]:
    """Returns the errors of all rules. unknown: keys whose value is invalid; rules that read them are skipped."""
    seen = hide_unknown(config, unknown)
    found: list[ConfigIssue] = []
    for rule in RULES:
        with suppress(UnresolvedValue):
            for issue in rule(seen):
                found.append(issue)  # noqa: PERF402 (what a rule found before it met an unknown value stands)
    return found
