"""Coordinate check (`coord_check`): trains several widths for a few steps, with muP and without, and plots activations.

It verifies the parametrization of an architecture: with muP every curve is flat, without it some rise or fall. Widths
start at the base model's and grow by mup_width_scale; heads are added, or get wider if the configured model has as many
heads as its base. Every model repeats the first batch of the training data at the peak learning rate, since the change
by training is measured.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.config import Config
from megatron.config.config import FIELDS
from megatron.config.derived.vocabulary import padded_vocab_size
from megatron.config.validation.mup import FACTORS
from megatron.config.validation.unknown_values import require
from megatron.config.validation.validate import find_violations
from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.init import shutdown
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_training_engine, init_topology
from megatron.errors import ConfigError
from megatron.log import get_logger
from megatron.param_table import MupWidths, base_widths
from megatron.registry import ACTIVATIONS
from megatron.tokenizers import build_tokenizer
from megatron.training.data_setup import build_run_data
from megatron.training.mup.activation_stats import ActivationRecorder, Curves, Sizes
from megatron.training.mup.plot import draw, require_matplotlib
from megatron.training.task_setup import task_of

MODELS, STEPS = 4, 4
"""How many widths are compared, and how many steps each model makes."""
MUP, STANDARD = "muP", "standard"

_log = get_logger(__name__)


def coord_check(config: Config) -> None:
    """Writes coord_check.png and coord_check.json into the run directory. Collective.

    Raises ConfigError if there is nothing to train on, matplotlib is missing, or a width cannot be sharded by the
    layout.
    """
    require_matplotlib()
    models = {name: list(_models(config, name)) for name in (MUP, STANDARD)}
    topology = init_topology(config)
    try:
        tokenizer = build_tokenizer(config.tokenizer)
        rows = padded_vocab_size(
            tokenizer.vocab_size, config.tokenizer.make_vocab_size_divisible_by, topology.model.size
        )
        train = build_run_data(config, topology, tokenizer, task=task_of(config, tokenizer)).train
        assert train is not None, "build_run_data refuses a run without data"
        batches = train.batches()
        step = [next(batches) for _ in range(require(config.training.gradient_accumulation_steps))]
        curves = {
            name: Curves.of({width: _measure(one, topology, rows, tokenizer.vocab_size, step) for width, one in each})
            for name, each in models.items()
        }
        if topology.rank == 0:
            _write(config, curves, Path(config.observe.log_dir or "."))
    finally:
        shutdown()


def _models(config: Config, parametrisation: str) -> Iterator[tuple[int, Config]]:
    """Yields the configuration at every width, with its hidden size."""
    base = base_widths(config.mup)
    assert base is not None, "a rule asks for the base"
    for number in range(MODELS):
        changed = at_width(config, base, config.mup.mup_width_scale**number)
        ConfigError.raise_any(find_violations(changed))
        if parametrisation == STANDARD:
            plain = {name: FIELDS[name].default for name in FACTORS}
            changed = changed.replace(use_mup=False, mup_base_widths=None, **plain)
        yield require(changed.model.hidden_size), changed


def at_width(config: Config, base: MupWidths, factor: int) -> Config:
    """Returns the configured model as wide as its base times a factor."""
    model = config.model
    wider_heads = model.num_attention_heads == base.num_attention_heads and model.kv_channels != base.head_dim
    more, wider = (1, factor) if wider_heads else (factor, 1)
    gated = ACTIVATIONS.entry(model.activation).gated
    return config.replace(
        hidden_size=base.hidden_size * factor,
        num_attention_heads=base.num_attention_heads * more,
        num_kv_heads=base.num_kv_heads * more,
        kv_channels=base.head_dim * wider,
        intermediate_size=base.mlp_width * factor * (3 if gated else 1),  # a gated one uses a third
        expansion_factor=None,
        mlp_multiple_of=1,
        fused_linear_cross_entropy=False,  # the logits are measured too
    )


def _measure(
    config: Config, topology: Topology, padded: int, vocabulary: int, step: Sequence[MicroBatch]
) -> list[tuple[Sizes, Sizes]]:
    """Returns sizes and changes of a model before its first step, and after each of STEPS steps."""
    engine = build_training_engine(config, topology, padded_vocab_size=padded, vocab_size=vocabulary)
    recorder, found = ActivationRecorder(), []
    with recorder.on(engine.layers()):
        for _ in range(STEPS + 1):
            loss = engine.train_step(iter(step), require(config.optimizer.lr)).loss
            found.append(recorder.take())
    if topology.rank == 0:
        kind = MUP if config.mup.use_mup else STANDARD
        _log.info("%s, width %d: loss %.4f after %d steps", kind, require(config.model.hidden_size), loss, STEPS)
    del engine
    gc.collect()  # before the next width is built
    return found


def _write(config: Config, curves: dict[str, Curves], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture, numbers = folder / "coord_check.png", folder / "coord_check.json"
    rate = require(config.optimizer.lr)
    widths = curves[MUP].widths
    draw(curves, picture, f"coordinate check: {config.optimizer.optimizer_type}, learning rate {rate:g}")
    record = {"widths": widths, "learning_rate": rate, **{name: found.json() for name, found in curves.items()}}
    numbers.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, found in curves.items():
        slopes = {part: by_step[-1] for part, by_step in found.slopes(of_changes=True).items()}
        least, most = min(slopes, key=slopes.__getitem__), max(slopes, key=slopes.__getitem__)
        _log.info(
            "%s: what %d steps change grows like the width to a power from %+.2f (%s) to %+.2f (%s)",
            name, STEPS, slopes[least], least, slopes[most], most,
        )  # fmt: skip
    _log.info("%s, %s", picture, numbers)
