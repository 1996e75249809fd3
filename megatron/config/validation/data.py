"""Rules for datasets."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.config import Config
from megatron.config.derived.fill import trains
from megatron.errors import ConfigIssue
from megatron.registry import POSITIONS


def data_has_one_source(config: Config) -> Iterator[ConfigIssue]:
    """Either data_path, which `split` divides, or lists of paths."""
    data = config.data
    lists = {f"{split}_data_paths": getattr(data, f"{split}_data_paths") for split in ("train", "valid", "test")}
    given = [name for name, paths in lists.items() if paths is not None]
    if data.data_path is not None and given:
        yield ConfigIssue(
            f"{given[0]} is given as well", key="data_path", value=data.data_path, hint="keep one of the two"
        )
    elif data.train_label_data_paths is not None and data.train_data_paths is None:
        yield ConfigIssue("there are no train_data_paths that it labels", key="train_label_data_paths")
    if given and lists["train_data_paths"] is None and trains(config.launch.user_script):
        yield ConfigIssue("there are no train_data_paths beside it", key=given[0], value=list(lists[given[0]] or ()))


def lists_are_as_long_as_their_paths(config: Config) -> Iterator[ConfigIssue]:
    """Weights, labels and rewards have one item per path."""
    data = config.data
    for split in ("train", "valid", "test"):
        paths = getattr(data, f"{split}_data_paths") or getattr(data, f"pos_{split}_data_paths")
        count = len(paths or ())
        for name in (f"{split}_data_weights", f"{split}_label_data_paths", f"{split}_reward_data_paths"):
            values = getattr(data, name)
            if values is not None and paths is not None and len(values) != count:
                yield ConfigIssue(f"it has {len(values)} items for {count} data sets", key=name, value=list(values))
        weights = getattr(data, f"{split}_data_weights") or ()
        if any(weight < 0 for weight in weights) or (weights and sum(weights) <= 0):
            yield ConfigIssue(
                "weights are not negative and not all zero", key=f"{split}_data_weights", value=list(weights)
            )


def split_is_readable(config: Config) -> Iterator[ConfigIssue]:
    """`split` has up to three fractions, separated by commas or slashes."""
    text = config.data.split
    try:
        shares = [float(share) for share in text.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or sum(shares) <= 0:
        yield ConfigIssue("this is not three shares", key="split", value=text, hint="write 969,30,1 or the like")


def passes_need_no_weights(config: Config) -> Iterator[ConfigIssue]:
    """train_epochs reads every training set equally often, so weights contradict it."""
    data = config.data
    if config.training.train_epochs is None:
        return
    weights = data.train_data_weights or ()
    if len(set(weights)) > 1:
        yield ConfigIssue(
            "train_epochs reads every data set equally often",
            key="train_data_weights",
            value=list(weights),
            hint="leave the weights out, or give train_iters",
        )
    if data.weight_by_num_documents:
        yield ConfigIssue(
            "train_epochs reads every data set equally often",
            key="weight_by_num_documents",
            value=True,
            hint="leave it out, or give train_iters",
        )


def distances_start_again_with_attention(config: Config) -> Iterator[ConfigIssue]:
    """Relative positions restart only where attention does: distances are within documents."""
    data, model = config.data, config.model
    counts_distances = "scores" in POSITIONS.entry(model.pos_emb).enters
    if data.reset_position_ids and not data.reset_attention_mask and counts_distances:
        yield ConfigIssue(
            f"pos_emb = {model.pos_emb} counts distances, which start again only where attention is reset",
            key="reset_position_ids",
            value=True,
            hint="set reset_attention_mask: true as well, or leave it out",
        )
