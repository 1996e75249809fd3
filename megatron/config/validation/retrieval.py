"""Rules for encoders of queries and passages (train_impl: ict or dpr)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron.config.config import Config
from megatron.config.derived.retrieval import DPR, EMBED, ICT, IVF, RETRIEVAL, RETRIEVAL_SCRIPTS, SEARCH
from megatron.config.derived.retro import BUILD_NEIGHBORS
from megatron.config.validation.dependent_model_keys import DependentKeys
from megatron.errors import ConfigIssue

SHORTEST = 8
"""Tokens of the shortest sequence with a title, a sentence and their separators."""
_NEGATIVES = ("hard_negatives", "other_negatives", "valid_hard_negatives", "valid_other_negatives")


def encoders_are_one_stage(config: Config) -> Iterator[ConfigIssue]:
    """Layouts that two encoders, or their passages, cannot be divided by."""
    if config.training.train_impl not in RETRIEVAL:
        return
    if config.parallelism.is_pipe_parallel:
        yield ConfigIssue(
            "encoders of queries and passages do not follow each other, as stages of a pipeline do",
            key="pipe_parallel_size",
            value=config.parallelism.pipe_parallel_size,
            hint="set it to 0, and use model_parallel_size or ZeRO for models that do not fit",
        )
    if config.kernels.compile:
        yield ConfigIssue("it compiles the blocks of one stack", key="compile", value=True, hint="leave it out")


def numbers_of_samples_make_sense(config: Config) -> Iterator[ConfigIssue]:
    """Probabilities, numbers of passages and widths."""
    if config.training.train_impl not in RETRIEVAL:
        return
    section, model = config.retrieval, config.model
    if not 0 <= section.query_in_block_prob <= 1:
        yield ConfigIssue("it must be from 0 to 1", key="query_in_block_prob", value=section.query_in_block_prob)
    for name in _NEGATIVES:
        key = f"retrieval_{name}"
        if getattr(section, key) < 0:
            yield ConfigIssue("it cannot be negative", key=key, value=getattr(section, key))
    tops = section.retrieval_report_topk_accuracies
    if any(top < 1 for top in tops) or len(set(tops)) < len(tops):
        hint = "give different numbers from 1 on"
        yield ConfigIssue(
            "these are no first passages", key="retrieval_report_topk_accuracies", value=list(tops), hint=hint
        )
    if (model.retrieval_projection_size or 0) < 0:
        key, value = "retrieval_projection_size", model.retrieval_projection_size
        yield ConfigIssue("it cannot be negative", key=key, value=value, hint="0 is no projection")
    if model.seq_length is not None and model.seq_length < SHORTEST:
        yield ConfigIssue(f"a sample has at least {SHORTEST} tokens", key="seq_length", value=model.seq_length)


def blocks_have_their_titles(config: Config) -> Iterator[ConfigIssue]:
    """Samples of sentences and blocks are made of documents; titles are those of one data set."""
    if config.training.train_impl != ICT:
        return
    data, titles = config.data, config.retrieval.titles_data_path
    if titles is not None and data.data_path is None:
        hint = "name the documents by data_path"
        yield ConfigIssue("titles are those of data_path's documents", key="titles_data_path", value=titles, hint=hint)
    for split in ("train", "valid", "test"):
        for name in (f"{split}_label_data_paths", f"{split}_reward_data_paths"):
            if getattr(data, name) is not None:
                what = "a sentence belongs to its block"
                yield ConfigIssue(what, key=name, value=list(getattr(data, name)), hint="leave it out")


def indices_compare_with_something(config: Config) -> Iterator[ConfigIssue]:
    """An index of cells compares with one of them or more."""
    if (probes := config.retrieval.retrieval_ivf_probes) < 1:
        yield ConfigIssue("it must be 1 or more", key="retrieval_ivf_probes", value=probes)


def searches_have_their_files(config: Config) -> Iterator[ConfigIssue]:
    """Embedding and searching a corpus need an encoder, the corpus, a folder and, to search it, questions."""
    script, section = script_name(config), config.retrieval
    if script not in RETRIEVAL_SCRIPTS:
        return
    if config.training.train_impl not in RETRIEVAL:
        hint = f"load a model of train_impl: {ICT} or {DPR}, and give that key"
        what = "it has no encoders of queries and passages"
        yield ConfigIssue(what, key="train_impl", value=config.training.train_impl, hint=hint)
    for key in ("evidence_data_path", "embedding_path", *(["qa_data"] if script == SEARCH else [])):
        if not getattr(section, key):
            yield ConfigIssue(f"{script} needs it", key=key, value=None)
    named = [section.evidence_data_path, *((section.qa_data or ()) if script == SEARCH else ())]
    for key, path in zip(("evidence_data_path", *["qa_data"] * len(named)), named, strict=False):
        if path is not None and not Path(path).is_file():
            yield ConfigIssue("there is no such file", key=key, value=path)


def script_name(config: Config) -> str:
    """Returns the file name of the script that runs."""
    return Path(str(config.launch.user_script)).name


OF_RETRIEVAL: tuple[DependentKeys, ...] = (
    DependentKeys(
        (
            *("retrieval_score_scaling", "retrieval_report_topk_accuracies"),
            *("retrieval_shared_encoder", "retrieval_projection_size"),
        ),
        lambda config: config.training.train_impl in RETRIEVAL,
        f"train_impl is neither {ICT} nor {DPR}",
    ),
    DependentKeys(
        ("titles_data_path", "query_in_block_prob", "use_one_sent_docs"),
        lambda config: config.training.train_impl == ICT,
        f"train_impl is not {ICT}",
    ),
    DependentKeys(
        tuple(f"retrieval_{name}" for name in _NEGATIVES),
        lambda config: config.training.train_impl == DPR,
        f"train_impl is not {DPR}",
    ),
    DependentKeys(
        ("evidence_data_path", "embedding_path"),
        lambda config: script_name(config) in RETRIEVAL_SCRIPTS,
        f"only tools/{EMBED} and tools/{SEARCH} read it",
    ),
    DependentKeys(
        ("qa_data", "retrieval_match"), lambda config: script_name(config) == SEARCH, f"only tools/{SEARCH} reads it"
    ),
    DependentKeys(
        ("retrieval_index",),
        lambda config: script_name(config) in (SEARCH, BUILD_NEIGHBORS),
        f"only tools/{SEARCH} and tools/{BUILD_NEIGHBORS} read it",
    ),
    DependentKeys(
        ("retrieval_ivf_probes",),
        lambda config: config.retrieval.retrieval_index == IVF,
        f"retrieval_index is not {IVF}",
    ),
    DependentKeys(
        ("pack_impl", "eod_mask_loss", "allow_chopped"),
        lambda config: config.training.train_impl != ICT,
        "a sample is a sentence and its block",
    ),
)
"""Keys that only encoders of queries and passages read, and those that they do not."""
