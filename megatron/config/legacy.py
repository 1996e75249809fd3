"""Keys of older GPT-NeoX releases: understood where they mean one of today's, else refused by the name of today's."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.config.merge import Given
from megatron.errors import Mistake

RENAMED = {
    "gas": "gradient_accumulation_steps",
    "autotuning_config": "autotuning",
    "save_iters": "extra_save_iters",
    "save_interval": "checkpoint_factor",
    "num_experts": "moe_num_experts",
}
"""Same meaning, another name."""

IGNORED = {
    "detect_nvlink_pairs": "NCCL finds the links between accelerators itself",
    "zero_allow_untested_optimizer": "every optimizer here is tried with ZeRO",
    "moe_type": "there is one way to compute experts",
    "enable_expert_tensor_parallelism": "experts are cut like every other layer, over model_parallel_size ranks",
}
"""Without effect on results; one warning line."""

REFUSED = {
    "sparsity": "write attention_config: [[[global], all]], or [[[sparse_variable], all]] for `all`, "
    "or [[[sparse_variable, global], all]] for `interspersed`",
    "attention_type": "write attention_config: [[[global], all]] with the kind of attention in it",
    "mlp_type": "write activation: swiglu with use_bias_in_mlp: false for the LLaMA MLP",
    "warmup_iters": "write warmup, the part of the decay horizon",
    "lr_warmup_iters": "write warmup, the part of the decay horizon",
    "decay_lr_to": "write min_lr, the learning rate itself",
    "fp8_margin": "write te_fp8_margin",
    "hf_tokenizer": "write tokenizer_type: HFTokenizer with vocab_file",
    "global_batch_size": "write train_batch_size",
    "micro_batch_size": "write train_micro_batch_size_per_gpu",
    "tensor_model_parallel_size": "write model_parallel_size",
    "tensor_parallel_size": "write model_parallel_size",
    "pipeline_model_parallel_size": "write pipe_parallel_size",
    "num_query_groups": "write num_kv_heads",
    "ffn_hidden_size": "write intermediate_size; a gated activation uses a third of it",
    "moe_loss_coeff": "write moe_aux_loss_coeff",
    "moe_token_dropping": "give moe_capacity_factor to drop tokens beyond it; without it none is dropped",
    "moe_train_capacity_factor": "write moe_capacity_factor",
    "learning_rate": "write optimizer: {type: Adam, params: {lr: ...}}",
    "bf16_enabled": "write precision: bfloat16",
    "max_steps": "write train_iters",
}
"""The remedy names today's spelling."""


def modernise(values: Mapping[str, Given]) -> tuple[dict[str, Given], list[Mistake], list[str]]:
    """Today's keys, the mistakes of keys that have no meaning any more, and a warning for each that has no effect."""
    modern: dict[str, Given] = {}
    mistakes: list[Mistake] = []
    warnings: list[str] = []
    for name, given in values.items():
        if name in REFUSED:
            what = "this is a key of another release"
            mistakes.append(Mistake(what, name, given.value, given.where, REFUSED[name]))
        elif name in IGNORED:
            warnings.append(f"{given.where}: {name} = {given.value!r}: has no effect; {IGNORED[name]}")
        elif name in RENAMED and RENAMED[name] in values:
            other = values[RENAMED[name]]
            what = f"this is an older name of {RENAMED[name]}, which is given at {other.where}"
            mistakes.append(Mistake(what, name, given.value, given.where, "keep one of the two"))
        else:
            modern[RENAMED.get(name, name)] = given
    return modern, mistakes, warnings
