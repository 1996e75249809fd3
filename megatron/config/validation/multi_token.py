"""Rules for modules that predict further tokens."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.adapter_config import low_rank, soft_prompt
from megatron.config.config import Config
from megatron.config.derived.fill import trains
from megatron.errors import ConfigIssue
from megatron.pipe_schedule.layout import ONE_F_ONE_B
from megatron.registry import ATTENTION_ALONE, MLP_ALONE, POSITIONS, WITHOUT_ATTENTION

KEY = "mtp_num_layers"
DRAFTS = "num_speculative_tokens"


def drafts_can_be_taken_back(config: Config) -> Iterator[ConfigIssue]:
    """There are modules that draft, on the ranks of the model, and nothing that a wrong draft has changed for good."""
    model, count = config.model, config.generation.num_speculative_tokens
    if count == 0 or trains(config.launch.user_script):
        return
    if count < 0 or count > (model.mtp_num_layers or 0):
        what = f"the model has {model.mtp_num_layers or 0} modules that draft a token each ({KEY})"
        yield ConfigIssue(what, key=DRAFTS, value=count, hint=f"write a number from 0 to {KEY}")
    kinds = sorted({str(kind) for kind in model.attention_config or ()} & (WITHOUT_ATTENTION - {MLP_ALONE}))
    reasons = {
        "pipe_parallel_size": (config.parallelism.pipe_parallel_size > 1, "the modules need the embedding's stage"),
        "attention_config": (bool(kinds), f"a block of kind {', '.join(kinds)} cannot take a wrong token back"),
        "recompute": (config.generation.recompute, "drafts are read with the cache"),
    }
    for key, (applies, why) in reasons.items():
        if applies:
            hint = f"change it, or leave {DRAFTS} out"
            yield ConfigIssue(f"{DRAFTS} = {count}: {why}", key=key, value=config.flat()[key], hint=hint)


def modules_read_further_tokens(config: Config) -> Iterator[ConfigIssue]:
    """The modules read the embeddings of following tokens, and what the model made of earlier ones."""
    model, axes = config.model, config.parallelism
    count = model.mtp_num_layers
    if count is None:
        return
    assert model.seq_length
    if not 1 <= count < model.seq_length:
        yield ConfigIssue("it must be from 1 to less than seq_length", key=KEY, value=count, hint="leave it out")
    if not 0 <= model.mtp_loss_scaling_factor < float("inf"):
        yield ConfigIssue("it cannot be negative", key="mtp_loss_scaling_factor", value=model.mtp_loss_scaling_factor)
    if not trains(config.launch.user_script):
        return  # generation and evaluation do without them
    last = str((model.attention_config or ("global",))[-1])
    reasons = {
        "pipe_schedule": (
            axes.pipe_parallel_size > 1 and axes.pipe_schedule != ONE_F_ONE_B,
            "the modules are on the last stage of pipelines with one stage a rank",
        ),
        "context_parallel_size": (axes.context_parallel_size > 1, "the tokens that follow are on other ranks"),
        "pos_emb": (
            "embedding" in POSITIONS.entry(model.pos_emb).enters,
            "a module embeds tokens anew, without positions, so that positions have to enter in attention",
        ),
        "train_impl": (config.training.train_impl != "normal", "only the loss of the next token has further tokens"),
        "lora": (low_rank(model.lora) is not None, "a frozen model has no further tokens to learn from"),
        "soft_prompt_tuning": (
            soft_prompt(model.soft_prompt_tuning) is not None,
            "a frozen model has no further tokens to learn from",
        ),
        "use_mup": (config.mup.use_mup, "muP has no rule for the projection that joins tokens and hidden states"),
        "fused_linear_cross_entropy": (
            not config.kernels.fused_linear_cross_entropy,
            "each module's loss is computed together with the output layer",
        ),
        "attention_config": (
            last in WITHOUT_ATTENTION | {ATTENTION_ALONE},
            f"a module has a block as the last one, which is a {last}",
        ),
        "norm_placement": (
            model.norm_placement == "post",
            "a module reads the output of the norm behind the last block",
        ),
        "embedding_norm": (model.embedding_norm, "a module embeds tokens anew, with a norm of its own"),
        "compile": (config.kernels.compile, "the blocks of modules are not compiled"),
    }
    for key, (applies, why) in reasons.items():
        if applies:
            hint = f"change it, or leave {KEY} out"
            yield ConfigIssue(f"{KEY} = {count}: {why}", key=key, value=config.flat()[key], hint=hint)
