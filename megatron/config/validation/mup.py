"""Rules for maximal update parametrisation (muP)."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.config import FIELDS, Config
from megatron.config.derived.fill import trains
from megatron.errors import ConfigIssue
from megatron.registry import MIXER_BLOCKS, NORMS, OPTIMIZERS, POSITIONS, REPLACING

FACTORS = ("mup_init_scale", "mup_attn_temp", "mup_output_temp", "mup_embedding_mult", "mup_rp_embedding_mult")


def mup_keys_need_use_mup(config: Config) -> Iterator[ConfigIssue]:
    """Keys of muP have no effect without use_mup."""
    mup = config.mup
    if mup.use_mup:
        return
    for name in FACTORS:
        if getattr(mup, name) != FIELDS[name].default:
            what = "it is a factor of muP, which is off"
            yield ConfigIssue(what, key=name, value=getattr(mup, name), hint="set use_mup, or leave it out")
    if mup.coord_check:
        yield ConfigIssue("it checks muP, which is off", key="coord_check", value=True, hint="set use_mup")
    if mup.base_shapes_file is not None and not mup.save_base_shapes:
        yield ConfigIssue(
            "it is neither read nor written",
            key="base_shapes_file",
            value=mup.base_shapes_file,
            hint="set use_mup to read it, or save_base_shapes to write it",
        )
    if mup.mup_base_widths is not None:
        what = "it follows from base_shapes_file"
        yield ConfigIssue(what, key="mup_base_widths", value=mup.mup_base_widths, hint="leave it out")


def mup_has_a_base(config: Config) -> Iterator[ConfigIssue]:
    """MuP needs a base shapes file; a run that does not train writes it."""
    mup = config.mup
    if (mup.use_mup or mup.save_base_shapes) and mup.base_shapes_file is None:
        name = "save_base_shapes" if mup.save_base_shapes else "use_mup"
        what = "there is no file to write" if mup.save_base_shapes else "there is no base model to compare with"
        hint = "give base_shapes_file"
        if not mup.save_base_shapes:
            hint += ", which ./deepy.py train.py BASE_CONF --save-base-shapes true --base-shapes-file FILE writes"
        yield ConfigIssue(what, key=name, value=True, hint=hint)
    both = [name for name in ("save_base_shapes", "coord_check") if getattr(mup, name)]
    if len(both) == 2:
        yield ConfigIssue("save_base_shapes is set as well", key="coord_check", value=True, hint="one after the other")
    elif both and not trains(config.launch.user_script):
        what = f"{config.launch.user_script} does not do it"
        yield ConfigIssue(what, key=both[0], value=True, hint="call ./deepy.py train.py with it")
    if mup.coord_check and config.parallelism.pipe_parallel_size > 0:
        yield ConfigIssue(
            "the check needs models on one stage",
            key="coord_check",
            value=True,
            hint="add --pipe-parallel-size 0; what it shows does not depend on the layout",
        )


def mup_factors_are_positive(config: Config) -> Iterator[ConfigIssue]:
    """Factors and temperatures are positive, and mup_width_scale is at least 2."""
    mup = config.mup
    for name in FACTORS:
        if not getattr(mup, name) > 0:
            yield ConfigIssue("it must be more than 0", key=name, value=getattr(mup, name))
    if mup.mup_width_scale < 2:
        yield ConfigIssue(
            "each width is that many times the one before: at least 2", key="mup_width_scale", value=mup.mup_width_scale
        )
    if mup.use_mup and mup.mup_rp_embedding_mult != 1.0 and not POSITIONS.entry(config.model.pos_emb).scores:
        yield ConfigIssue(
            f"pos_emb = {config.model.pos_emb} learns no relative positions",
            key="mup_rp_embedding_mult",
            value=mup.mup_rp_embedding_mult,
            hint="leave it out, or use pos_emb: rpe",
        )


def mup_knows_the_model(config: Config) -> Iterator[ConfigIssue]:
    """MuP has rules for matrix products and attention only."""
    if not config.mup.use_mup:
        return
    kinds = sorted(set(map(str, config.model.attention_config or ())) & (MIXER_BLOCKS | REPLACING))
    if kinds:
        yield ConfigIssue(
            f"muP has no rules for blocks of kind {', '.join(kinds)}: they are derived for products of matrices and "
            "attention, and are known to fail for state spaces (Vankadara et al., NeurIPS 2024)",
            key="use_mup",
            value=True,
            hint="use kinds with attention, or leave use_mup out",
        )
    if NORMS.entry(config.model.norm).scalars:
        yield ConfigIssue(
            "muP has no rule for its one length, which would have to grow with the root of the width",
            key="norm",
            value=config.model.norm,
            hint="use layernorm or rmsnorm, or leave use_mup out",
        )


def mup_knows_the_optimizer(config: Config) -> Iterator[ConfigIssue]:
    """MuP has rules for steps that are proportional to the gradient or independent of its size."""
    kind = config.optimizer.optimizer_type
    if not config.mup.use_mup or not trains(config.launch.user_script):
        return
    known = {name for name in OPTIMIZERS.names if OPTIMIZERS.entry(name).traits & {"entrywise", "proportional"}}
    if kind not in known:
        yield ConfigIssue(
            f"muP has rules for steps of a size of their own in every entry and for steps as large as the gradient, "
            f"and those of {kind} are neither",
            key="optimizer",
            value=config.optimizer.optimizer,
            hint=f"use one of {', '.join(name for name in OPTIMIZERS.names if name in known)}",
        )
